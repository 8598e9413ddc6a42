"""What fatal lines of logs look like, what they mean and what to do. Loads without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownError:
    """One kind of fatal line."""

    pattern: re.Pattern[str]
    cause: str
    """With the pattern's groups as {name}, and {line} for all of the line."""
    remedy: str
    is_follower: bool = False
    """Usually told by those whom another's failure has hit."""
    is_end: bool = False
    """SLURM's word of the end of the job: nothing went on after it."""
    in_any_line: bool = True
    """False: only as the last line of a traceback, for elsewhere it is talk."""
    words: tuple[str, ...] = ("",)
    """Every line of the kind has one of them: a look for words is many times faster than one for a pattern that begins anyhow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Meaning:
    """What a fatal line tells."""

    cause: str
    remedy: str
    is_follower: bool = False
    """It only tells that another failed."""
    is_end: bool = False
    """It tells of the end of the job's attempt itself."""
    host: str = ""
    """Empty where the line names none."""
    phase: str = ""
    """Empty where the line names none."""


def find_known(line: str, *, is_exception: bool = False) -> Meaning | None:
    """The meaning of a line; None where it is no known fatal one.

    Args:
        line: of a log.
        is_exception: it is the last line of a Python traceback.
    """
    for known in KNOWN_ERRORS:
        if not (is_exception or known.in_any_line) or not any(word in line for word in known.words):
            continue
        if match := known.pattern.search(line):
            groups = {name: value or "" for name, value in match.groupdict().items()}
            return Meaning(
                cause=known.cause.format(line=_short(line), **groups),
                remedy=known.remedy,
                is_follower=known.is_follower,
                is_end=known.is_end,
            )
    return None


