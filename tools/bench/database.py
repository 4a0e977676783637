"""What the layer database costs, and how good its layers are on samples that it hasn't seen.

For each pruner: seconds and peak memory of each layer and in all, and the layers' relative squared output errors on
the samples of `--eval` at some sparsities, geometric means over the layers. `--layers` takes some of the layers,
`--samples 128,512` collects the Hessians from fewer samples too. `--widths` makes layers of these widths, `--rows` of
outputs each, instead of taking a network's. Exponents are fitted to time and memory against a layer's width d (time
for each of its rows; memory beyond what was there before) and against the number of samples; `--plot` draws them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer

from onnx_spdy.models import Layer, Prepared, to_canonical
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.hessian import collect_hessians, squared_error
from onnx_spdy.pipeline.database.layer_database import peak_bytes
from onnx_spdy.pipeline.database.pruners import DEFAULT_PRUNER, Pruner
from onnx_spdy.pipeline.level import Level, levels_for
from onnx_spdy.pipeline.network import Network
from onnx_spdy.tools.bench.synthetic_layers import synthetic_layers
from onnx_spdy.tools.options import Pattern, Threads, several
from onnx_spdy.tools.progress import ProgressBars
from onnx_spdy.tools.report.page import plain_axes
from onnx_spdy.tools.results import Json, Plot, write_plot, write_results
from onnx_spdy.tools.specs import SpecError, load_network, load_pruner, load_samples
from onnx_spdy.tools.table import print_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIB = 2**30
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def bench(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", show_default=False)] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="DATA", help="calibration samples")] = None,
    evaluation: Annotated[
        str | None,
        typer.Option("--eval", metavar="DATA", help="other samples, for the errors; default: those of --data"),
    ] = None,
    pruner: Annotated[str, typer.Option("--pruner", metavar="NAME[,NAME...]")] = DEFAULT_PRUNER,
    pattern: Pattern = "unstructured",
    sparsities: Annotated[
        str, typer.Option("--sparsities", metavar="S[,S...]", help="the nearest levels are shown")
    ] = ("0.5,0.7,0.8,0.9,0.95,0.98"),
    layers: Annotated[str | None, typer.Option("--layers", help="names or numbers, by commas; default: all")] = None,
    outputs: Annotated[
        int | None, typer.Option("--outputs", min=1, help="only the first so many of each layer, to save time")
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option("--samples", metavar="N[,N...]", help="numbers of samples to time Hessians with as well"),
    ] = None,
    widths: Annotated[
        str | None, typer.Option("--widths", metavar="N[,N...]", help="make layers of these widths instead of MODEL's")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="outputs of each layer that --widths makes")] = 64,
    threads: Threads = None,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Build some layers of a database by each pruner; show times, memory and errors."""
    if threads:
        torch.set_num_threads(threads)
    pruners = [load_pruner(spec) for spec in pruner.split(",")]
    levels = levels_for(pattern)[1:]
    shown = nearest(levels, several(sparsities, float, "--sparsities"))
    numbers = set(several(samples, int, "--samples")) if samples else set()
    if widths:
        made, calibration = synthetic_layers(several(widths, int, "--widths"), rows, max(numbers or {1024}))
        network = Network(Prepared(made))
    elif model and data:
        network = Network(load_network(model))
        calibration = load_samples(data, network.prepared)
    else:
        raise SpecError("give MODEL and --data, or --widths")
    chosen = selected(network, layers)
    counts = sorted({*numbers, len(calibration)})
    with ProgressBars() as bars:

        def hessians_of(some: Samples, what: str) -> dict[str, torch.Tensor]:
            progress = bars.stage("hessians")
            return collect_hessians(network, chosen, some, lambda done, total, note: progress(done, total, what))

        collected: list[dict[str, Any]] = []
        for count in counts:
            with measured(collected, samples=count):
                hessians = hessians_of(calibration.take(slice(0, count)), f"{count} samples")
        unseen = hessians_of(load_samples(evaluation, network.prepared), "other samples") if evaluation else hessians
        pruned: list[dict[str, Any]] = []
        for number, layer in enumerate(chosen):
            for one in pruners:
                bars.stage("layers")(number, len(chosen), f"{layer.name} by {one.name}")
                pair = hessians[layer.name], unseen[layer.name]
                pruned.append(bench_layer(network, layer, *pair, one.prune, levels, shown, outputs))
                pruned[-1]["pruner"] = one.name
    found = {
        "hessians": collected,
        "layers": pruned,
        "levels": [*map(str, shown)],
        "exponents": exponents(collected, pruned),
    }
    show(found)
    write_results(json, "bench_database", {**found, "peak_gib": peak_bytes() / GIB, "threads": torch.get_num_threads()})
    write_plot(plot, lambda figure: draw(found, figure), height=7, label="What a database costs")


def nearest(levels: Sequence[Level], sparsities: Sequence[float]) -> list[Level]:
    """The level nearest to each of these sparsities, each once."""
    return list(dict.fromkeys(min(levels, key=lambda level: abs(level.sparsity - one)) for one in sparsities))


def selected(network: Network, names: str | None) -> list[Layer]:
    """The prunable layers with these names or numbers, in graph order.

    Raises:
        SpecError: there is no such layer.
    """
    if names is None:
        return list(network.layers)
    wanted = {name.strip() for name in names.split(",")}
    known = {key: layer for n, layer in enumerate(network.layers) for key in (str(n), layer.name)}
    if unknown := wanted - set(known):
        raise SpecError(
            f"no layer {min(unknown)!r}; there are 0 to {len(network.layers) - 1}: {', '.join(list(known)[1::2])}"
        )
    return [layer for n, layer in enumerate(network.layers) if wanted & {str(n), layer.name}]


