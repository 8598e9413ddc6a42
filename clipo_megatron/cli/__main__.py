"""`python -m clipo_megatron.cli`: the same as `clipo`."""

from clipo_megatron.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
