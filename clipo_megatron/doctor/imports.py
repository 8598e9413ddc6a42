"""What only a process of its own can try: imports of a run's packages, and the filter that confines verifiers.

Loads without torch.
"""

from __future__ import annotations

import subprocess
import sys

from clipo_megatron.doctor.finding import Finding, fail, ok, warn

_NAME = "imports"
UNCONFINED_REMEDY = "run on Linux x86_64 with seccomp, or know that answers are parsed by processes with your rights"
_SMOKE = """
def at(stage):
    print(stage, flush=True)
at("torch")
import torch
square = torch.ones(64, 64)
assert float((square @ square).sum()) == 64.0 ** 3, "a product of matrices is wrong"
if torch.cuda.is_available():
    at("a kernel of torch on the GPU")
    states = torch.ones(1, 2, 128, 64, device="cuda", dtype=torch.bfloat16)
    assert float(torch.nn.functional.scaled_dot_product_attention(states, states, states).sum()) == 16384.0
    at("transformer-engine")
    import transformer_engine.pytorch as te
    assert te.Linear(64, 64, params_dtype=torch.bfloat16)(states).isfinite().all()
at("megatron-core")
import megatron.core
at("ray")
import ray
at("math-verify")
import math_verify
at("vllm")
import vllm
at("done")
"""


def check_imports(*, timeout_s: float = 300.0) -> Finding:
    """Import torch, megatron-core, Ray, math-verify and vLLM, on a GPU also Transformer Engine, with a kernel of each there.

    A package that crashes or hangs takes only that process with it.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _SMOKE], capture_output=True, text=True, timeout=timeout_s, check=False
        )
        said, errors, ending = done.stdout, done.stderr, f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as late:
        said, errors, ending = _text(late.stdout), _text(late.stderr), f"not done after {timeout_s:g} s"
    stage = (said.split("\n")[:-1] or ["python"])[-1]
    if stage == "done":
        return ok(_NAME, "torch, megatron-core, Ray, math-verify and vLLM load, and a product is right")
    last = " ".join((errors.strip().splitlines() or ["no message"])[-1].split())[:300]
    remedy = "install the pinned requirements again there, or run in the container; CUDA's libraries must be torch's"
    return fail(_NAME, f"{stage}: {ending}: {last}", remedy)


def check_confinement(*, timeout_s: float = 60.0) -> Finding:
    """Whether this system's kernel lets verifiers be confined, tried in a process that ends then."""
    name, code = "confinement", "from clipo_megatron.rewards.confinement import confine; print(confine())"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s, check=False
        )
        reason = (
            done.stdout.strip()
            if done.returncode == 0
            else f"the filter ended its process, exit code {done.returncode}"
        )
    except subprocess.TimeoutExpired:
        reason = f"not done after {timeout_s:g} s"
    if reason:
        return warn(name, f"verifiers are not confined on this host: {reason}", UNCONFINED_REMEDY)
    return ok(name, "verifiers have no network, write no files and start no programs")


def _text(found: bytes | str | None) -> str:
    return found.decode(errors="replace") if isinstance(found, bytes) else found or ""
