"""One decode step as a picture: what each microsecond of both ranks is for, with all waits in one colour."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_spark.errors import ConfigurationError
from vllm_spark.estimate.step import ATTENTION, EXPERTS, HOST, NORMS, ROUTER, STATES
from vllm_spark.recording import parts
from vllm_spark.recording.parts import COLLECTIVES, READ, SEND, WAITS
from vllm_spark.trace.kernel_parts import COPIES, MATRICES
from vllm_spark.trace.step_parts import ORDER
from vllm_spark.trace.timeline import Interval, PairTimeline, innermost, within

FORMATS = (".png", ".svg", ".pdf")

_ROLES = ("leader", "follower")
_WAIT = "#d62728"
_COLOURS = {
    parts.REQUESTS: "#bab0ac",
    parts.SCHEDULE: "#4c78a8",
    parts.SEND: "#b279a2",
    parts.READ: "#e377c2",
    parts.PREPARE: "#9ecae9",
    parts.FORWARD: "#88d27a",
    parts.COLLECTIVES: "#f58518",
    parts.HEAD: "#f2cf5b",
    parts.SAMPLE: "#72b7b2",
    parts.DRAFT: "#d6a5c9",
    parts.OUTPUT: "#79706e",
    parts.UPDATE: "#1f4e79",
    parts.WORKER: "#d3d3d3",
    parts.LOOP: "#c5b0d5",
    EXPERTS: "#54a24b",
    MATRICES: "#8cd17d",
    ATTENTION: "#59a9e0",
    STATES: "#2e5f8a",
    ROUTER: "#e377c2",
    NORMS: "#c7e9c0",
    COPIES: "#9d755d",
    HOST: "#eeeeee",
    **dict.fromkeys(parts.WAITS, _WAIT),
}
_LANE, _HEIGHT = 1.0, 0.62
_LABEL_SHARE = 0.055  # of the width, from which on a part has its name in it
_ZOOMED_COLLECTIVES = 6
_DPI = 150


def draw(pair: PairTimeline, path: Path, title: str) -> None:
    """Draws the step of median length; below it a stretch with a few collectives, if the threads run any.

    Args:
        pair: what was recorded.
        path: the file; its suffix chooses the format.
        title: the first line above it.

    Raises:
        ConfigurationError: it cannot be written.
    """
    from matplotlib.figure import Figure

    number = pair.typical()
    window = pair.ranks[0].host[number]
    assert window is not None
    lanes = _lanes(pair)
    zoom = _zoomed(pair, window.start, window.end)
    figure = Figure(figsize=(13, (1.1 + 0.75 * len(lanes)) * (2 if zoom else 1) + 1.3), layout="constrained")
    panels = figure.subplots(2 if zoom else 1, 1, squeeze=False)[:, 0]
    used = _panel(panels[0], lanes, window.start, window.end, window.start)
    _arrows(panels[0], pair, number, lanes, window.start)
    panels[0].set_title(
        f"{title}\na step of {(window.end - window.start) / 1e3:,.0f} us, the median of {len(pair.chosen)}; "
        f"the ranks' times compare within {pair.clock.uncertainty / 1e3:,.1f} us",
        fontsize=10,
    )
    if zoom:
        used |= _panel(panels[1], lanes, *zoom, window.start)
        panels[1].set_title("a part of it", fontsize=9)
    panels[-1].set_xlabel("microseconds since the leader began with the step")
    _legend(figure, used)
    try:
        figure.savefig(path, dpi=_DPI)
    except OSError as error:
        raise ConfigurationError(
            f"the image {path} cannot be written ({error.strerror}); give a folder in which you may write"
        ) from None


def check_image(path: Path) -> None:
    """Raises ConfigurationError if `draw` would fail, before anything has been recorded."""
    if path.suffix not in FORMATS:
        raise ConfigurationError(f"--image {path} must end in {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError("--image needs matplotlib; install it: pip install matplotlib")


def _lanes(pair: PairTimeline) -> list[tuple[str, list[Interval]]]:
    """Rows from the top: each rank's thread, and its GPU."""
    lanes = []
    for rank in pair.ranks:
        name = f"rank {rank.recording.rank}\n{_ROLES[rank.recording.rank]}"
        lanes.append((name, innermost(rank.spans)))
        busy = [each for window in rank.gpu if window is not None for each in window.intervals]
        if busy:
            lanes.append((f"{name}, GPU", busy))
    return lanes


