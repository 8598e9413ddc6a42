"""Shared memory over which vLLM talks with an engine's workers: its names in /dev/shm, which a killed process leaves behind.

vLLM removes them when an engine ends by itself. A name is only needed until all workers have opened the memory.
"""

from __future__ import annotations

import gc


def drop_names() -> int:
    """Remove the names of what this process has made; to be called when the engine has started. Returns how many.

    The memory stays for those that have it open, and goes with the last of them.
    """
    from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer

    is_frozen = gc.get_freeze_count() > 0
    gc.unfreeze()  # vLLM freezes what it has made, and frozen objects are in no list
    # Not isinstance: it asks proxies for their class, which imports what they stand for.
    made = [found for found in gc.get_objects() if type(found) is ShmRingBuffer and found.is_creator]
    if is_frozen:
        gc.freeze()
    for buffer in made:
        buffer.shared_memory.unlink()
        buffer.is_creator = False  # or it would remove the name again at its end
    return len(made)
