"""The lock by which one process has a folder, on file systems that may have no locks."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from clipo_megatron.errors import ConfigError

NO_LOCKS_REMEDY = "let the site mount it with locks (Lustre: -o flock, NFS: with lockd)"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What Lustre says without its mount option, NFS without its daemon, and others that have none."""


def take_lock(descriptor: int, folder: Path, *, otherwise: str) -> bool:
    """Lock an open file until all its descriptors are closed; False: another process has it.

    Args:
        descriptor: of the file, open for writing, as NFS needs it.
        folder: where it lies, for the message.
        otherwise: what the user can do beside having locks, e.g. "choose another run.folder".

    Raises:
        ConfigError: the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise ConfigError(
            f"{folder}: a file there can't be locked ({os.strerror(error.errno)}), and without a lock two runs could write to "
            f"one folder; {NO_LOCKS_REMEDY}, or {otherwise}"
        ) from error
    return True
