"""Many targets: a front of speedup against loss, each point a network that was deployed and measured.

The table, the database and everything that a search has scored are shared; each target has a folder of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx_spdy.pipeline.artifact import Document
from onnx_spdy.pipeline.report import Report

FILE = "front.json"
_FROM_REPORT = (
    "target_speedup", "predicted_speedup", "measured_speedup", "measured_speedup_lower", "measured_speedup_upper",
    "pruned_seconds", "loss", "held_out_loss", "metric_pruned", "sparsity", "missed", "best_pruned",
    "best_dense_alternative", "times_as_fast_as_best_dense", "times_as_fast_as_best_dense_lower",
    "times_as_fast_as_best_dense_upper",
)  # fmt: skip


class Front(Document):
    """The points from the slowest to the fastest target, as front.json holds them."""

    KIND = "front"

    @property
    def missed(self) -> str | None:
        """Which targets are out of reach and why, in one line; None when none is."""
        return "; ".join(point["missed"] for point in self.content["points"] if point["missed"]) or None


def target_folder(out: Path, speedup: float) -> Path:
    """Where the network for one of several targets is: `out/2x`."""
    return out / f"{speedup:g}x"


def meet_all(speedups: Sequence[float], out: Path, meet: Callable[[float, Path], Report]) -> tuple[Front, list[Report]]:
    """Reach every target, the highest first: it is the one that may be impossible, and that teaches most.

    Args:
        out: the front is written there, each target's results into `target_folder`.
        meet: (speedup, folder) -> the report of the run for it.
    Returns:
        The front and the reports, both from the lowest target to the highest.
    """
    found = {speedup: meet(speedup, target_folder(out, speedup)) for speedup in sorted(set(speedups), reverse=True)}
    reports = [found[speedup] for speedup in sorted(found)]
    front = make_front([(target_folder(out, speedup).name, found[speedup]) for speedup in sorted(found)])
    front.save(out / FILE)
    return front, reports


def make_front(reports: Sequence[tuple[str, Report]]) -> Front:
    """The front of these (folder, report)."""
    first = reports[0][1].content
    points = [
        {
            "folder": folder,
            "asked_speedup": one.asked_speedup,
            "beats_best_dense": one.content["times_as_fast_as_best_dense_lower"] > 1,
            **{key: one.content[key] for key in _FROM_REPORT},
        }
        for folder, one in reports
    ]
    shared = ("runtime", "environment", "loss_name", "metric_name", "metric_dense", "dense_seconds", "highest_speedup")
    return Front({"headline": _headline(points), **{key: first[key] for key in shared}, "points": points})


def _headline(points: Sequence[Mapping[str, Any]]) -> str:
    """Which of the points are worth deploying, in one sentence."""

    def name(one: Mapping[str, Any]) -> str:
        return f"{one['runtime']} {one['precision']}"

    winners = [point for point in points if point["beats_best_dense"]]
    dense = ", ".join(dict.fromkeys(name(point["best_dense_alternative"]) for point in winners or points))
    if not winners:
        return f"None of the {len(points)} networks is faster than the best dense alternative ({dense})"
    times = ", ".join(
        f"{point['folder']} {point['times_as_fast_as_best_dense']:.2f}x in {name(point['best_pruned'])}"
        for point in winners
    )
    return f"{len(winners)} of {len(points)} networks are faster than the best dense alternative ({dense}): {times}"
