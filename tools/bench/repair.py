"""Very little data: the metric dense, pruned layer by layer, statistics corrected, and repaired.

    python -m onnx_spdy.tools.bench.repair MODEL --data DATA --eval DATA --level 2:4 --samples 64,256,1024
    python -m onnx_spdy.tools.bench.repair MODEL --data DATA --eval DATA --profile 2x.json --profile 3x.json

All prunable layers but the first and the last go to one level, or every layer to its level in each of the profiles;
magnitude pruning stands beside the default pruner. The metric is computed in PyTorch, in bfloat16 where the CPU has it:
the dense network too, so differences count.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

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
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.training.repair import RATE, repair
from onnx_spdy.tools.expected import run_command
from onnx_spdy.tools.progress import ProgressBars
from onnx_spdy.tools.specs import load_metric, load_network, load_samples


def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL")],
    data: Annotated[str, typer.Option(metavar="DATA", help="calibration samples")],
    evaluation: Annotated[str, typer.Option("--eval", metavar="DATA")],
    metric: Annotated[str, typer.Option(metavar="M")] = "top1",
    level: Annotated[str, typer.Option(metavar="LEVEL", help="2:4, unstructured@0.8000, ...")] = "2:4",
    profile: Annotated[
        list[Path] | None, typer.Option(metavar="F", help="instead of --level; may be given several times")
    ] = None,
    samples: Annotated[str, typer.Option(metavar="N[,N...]")] = "64,256,1024",
    pruners: Annotated[str, typer.Option(metavar="NAME[,NAME]")] = f"magnitude,{DEFAULT_PRUNER}",
    database: Annotated[Path | None, typer.Option(metavar="DIR", help="saves pruning again by its pruner")] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    rate: Annotated[float, typer.Option()] = RATE,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(metavar="F", help="all figures as JSON")] = None,
) -> None:
    """Prune, correct and repair with so many samples, and print the metric after each step."""
    network, measure = Network(load_network(model)), load_metric(metric)
    inner = [layer.name for layer in network.layers[1:-1]]
    tasks = {str(path): Profile.load(path).levels for path in profile or []} or {
        level: dict.fromkeys(inner, Level.parse(level))
    }
    whole, held = load_samples(data, network.model), load_samples(evaluation, network.model)
    weights = open_database(database) if database else None
    known = weights.made_from["pruner"] if weights else None
    names = pruners.split(",")
    # Only what is pruned here, and by a pruner whose weights aren't there already, needs a Hessian.
    changed = {name for levels in tasks.values() for name, one in levels.items() if one != DENSE}
    to_prune = [layer for layer in network.layers if layer.name in changed] if set(names) != {known} else []
    rows = []
    print(f"dense {evaluated(network, held, measure):.4f}, {len(held)} evaluation samples", flush=True)
    for count in map(int, samples.split(",")):
        some = whole.take(slice(0, count))
        hessians = collect_hessians(network, to_prune, some) if to_prune else {}
        correction = StatisticsCorrection(network, some)
        for name, levels in tasks.items():
            for pruner in names:
                network.reset()
                start = time.monotonic()
                stored = weights if pruner == known else None
                stitch(network, levels, pruner_named(pruner), hessians, stored)
                row = {"prune_seconds": time.monotonic() - start} | steps(
                    network, some, correction, levels,
                    lambda: evaluated(network, held, measure), epochs, rate, seed,
                )  # fmt: skip
                rows.append({"samples": count, "levels": name, "pruner": pruner, **row})
                print(
                    "  ".join(f"{key} {value:.4g}" if key in row else f"{value}" for key, value in rows[-1].items()),
                    flush=True,
                )
    if out:
        out.write_text(json.dumps({"rows": rows}, indent=1), encoding="utf8")


def stitch(
    network: Network,
    levels: Mapping[str, Level],
    prune: Pruner,
    hessians: Mapping[str, torch.Tensor],
    stored: LayerDatabase | None,
) -> None:
    """Prune each layer of a dense network to its level, or take it from the database."""
    for layer in network.layers:
        level = levels.get(layer.name, DENSE)
        if stored:
            network.set(layer.weight, stored.weight(network, layer, level))
        elif level != DENSE:
            dense = to_canonical(layer, network.dense(layer.weight)).contiguous()
            (pruned,) = prune(dense, hessians[layer.name], [level])
            network.set(layer.weight, from_canonical(layer, pruned))


def steps(
    network: Network,
    samples: Samples,
    correction: StatisticsCorrection,
    levels: Mapping[str, Level],
    score: Callable[[], float],
    epochs: int | None,
    rate: float,
    seed: int,
) -> dict[str, float]:
    """The metric of the pruned network and after each step, and the seconds of repair."""
    layers = [layer for layer in network.layers if levels.get(layer.name, DENSE) != DENSE]
    found = {"pruned": score()}
    correction.apply(layers)
    found["corrected"] = score()
    start = time.monotonic()
    with ProgressBars() as watch:
        training = repair(
            network, layers, samples, epochs=epochs, rate=rate, seed=seed,
            progress=lambda done, total, note: watch("repair", done, total, note),
        )  # fmt: skip
    found |= {"repair_seconds": time.monotonic() - start, "repaired": score()}
    return found | {"error_before": training.loss_before, "error_after": training.loss_after}


def evaluated(network: Network, samples: Samples, metric: Metric) -> float:
    """The metric of the network with the weights that it has now."""
    parts = [outputs for _, outputs in network.outputs(samples, bfloat16=network.bfloat16)]
    outputs = {name: np.concatenate([part[name].float().numpy() for part in parts]) for name in parts[0]}
    return metric(outputs, samples.target)


def main() -> None:
    """The command line."""
    run_command(bench)


if __name__ == "__main__":
    main()
