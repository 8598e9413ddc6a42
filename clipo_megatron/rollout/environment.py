"""The environment variables of an engine's process.

vLLM reads them when it is imported and when it starts workers: whoever starts the process sets them, the engine checks.
"""

from __future__ import annotations

from collections.abc import Mapping

_FREE = ("OMP_NUM_THREADS", "VLLM_LOGGING_LEVEL", "VLLM_HOST_IP")
"""Any value will do for these."""


def engine_environment(device: str, tp: int) -> dict[str, str]:
    """Variables to set for a process that will hold one engine.

    Args:
        device: "cpu" or "cuda".
        tp: tensor parallel degree of the engine.
    """
    variables = {
        # The scheduler runs in the caller's process: calls return in the order of calls, and same calls, same samples.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        # Its warnings speak of what it was asked for on purpose (eager mode, no tokenizer) and come from every engine.
        "VLLM_LOGGING_LEVEL": "ERROR",
        # An engine never spans machines: no guessing of the outward network address.
        "VLLM_HOST_IP": "127.0.0.1",
        "HF_HUB_OFFLINE": "1",
    }
    if tp > 1:
        # The caller may have threads (Ray's, OpenMP's): a forked worker could inherit a held lock.
        variables["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    if device == "cpu":
        variables |= {
            # One thread a worker, bound to no core: several engines and trainer ranks share the machine.
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # Without it the first call spends 20 s compiling a helper of a few lines.
            "TORCHDYNAMO_DISABLE": "1",
        }
    return variables


def environment_problems(device: str, tp: int, environment: Mapping[str, str]) -> list[str]:
    """Everything in `environment` that an engine of this kind can't start with; empty when it can.

    Args:
        device: "cpu" or "cuda".
        tp: tensor parallel degree of the engine.
        environment: usually os.environ.
    """
    problems: list[str] = []
    for name, value in engine_environment(device, tp).items():
        if name not in environment:
            problems.append(f"{name} is not set: an engine's process needs {name}={value}")
        elif environment[name] != value and name not in _FREE:
            problems.append(f"{name} = {environment[name]}: must be {value} in an engine's process")
    if "VLLM_CPU_KVCACHE_SPACE" in environment:
        problems.append(
            f"VLLM_CPU_KVCACHE_SPACE = {environment['VLLM_CPU_KVCACHE_SPACE']}: overrides rollout.kv_cache_mib; "
            "unset it"
        )
    return problems
