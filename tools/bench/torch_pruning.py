"""Torch-Pruning as a yardstick: its narrow networks at the same measured speedup, trained equally long.

Torch-Pruning (DepGraph) removes channels from a PyTorch module by the norms of what depends on them, or by a first- or
second-order criterion. Here the fraction that it removes is halved and halved again until its network, exported and
prepared as ours, measures the speedup; then both are trained in the same way (`onnx-spdy finetune`).

Needs the package torch-pruning. Source: Fang et al., DepGraph (CVPR 2023).
"""

from __future__ import annotations

import copy
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import torch
import typer
from torch import nn

from onnx_spdy.models import Prepared, export_module, prepare, save_model
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.engine import open_runtime
from onnx_spdy.pipeline.metric import Metric
from onnx_spdy.pipeline.training.finetune import finetune
from onnx_spdy.pipeline.validate import evaluate, validate
from onnx_spdy.runtimes import Runtime, Workload
from onnx_spdy.runtimes.atomic import WorkFolder
from onnx_spdy.runtimes.errors import OnnxSpdyError
from onnx_spdy.tools.options import Batch, Data, MetricName, RuntimeName, Threads, minutes, several
from onnx_spdy.tools.progress import ProgressBars
from onnx_spdy.tools.results import Json, write_results
from onnx_spdy.tools.specs import load_function, load_metric, load_samples, load_workload
from onnx_spdy.tools.table import print_table

CRITERIA = ("magnitude", "taylor", "hessian")
HALVINGS = 6
VISITS = 6
LEARNT_FROM = 256  # samples whose gradients the criteria of first and second order see
GRADIENT_BATCH = 32


class NoTorchPruning(OnnxSpdyError, ValueError):
    """Torch-Pruning is missing, or can't prune the module."""


@dataclass(frozen=True)
class Row:
    """One network of Torch-Pruning.

    Attributes:
        ratio: the fraction of channels that it was told to remove.
        speedup, lower: measured against the dense network in turns, and its lower bound.
        metric_dense, metric, metric_trained: of the dense network, one-shot, and after training.
    """

    criterion: str
    target: float
    ratio: float
    speedup: float
    lower: float
    metric_dense: float
    metric: float
    metric_trained: float | None
    train_seconds: float | None


def bench(
    model: Annotated[str, typer.Argument(metavar="FILE.py:FUNCTION", help="gives (module, example inputs)")],
    data: Data,
    runtime: RuntimeName,
    evaluation: Annotated[str, typer.Option("--eval", metavar="DATA", help="samples for the metric")],
    speedup: Annotated[str, typer.Option("--speedup", metavar="X[,X...]")] = "2,3",
    criteria: Annotated[str, typer.Option("--criterion", metavar="NAME[,NAME...]")] = "magnitude,taylor",
    metric: MetricName = "top1",
    batch: Batch = 1,
    threads: Threads = None,
    round_to: Annotated[int, typer.Option("--round-to", min=1, help="channels stay a multiple of so many")] = 16,
    local: Annotated[bool, typer.Option("--local", help="the same fraction in every layer; its own default")] = False,
    train: Annotated[float | None, typer.Option("--train", metavar="MINUTES", help="of each network")] = None,
    train_data: Annotated[str | None, typer.Option("--train-data", metavar="DATA", help="default: --data")] = None,
    json: Json = None,
) -> None:
    """Prune a module with Torch-Pruning to measured speedups, train it, and judge it."""
    module, example = load_function(model, "the model")()
    dense = prepare(export_module(module, example))
    samples = load_samples(data, dense)
    learnt = load_samples(train_data, dense) if train_data else samples
    judge = Judge(load_samples(evaluation, dense), load_metric(metric), learnt, minutes(train))
    workload = load_workload(samples, dense, batch, threads)
    rows: list[Row] = []
    with open_runtime(runtime) as engine, ProgressBars() as bars, WorkFolder() as folder:
        wanted = [(c, x) for c in criteria.split(",") for x in several(speedup, float, "--speedup")]
        for number, (criterion, target) in enumerate(wanted, 1):
            make = Pruning(module, example, criterion, samples, round_to, not local)
            found = at_speedup(dense, make, engine, workload, target, Path(folder))
            rows.append(judge(dense, found, criterion, target, Path(folder)))
            bars.stage("networks")(number, len(wanted), f"{criterion} {target:g}x")
            write_results(json, "bench_torch_pruning", {"rows": [asdict(row) for row in rows]})
    show(rows, metric)


