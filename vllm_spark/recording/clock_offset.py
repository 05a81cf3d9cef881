"""The offset between the clocks of both machines, from round trips over the channel.

As NTP (RFC 5905, section 8): the leader notes when it sent a message and when the answer arrived, and the answer has
the follower's times of both. Neither direction can have taken less than nothing, so the offset lies within half of the
round trip around its middle: this is a bound and not a deviation. Of many round trips the shortest has the best bound.
A second estimate after the steps gives the drift of one clock against the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple


class RoundTrip(NamedTuple):
    """The times of one message and its answer, in nanoseconds.

    Attributes:
        sent: by the leader, on its clock.
        received: by the follower, on its clock.
        answered: by the follower, on its clock.
        arrived: at the leader, on its clock.
    """

    sent: int
    received: int
    answered: int
    arrived: int

    @property
    def under_way(self) -> int:
        """Nanoseconds that both messages took together."""
        return (self.arrived - self.sent) - (self.answered - self.received)


@dataclasses.dataclass(frozen=True)
class ClockOffset:
    """The offset at one time, in nanoseconds.

    Attributes:
        at: the time, on the leader's clock.
        offset: what the follower's clock shows minus what the leader's shows.
        uncertainty: how far the true offset may be from it, at most.
        round_trips: from how many it was chosen.
    """

    at: int
    offset: int
    uncertainty: int
    round_trips: int


def estimate(round_trips: Sequence[RoundTrip]) -> ClockOffset:
    """The offset, from the shortest of `round_trips`, of which there must be one."""
    best = min(round_trips, key=lambda trip: trip.under_way)
    doubled = (best.received - best.sent) + (best.answered - best.arrived)
    return ClockOffset(
        at=(best.sent + best.arrived) // 2,
        offset=doubled // 2,
        uncertainty=-(-best.under_way // 2) + 1,  # and what the divisions have cut
        round_trips=len(round_trips),
    )


class LeaderClock:
    """Converts times of the follower's clock to the leader's.

    Args:
        before: the offset before the recorded steps.
        after: the offset after them; the clocks drift evenly in between.
    """

    def __init__(self, before: ClockOffset, after: ClockOffset) -> None:
        self._before, self._after = before, after
        span = after.at - before.at
        self._drift = (after.offset - before.offset) / span if span > 0 else 0.0

    @property
    def offset(self) -> int:
        """Nanoseconds by which the follower's clock is ahead, before the steps."""
        return self._before.offset

    @property
    def drift_ppm(self) -> float:
        """How much faster the follower's clock runs, in millionths: as uncertain as both offsets."""
        return self._drift * 1e6

    @property
    def uncertainty(self) -> int:
        """Nanoseconds by which a converted time may be wrong, at most."""
        return max(self._before.uncertainty, self._after.uncertainty)

    def time(self, follower: int) -> int:
        """The leader's clock, in nanoseconds, when the follower's showed `follower`."""
        near = follower - self._before.offset  # wrong by the drift, which changes the drift by nothing
        return follower - self._before.offset - round(self._drift * (near - self._before.at))
