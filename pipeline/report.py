"""The report: what was asked, what was predicted, what was measured, and what every layer does now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnx_spdy.pipeline.aim import Against
from onnx_spdy.pipeline.alternatives import Alternatives
from onnx_spdy.pipeline.artifact import Document, fields_of
from onnx_spdy.pipeline.database.layer_database import LayerDatabase
from onnx_spdy.pipeline.latency.table import LatencyTable
from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.metric import Metrics
from onnx_spdy.pipeline.network import Int8Network, Network, PrunedNetwork
from onnx_spdy.pipeline.opponent import headline, standing, verdict
from onnx_spdy.pipeline.site import Site, find_sites
from onnx_spdy.pipeline.target import Outcome
from onnx_spdy.pipeline.training.trainer import Training
from onnx_spdy.runtimes import reason_in

# What makes two calls one question, and what makes two attempts one profile.
QUESTION = ("target_speedup", "runtime", "environment", "search", "seed", "loss_name", "made_from")
ATTEMPTED = ("aim_speedup", "predicted_speedup", "loss")
# What the report of several devices says of each.
ON_DEVICE = (
    "runtime", "target_speedup", "predicted_speedup", "measured_speedup", "measured_speedup_lower",
    "measured_speedup_upper", "dense_seconds", "pruned_seconds", "metric_dense", "metric_pruned", "missed",
    "best_dense_alternative", "times_as_fast_as_best_dense", "times_as_fast_as_best_dense_lower",
    "times_as_fast_as_best_dense_upper", "environment",
)  # fmt: skip


class Report(Document):
    """The result of a run, as report.json holds it."""

    KIND = "report"

    @property
    def missed(self) -> str | None:
        """Why the target is out of reach, in one line; None when it was met, or missed by noise only."""
        return self.content["missed"]

    @property
    def asked_speedup(self) -> float:
        """The target as it was given, against whatever dense network."""
        against = self.content["against"]
        return against["asked_speedup"] if against else self.content["target_speedup"]

    def after(self, earlier: Report | None) -> Report:
        """This report with the attempts of an earlier call for the same question before its own.

        A profile that was measured again has its last measurement only.
        """
        if earlier is None or any(earlier.content.get(name) != self.content[name] for name in QUESTION):
            return self
        own = self.content["attempts"]
        known = [{name: one[name] for name in ATTEMPTED} for one in own]
        before = [one for one in earlier.content["attempts"] if {n: one.get(n) for n in ATTEMPTED} not in known]
        return Report({**self.content, "attempts": [*before, *own]})

    def among(self, reports: Mapping[str, Report]) -> Report:
        """This report, of the device that decides, with what the network does on each of them.

        Args:
            reports: of the same network on every device, by its name.
        """
        devices = {name: {key: one.content[key] for key in ON_DEVICE} for name, one in reports.items()}
        return Report({**self.content, "devices": devices})

    @classmethod
    def load(cls, path: Path | str) -> Report:
        """The report in a file.

        Raises:
            ArtifactError: missing, damaged or of another version.
        """
        content = super().load(path).content
        with fields_of(path):
            return cls({**content, "attempts": [dict(one) for one in content["attempts"]]})


def make_report(
    network: Network,
    pruned: PrunedNetwork,
    table: LatencyTable,
    database: LayerDatabase,
    outcome: Outcome,
    *,
    metrics: Metrics | None,
    alternatives: Alternatives,
    against: Against | None,
    repaired: Training | None,
    trained: Training | None,
    stages: Sequence[Mapping[str, Any]],
) -> Report:
    """Gather what the stages found.

    Args:
        network, pruned: the dense network and what was made of it.
        table, database: from which.
        outcome: the profile that was kept and what it measured, and all that were tried.
        metrics: of both; None when there was nothing to evaluate on.
        alternatives: the dense network in every runtime and precision of this machine, and a narrow one too.
        against: where the target came from one against the best dense alternative.
        repaired: how the weights were trained after the correction; None where they weren't.
        trained: how the whole network was trained after that; the same.
        stages: name and seconds of each stage.
    """
    profile, validation = outcome.kept.profile, outcome.kept.validation
    choice = [table.levels.index(profile.levels[name]) for name in table.layers]
    beside, metric = standing(alternatives), metrics.name if metrics else None
    return Report(
        {
            "headline": headline(validation.speedup, validation.lower, validation.upper, beside),
            "runtime": validation.environment.runtime,
            "target_speedup": profile.target_speedup,
            "predicted_speedup": profile.predicted_speedup,
            **validation.to_json(),
            "missed": outcome.missed(profile.target_speedup),
            "attempts": [attempt.to_json() for attempt in outcome.attempts],
            "highest_speedup": table.highest_speedup,
            "prediction": table.prediction and vars(table.prediction),
            "table_foreign_cores": table.foreign_cores,
            "against": against and against.to_json(),
            **beside.to_json(),
            "alternatives": {**alternatives.to_json(), "verdict": verdict(beside, metric)},
            "metric_name": metric,
            "metric_dense": metrics and metrics.dense,
            "metric_pruned": metrics and metrics.pruned,
            "loss_name": profile.loss_name,
            "loss": profile.loss,
            "held_out_loss": profile.held_out_loss,
            "search": profile.search,
            "search_ended": profile.ended,
            "evaluations": profile.evaluations,
            "images": profile.samples_run,
            "seed": profile.seed,
            "sparsity": _sparsity(network, pruned),
            "statistics_correction": pruned.corrected,
            "int8": pruned.int8 and _int8(pruned.int8),
            "repair": repaired and vars(repaired),
            "finetune": trained and vars(trained),
            "made_from": dict(profile.made_from),
            "stages": list(stages),
            "layers": _layer_rows(network, pruned, table, database, choice),
            "skipped": [{"name": layer.name, "op": layer.op, "reason": layer.skip} for layer in network.skipped],
            "rest": [
                {"kernel": kernel, "outputs": outputs, "seconds": seconds} for kernel, outputs, seconds in table.rest
            ],
            "rest_seconds": table.rest_seconds,
        }
    )


def _int8(found: Int8Network) -> dict[str, Any]:
    """How the network came to int8."""
    return {
        "ranges": found.ranges,
        "corrected_biases": found.corrected,
        "loss": found.loss,
        "layers": len(found.layers),
        "skipped": dict(found.skipped),
    }


def _sparsity(network: Network, pruned: PrunedNetwork) -> float:
    """The fraction of the prunable layers' weights that are zero or gone."""
    layers = [layer for layer in network.prepared.layers if layer.shape] if pruned.widths else network.layers
    dense = sum(int(np.prod(layer.shape)) for layer in layers)
    if not pruned.widths:
        return sum(int((network.values(layer.weight, pruned.weights) == 0).sum()) for layer in layers) / dense
    return 1 - sum(int(np.prod(layer.shape)) for layer in pruned.base.layers if layer.shape) / dense