@contextmanager
def measured(into: list[dict[str, Any]], **what: Any) -> Iterator[None]:
    """Append the block's wall seconds, the process's peak memory during it (Linux; elsewhere the peak so far), and how
    far that is above what was there before."""
    if CLEAR.exists():
        CLEAR.write_text("5")  # resets the peak to what is there now
    before = recent_peak()
    start = time.monotonic()
    yield
    seconds, peak = time.monotonic() - start, recent_peak()
    into.append({**what, "seconds": seconds, "peak_gib": peak / GIB, "more_gib": (peak - before) / GIB})


def recent_peak() -> int:
    if not STATUS.exists():
        return peak_bytes()
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def bench_layer(
    network: Network,
    layer: Layer,
    hessian: torch.Tensor,
    unseen: torch.Tensor,
    prune: Pruner,
    levels: Sequence[Level],
    shown: Sequence[Level],
    outputs: int | None,
) -> dict[str, Any]:
    """Time and memory of all levels of a layer, and its errors by the other samples at those that are shown."""
    dense = to_canonical(layer, network.dense(layer.weight))[:outputs].contiguous()
    power = squared_error(dense.flatten(1).double(), unseen)
    kept: dict[Level, torch.Tensor] = {}
    found: list[dict[str, Any]] = []
    with measured(found, layer=layer.name, out=len(dense), width=len(hessian)):
        for level, weight in zip(levels, prune(dense, hessian, levels), strict=True):
            if level in shown:
                kept[level] = weight
    errors = [squared_error((kept[level] - dense).flatten(1).double(), unseen) / max(power, 1e-300) for level in shown]
    return {**found[0], "errors": errors}


def exponents(hessians: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Slopes of logarithms: of the Hessians' seconds and memory against samples, of each pruner's against the width."""
    points: dict[str, tuple[list[int], list[float]]] = {}
    for what in ("seconds", "more_gib"):
        points[f"{what} of hessians by samples"] = [h["samples"] for h in hessians], [h[what] for h in hessians]
    for name in dict.fromkeys(row["pruner"] for row in rows):
        mine = [row for row in rows if row["pruner"] == name]
        widths = [row["width"] for row in mine]
        points[f"seconds a row of {name} by width"] = widths, [row["seconds"] / row["out"] for row in mine]
        points[f"more_gib of {name} by width"] = widths, [row["more_gib"] for row in mine]
    # Memory that was there already isn't more: nothing to fit.
    return {name: slope(x, y) for name, (x, y) in points.items() if len(set(x)) > 1 and min(y) > 0}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def show(found: dict[str, Any]) -> None:
    """Print the tables."""
    print_table(
        "Hessians", ("samples", "seconds", "peak GiB", "more than before"),
        [(one["samples"], f"{one['seconds']:.1f}", f"{one['peak_gib']:.2f}", f"{one['more_gib']:.2f}")
         for one in found["hessians"]],
    )  # fmt: skip
    print_table(
        "Errors of layers", ("layer", "pruner", "out", "width", "seconds", "peak GiB", *found["levels"]),
        [(row["layer"], row["pruner"], row["out"], row["width"], f"{row['seconds']:.1f}", f"{row['peak_gib']:.2f}",
          *(f"{error:.6f}" for error in row["errors"])) for row in found["layers"]],
    )  # fmt: skip
    together = []
    for name in dict.fromkeys(row["pruner"] for row in found["layers"]):
        mine = [row for row in found["layers"] if row["pruner"] == name]
        means = np.exp(np.mean(np.log(np.maximum([row["errors"] for row in mine], 1e-300)), axis=0))
        seconds, peak = sum(row["seconds"] for row in mine), max(row["peak_gib"] for row in mine)
        together.append((name, f"{seconds:.1f}", f"{peak:.2f}", *(f"{mean:.6f}" for mean in means)))
    print_table("All layers, errors as geometric means", ("pruner", "seconds", "peak GiB", *found["levels"]), together)
    print_table("Exponents", ("of", "exponent"), [(name, f"{one:.2f}") for name, one in found["exponents"].items()])


def draw(found: dict[str, Any], figure: Figure) -> None:
    """Seconds and memory against a layer's width and against samples."""
    axes = figure.subplots(2, 2)
    columns: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("seconds for each row", lambda row: row["seconds"] / row["out"]),
        ("more memory, GiB", lambda row: row["more_gib"]),
    ]
    for axis, (title, value) in zip(axes[0], columns, strict=True):
        for name in dict.fromkeys(row["pruner"] for row in found["layers"]):
            mine = [row for row in found["layers"] if row["pruner"] == name]
            axis.plot([row["width"] for row in mine], [value(row) for row in mine], "o", label=name)
        axis.set(xlabel="width d of the layer", ylabel=title, xscale="log")
        axis.legend(frameon=False)
    for axis, what in zip(axes[1], ("seconds", "more_gib"), strict=True):
        axis.plot([one["samples"] for one in found["hessians"]], [one[what] for one in found["hessians"]], "o-")
        axis.set(xlabel="calibration samples", ylabel=f"{what} of the Hessians", xscale="log")
    for axis in axes.flat:
        plain_axes(axis)
        if all(min(line.get_ydata()) > 0 for line in axis.lines):  # memory that was there already isn't more
            axis.set_yscale("log")
