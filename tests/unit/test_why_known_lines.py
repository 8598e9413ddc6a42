"""Laws of the fatal lines that `clipo why` knows: one error code of CUDA is not another, and talk of a signal is no death."""

from __future__ import annotations

import pytest

from clipo_megatron.slurm.known_errors import find_known

CUDA = {
    "CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:62": "a GPU ran out of memory",
    "n1:71:90 [0] include/alloc.h:228 NCCL WARN Cuda failure 2 'out of memory'": "a GPU ran out of memory",
    "n1:71:90 [0] include/alloc.h:228 NCCL WARN Cuda failure 'out of memory'": "a GPU ran out of memory",
    "RuntimeError: CUDA error: out of memory": "a GPU ran out of memory",
    "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": "a GPU ran out of memory",
    "RuntimeError: CUDA error: device-side assert triggered": "an assertion of a GPU's kernel failed",
    "RuntimeError: CUDA error: no kernel image is available for execution on the device": "was not built for this kind",
    "RuntimeError: CUDA error: invalid device ordinal": "asked for a GPU that it was not given",
    "RuntimeError: CUDA error: CUDA driver version is insufficient for CUDA runtime version": "driver is too old",
    "RuntimeError: CUDA error: an illegal memory access was encountered": "a CUDA call failed",
    "RuntimeError: CUDA error: uncorrectable ECC error encountered": "a GPU failed",
    "RuntimeError: CUDA error: uncorrectable NVLink error detected during the execution": "a GPU failed",
    "kernel: NVRM: Xid (PCI:0000:19:00): 79, pid=7, GPU has fallen off the bus.": "a GPU failed",
}


@pytest.mark.parametrize("line", CUDA)
def test_an_error_of_cuda_is_told_by_its_code_and_only_a_broken_gpu_is_excluded(line):
    found = find_known(line)
    assert CUDA[line] in found.cause
    assert not found.is_follower
    is_of_node = CUDA[line] in ("a GPU failed", "driver is too old")
    assert found.remedy.startswith("exclude the node") == is_of_node


@pytest.mark.parametrize(
    "line",
    [
        "Worker exited with exit code None by signal 9",
        "torch.multiprocessing.spawn.ProcessExitedException: process 0 terminated with signal SIGKILL",
        "Signal 9 (SIGKILL) received by PID 1234",
        "  exitcode  : -9 (pid: 1234)",
        "srun: error: n1: task 0: Killed",
        "driver: killed by signal 9",
        "a process ended with exit code 137",
    ],
)
def test_a_process_that_was_killed_is_told_as_what_follows(line):
    found = find_known(line)
    assert "a process was killed" in found.cause
    assert found.is_follower


def test_a_process_that_a_bus_error_ended_is_told():
    assert "/dev/shm" in find_known("Worker exited with exit code None by signal 7").cause
    assert "/dev/shm" in find_known("*** SIGBUS received at time=1764000000 on cpu 3 ***").cause


@pytest.mark.parametrize(
    "line",
    [
        "sending SIGTERM, after 30 s SIGKILL, to what is left",
        "handlers: signal 7, signal 9, signal 15",
        "(1) The process is killed by SIGKILL by OOM killer due to high memory usage.",
        "SIGBUS: handler installed",
        "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
    ],
)
def test_talk_of_signals_and_assertions_is_no_fatal_line(line):
    assert find_known(line) is None
