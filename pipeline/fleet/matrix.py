"""A fleet's result: the front of every device, side by side, as a matrix of devices and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnx_spdy.pipeline.artifact import Document
from onnx_spdy.pipeline.front import Front, make_front
from onnx_spdy.pipeline.report import Report

FILE = "fleet.json"


class Matrix(Document):
    """Every device at every target, as fleet.json holds them.

    `devices` has of each device's name what front.json has, `unreachable` why a target couldn't be reached on one.
    """

    KIND = "fleet"

    @property
    def missed(self) -> str | None:
        """What is out of reach on which device and why, in one line; None when nothing is."""
        found = [f"{name}: {why}" for name, front in self.content["devices"].items() if (why := Front(front).missed)]
        found += [f"{name}: {why}" for name, why in self.content["unreachable"].items()]
        return "; ".join(found) or None


def make_matrix(
    reports: Mapping[str, Sequence[tuple[str, Report]]], unreachable: Mapping[str, str], *, one_network: bool
) -> Matrix:
    """The matrix of these.

    Args:
        reports: of each device's name (folder, report) of each target, from the lowest to the highest.
        unreachable: name of a device where a target can't be reached -> why.
        one_network: whether a target has the same network on all devices.
    """
    fronts = {name: make_front(several).content for name, several in reports.items()}
    return Matrix(
        {
            "headline": _headline(fronts, len(fronts) + len(unreachable)),
            "one_network": one_network,
            "devices": fronts,
            "unreachable": dict(unreachable),
        }
    )


def _headline(fronts: Mapping[str, Mapping[str, Any]], devices: int) -> str:
    """How many of all are worth deploying, in one sentence."""
    points = [point for front in fronts.values() for point in front["points"]]
    kept = sum(point["measured_speedup_lower"] >= point["target_speedup"] for point in points)
    beating = sum(point["beats_best_dense"] for point in points)
    return (
        f"{devices} devices: {kept} of {len(points)} results have their measured lower bound at or above the "
        f"target, {beating} are faster than the best dense alternative on their device"
    )
