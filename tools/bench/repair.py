"""Very little data: the metric dense, pruned layer by layer, statistics corrected, and repaired.

All prunable layers but the first and the last go to one level, or every layer to its level in each of the profiles;
magnitude pruning stands beside the default pruner. The metric is computed in PyTorch, in bfloat16 where the CPU has it:
the dense network too, so differences count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from onnx_spdy.models import from_canonical, to_canonical
from onnx_spdy.pipeline.correct import StatisticsCorrection
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.hessian import collect_hessians
from onnx_spdy.pipeline.database.layer_database import LayerDatabase, open_database
from onnx_spdy.pipeline.database.pruners import DEFAULT_PRUNER, Pruner, pruner_named
from onnx_spdy.pipeline.level import DENSE, Level
from onnx_spdy.pipeline.metric import Metric
from onnx_spdy.pipeline.network import DENSE_WEIGHTS, Network, PrunedNetwork, Weights
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.site import Site
from onnx_spdy.pipeline.training.repair import RATE, repair
from onnx_spdy.tools.options import Data, Evaluation, MetricName, ModelArgument, Seed, several
from onnx_spdy.tools.progress import ProgressBars
from onnx_spdy.tools.results import Json, write_results
from onnx_spdy.tools.specs import load_metric, load_network, load_samples
from onnx_spdy.tools.table import print_table


def bench(
    model: ModelArgument,
    data: Data,
    evaluation: Evaluation,
    metric: MetricName = "top1",
    level: Annotated[str, typer.Option("--level", metavar="LEVEL", help="2:4, unstructured@0.8000, ...")] = "2:4",
    profile: Annotated[
        list[Path] | None, typer.Option("--profile", metavar="F", help="instead of --level; once for each profile")
    ] = None,
    samples: Annotated[str, typer.Option("--samples", metavar="N[,N...]")] = "64,256,1024",
    pruner: Annotated[str, typer.Option("--pruner", metavar="NAME[,NAME...]")] = f"magnitude,{DEFAULT_PRUNER}",
    database: Annotated[
        Path | None, typer.Option("--database", metavar="DIR", help="saves pruning again by its pruner")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="of repair")] = None,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="of repair")] = RATE,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Prune, correct and repair with so many samples; show the metric after each step."""
    network, measure = Network(load_network(model)), load_metric(metric)
    inner = [layer.name for layer in network.layers[1:-1]]
    tasks = {str(path): Profile.load(path).levels for path in profile or []} or {
        level: dict.fromkeys(inner, Level.parse(level))
    }
    whole, held = load_samples(data, network.prepared), load_samples(evaluation, network.prepared)
    weights = open_database(database) if database else None
    known = weights.made_from["pruner"] if weights else None
    names = pruner.split(",")
    # Only what is pruned here, and by a pruner whose weights aren't there already, needs a Hessian.
    changed = {name for levels in tasks.values() for name, chosen in levels.items() if chosen != DENSE}
    to_prune = [layer for layer in network.layers if layer.name in changed] if set(names) != {known} else []
    rows: list[dict[str, Any]] = []
    reference = evaluated(network, DENSE_WEIGHTS, held, measure)
    for count in several(samples, int, "--samples"):
        some = whole.take(slice(0, count))
        hessians = collect_hessians(network, to_prune, some) if to_prune else {}
        correction = StatisticsCorrection(network, some)
        for name, levels in tasks.items():
            for one in names:
                start = time.monotonic()
                stored = weights if one == known else None
                pruned = stitch(network, levels, pruner_named(one).prune, hessians, stored)
                row = {"prune_seconds": time.monotonic() - start} | steps(
                    network, pruned, some, correction,
                    lambda weights: evaluated(network, weights, held, measure), epochs, learning_rate, seed,
                )  # fmt: skip
                rows.append({"samples": count, "levels": name, "pruner": one, **row})
                content = {"metric": metric, "dense": reference, "evaluation_samples": len(held), "rows": rows}
                write_results(json, "bench_repair", content, seed)
    print_table(
        f"{metric} on {len(held)} samples; dense {reference:.4f}", [name.replace("_", " ") for name in rows[0]],
        [[f"{cell:.4g}" if isinstance(cell, float) else cell for cell in row.values()] for row in rows],
    )  # fmt: skip


def stitch(
    network: Network,
    levels: Mapping[str, Level],
    prune: Pruner,
    hessians: Mapping[str, torch.Tensor],
    stored: LayerDatabase | None,
) -> PrunedNetwork:
    """Each layer pruned to its level, or taken from the database."""
    weights: dict[str, torch.Tensor] = {}
    for layer in PrunedNetwork.with_zeros(network, {}, levels).layers:
        level = levels[layer.name]
        if stored:
            weights |= stored.weights(network, Site(layer.name, (layer,)), level)
        else:
            dense = to_canonical(layer, network.dense(layer.weight)).contiguous()
            (pruned,) = prune(dense, hessians[layer.name], [level])
            weights[layer.weight] = from_canonical(layer, pruned)
    return PrunedNetwork.with_zeros(network, weights, levels)


def steps(
    network: Network,
    pruned: PrunedNetwork,
    samples: Samples,
    correction: StatisticsCorrection,
    score: Callable[[Weights], float],
    epochs: int | None,
    rate: float,
    seed: int,
) -> dict[str, float]:
    """The metric of the pruned network and after each step, and the seconds of repair."""
    corrected = replace(pruned, weights=correction.apply(pruned.weights, pruned.layers))
    found = {"pruned": score(pruned.weights), "corrected": score(corrected.weights)}
    start = time.monotonic()
    with ProgressBars() as bars:
        repaired, training = repair(
            network, corrected, samples, epochs=epochs, rate=rate, seed=seed, progress=bars.stage("repair")
        )
    found |= {"repair_seconds": time.monotonic() - start, "repaired": score(repaired.weights)}
    return found | ({"error_before": training.loss_before, "error_after": training.loss_after} if training else {})


def evaluated(network: Network, weights: Weights, samples: Samples, metric: Metric) -> float:
    """The metric of the network with these weights."""
    parts = [outputs for _, outputs in network.outputs(samples, weights, bfloat16=network.bfloat16)]
    outputs = {name: np.concatenate([part[name].float().numpy() for part in parts]) for name in parts[0]}
    return metric(outputs, samples.target)
