"""What the command line prints: tables for people, on stdout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnx_spdy.models import Group, Prepared, find_groups, to_canonical
from onnx_spdy.models.graph import one_line
from onnx_spdy.models.stored import values_of
from onnx_spdy.pipeline.alternatives import DENSE, Alternatives
from onnx_spdy.pipeline.latency.table import LatencyTable
from onnx_spdy.pipeline.level import BLOCKS, Level
from onnx_spdy.pipeline.mask import comes_in_blocks, level_violation
from onnx_spdy.pipeline.network import Int8Network
from onnx_spdy.pipeline.training.trainer import Training
from onnx_spdy.pipeline.usage import FILE as LOADER
from onnx_spdy.runtimes import Environment, is_busy
from onnx_spdy.tools.doctor import Finding
from onnx_spdy.tools.table import print_table

NAMED = 8  # layers in a line
LONGEST_NOTE = 100  # characters
N_OF_M = {name: Level.parse(name) for name in ("1:4", "2:4", "4:8")}  # that hardware knows, the strictest first
LARGEST_FIRST = sorted(BLOCKS, key=lambda name: BLOCKS[name], reverse=True)


def environment(content: Mapping[str, Any]) -> str:
    """One line that says for what machine and setting a number holds."""
    return (
        f"{content['runtime']} {content['version']}, {content['precision']}, batch {content['batch']}, "
        f"{content['threads']} threads, {content['cpu']} ({content['instruction_set']})"
    )


def layers(network: Prepared) -> None:
    """The prunable layers and the skipped ones."""
    rows = []
    initializers = {tensor.name: tensor for tensor in network.proto.graph.initializer}
    prunable = weights = 0
    patterns: Counter[str] = Counter()
    for layer in network.layers:
        count = zeros = pattern = "-"
        if layer.weight in initializers:
            values = values_of(initializers[layer.weight])
            count, zeros = str(values.size), f"{(values == 0).mean():.1%}"
            if len(layer.shape) > 1 and layer.op != "ConvTranspose":
                pattern = pattern_of(to_canonical(layer, values))
            prunable, weights = prunable + layer.prunable, weights + values.size * layer.prunable
        shape = "x".join(map(str, layer.shape))
        rows.append((layer.name, layer.op, shape, count, zeros, pattern, layer.skip or "prunable"))
        patterns[pattern] += layer.prunable
    print_table("Layers", ("layer", "op", "shape (out, in, kernel)", "weights", "zeros", "pattern", "why"), rows)
    print(f"{prunable} prunable layers with {weights:,} weights")
    for pattern in N_OF_M:
        if patterns[pattern]:
            print(f"{patterns[pattern]} of them are {pattern} along their input channels, as GPUs want it")
    groups(find_groups(network))


def groups(found: Sequence[Group]) -> None:
    """What can only be removed together: channels, feed-forward units, attention heads, coupled widths."""
    able = {True: "can shrink, and go with its residual branch", False: "can shrink"}
    rows = [
        (one.name, one.kind, one.units, _named(one.producers), one.skip or able[one.branch is not None])
        for one in found
    ]
    print_table("Groups", ("group", "kind", "units", "layers that make them", "why"), rows)
    print(f"{sum(one.prunable for one in found)} groups of units that can be removed")


def _named(names: Sequence[str]) -> str:
    return f"{', '.join(names[:NAMED])}{' ...' if len(names) > NAMED else ''}"


def int8(found: Int8Network) -> None:
    """What of a network is in int8, and how it was chosen."""
    biases = "corrected biases" if found.corrected else "biases as they were"
    print(
        f"{len(found.layers)} layers in int8, ranges by {found.ranges}, {biases}; calibration loss {found.loss:.3g} "
        "against floating point"
    )
    for name, why in found.skipped.items():
        print(f"  {name} stays in floating point: {why}")


def pattern_of(weight: np.ndarray) -> str:
    """The pattern of a layer's zeros: the strictest N:M along its input channels, else the largest blocks in which they
    all come, else whether there are any.

    Args:
        weight: (out, in, *kernel).
    """
    if (weight != 0).all():
        return "dense"
    # Where there are no more channels than a group may keep, any weights have the pattern, and none is meant.
    patterns = [level for level in N_OF_M.values() if weight.shape[1] > level.group[0]]
    found = (str(level) for level in patterns if level_violation(weight, level) is None)
    return next(found, None) or next(name for name in LARGEST_FIRST if comes_in_blocks(weight, name))


def table(found: LatencyTable) -> None:
    """What the latency table says about each layer, and how far pruning can get."""
    columns = ("layer", "dense ms", "best ms", "± at best", "at", "break-even", "kernel, dense and best")
    cells: list[tuple[object, ...]] = []
    for row, name in enumerate(found.layers):
        seconds = found.seconds[row]
        best = int(seconds.argmin())
        break_even, kernels = found.break_even(row), found.kernels[row]
        cells.append((
            name, f"{1e3 * seconds[0]:.3f}", f"{1e3 * seconds[best]:.3f}", _uncertainty(found.spread[row][best]),
            found.levels[best], break_even or "none: pruning it gains nothing",
            kernels[0] if kernels[best] == kernels[0] else f"{kernels[0]}, {kernels[best]}",
        ))  # fmt: skip
    print_table("Layers by the latency table", columns, cells)
    print(environment(found.environment.to_json()))
    print(f"dense, end to end: {1e3 * found.dense.median:.3f} ms (spread {found.dense.spread:.1%})")
    print(f"outside the prunable layers: {1e3 * found.rest_seconds:.3f} ms")
    print(f"highest reachable speedup by the table: {found.highest_speedup:.2f}x")
    if found.prediction:
        one = found.prediction
        print(
            f"the table predicted {one.networks} networks, measured only afterwards, with a median error of "
            f"{one.median:.1%}, the largest {one.largest:.1%}"
        )
    if rows := [row for row in range(len(found.layers)) if found.break_even(row) is None]:
        gainless = [found.layers[row] for row in rows]
        share = min(1.0, float(found.seconds[rows, 0].sum()) / found.dense_seconds)  # each is fitted with an error
        print(
            f"pruning gains nothing in {len(gainless)} of {len(found.layers)} layers, {share:.0%} of the time: "
            f"{_named(gainless)}"
        )
    if is_busy(found.foreign_cores, found.environment.cores):
        print(
            f"measured while other programs kept up to {found.foreign_cores:.1f} of {found.environment.cores} cores "
            "busy: don't trust these times"
        )
    if found.fallback:
        print(f"not optimised by the engine, and pruning it gains nothing: {found.fallback}")


def _uncertainty(spread: float) -> str:
    """Of a time, as a share of it; of one that is next to nothing the number itself would say nothing."""
    return f"{spread:.0%}" if spread < 1 else "over 100%"


def validation(content: Mapping[str, Any]) -> None:
    """A measured speedup, and the metric where there is one."""
    print(environment(content["environment"]))
    print(f"dense {1e3 * content['dense_seconds']:.3f} ms, pruned {1e3 * content['pruned_seconds']:.3f} ms")
    print(
        f"measured speedup {content['measured_speedup']:.3f}x "
        f"(95 % bounds {content['measured_speedup_lower']:.3f} to {content['measured_speedup_upper']:.3f})"
    )
    cores = content["environment"]["cores"]
    if is_busy(content.get("foreign_cores"), cores):
        print(f"other programs kept {content['foreign_cores']:.1f} of {cores} cores busy meanwhile: measure again")
    if content.get("metric_name"):
        print(f"{content['metric_name']}: dense {content['metric_dense']:.4f}, pruned {content['metric_pruned']:.4f}")
    if content.get("fallback"):
        print(f"not optimised by the engine: {content['fallback']}")


def training(what: str, found: Training) -> None:
    """How a repair or a fine-tuning went."""
    print(
        f"{what}: loss on {found.held_out} held-out samples {found.loss_before:.5f} before, "
        f"{found.loss_after:.5f} after; {found.stopped}"
    )


def report(content: Mapping[str, Any], folder: Path) -> None:
    """The report of a run."""
    print(content["headline"])
    rest = f"{1e3 * content['rest_seconds']:.3f}"
    rows = [
        (layer["name"], _level(layer), f"{1e3 * layer['dense_seconds']:.3f}", f"{1e3 * layer['seconds']:.3f}",
         f"{layer['error']:.4f}", layer["note"])
        for layer in content["layers"]
    ]  # fmt: skip
    rows.append(("everything else", "", rest, rest, "", ""))
    print_table("Layers", ("layer", "level", "dense ms", "ms", "error", "note"), rows)
    if against := content["against"]:
        print(
            f"target {against['asked_speedup']:g}x against the best dense alternative, "
            f"{against['best']['runtime']} {against['best']['precision']}:"
        )
    print(
        f"target {content['target_speedup']:.4g}x, predicted {content['predicted_speedup']:.3f}x, "
        f"search {content['search']}"
    )
    validation(content)
    if Environment.from_json(content["environment"]).is_formula:
        print("These times come from a formula, not from an engine: they say nothing about real hardware.")
    elif content["measured_speedup_lower"] < content["target_speedup"]:
        print("The measured lower bound is below the target.")
    if content.get("repair"):
        training("repair", Training(**content["repair"]))
    if content.get("finetune"):
        training("finetune", Training(**content["finetune"]))
    print(content["alternatives"]["verdict"])
    print(f"{content['sparsity']:.1%} of the prunable weights are zero or gone; report: {folder / 'report.html'}")
    if (folder / LOADER).exists():
        print(f"to run it in your own program: {folder / LOADER}")


def _level(layer: Mapping[str, Any]) -> str:
    kept = f" ({layer['kept']} of {layer['units']})" if "units" in layer and layer["kept"] < layer["units"] else ""
    return f"{layer['level']}{kept}"


def alternatives(found: Alternatives, metric: str) -> None:
    """The dense network in every runtime and precision, the fastest first."""
    measured = sorted(found.of(DENSE), key=lambda one: one.seconds.median)
    rows = [
        (one.name, f"{1e3 * one.seconds.median:.3f}", "-" if one.metric is None else f"{one.metric:.4f}")
        for one in measured
    ]
    rows += [(name, "-", why) for name, why in found.missing.items()]
    print_table("The dense network", ("runtime and precision", "ms", metric), rows)


def engines(found: Alternatives, metric: str | None) -> None:
    """Files in every engine, the fastest first."""
    measured = sorted(found.measured, key=lambda one: one.seconds.median)
    slowest = measured[-1].seconds.median
    rows = [
        (one.role, one.name, f"{1e3 * one.seconds.median:.3f}", f"{slowest / one.seconds.median:.2f}x",
         "-" if one.metric is None else f"{one.metric:.4f}",
         one_line(f"not optimised: {one.fallback}", LONGEST_NOTE) if one.fallback else "")
        for one in measured
    ]  # fmt: skip
    columns = ("file", "runtime and precision", "ms", "times as fast", metric or "metric", "note")
    print_table("Engines", columns, rows)
    for label, why in found.missing.items():
        print(f"{label}: {why}")
    setting = measured[0].environment
    print(f"batch {setting.batch}, {setting.threads} threads, {setting.cpu} ({setting.instruction_set})")


def front(content: Mapping[str, Any], folder: Path) -> None:
    """The front of several targets."""
    metric = content["metric_name"]
    loss = f"{content['loss_name']} loss"
    columns = ("target", "predicted", "measured", "lower bound", "ms", "x best dense", "sparsity", loss, "held out",
               metric or "metric", "network")  # fmt: skip
    dense_metric = "-" if content["metric_dense"] is None else f"{content['metric_dense']:.4f}"
    dense_ms = f"{1e3 * content['dense_seconds']:.3f}"
    print(content["headline"])
    rows: list[tuple[object, ...]] = [
        ("dense", "", "", "", dense_ms, "", "", "", "", dense_metric, folder / "dense.onnx")
    ]
    for point in content["points"]:
        rows.append((
            f"{point['asked_speedup']:g}x", f"{point['predicted_speedup']:.3f}x",
            f"{point['measured_speedup']:.3f}x", f"{point['measured_speedup_lower']:.3f}x",
            f"{1e3 * point['pruned_seconds']:.3f}",
            f"{point['times_as_fast_as_best_dense']:.2f}x{' *' if point['beats_best_dense'] else ''}",
            f"{point['sparsity']:.1%}", f"{point['loss']:.5g}",
            *("-" if point[key] is None else f"{point[key]:.4g}" for key in ("held_out_loss", "metric_pruned")),
            folder / point["folder"] / "model.onnx",
        ))  # fmt: skip
    print_table("Front", columns, rows)
    print("* faster than every dense alternative that loses no more")
    print(environment(content["environment"]))
    if Environment.from_json(content["environment"]).is_formula:
        print("These times come from a formula, not from an engine: they say nothing about real hardware.")
    print(f"front: {folder / 'front.html'}, {folder / 'front.svg'}, {folder / 'front.json'}")


def fleet(content: Mapping[str, Any], folder: Path) -> None:
    """The matrix of devices and targets."""
    print(content["headline"])
    rows: list[tuple[object, ...]] = []
    for name, one in content["devices"].items():
        metric = "-" if one["metric_dense"] is None else f"{one['metric_dense']:.4f}"
        rows.append((name, "dense", "", "", f"{1e3 * one['dense_seconds']:.3f}", "", "", metric, ""))
        for point in one["points"]:
            rows.append((
                name, f"{point['asked_speedup']:g}x", f"{point['measured_speedup']:.3f}x",
                f"{point['measured_speedup_lower']:.3f}x", f"{1e3 * point['pruned_seconds']:.3f}",
                f"{point['times_as_fast_as_best_dense']:.2f}x{' *' if point['beats_best_dense'] else ''}",
                f"{point['sparsity']:.1%}",
                "-" if point["metric_pruned"] is None else f"{point['metric_pruned']:.4f}", folder / point["folder"],
            ))  # fmt: skip
    metric = next((one["metric_name"] for one in content["devices"].values() if one["metric_name"]), "metric")
    columns = ("device", "target", "measured", "lower bound", "ms", "x best dense", "sparsity", metric, "report")
    print_table("One network for all" if content["one_network"] else "A network for each", columns, rows)
    print("* faster than every dense alternative on that device that loses no more")
    for name, why in content["unreachable"].items():
        print(f"{name}: {why}")
    for one in content["devices"].values():
        print(environment(one["environment"]))
    if any(Environment.from_json(one["environment"]).is_formula for one in content["devices"].values()):
        print("Times of fake come from a formula, not from an engine: they say nothing about real hardware.")
    print(f"fleet: {folder / 'fleet.html'}, {folder / 'fleet.svg'}, {folder / 'fleet.json'}")


def doctor(findings: Sequence[Finding]) -> None:
    """Which runtimes work here."""
    rows = [
        (
            one.name, one.version or "no", "\n".join(one.patterns) or "none",
            f"{one.problem}. {one.note}" if one.problem else one.note,
        )
        for one in findings
    ]  # fmt: skip
    print_table("Runtimes", ("runtime", "works", "sparse kernels for", "note"), rows)