def _short(line: str) -> str:
    text = " ".join(line.split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _known(
    pattern: str,
    cause: str,
    remedy: str,
    *,
    is_follower: bool = False,
    is_end: bool = False,
    in_any_line: bool = True,
    words: tuple[str, ...] = ("",),
) -> KnownError:
    return KnownError(
        pattern=re.compile(pattern),
        cause=cause,
        remedy=remedy,
        is_follower=is_follower,
        is_end=is_end,
        in_any_line=in_any_line,
        words=words,
    )


def _by_signal(number: int, name: str) -> str:
    """Pattern of a process that a signal has ended: the signal alone is talk of what may be sent, or may have been."""
    signal = rf"(?:[Ss]ignal:? {number}\b|(?:[Ss]ignal:? )?{name}\b)"
    ended = r"(?<!process is )\b(?:[Kk]illed|[Tt]erminated|[Ee]xit(?:ed|s)?|[Ee]nded|[Dd]ied)"
    between = r"(?: (?:with|by|from|on|of|due|to|a|the|exit|code|None|-?\d+))*"
    return rf"{ended}{between} {signal}|\*\*\* {name} received|[Ss]ignal {number} \({name}\) received|exitcode *: *-{number}\b"


KNOWN_ERRORS = (
    # SLURM's own words.
    _known(
        r"CANCELLED AT (?P<when>\S+) DUE TO TIME LIMIT",
        "the time limit of the job was reached at {when}",
        "submit it again: it goes on from its newest checkpoint; ask for more --time, or lower checkpoint.every",
        is_end=True,
    ),
    _known(
        r"Node failure on (?P<node>\S+)",
        "the node {node} failed",
        "requeue the job (it goes on from its newest checkpoint); exclude the node with --exclude if it fails again",
    ),
    _known(
        r"CANCELLED AT (?P<when>\S+) DUE TO NODE FAILURE",  # told by the nodes that live
        "another node of the job failed at {when}",
        "requeue the job (it goes on from its newest checkpoint); `sinfo -R` names the node: --exclude it if it fails again",
        is_follower=True,
        is_end=True,
    ),
    _known(
        r"CANCELLED AT (?P<when>\S+) DUE TO PREEMPTION",
        "the job was preempted at {when}",
        "it goes on from its newest checkpoint when it is requeued",
        is_end=True,
    ),
    _known(
        # No reason after the time: scancel. Of a JOB only, for the batch script ends STEPs itself.
        r"\*\*\* JOB \S+ ON \S+ CANCELLED AT (?P<when>\S+) \*\*\*",
        "the job was cancelled at {when} by scancel or an administrator",
        "submit it again with the same command: it goes on from its newest checkpoint",
        is_end=True,
    ),
    _known(
        r"^\S+ \w+ SLURM ends the job$",  # of the batch script
        "SLURM ended the job: scancel, its time limit, or a lost node",
        "look at `sacct -j` or `scontrol show job` for which it was; the same command goes on from the newest checkpoint",
        is_follower=True,
        is_end=True,
    ),
    _known(
        r"[Dd]etected \d+ oom[-_]kill event|Out Of Memory|oom-kill|OOM Killed|[Oo]ut of memory: Killed process",
        "the kernel killed a process for lack of host memory ({line})",
        "ask for more memory (--mem=0); fewer rewards.workers, no optimizer.cpu_offload, or more nodes",
        words=("oom", "emory", "OOM"),
    ),
    _known(
        r"Workers? .*killed due to memory pressure|killed due to the node running low on memory|OutOfMemoryError: Task was|address the out of memory issue",
        "Ray killed a worker because its node ran out of host memory",
        "ask for more memory (--mem=0); fewer rewards.workers, no optimizer.cpu_offload, or more nodes",
    ),
    # Devices.
    _known(
        # As torch, vLLM's memory pool, NCCL and cuBLAS say it.
        r"CUDA out of memory|cuda OutOfMemoryError|OutOfMemoryError: CUDA|CUDA [Ee]rror: out of memory"
        r"|Cuda failure (?:\d+ )?'out of memory'|CUDA_ERROR_OUT_OF_MEMORY|CUBLAS_STATUS_ALLOC_FAILED",
        "a GPU ran out of memory ({line})",
        "lower layout.micro_batch_tokens or rollout.gpu_memory_utilization, or recompute more; see `clipo plan memory`",
    ),
    _known(
        r"No available memory for the cache blocks|Free memory on device .* is less than desired GPU memory utilization",
        "a vLLM engine has no memory left for its KV cache ({line})",
        "raise rollout.gpu_memory_utilization or rollout.tp; end other processes on that GPU",
    ),
    _known(
        r"device-side assert triggered|cudaErrorAssert\b",
        "an assertion of a GPU's kernel failed, most often an index out of range ({line})",
        "a fault of the data or the program, not of the GPU: look for `Assertion` in the lines above; CUDA_LAUNCH_BLOCKING=1 "
        "gives the true stack; compare token ids with the model's vocabulary",
    ),
    _known(
        r"no kernel image is available|cudaErrorNoKernelImageForDevice|provided PTX was compiled with an unsupported",
        "a package was not built for this kind of GPU ({line})",
        "install builds of torch, vLLM and Transformer Engine for its compute capability, or use the container; "
        "`clipo doctor --level model` tries them",
    ),
    _known(
        r"invalid device ordinal|no CUDA-capable device is detected|No CUDA GPUs are available|CUDA_ERROR_NO_DEVICE",
        "a process asked for a GPU that it was not given ({line})",
        "compare CUDA_VISIBLE_DEVICES and `nvidia-smi -L` on that node with --gpus-per-node and the recipe's layout",
    ),
    _known(
        r"CUDA driver version is insufficient|forward compatibility was attempted on non supported HW",
        "a node's driver is too old for this CUDA ({line})",
        "exclude the node with --exclude and tell the site, or use packages for the CUDA version of its driver",
    ),
    _known(
        r"(uncorrectable (\w+ )?error|Xid.*\(PCI.*|GPU is lost|fallen off the bus)",
        "a GPU failed ({line})",
        "exclude the node with --exclude and tell the site",
    ),
    _known(
        r"CUDA [Ee]rror: .*",
        "a CUDA call failed ({line})",
        "a fault of the program or of the GPU: read the lines above, and `dmesg` of that node for Xid; where it comes on one "
        "node only, exclude that with --exclude",
    ),
    # Files.
    _known(
        r"No space left on device|\[Errno 28\]",
        "no space left on a disk ({line})",
        "free space there: /tmp of that node, or the run folder's file system; `clipo doctor --level node` measures both",
    ),
    _known(
        r"Disk quota exceeded|\[Errno 122\]",
        "the disk quota is used up ({line})",
        "free space, or choose another run.folder",
    ),
    _known(
        r"Read-only file system|\[Errno 30\]",
        "a folder can't be written to: read-only file system ({line})",
        "mount it writable on that node, or choose another run.folder (or CLIPO_JOBS_DIR for the logs)",
    ),
    _known(
        rf"Bus error|{_by_signal(7, 'SIGBUS')}|exit code 135\b",
        "a process ended by a bus error: /dev/shm of that node is full or too small",
        "remove leftovers from /dev/shm there, or enlarge it; in a container give it the host's",
        words=("Bus error", "ignal", "SIGBUS", "exit"),
    ),
    _known(
        r"(?P<what>\S+): command not found|execve\(\): (?P<program>[^:]+): No such file or directory",
        "a program is not to be found: {what}{program}",
        "correct the environment (PATH, module, virtual environment) in the site's env file, on every node",
        words=("command not found", "execve"),
    ),
    _known(
        r"(bash|sbatch|slurm_script|\.sh|srun).*: Permission denied|execve\(\): .*: Permission denied",
        "permission denied ({line})",
        "make the file executable, or the folder readable, for your user on that node",
        words=("Permission denied",),
    ),
    _known(
        r"PermissionError: \[Errno 13\] .*",
        "permission denied ({line})",
        "give your user the right to that path on that node, or choose another one",
        in_any_line=False,
    ),
    _known(
        r"ModuleNotFoundError: No module named (?P<module>\S+)",
        "the Python package {module} is missing on that node",
        "install the pinned requirements there, or run in the container",
    ),
    _known(
        r"unrecognized option '--container-image",
        "CONTAINER_IMAGE is set and this SLURM has no pyxis",
        "unset CONTAINER_IMAGE and use an environment that all nodes see, or ask the site for pyxis",
    ),
    # Network.
    _known(
        r"Address already in use|EADDRINUSE|\[Errno 98\]",
        "a port is taken ({line})",
        "end what listens there (`ss -ltnp` on that node), or choose another port",
    ),
    _known(
        r"AF_UNIX path length cannot exceed|AF_UNIX path too long",
        "the path of a temporary folder is too long for a socket ({line})",
        "set TMPDIR to a short folder such as /tmp; a Ray cluster of your own needs a short --temp-dir",
    ),
    # Engines.
    _known(
        r"(Engine core initialization failed|Failed to load model|not supported.*vLLM|Model architectures? \[.*\] are not supported)",
        "a vLLM engine did not start ({line})",
        "read the lines above it in that log; `clipo doctor --level model` starts an engine alone",
        words=("Engine core", "Failed to load", "not supported"),
    ),
    # What follows from another's failure.
    _known(
        r"Watchdog caught collective operation timeout|Collective operation timed out|Timed out waiting \d+ms for",
        "a collective did not end in time: another rank hangs or died ({line})",
        "find the rank that is missing in it: the stack dumps of all ranks lie in the workers' logs",
        is_follower=True,
    ),
    _known(
        r"Connection closed by peer|Connection reset by peer|Broken pipe|NCCL error.*remote process exited|ncclRemoteError|ncclSystemError",
        "the connection to another rank broke ({line})",
        "look for the rank that ended first",
        is_follower=True,
    ),
    _known(
        r"(ActorDiedError|The actor died unexpectedly|RayActorError|ActorUnavailableError|OwnerDiedError|NodeDiedError).*",
        "a Ray worker died ({line})",
        "look for the cause in that worker's log; without one it was killed: host memory, or from outside",
        is_follower=True,
    ),
    _known(
        rf"srun: error: \S+: tasks? [\d,-]+: (?:Killed|Terminated)|{_by_signal(9, 'SIGKILL')}|exit code 137\b",
        "a process was killed ({line})",
        "host memory (dmesg, --mem=0), the end of the job, or someone's hand",
        is_follower=True,
        words=("srun: error", "ignal", "SIGKILL", "exit"),
    ),
    _known(
        r"srun: error: \S+: tasks? [\d,-]+: (?P<how>Exited with exit code (?!85\b)\d+|Segmentation fault.*|Aborted.*)",
        "a step of the job ended: {how}",
        "read that node's log",
        is_follower=True,
    ),
    _known(
        r"Segmentation fault|SIGSEGV|Fatal Python error: (?P<what>.*)",
        "a process crashed ({line})",
        "read the stack in that log; compare the packages of the nodes: `clipo doctor --level node`",
    ),
)
