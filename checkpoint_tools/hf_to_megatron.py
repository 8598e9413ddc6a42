"""`python checkpoint_tools/hf_to_megatron.py SRC DST --layout tp=2,pp=2` is `clipo ckpt import SRC DST --layout tp=2,pp=2`."""

import os
import sys


def _run() -> int:
    # Python puts this folder first on its path, where inspect.py would hide the standard library's module.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path = [os.path.dirname(here), *(path for path in sys.path if os.path.abspath(path) != here)]
    from clipo_megatron.cli.main import main

    return main(["ckpt", "import", *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(_run())
