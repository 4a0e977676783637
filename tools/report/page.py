"""report.html: the content of report.json as one page for people, without scripts or anything from elsewhere."""

from __future__ import annotations

import io
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from onnx_spdy.pipeline.artifact import replacing
from onnx_spdy.runtimes import Environment, Measurement
from onnx_spdy.runtimes.atomic import WorkFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Plots are drawn in the first colour; in the page each becomes a CSS variable, so that dark mode can change it.
COLOURS = {
    "ink": ("#1c2430", "#dfe5ec"),
    "faint": ("#d5dae1", "#39424e"),
    "dense": ("#98a4b3", "#7c8a9b"),
    "pruned": ("#0b7d74", "#2bbfae"),
    "sparsity": ("#7a63b8", "#a08fdc"),
    "rest": ("#c08a3e", "#d3a052"),
    "target": ("#b3362b", "#ff8a7a"),
}
NAMED_LAYERS = 40  # with more, a plot has numbers on its axis instead of names
LABEL_CHARACTERS = 24
TOP_ROWS = 12
REST_ROWS = 30
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
OFF_SCALE = 1.5  # a rest larger than this many times the slowest layer would flatten all the layers' bars


@dataclass(frozen=True)
class Verdict:
    """Whether the target was met, for the eye (`kind`: met, open or missed) and in words."""

    kind: str
    words: str


@dataclass(frozen=True)
class Part:
    """A part of the pruned network's time by the latency table."""

    label: str
    kernel: str
    seconds: float
    share: float  # of the whole, in [0, 1]
    is_layer: bool


def write_report_html(report: Mapping[str, Any], path: Path) -> None:
    """Write `render(report)` to a file, atomically."""
    write_pages(path.parent, {path.name: render(report)})


def write_pages(out: Path, pages: Mapping[str, str]) -> None:
    """Write files into a folder, each atomically.

    Args:
        pages: name -> text.
    """
    for name, text in pages.items():
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf8")


def filled(name: str, filters: Mapping[str, Callable[..., str]], **values: Any) -> str:
    """The template of that name, filled with values.

    Raises:
        KeyError: one of them lacks what the template shows.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )  # fmt: skip
    environment.filters |= filters
    template = environment.get_template(name)
    try:
        return template.render(values)
    except jinja2.UndefinedError as exc:
        raise KeyError(str(exc)) from exc


def render(report: Mapping[str, Any]) -> str:
    """The page for the content of report.json; the same content gives the same text."""
    from markupsafe import Markup

    parts = _parts(report)
    return filled(
        "report.html",
        {"ms": _ms, "times": _times, "share": _share, "ratio": _ratio, "duration": _duration},
        report=report,
        environment=report["environment"],
        is_formula=Environment.from_json(report["environment"]).is_formula,
        verdict=_verdict(report),
        metric_change=_metric_change(report),
        measurements={name: Measurement.from_json(report[name]) for name in ("dense", "pruned")},
        parts=parts,
        top_rows=TOP_ROWS,
        layers_share=math.fsum(part.share for part in parts if part.is_layer),
        table_seconds=math.fsum(part.seconds for part in parts),
        dense_layer_seconds=math.fsum(layer["dense_seconds"] for layer in report["layers"]),
        rest=[part for part in parts if not part.is_layer],
        rest_rows=REST_ROWS,
        alternatives=sorted(report["alternatives"]["measured"], key=lambda one: one["median_seconds"]),
        pruned_alternative_seconds=next(
            one["median_seconds"] for one in report["alternatives"]["measured"] if one["role"] == "pruned"
        ),
        stage_seconds=math.fsum(stage["seconds"] for stage in report["stages"]),
        colours=COLOURS,
        layers_plot=Markup(_layers_plot(report)),
        rounds_plot=Markup(_rounds_plot(report)),
    )


def _verdict(report: Mapping[str, Any]) -> Verdict:
    target, measured = report["target_speedup"], report["measured_speedup"]
    lower, upper = report["measured_speedup_lower"], report["measured_speedup_upper"]
    asked = f"the target of {target:g}x"
    if lower >= target:
        return Verdict("met", f"Target met: the whole 95 % interval is at or above {asked}.")
    if measured >= target:
        return Verdict(
            "open", f"Not certain: the measured value reaches {asked}, but its lower bound of {_times(lower)} does not."
        )
    if upper >= target:
        return Verdict(
            "missed", f"Target missed: the measured value is below {asked}, though the noise doesn't rule it out."
        )
    return Verdict("missed", f"Target missed: even the upper bound of {_times(upper, up=True)} is below {asked}.")


def _metric_change(report: Mapping[str, Any]) -> str:
    dense, pruned = report["metric_dense"], report["metric_pruned"]
    if dense is None or pruned is None:
        return ""
    is_fraction = 0 <= dense <= 1 and 0 <= pruned <= 1
    return f"{100 * (pruned - dense):+.2f} points" if is_fraction else f"{pruned - dense:+.4g}"


def _parts(report: Mapping[str, Any]) -> list[Part]:
    """Where the pruned network's time goes by the table, slowest first."""
    found = [(layer["name"], layer["kernel"], layer["seconds"], True) for layer in report["layers"]]
    found += [
        (row["outputs"] or "no tensor of its own", row["kernel"], row["seconds"], False) for row in report["rest"]
    ]
    total = math.fsum(seconds for _, _, seconds, _ in found) or 1.0
    parts = [Part(name, kernel, seconds, seconds / total, layer) for name, kernel, seconds, layer in found]
    return sorted(parts, key=lambda part: -part.seconds)


