"""What a user of the receiving machine can do about a copy that fails: a follower has other options than a leader."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Remedies:
    """Parts of sentences.

    Attributes:
        folder: how another folder is given.
        again: how the copy goes on, once the cause is removed; it follows a comma.
        retry: how it is tried again now.
        rest: what follows how much has arrived before the connection was lost.
    """

    folder: str
    again: str
    retry: str
    rest: str = ""


def follower_remedies(name: str = "NAME") -> Remedies:
    """Those of a follower, for the model that its leader calls `name`. It connects again by itself."""
    return Remedies(
        f"give another folder: vllm-spark join --model-path {name}=FOLDER",
        "and the copy continues",
        "it is copied again",
        ", and the copy continues with the rest",
    )


LEADER_REMEDIES = Remedies(
    "start vllm serve with another path, or with --download-dir FOLDER for a model of the hub",
    "start this command again, and the copy continues",
    "start this command again",
)
"""Those of a leader, which looks for its files once, when it starts."""
