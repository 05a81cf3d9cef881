"""How long the peer has been silent, and when that is too long. Times are seconds of the monotonic clock."""

from __future__ import annotations


class Silence:
    """The time since the peer's last sign of life, against the time that is allowed for it.

    Args:
        limit: seconds of silence after which the peer counts as dead once the model runs.
        starting_limit: the same until then.
        now: when the connection was made, which counts as a sign of life.
    """

    def __init__(self, limit: float, starting_limit: float, now: float) -> None:
        self._limit, self._starting_limit = limit, max(limit, starting_limit)
        self._heard = now
        self._running_since: float | None = None

    def end(self, now: float) -> None:
        """The peer gave a sign of life, or its silence proves nothing: this process itself was stopped."""
        self._heard = now

    def model_runs(self, now: float) -> None:
        """The shorter limit counts, and silence anew: before, the peer was allowed more. Only the first call counts."""
        if self._running_since is None:
            self._running_since = now

    def seconds(self, now: float) -> float:
        """For how long the peer has given no sign of life."""
        return now - self._heard

    def is_too_long(self, now: float, patience: float) -> bool:
        """Whether the peer counts as dead.

        Args:
            now: the present time.
            patience: seconds of silence that are allowed just now, if that is more than the limit.
        """
        return now >= self._deadline() and now - self._since() > patience

    def look_again_at(self, now: float, interval: float) -> float:
        """When `is_too_long` may next become true: at the limit; once that is over, whenever patience ends.

        Args:
            now: the present time.
            interval: seconds between two looks while there is patience.
        """
        deadline = self._deadline()
        return deadline if now < deadline else now + interval

    def _since(self) -> float:
        return self._heard if self._running_since is None else max(self._heard, self._running_since)

    def _deadline(self) -> float:
        return self._since() + (self._starting_limit if self._running_since is None else self._limit)