def _ms(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.{4 if value < 0.1 else 3 if value < 10 else 2 if value < 100 else 1}f}"


def _times(speedup: float, up: bool = False) -> str:
    """Rounded to the unfavourable side: 1.9996 must not read as 2 beside a target of 2."""
    rounded = Decimal(repr(float(speedup))).quantize(Decimal("0.001"), ROUND_CEILING if up else ROUND_FLOOR)
    return f"{rounded}x"


def _ratio(dense_seconds: float, seconds: float) -> str:
    return f"{dense_seconds / seconds:.2f}x" if seconds > 0 else "-"


def _share(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _layers_plot(report: Mapping[str, Any]) -> str:
    layers: Sequence[Mapping[str, Any]] = report["layers"]
    count, rest = len(layers), 1e3 * report["rest_seconds"]
    positions, at_rest = range(count), count + 0.5
    dense = [1e3 * layer["dense_seconds"] for layer in layers]
    pruned = [1e3 * layer["seconds"] for layer in layers]
    slowest = max([*dense, *pruned], default=0.0) or rest or 1.0

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.5])
        above.bar(positions, [100 * layer["sparsity"] for layer in layers], 0.82, color=colour("sparsity"))
        above.set(ylim=(0, 100), yticks=[0, 50, 100], ylabel="removed, %")
        below.bar([x - 0.205 for x in positions], dense, 0.41, color=colour("dense"), label="dense")
        below.bar([x + 0.205 for x in positions], pruned, 0.41, color=colour("pruned"), label="pruned")
        below.bar([at_rest], [rest], 0.82, color=colour("rest"), label="everything else")
        is_cut = rest > OFF_SCALE * slowest
        top = 1.2 * (slowest if is_cut else max(slowest, rest))
        note = f"{rest:.3g} ms" + (", beyond the axis" if is_cut else "")
        x, y, side = (at_rest - 0.55, 0.97 * top, "top") if is_cut else (at_rest + 0.41, rest, "bottom")
        below.text(x, y, note, va=side, ha="right")
        below.set(ylim=(0, top), ylabel="ms", xlim=(-0.8, max(at_rest, 9) + 0.8))
        below.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.1)
        if count <= NAMED_LAYERS:
            below.set_xticks(positions, [_short(layer["name"]) for layer in layers], rotation=90)
        else:
            step = 5 * math.ceil(count / 125)
            below.set_xticks(range(step - 1, count, step), range(step, count + 1, step))
            below.set_xlabel("number of the layer in the table of all layers")
        for axes in (above, below):
            plain_axes(axes)
            axes.tick_params(axis="x", length=0)

    return svg_plot(
        draw, height=4.2, label="Bars for each layer or group: what was removed, and time in ms dense and pruned"
    )