def _layer_rows(
    network: Network, pruned: PrunedNetwork, table: LatencyTable, database: LayerDatabase, choice: Sequence[int]
) -> list[dict[str, Any]]:
    dense_seconds, seconds = table.costs.of_layers([0] * len(choice)), table.costs.of_layers(choice)
    errors = database.errors(table.layers)
    rows = []
    for row, (site, column) in enumerate(zip(find_sites(network.prepared, table.levels), choice, strict=True)):
        break_even = table.break_even(row)
        rows.append(
            {
                "name": site.name,
                **_what(site, network, pruned, table.levels[column]),
                "level": str(table.levels[column]),
                "dense_seconds": float(dense_seconds[row]),
                "seconds": float(seconds[row]),
                "kernel": table.kernels[row][column],
                "dense_kernel": table.kernels[row][0],
                "break_even": break_even and str(break_even),
                "error": float(errors[row, column]),
                "note": _why(table, row, column, table.levels[column].is_whole),
            }
        )
    return rows


def _what(site: Site, network: Network, pruned: PrunedNetwork, level: Level) -> dict[str, Any]:
    """What a site is, and what it lost."""
    layer, group = site.layers[0], site.group
    if group is None:
        zeros = float((network.values(layer.weight, pruned.weights) == 0).float().mean())
        return {"op": layer.op, "initializer": layer.weight, "shape": list(layer.shape), "sparsity": zeros}
    kept = site.kept(level)
    return {
        "op": group.kind,
        "initializer": layer.weight,
        "shape": [group.units],
        "units": group.units,
        "kept": kept,
        "sparsity": 1 - kept / group.units,
    }


def _why(table: LatencyTable, row: int, column: int, is_dense: bool) -> str:
    """Why a layer stayed dense or is not faster, in words; empty when there is nothing to explain."""
    dense, fastest = table.seconds[row, 0], table.seconds[row].min()
    if reasons := [f"{level}: {why}" for level in table.levels if (why := _why_dense(table, row, level))]:
        return "; ".join([*reasons, *([] if is_dense else ["pruned all the same"])])
    if fastest >= dense:
        return "no sparsity makes it faster in this runtime" + ("" if is_dense else "; pruned all the same")
    if is_dense:
        return f"left dense; at best {dense / fastest:.2f}x faster"
    return "" if table.seconds[row, column] < dense else "not faster at this level"


def _why_dense(table: LatencyTable, row: int, level: Level) -> str:
    """Why an N:M level gains a layer nothing: the engine's own reason, or that its sparse kernel is slower."""
    column = table.levels.index(level)
    if not level.is_n_of_m:
        return ""
    dense, seconds = table.seconds[row, 0], table.seconds[row, column]
    if reason := reason_in(table.kernels[row][column]):
        return reason
    if table.sparse[row, column] and seconds >= dense:
        return f"slower, {1e3 * seconds:.4f} against {1e3 * dense:.4f} ms"
    return ""
