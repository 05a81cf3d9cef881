"""Keeps the environment of the tests' process as it was.

torch and cv2, which transformers imports, set variables there. Processes that are started later would have them, and no
fork server would suit those: each would import vLLM itself, which takes a core ten seconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unchanged_environment() -> Iterator[None]:
    """Undoes at its end what was changed in `os.environ`; also a decorator."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
