"""Whether the thorough tests run too, and how many examples hypothesis tries."""

from __future__ import annotations

import os

THOROUGH = "VLLMSPARK_THOROUGH" in os.environ


def examples(plain: int, thorough: int) -> int:
    """The number of examples of a test that is slow for each: `plain`, or in the thorough run `thorough`."""
    return thorough if THOROUGH else plain
