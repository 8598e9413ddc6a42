"""`python checkpoint_tools/verify.py A [B]` is `clipo ckpt verify A [B]`: folders bit by bit."""

import os
import sys


def _run() -> int:
    # Python puts this folder first on its path, where inspect.py would hide the standard library's module.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path = [os.path.dirname(here), *(path for path in sys.path if os.path.abspath(path) != here)]
    from clipo_megatron.cli.main import main

    return main(["ckpt", "verify", *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(_run())
