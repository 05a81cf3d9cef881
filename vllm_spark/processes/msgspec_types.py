"""Works around a crash of msgspec when two threads decode a type for the first time at once."""

from __future__ import annotations

import msgspec


def preload_decoders(*types: type) -> None:
    """Makes msgspec inspect the annotations of `types` now. Call it where they are defined, at import time.

    It inspects a type at the first use, and the process crashes if two threads do that at once, as with the HELLO
    messages of a follower's connections (msgspec 0.22: 12 times in 12 tries for a type with others in it).
    """
    for each in types:
        msgspec.json.Decoder(each)
