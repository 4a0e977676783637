"""The front of several targets as a page and as a plot: front.html and front.svg."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_spdy.runtimes import Environment
from onnx_spdy.tools.report.page import COLOURS, colour, filled, plain_axes, svg_plot, write_pages

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABEL = "Measured speedup with its 95 % interval against calibration loss and metric, one point for each target"


def write_front_html(front: Mapping[str, Any], out: Path) -> None:
    """Write front.html and front.svg into a folder, atomically."""
    write_pages(out, {"front.html": render(front), "front.svg": plot(front, alone=True)})


def render(front: Mapping[str, Any]) -> str:
    """The page for the content of front.json; the same content gives the same text."""
    from markupsafe import Markup

    return filled(
        "front.html",
        {},
        front=front,
        environment=front["environment"],
        is_formula=Environment.from_json(front["environment"]).is_formula,
        colours=COLOURS,
        plot=Markup(plot(front)),
    )


def speedups_of(points: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[list[float]]]:
    """Of each point the measured speedup, and how far its bounds are below and above."""
    speedups = [point["measured_speedup"] for point in points]
    below = [point["measured_speedup"] - point["measured_speedup_lower"] for point in points]
    above = [point["measured_speedup_upper"] - point["measured_speedup"] for point in points]
    return speedups, [below, above]


def plot(front: Mapping[str, Any], *, alone: bool = False) -> str:
    """Speedup against loss, and against the metric where there is one, as an <svg> element or file."""
    points = front["points"]
    speedups, spread = speedups_of(points)
    has_metric = front["metric_dense"] is not None

    def curve(axes: Axes, values: list[float], name: str, label: str) -> None:
        axes.errorbar(speedups, values, xerr=spread, fmt="o-", ms=4, mfc="none", lw=1, color=colour(name), label=label)
        for point, speedup, value in zip(points, speedups, values, strict=True):
            if point["beats_best_dense"]:
                axes.plot([speedup], [value], "o", ms=4, color=colour(name))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 1 + has_metric, squeeze=False)[0]
        curve(panels[0], [point["loss"] for point in points], "pruned", "calibration samples that select")
        if all(point["held_out_loss"] is not None for point in points):
            curve(panels[0], [point["held_out_loss"] for point in points], "sparsity", "held-out samples")
        panels[0].set(ylabel=f"{front['loss_name']} loss", ylim=(0, None))
        if has_metric:
            panels[1].axhline(front["metric_dense"], color=colour("dense"), lw=1.2, dashes=(5, 3), label="dense")
            curve(panels[1], [point["metric_pruned"] for point in points], "pruned", "pruned")
            panels[1].set(ylabel=front["metric_name"])
        for axes in panels:
            axes.set(xlabel="measured speedup")
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, frameon=False, borderaxespad=0.1)
            plain_axes(axes)

    return svg_plot(draw, height=3.4, label=LABEL, alone=alone)
