"""The matrix of a fleet as a page and as a plot: fleet.html and fleet.svg."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_spdy.runtimes import Environment
from onnx_spdy.tools.report.front import speedups_of
from onnx_spdy.tools.report.page import COLOURS, colour, filled, plain_axes, svg_plot, write_pages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABEL = "Measured speedup with its 95 % interval against the metric, or the calibration loss, one line for each device"
LINES = ("pruned", "sparsity", "rest", "target", "dense", "ink")
MARKERS = "osD^vP"


def write_fleet_html(fleet: Mapping[str, Any], out: Path) -> None:
    """Write fleet.html and fleet.svg into a folder, atomically."""
    write_pages(out, {"fleet.html": render(fleet), "fleet.svg": plot(fleet, alone=True)})


def render(fleet: Mapping[str, Any]) -> str:
    """The page for the content of fleet.json; the same content gives the same text."""
    from markupsafe import Markup

    fronts = fleet["devices"].values()
    return filled(
        "fleet.html",
        {},
        fleet=fleet,
        targets=sorted({point["asked_speedup"] for front in fronts for point in front["points"]}),
        metric=next((front["metric_name"] for front in fronts if front["metric_name"]), None),
        is_formula=any(Environment.from_json(front["environment"]).is_formula for front in fronts),
        colours=COLOURS,
        plot=Markup(plot(fleet)),
    )


def plot(fleet: Mapping[str, Any], *, alone: bool = False) -> str:
    """Speedup against the metric, or the loss where there is none, as an <svg> element or file."""
    fronts = fleet["devices"]
    has_metric = all(front["metric_dense"] is not None for front in fronts.values())
    key = "metric_pruned" if has_metric else "loss"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (name, front) in enumerate(fronts.items()):
            points = front["points"]
            speedups, spread = speedups_of(points)
            ink = colour(LINES[number % len(LINES)])
            axes.errorbar(
                speedups, [point[key] for point in points], xerr=spread, ms=4, lw=1, color=ink, label=name,
                fmt=f"{MARKERS[number // len(LINES) % len(MARKERS)]}-",
            )  # fmt: skip
        axes.set(xlabel="measured speedup on the device")
        if fronts:
            first = next(iter(fronts.values()))
            axes.set(ylabel=first["metric_name"] if has_metric else f"{first['loss_name']} loss")
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, frameon=False, borderaxespad=0.1)
        plain_axes(axes)

    return svg_plot(draw, height=3.4, label=LABEL, alone=alone)