class Pruning:
    """Prunes copies of a module.

    Raises:
        NoTorchPruning: the package is missing, or there is no such criterion.
    """

    def __init__(
        self, module: nn.Module, example: Any, criterion: str, samples: Samples, round_to: int, is_global: bool
    ) -> None:
        try:
            import torch_pruning
        except ImportError as exc:
            raise NoTorchPruning(f"Torch-Pruning can't be imported ({exc}); pip install torch-pruning") from exc
        if criterion not in CRITERIA:
            raise NoTorchPruning(f"unknown criterion {criterion!r}; known: {', '.join(CRITERIA)}")
        self._tp, self._module, self.example = torch_pruning, module, example
        self._criterion, self._round_to, self._is_global = criterion, round_to, is_global
        self._samples = samples.take(slice(0, LEARNT_FROM))

    def __call__(self, ratio: float) -> nn.Module:
        """A copy without this fraction of its channels; the layers that make the outputs keep theirs."""
        module = copy.deepcopy(self._module).eval()
        importances = {
            "magnitude": self._tp.importance.GroupMagnitudeImportance,
            "taylor": self._tp.importance.GroupTaylorImportance,
            "hessian": self._tp.importance.GroupHessianImportance,
        }
        importance = importances[self._criterion]()
        pruner = self._tp.pruner.BasePruner(
            module, self.example, importance, pruning_ratio=ratio, global_pruning=self._is_global,
            ignored_layers=last_layers(module), round_to=self._round_to,
        )  # fmt: skip
        if self._criterion != "magnitude":
            self._learn(module, importance)
        pruner.step()
        return module

    def _learn(self, module: nn.Module, importance: Any) -> None:
        """Gradients of the cross entropy; of each sample where the criterion squares them."""
        inputs = torch.from_numpy(next(iter(self._samples.inputs.values())))
        if self._samples.target is None:
            raise NoTorchPruning(f"criterion {self._criterion!r} needs labels in the data")
        labels = torch.from_numpy(np.asarray(self._samples.target))
        module.zero_grad()
        for some, target in zip(inputs.split(GRADIENT_BATCH), labels.split(GRADIENT_BATCH), strict=True):
            losses = nn.functional.cross_entropy(module(some), target, reduction="none")
            if self._criterion == "taylor":
                losses.sum().backward()
                continue
            importance.zero_grad()
            for loss in losses:
                module.zero_grad()
                loss.backward(retain_graph=True)
                importance.accumulate_grad(module)


def last_layers(module: nn.Module) -> list[nn.Module]:
    """The linear layers that nothing but the output follows: the last one."""
    linear: list[nn.Module] = [part for part in module.modules() if isinstance(part, nn.Linear)]
    return linear[-1:]


@dataclass(frozen=True)
class Found:
    """A network at a speedup."""

    ratio: float
    network: Prepared
    speedup: float
    lower: float


def at_speedup(
    dense: Prepared,
    make: Pruning,
    engine: Runtime,
    workload: Workload,
    target: float,
    folder: Path,
) -> Found:
    """The network with the least removed that measures the speedup.

    Raises:
        NoTorchPruning: not even the most that it may remove does.
    """
    save_model(dense.proto, folder / "dense.onnx")

    def measured(ratio: float) -> Found:
        network = prepare(export_module(make(ratio), make.example))
        save_model(network.proto, folder / "pruned.onnx")
        found = validate(folder / "dense.onnx", folder / "pruned.onnx", engine, workload, visits=VISITS, rounds=2)
        return Found(ratio, network, found.speedup, found.lower)

    least, most, best = 0.0, 0.95, None
    for _ in range(HALVINGS):
        found = measured((least + most) / 2)
        if found.speedup >= target:
            most, best = found.ratio, found
        else:
            least = found.ratio
    if best is None:
        raise NoTorchPruning(f"no fraction of the channels that were tried measures {target:g}x; lower --speedup")
    return best


@dataclass(frozen=True)
class Judge:
    """Tells what a network is worth, before and after training.

    Attributes:
        samples, metric: what it is judged on.
        learnt: what it is trained on.
        seconds: of training; None for none.
    """

    samples: Samples
    metric: Metric
    learnt: Samples
    seconds: float | None

    def __call__(self, dense: Prepared, found: Found, criterion: str, target: float, folder: Path) -> Row:
        before = self._score(dense.proto, folder), self._score(found.network.proto, folder)
        trained, start = None, time.monotonic()
        if self.seconds:
            done = finetune(dense, found.network.proto, self.learnt, epochs=1000, time_limit_seconds=self.seconds)
            trained = self._score(done.model, folder)
        took = time.monotonic() - start if self.seconds else None
        return Row(criterion, target, found.ratio, found.speedup, found.lower, *before, trained, took)

    def _score(self, network: onnx.ModelProto, folder: Path) -> float:
        save_model(network, folder / "judged.onnx")
        return evaluate(folder / "judged.onnx", self.samples, self.metric)


def show(rows: list[Row], metric: str) -> None:
    """For people."""
    cells = [
        (row.criterion, f"{row.target:g}x", f"{row.ratio:.3f}", f"{row.speedup:.3f}x ({row.lower:.3f})",
         f"{row.metric_dense:.4f}", f"{row.metric:.4f}",
         "-" if row.metric_trained is None else f"{row.metric_trained:.4f}")
        for row in rows
    ]  # fmt: skip
    columns = ("criterion", "target", "fraction", "measured (lower)", f"{metric} dense", "pruned", "trained")
    print_table("Torch-Pruning", columns, cells)