def _rounds_plot(report: Mapping[str, Any]) -> str:
    seconds = {name: report[name]["seconds"] for name in ("dense", "pruned")}
    rounds = range(1, len(seconds["dense"]) + 1)
    speedups = [slow / fast for slow, fast in zip(seconds["dense"], seconds["pruned"], strict=True)]
    lower, upper = report["measured_speedup_lower"], report["measured_speedup_upper"]
    target = report["target_speedup"]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for name, values in seconds.items():
            left.plot(rounds, [1e3 * value for value in values], "o-", ms=3, lw=0.8, color=colour(name), label=name)
        left.set(ylim=(0, 1.08e3 * max(map(max, seconds.values()))), ylabel="ms", xlabel="round")
        right.axhspan(lower, upper, color=colour("pruned"), alpha=0.18, lw=0, label="95 % interval")
        right.axhline(target, color=colour("target"), lw=1.2, dashes=(5, 3), label="target")
        right.plot(rounds, speedups, "o", ms=3, color=colour("ink"), label="one round")
        low, high = min(target, *speedups), max(target, *speedups)
        margin = max(0.08 * (high - low), 0.01 * high)  # without noise there would be no range at all
        right.set(ylim=(low - margin, high + margin), ylabel="speedup", xlabel="round")
        for axes in (left, right):
            plain_axes(axes)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=3, frameon=False, borderaxespad=0.1)

    return svg_plot(draw, height=2.7, label="Points for each measured round: ms dense and pruned, and their ratio")


def colour(name: str) -> str:
    return COLOURS[name][0]


def _short(name: str) -> str:
    text = " ".join(name.split())
    if len(text) <= LABEL_CHARACTERS:
        return text
    tail = text[1 - LABEL_CHARACTERS :]
    return "…" + tail[max(tail.find("/"), 0) :]


def plain_axes(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=colour("faint"), lw=0.7)


def _import_matplotlib() -> ModuleType:
    """matplotlib, which would write a list of fonts into the user's cache when it is imported."""
    variable = "MPLCONFIGDIR"
    if "matplotlib" in sys.modules or variable in os.environ:
        import matplotlib

        return matplotlib
    with WorkFolder() as folder:
        os.environ[variable] = folder
        try:
            import matplotlib
            import matplotlib.font_manager
        finally:
            del os.environ[variable]
    return matplotlib


def svg_plot(draw: Callable[[Figure], None], *, height: float, label: str, alone: bool = False) -> str:
    """An <svg> element that can stand in a page: no ids or styles that meet those around it, colours as variables.

    With `alone` it is the text of a file: with a namespace and fixed colours.
    """
    matplotlib = _import_matplotlib()
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Text stays text, which the reader's browser draws: which glyphs matplotlib's font lacks means nothing.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        matplotlib.rcdefaults()  # a user's own style must not change the page
        style: dict[Any, Any] = dict.fromkeys(INKED, colour("ink"))
        style |= {"svg.fonttype": "none", "svg.hashsalt": label, "font.size": 8.5}
        style |= {"text.parse_math": False}  # a name with dollar signs is no formula
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=(10.4, height), layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = re.sub(r"<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None  # matplotlib always writes one
    text = text[text.index(">", text.index("<svg")) + 1 :]
    if alone:
        links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        paper = '<rect width="100%" height="100%" fill="#fff"/>'
        return f'<svg {links} viewBox="{box[1]}"><title>{label}</title>{paper}{text}'
    for name, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{name})")
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{label}"><title>{label}</title>{text}'
