"""The errors of the runtime; every message is one sentence with the offending value."""

from vllm_spark._native import (
    CollectiveAbortedError,
    CollectiveError,
    CollectiveTimeoutError,
    MismatchError,
    PoisonedError,
    UsageError,
)


class AgreementError(CollectiveError):
    """The two ranks have different settings; the message names the setting and both values."""


__all__ = [
    "AgreementError",
    "CollectiveAbortedError",
    "CollectiveError",
    "CollectiveTimeoutError",
    "MismatchError",
    "PoisonedError",
    "UsageError",
]
