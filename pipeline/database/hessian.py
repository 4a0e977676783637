"""Layer Hessians from one pass over the calibration samples, or in parts, layer after layer, where memory is short.

For a layer that computes W x on input patches x (d,), the squared output error of changed weights is
tr((W - W0) H (W - W0)^T) with H = E[x x^T] (d, d), the mean over samples and positions, without padding.
Everything that the pruners know about the data is in H.

Source: Frantar & Alistarh, OBC (NeurIPS 2022), section 3 (H = 2 X X^T there; a constant factor changes nothing).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
import torch

from onnx_spdy.models import InputPatches, Layer, Suspended
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.matmul import fast_float32
from onnx_spdy.pipeline.database.patch_products import Part, PatchProducts
from onnx_spdy.pipeline.network import Network, Weights
from onnx_spdy.pipeline.padding import Padding
from onnx_spdy.pipeline.progress import Progress, ignore
from onnx_spdy.pipeline.tasks import IN_PROCESS, Tasks, in_order

SHARD = 8  # batches whose products are added by one task; the same whoever works
KEPT_BYTES = 1 << 28  # of values between layers


def hessian_bytes(layer: Layer) -> int:
    """Memory that a layer needs while its Hessian is collected: the long sum, the short one and a product.

    Where several nodes multiply by its weight, a shard has a long sum of its own.
    """
    return (16 if len(layer.nodes) == 1 else 24) * int(np.prod(layer.shape[1:])) ** 2


def collect_hessians(
    network: Network,
    layers: Sequence[Layer],
    samples: Samples,
    progress: Progress = ignore,
    tasks: Tasks = IN_PROCESS,
) -> dict[str, torch.Tensor]:
    """The Hessian of each layer in the dense network, all from one pass; see `CalibrationPass.hessians`."""
    return CalibrationPass(network, samples, tasks).hessians(layers, progress)


class CalibrationPass:
    """Calibration samples on their way through the dense network, which stop where Hessians are wanted.

    Args:
        network: run with its dense weights.
        samples: calibration samples.
        tasks: who does it.
    """

    def __init__(self, network: Network, samples: Samples, tasks: Tasks = IN_PROCESS) -> None:
        self._network, self._tasks = network, tasks
        batches = network.batches(samples)
        self._shards = [batches[start : start + SHARD] for start in range(0, len(batches), SHARD)]
        self._stopped: list[Suspended] = []  # each batch where it stopped; none where they start again

    @property
    def step(self) -> int:
        """The node that comes next on their way."""
        return self._stopped[0].step if self._stopped else 0

    def hessians(
        self,
        layers: Sequence[Layer],
        progress: Progress = ignore,
        *,
        goes_on: bool = False,
        behind: Weights | None = None,
    ) -> dict[str, torch.Tensor]:
        """The Hessian of each of these layers.

        The samples are taken in shards of `SHARD` batches, a task each, and the shards' sums are added in order. In
        this process they go on from where they stopped when Hessians of earlier layers were made, up to the last of
        these. What flows between layers is kept up to `KEPT_BYTES`; where it is more, they start again.

        Memory: at most `hessian_bytes` summed over the layers, and twice `PATCH_BYTES` of patch_products.py: patches
        are copied out a few samples at a time and never kept. Layers may be on any device: products are taken there,
        the long sum is kept on the CPU.

        A layer whose weight several nodes multiply by has the mean over what all of them see.

        An input that is always zero gives an exact row and column of zeros; with fewer samples than inputs H is
        singular. Both are left as they are here: what a pruner makes of them is its business (see `damped` in
        quadratic.py).

        Args:
            layers: those of the network's layers that are wanted.
            progress: called with (samples done, samples, "").
            goes_on: whether those of later layers will be asked for.
            behind: where the samples are to go through what is pruned already, the weights of all pruned layers that
                have a node from `step` on: the samples stop before these layers, whatever room that takes, and then run
                through them, which are dense, once more than needed. None where they go through the dense network.
        Returns:
            layer name -> H (d, d) float64, d = in * prod(kernel), in the order of `weight.flatten(1)`.
        """
        totals = [ShardSum() for _ in layers]
        done, count = 0, sum(len(batch) for shard in self._shards for batch in shard)
        parallel = self._tasks.is_parallel and behind is None
        found = self._in_tasks(layers) if parallel else self._here(layers, goes_on, behind)
        for shard, sums in zip(self._shards, found, strict=True):
            for total in totals:
                total.add(sums.pop(0))  # not kept while the next shard is computed
            done += sum(map(len, shard))
            progress(done, count, "")
        self._network.let_go()
        return {layer.name: total.mean(self._network, layer) for layer, total in zip(layers, totals, strict=True)}

    def _in_tasks(self, layers: Sequence[Layer]) -> Iterator[list[ShardSum]]:
        """The sums of each layer over each shard, from the beginning of the network."""
        needs = sum(map(hessian_bytes, layers))
        collection = _Collection(self._network, tuple(layers))
        return in_order(self._tasks.map(_sums_of, collection, self._shards, lambda shard: needs))

    def _here(self, layers: Sequence[Layer], goes_on: bool, behind: Weights | None) -> Iterator[list[ShardSum]]:
        """The same from where the samples stopped."""
        graph = self._network.graph
        steps = [graph.step_of(name) for layer in layers for name in layer.nodes]
        first, last = min(steps, default=0), max(steps, default=0) + 1
        before, self._stopped = self._stopped, []
        count = sum(map(len, self._shards))
        starts: Iterator[Suspended | None] = iter(before)
        if not before or before[0].step > first:
            starts = repeat(None)

        def run(batch: Samples) -> None:
            if behind is not None:
                self._stopped.append(self._network.advance(batch, next(starts), first, behind))
                self._network.advance(batch, self._stopped[-1], last, behind)
                return
            stopped = self._network.advance(batch, next(starts), last)
            if goes_on and stopped.bytes * count <= KEPT_BYTES:
                self._stopped.append(stopped)

        for shard in self._shards:
            yield _sums(self._network, layers, shard, run)
        if len(self._stopped) < count:  # a batch may be smaller than others
            self._stopped = []


@dataclass(frozen=True)
class _Collection:
    """What all shards have in common."""

    network: Network
    layers: tuple[Layer, ...]


@dataclass
class ShardSum:
    """The sum of x x^T of one layer over some samples.

    Attributes:
        count: how many patches x it is of.
        parts: as `PatchProducts` gives them; float32 where they were added in float32 alone, float64 otherwise.
    """

    count: int = 0
    parts: dict[Part, np.ndarray] = field(default_factory=dict)

    def add(self, other: ShardSum) -> None:
        """Add another sum, in float64."""
        self.count += other.count
        for part, values in other.parts.items():
            if part in self.parts:
                self.parts[part] += values
            else:
                self.parts[part] = values.astype(np.float64)

    def mean(self, network: Network, layer: Layer) -> torch.Tensor:
        """H (d, d) float64."""
        parts = {part: torch.from_numpy(values) for part, values in self.parts.items()}
        matrix = PatchProducts(InputPatches(network.model, layer)).matrix(parts)
        self.parts = {}
        return matrix.div_(max(1, self.count))


def _sums_of(collection: _Collection, shard: Sequence[Samples]) -> list[ShardSum]:
    """The sums of each layer over the batches of a shard: a task."""
    network, layers = collection.network, collection.layers
    return _sums(network, layers, shard, lambda batch: network.run(batch))


def _sums(
    network: Network, layers: Sequence[Layer], shard: Sequence[Samples], run: Callable[[Samples], object]
) -> list[ShardSum]:
    """The sums of each layer over the batches of a shard.

    Args:
        run: takes a batch through the network, or as far as the layers are.
    """
    sums = {layer.name: _Sum(network, layer) for layer in layers}
    hooks = [
        network.graph.node(name).register_forward_pre_hook(sums[layer.name].hook)
        for layer in layers
        for name in layer.nodes
    ]
    try:
        for batch in shard:
            for one in sums.values():
                one.padding = Padding(batch.samples_first)
            with torch.inference_mode():
                run(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [one.sum() for one in sums.values()]


class _Sum:
    """Running sum of x x^T of one layer: products and short sums in float32, the long sum in float64."""

    FLUSH = 8  # products added in float32 before they go to the float64 sum, which costs several times as much

    def __init__(self, network: Network, layer: Layer) -> None:
        self._products = PatchProducts(InputPatches(network.model, layer))
        self._total = ShardSum()
        self._recent: dict[Part, torch.Tensor] = {}
        self._calls = self._count = 0
        self._has_positions = layer.op != "Conv"  # before its channels
        self.padding = Padding({})  # of the batch that runs

    def hook(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if self._calls and self._calls % self.FLUSH == 0:
            self._total.add(self._flushed())
        values = inputs[0].float()
        if self._has_positions:
            values = self.padding.real_rows(values)
        self._count += self._products.count(values)
        self._calls += 1
        for part, product in self._products(values):
            self._recent[part] = self._recent[part].add_(product) if part in self._recent else product

    def sum(self) -> ShardSum:
        """Of all calls so far. What was never flushed stays in float32, which holds it exactly in half the bytes."""
        last = self._flushed()
        if self._total.parts:
            self._total.add(last)
            last = self._total
        return ShardSum(self._count, last.parts)

    def _flushed(self) -> ShardSum:
        recent, self._recent = self._recent, {}
        return ShardSum(0, {part: values.numpy(force=True) for part, values in recent.items()})


@fast_float32()
def squared_error(change: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(D H D^T): mean squared output error of a layer whose weights change by D (out, d)."""
    return float(((change @ hessian) * change).sum())