def _panel(
    axes: Any,
    lanes: Sequence[tuple[str, list[Interval]]],
    start: int,
    end: int,
    zero: int,
) -> set[str]:
    """Draws what lies between two times, and returns its parts."""
    used: set[str] = set()
    for row, (_, intervals) in enumerate(lanes):
        bottom = -row * _LANE - _HEIGHT / 2
        found = within(intervals, start, end)
        for part in {each.part for each in found}:
            bars = [((each.start - zero) / 1e3, (each.end - each.start) / 1e3) for each in found if each.part == part]
            axes.broken_barh(bars, (bottom, _HEIGHT), facecolors=_COLOURS[part], linewidth=0)
        used |= {each.part for each in found}
        for each in found:
            if each.end - each.start >= _LABEL_SHARE * (end - start):
                middle = ((each.start + each.end) / 2 - zero) / 1e3
                text = f"{each.part}\n{(each.end - each.start) / 1e3:,.0f}"
                colour = "white" if each.part in WAITS else "black"
                axes.text(middle, -row * _LANE, text, ha="center", va="center", fontsize=7, color=colour, clip_on=True)
    axes.set_xlim((start - zero) / 1e3, (end - zero) / 1e3)
    axes.set_ylim(-(len(lanes) - 1) * _LANE - 0.55, 0.55)
    axes.set_yticks([-row * _LANE for row in range(len(lanes))], [name for name, _ in lanes], fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return used


def _arrows(axes: Any, pair: PairTimeline, number: int, lanes: Sequence[tuple[str, list[Interval]]], zero: int) -> None:
    """From the leader's sending of the step to the follower's reading."""
    leader, follower = (rank.host[number] for rank in pair.ranks)
    sent = [each.end for each in leader.intervals if each.part == SEND] if leader else []
    read = [each.start for each in follower.intervals if each.part == READ] if follower else []
    if not sent or not read:
        return
    rows = [row for row, (name, _) in enumerate(lanes) if not name.endswith("GPU")]
    axes.annotate(
        "",
        xy=((read[0] - zero) / 1e3, -rows[1] * _LANE + _HEIGHT / 2),
        xytext=((sent[0] - zero) / 1e3, -rows[0] * _LANE - _HEIGHT / 2),
        arrowprops={"arrowstyle": "->", "color": "black", "linewidth": 1.0},
    )


def _zoomed(pair: PairTimeline, start: int, end: int) -> tuple[int, int] | None:
    """A stretch in the middle of a step that has some of its collectives; None if it has no more than that."""
    found = [each for each in pair.ranks[0].spans if each.part == COLLECTIVES and start <= each.start < end]
    if len(found) <= _ZOOMED_COLLECTIVES:
        return None
    first = (len(found) - _ZOOMED_COLLECTIVES) // 2
    chosen = found[first : first + _ZOOMED_COLLECTIVES]
    margin = (chosen[-1].end - chosen[0].start) // 30
    return chosen[0].start - margin, chosen[-1].end + margin


def _legend(figure: Any, used: set[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=_COLOURS[part], label=part) for part in ORDER if part in used and part not in WAITS]
    waits = [part for part in ORDER if part in used & WAITS]
    if waits:
        handles.append(Patch(color=_WAIT, label="waits: " + ", ".join(waits)))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), fontsize=8, frameon=False)
