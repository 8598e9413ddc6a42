"""Checks after an installation that torch is a CPU build that works and that nothing breaks `import vllm`; says what to do."""

import importlib.util
import sys


def problem() -> str:
    """What is wrong with the installed packages, and the remedy; "" when nothing is."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch does not import ({error}); it is most likely a build for CUDA. {_REMEDY}"
    if torch.version.cuda is not None:
        return f"torch {torch.__version__} is a build for CUDA {torch.version.cuda}. {_REMEDY}"
    broken = [name for name in ("torchvision", "torchaudio", "torchcodec") if importlib.util.find_spec(name)]
    if broken:
        return f"{', '.join(broken)} break(s) `import vllm` here; remove with `make clean-venv`, then run make again"
    return ""


_REMEDY = (
    "The pinned set needs the CPU build of torch, which pip takes from PyTorch's own index of CPU wheels: set "
    "PIP_EXTRA_INDEX_URL to that index, run `make clean-venv`, then run make again"
)

if __name__ == "__main__":
    if text := problem():
        print(f"make: {text}", file=sys.stderr)
        raise SystemExit(1)
