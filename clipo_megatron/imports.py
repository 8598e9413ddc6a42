"""Imports of large libraries, without what makes them slow."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Within the block no garbage is looked for, in all threads.

    torch, Megatron and vLLM make hundreds of thousands of objects when they are imported, all of which stay: to look for
    garbage among them again and again takes a seventh of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
