"""Types of messages that msgspec knows before two threads may need them at once.

It reads a type's annotations at the first use, and the process crashes if two threads come to that together, as the
greetings of a follower's lanes may (msgspec 0.22: 12 times in 12 tries for a type with others in it).
"""

from __future__ import annotations

import msgspec


def preload_decoders(*types: type) -> None:
    """Has msgspec read the annotations of `types` now. Call it where they are defined, when the module is imported."""
    for each in types:
        msgspec.json.Decoder(each)
