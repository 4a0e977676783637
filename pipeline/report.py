"""The report: what was asked, what was predicted, what was measured, and what every layer does now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_spdy.models import Layer
from onnx_spdy.pipeline.aim import Outcome
from onnx_spdy.pipeline.artifact import read_json, write_json
from onnx_spdy.pipeline.database import LayerDatabase
from onnx_spdy.pipeline.latency import LatencyTable
from onnx_spdy.pipeline.level import DENSE
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.profile import Profile

VERSION = 1


@dataclass(frozen=True)
class Report:
    """The result of a run, as report.json holds it.

    Attributes:
        content: the document; `report.json` without its format and version.
    """

    content: Mapping[str, Any]

    @property
    def missed(self) -> str | None:
        """Why the target is out of reach, in one line; None when it was met, or missed by noise only."""
        return self.content["missed"]

    def save(self, path: Path) -> None:
        write_json(path, "report", VERSION, self.content)

    @classmethod
    def load(cls, path: Path) -> Report:
        """The report in a file.

        Raises:
            ArtifactError: missing, damaged or of another version.
        """
        return cls(read_json(path, "report", VERSION))


def make_report(
    network: Network,
    table: LatencyTable,
    database: LayerDatabase,
    outcome: Outcome,
    *,
    metric_name: str | None,
    metrics: tuple[float, float] | None,
    corrected: str,
    stages: Sequence[Mapping[str, Any]],
) -> Report:
    """Gather what the stages found.

    Args:
        outcome: the profile that was kept and what it measured, and all that were tried.
        metric_name, metrics: name and (dense, pruned) values, or None when there was nothing to evaluate on.
        corrected: whether statistics were corrected, or why not.
        stages: name and seconds of each stage.
    """
    profile, validation = outcome.kept.profile, outcome.kept.validation
    dense_metric, pruned_metric = metrics or (None, None)
    weights = sum(int(network.dense(layer.weight).numel()) for layer in network.layers)
    zeros = sum(int((network.get(layer.weight) == 0).sum()) for layer in network.layers)
    return Report(
        {
            "runtime": validation.environment.runtime,
            "target_speedup": profile.target_speedup,
            "predicted_speedup": profile.predicted_speedup,
            **validation.to_json(),
            "missed": outcome.missed(profile.target_speedup),
            "attempts": [attempt.to_json() for attempt in outcome.attempts],
            "highest_speedup": table.highest_speedup,
            "metric_name": metric_name,
            "metric_dense": dense_metric,
            "metric_pruned": pruned_metric,
            "loss_name": profile.loss_name,
            "loss": profile.loss,
            "search": profile.search,
            "evaluations": profile.evaluations,
            "seed": profile.seed,
            "sparsity": zeros / weights,
            "statistics_correction": corrected,
            "made_from": dict(profile.made_from),
            "stages": list(stages),
            "layers": [_layer_row(network, table, database, profile, layer) for layer in network.layers],
            "skipped": [{"name": layer.name, "op": layer.op, "reason": layer.skip} for layer in network.skipped],
            "rest": [
                {"kernel": kernel, "outputs": outputs, "seconds": seconds} for kernel, outputs, seconds in table.others
            ],
            "rest_seconds": table.base_seconds,
        }
    )


def _layer_row(
    network: Network, table: LatencyTable, database: LayerDatabase, profile: Profile, layer: Layer
) -> dict[str, Any]:
    row, level = table.layers.index(layer.name), profile.levels[layer.name]
    column = table.levels.index(level)
    weight = network.get(layer.weight)
    return {
        "name": layer.name,
        "op": layer.op,
        "initializer": layer.weight,
        "shape": list(layer.shape),
        "level": str(level),
        "sparsity": float((weight == 0).float().mean()),
        "dense_seconds": float(table.seconds[row, 0]),
        "seconds": float(table.seconds[row, column]),
        "kernel": table.kernels[row][column],
        "dense_kernel": table.kernels[row][0],
        "error": float(database.errors([layer.name])[0, column]),
        "note": _why(table, row, column, level == DENSE),
    }


def _why(table: LatencyTable, row: int, column: int, is_dense: bool) -> str:
    """Why a layer stayed dense or is not faster, in words; empty when there is nothing to explain."""
    dense, fastest = table.seconds[row, 0], table.seconds[row].min()
    if fastest >= dense:
        return "no sparsity makes it faster in this runtime" + ("" if is_dense else "; pruned all the same")
    if not table.sparse[row].any():
        return "the engine has no sparse kernel for it"
    if is_dense:
        return f"left dense; at best {dense / fastest:.2f}x faster"
    return "" if table.seconds[row, column] < dense else "not faster at this level"
