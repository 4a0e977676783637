"""The network as the stages see it: a TorchGraph with its prunable layers, run with the weights that a stage names.

What a pruned network is, is a value: `Weights`. The graph is shared by all stages, and what it holds between two runs
is nobody's business: whoever runs it says with which weights, and only those that changed are copied.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import onnx
import torch

from onnx_spdy.models import Layer, Prepared, Suspended, TorchGraph, find_layers, fixed_batch, write_weights
from onnx_spdy.models.int8.fake import Rounding, activation_rounding
from onnx_spdy.models.int8.grid import Grid
from onnx_spdy.models.operators import read_tensor
from onnx_spdy.models.stored import is_mapped
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.level import DENSE, Level
from onnx_spdy.pipeline.padding import Padding
from onnx_spdy.pipeline.site import NothingToPrune

logger = logging.getLogger(__name__)

BATCH_SIZE = 32  # large enough for full speed on a CPU, small enough to stay in its caches

Keep = Callable[[Suspended], None]
Weights = Mapping[str, torch.Tensor]  # initializer -> values, as the file stores them; never changed in place
INPUT_GRID = "int8 input of "  # and the name of a node: in `Weights`, the grid to which what it reads is rounded
DENSE_WEIGHTS: Weights = MappingProxyType({})  # what isn't named is dense


class Network:
    """A prepared network that can be run in PyTorch with other weights.

    Attributes:
        prepared: the dense network.
        graph: the TorchGraph that computes; which weights it holds depends on who ran it last.
        layers: the prunable layers in graph order.
        skipped: the other layers that carry weights, with the reason in `skip`.
        bfloat16: whether it runs faster in bfloat16 here, and may: one that is stored in half precision mixes types
            as it does on purpose.
    """

    def __init__(self, prepared: Prepared, *, for_pruning: bool = True) -> None:
        """Raises NothingToPrune where it is for pruning and no layer can be.

        Those of a narrow network may all be too small for it.
        """
        self.prepared = prepared
        self.graph = TorchGraph(prepared.proto).eval().requires_grad_(False)
        for tensor in (*self.graph.parameters(), *self.graph.buffers()):
            tensor.data = _laid_out(tensor.data)  # all at once with `.to` fails for graphs that hold rank 5 too
        self.layers = prepared.prunable
        self.skipped = tuple(layer for layer in prepared.layers if not layer.prunable)
        if for_pruning and not self.layers:
            reasons = (
                "; ".join(f"{layer.name}: {layer.skip}" for layer in self.skipped[:3]) or "no Conv, Gemm or MatMul"
            )
            raise NothingToPrune(f"the network has no prunable layer ({reasons})")
        self.bfloat16 = has_bfloat16() and not any(p.dtype.itemsize == 2 for p in self.graph.parameters())
        self._parameters: dict[str, torch.nn.Parameter] = dict(self.graph.named_parameters())
        self._dense: dict[str, torch.Tensor] = {}  # of those that were asked for or overwritten
        stored = {tensor.name: tensor for tensor in prepared.proto.graph.initializer if is_mapped(tensor)}
        self._mapped = {name: tensor for name, tensor in stored.items() if name in self._parameters}
        self._loaded: Weights = DENSE_WEIGHTS
        self._rounded: dict[str, Rounding] = {}  # node -> what is done to its input now
        self._hooked: set[str] = set()  # nodes whose input may be rounded
        self._left_out: set[int] = set()  # numbers of samples that a warning told
        self._trained: set[str] = set()  # changed in place now

    def __reduce__(self) -> tuple[type[Network], tuple[Prepared]]:
        """Where it is sent to it holds its dense weights."""
        return Network, (self.prepared,)

    @property
    def model(self) -> onnx.ModelProto:
        """The graph of the dense network; never changed."""
        return self.prepared.proto

    @property
    def trainable_names(self) -> Set[str]:
        """Names of the weights and biases that the graph computes with."""
        return self._parameters.keys()

    @property
    def is_mapped(self) -> bool:
        """Whether weights stay in their file until they are read."""
        return bool(self._mapped)

    @property
    def sha256(self) -> str:
        """Of the dense network."""
        return self.prepared.sha256

    def dense(self, initializer: str) -> torch.Tensor:
        """The dense values of a weight or bias, as the file stores them."""
        if initializer in self._mapped:
            return read_tensor(self._mapped[initializer])
        if initializer not in self._dense:  # nobody has overwritten it yet
            self._dense[initializer] = self._parameters[initializer].detach().clone()
        return self._dense[initializer]

    def values(self, initializer: str, weights: Weights) -> torch.Tensor:
        """The values of a weight or bias of the network with these weights."""
        return weights[initializer] if initializer in weights else self.dense(initializer)

    def load(self, weights: Weights) -> None:
        """Make the graph compute with these weights; those that aren't named are dense.

        Where a node's `input_grid` is among them, what the node reads is rounded to it.
        """
        for name in {**self._loaded, **weights}:
            if name.startswith(INPUT_GRID):
                if weights.get(name) is not self._loaded.get(name):
                    self._round_input(name.removeprefix(INPUT_GRID), weights.get(name))
            elif name in self._trained or weights.get(name) is not self._loaded.get(name):
                self.dense(name)  # kept before it is overwritten
                self._parameters[name].data.copy_(self.values(name, weights))
        self._loaded = dict(weights)

    def _round_input(self, node: str, grid: torch.Tensor | None) -> None:
        if grid is None:
            del self._rounded[node]
            return
        self._rounded[node] = activation_rounding(unpacked_grid(grid))
        if node in self._hooked:
            return
        self._hooked.add(node)

        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
            if node not in self._rounded or inputs[0] is None:
                return inputs
            return self._rounded[node](inputs[0]), *inputs[1:]

        self.graph.node(node).register_forward_pre_hook(hook)

    def let_go(self) -> None:
        """Map the dense weights afresh that are mapped: what was read of them so far is out of memory then."""
        for name, tensor in self._mapped.items():
            if name not in self._loaded and name not in self._trained:
                self._parameters[name].data = _laid_out(read_tensor(tensor))

    @contextlib.contextmanager
    def trainable(self, names: Sequence[str], weights: Weights) -> Iterator[dict[str, torch.nn.Parameter]]:
        """The parameters of these initializers, loaded with `weights`, for an optimizer to change in place.

        While it lasts, `forward` runs the network as it is being trained; afterwards it is forgotten.
        """
        self.load(weights)
        for name in names:
            self.dense(name)
        parameters = {name: self._parameters[name] for name in names}
        self._trained = set(names)
        try:
            yield parameters
        finally:
            self.load({name: self.dense(name) for name in names})
            self._trained = set()

    def batch_size(self, wanted: int = BATCH_SIZE) -> int:
        """`wanted`, or the batch that the graph itself fixes."""
        return fixed_batch(self.model) or wanted

    def run(
        self,
        samples: Samples,
        weights: Weights = DENSE_WEIGHTS,
        start: Suspended | None = None,
        keep: Keep | None = None,
        keep_before: Sequence[int] = (),
    ) -> dict[str, torch.Tensor]:
        """Outputs for one batch, zero at padding; for `start`, `keep` and `keep_before` see `TorchGraph.run`."""
        self.load(weights)
        return self.forward(samples, start, keep, keep_before)

    def forward(
        self,
        samples: Samples,
        start: Suspended | None = None,
        keep: Keep | None = None,
        keep_before: Sequence[int] = (),
    ) -> dict[str, torch.Tensor]:
        """The same with the weights that the graph holds, which is for those who train it; see `trainable`."""
        if start is None and keep is None:
            outputs = self.graph(as_tensors(samples))
        else:
            outputs = self.graph.run(as_tensors(samples), start, keep, keep_before)
        padding = Padding(samples.samples_first)
        return {name: padding.zeroed(values) for name, values in outputs.items()}

    def whole(self, index: np.ndarray) -> np.ndarray:
        """These samples as the graph takes them: a number of them that fills its batch, where it fixes one.

        Those that don't fill the last batch are left out, and a warning is logged. Fewer than one batch are repeated,
        each as often as any other, so that means over them stay what they are.

        Args:
            index: numbers of samples.
        """
        size = fixed_batch(self.model) or 1
        left = len(index) % size
        if left == 0:
            return index
        if len(index) < size:
            return np.resize(index, math.lcm(len(index), size))
        if left not in self._left_out:
            self._left_out.add(left)
            logger.warning(
                "%d of %d samples are left out: they don't fill a batch of %d, which the graph fixes",
                left, len(index), size,
            )  # fmt: skip
        return index[:-left]

    def first(self, samples: Samples, count: int) -> Samples:
        """The first so many samples, at least a batch where the graph fixes one."""
        return samples.take(slice(0, max(count, self.batch_size(1))))

    def last(self, samples: Samples, count: int) -> Samples:
        """The last so many; the same."""
        return samples.take(slice(-max(count, self.batch_size(1)), None))

    def batches(self, samples: Samples, size: int = BATCH_SIZE) -> list[Samples]:
        """The samples in batches of `size`, or of as many as the graph fixes; there, those that `whole` keeps."""
        index = self.whole(np.arange(len(samples)))
        kept = samples if len(index) == len(samples) else samples.take(index)
        return list(kept.batches(self.batch_size(size)))

    def advance(
        self, samples: Samples, start: Suspended | None, stop: int, weights: Weights = DENSE_WEIGHTS
    ) -> Suspended:
        """Run one batch through the network up to the node numbered `stop`; see `TorchGraph.advance`."""
        self.load(weights)
        return self.graph.advance(as_tensors(samples), start, stop)

    def run_together(
        self,
        batches: Sequence[Samples],
        after: Callable[[torch.nn.Module, list[torch.Tensor]], list[torch.Tensor]],
        weights: Weights = DENSE_WEIGHTS,
    ) -> None:
        """Run all batches node by node; see `TorchGraph.run_together`."""
        self.load(weights)
        self.graph.run_together([as_tensors(batch) for batch in batches], after)

    def outputs(
        self, samples: Samples, weights: Weights = DENSE_WEIGHTS, *, bfloat16: bool = False
    ) -> Iterator[tuple[Samples, dict[str, torch.Tensor]]]:
        """Each batch of the samples with its outputs, without gradients; computed in bfloat16 where that is safe."""
        for batch in self.batches(samples):
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                outputs = self.run(batch, weights)
            yield batch, outputs


class InNumPy(Mapping[str, np.ndarray]):
    """Weights as NumPy arrays, each made when it is asked for."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> np.ndarray:
        return self._weights[name].numpy(force=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


@dataclass(frozen=True)
class Int8Network:
    """A network in int8.

    Attributes:
        proto: standard ONNX, QDQ.
        ranges: which way to choose the ranges of activations was best.
        corrected: whether its biases are corrected.
        loss: calibration loss on the judged samples.
        layers: names of the layers that compute in int8.
        skipped: name of a layer that can't -> why.
    """

    proto: onnx.ModelProto
    ranges: str
    corrected: bool
    loss: float
    layers: tuple[str, ...]
    skipped: Mapping[str, str]


@dataclass(frozen=True)
class PrunedNetwork:
    """What a pruned network has that the dense one hasn't.

    Attributes:
        base: the graph that the weights belong to: the dense one, or the one from which units were cut out.
        weights: initializer -> values as the file stores them, of every weight and bias that differs from the base's.
        levels: name of a site -> level, of all sites.
        layers: those of the dense network in which weights were removed, in graph order.
        widths: group -> units that stay, ascending, of the groups that are narrower.
        corrected: what was corrected in it, in words, or why nothing was.
        int8: the same in int8, which is what is deployed; None where it stays in floating point.
        trained_whole: whether layers that lost nothing were trained too.
    """

    base: Prepared
    weights: Weights
    levels: Mapping[str, Level]
    layers: tuple[Layer, ...] = ()
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    corrected: str = "not applied"
    int8: Int8Network | None = None
    trained_whole: bool = False

    @property
    def int8_nodes(self) -> frozenset[str] | None:
        """Names of the nodes with weights that compute in int8; None for all that can."""
        chosen = {name for name, level in self.levels.items() if level.is_int8}
        if len(chosen) == len(self.levels):
            return None
        layers = find_layers(self.base.proto, minimum_weights=0)
        return frozenset(name for layer in layers if layer.name in chosen for name in layer.nodes)

    def in_float(self) -> onnx.ModelProto:
        """Its graph in floating point."""
        return write_weights(self.base.proto, InNumPy(self.weights))

    @classmethod
    def with_zeros(cls, network: Network, weights: Weights, levels: Mapping[str, Level]) -> PrunedNetwork:
        """A network whose layers are at these levels, of those that aren't widths."""
        layers = tuple(layer for layer in network.layers if levels.get(layer.name, DENSE) != DENSE)
        return cls(network.prepared, weights, levels, layers)


def input_grid(node: str) -> str:
    """The name in `Weights` of the grid to which what a node reads is rounded."""
    return INPUT_GRID + node


def packed_grid(grid: Grid) -> torch.Tensor:
    """(3 + scales,) float64: the zero point, whether it is signed, the axis or -1, and the scales."""
    head = [grid.zero, grid.signed, -1 if grid.axis is None else grid.axis]
    return torch.tensor([*map(float, head), *np.atleast_1d(grid.scale).tolist()], dtype=torch.float64)


def unpacked_grid(packed: torch.Tensor) -> Grid:
    """What `packed_grid` packed."""
    zero, signed, axis, *scale = packed.tolist()
    of_axis = None if axis < 0 else int(axis)
    return Grid(np.array(scale[0] if of_axis is None else scale, np.float32), int(zero), bool(signed), of_axis)


def as_tensors(samples: Samples) -> dict[str, torch.Tensor]:
    """The inputs as a TorchGraph takes them; see `as_tensor`."""
    return {name: as_tensor(array) for name, array in samples.inputs.items()}


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; emulated, it would be slower than float32."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return False  # torch 2.9 can't tell
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """An array as a tensor, images in the memory layout in which CPUs convolve fastest."""
    return _laid_out(torch.from_numpy(array))


def _laid_out(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
