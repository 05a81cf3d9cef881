"""The ranks of a pair."""

from __future__ import annotations

LEADER_RANK, FOLLOWER_RANK = RANKS = (0, 1)
WORLD_SIZE = len(RANKS)
