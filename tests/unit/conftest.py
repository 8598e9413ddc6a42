"""What unit tests of files share."""

from __future__ import annotations

import contextlib
import resource

import pytest


@pytest.fixture
def file_size_limit():
    """A block in which no file of this process may grow beyond so many bytes: like a full disk, for the writer."""

    @contextlib.contextmanager
    def limit(num_bytes: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit
