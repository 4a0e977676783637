"""The network as the stages see it: a TorchGraph with its prunable layers, its dense outputs and its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
import torch

from onnx_spdy.models import Layer, Suspended, TorchGraph, find_layers, fixed_batch, model_sha256
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.loss import LOSSES, Loss, LossError, default_loss

BATCH_SIZE = 32  # large enough for full speed on a CPU, small enough to stay in its caches
LARGEST_BATCH = 64  # of the objective

Keep = Callable[[Suspended], None]


class Network:
    """A prepared ONNX model that can be run in PyTorch with other weights.

    Attributes:
        model: the prepared dense model; never changed.
        graph: the TorchGraph whose weights the stages exchange.
        layers: the prunable layers in graph order.
        skipped: the other layers that carry weights, with the reason in `skip`.
        bfloat16: whether it runs faster in bfloat16 here, and may: one that is stored in half precision mixes types
            as it does on purpose.
        edits: how often a weight or bias was exchanged: tells whoever keeps the network in some state that another did.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.graph = TorchGraph(model).eval().requires_grad_(False)
        for tensor in (*self.graph.parameters(), *self.graph.buffers()):
            if tensor.dim() == 4:  # all at once with `.to` fails for graphs that hold tensors of rank 5 too
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        layers = find_layers(model)
        self.layers: tuple[Layer, ...] = tuple(layer for layer in layers if layer.prunable)
        self.skipped: tuple[Layer, ...] = tuple(layer for layer in layers if not layer.prunable)
        if not self.layers:
            reasons = (
                "; ".join(f"{layer.name}: {layer.skip}" for layer in self.skipped[:3]) or "no Conv, Gemm or MatMul"
            )
            raise NothingToPrune(f"the network has no prunable layer ({reasons})")
        self.bfloat16 = has_bfloat16() and not any(p.dtype.itemsize == 2 for p in self.graph.parameters())
        self.sha256 = model_sha256(model)
        self.edits = 0
        self._parameters: dict[str, torch.nn.Parameter] = dict(self.graph.named_parameters())
        self._dense = {
            name: self._parameters[name].clone()
            for layer in self.layers
            for name in (layer.weight, layer.bias)
            if name is not None
        }

    def dense(self, initializer: str) -> torch.Tensor:
        """The dense values of a layer's weight or bias, as the file stores them."""
        return self._dense[initializer]

    def get(self, initializer: str) -> torch.Tensor:
        """The values that the graph computes with now."""
        return self._parameters[initializer].data

    def set(self, initializer: str, values: torch.Tensor) -> None:
        """Exchange the values of one weight or bias, in the shape in which the file stores it."""
        self._parameters[initializer].data.copy_(values)
        self.edits += 1

    def parameter(self, initializer: str) -> torch.nn.Parameter:
        """What an optimizer trains; whoever changes it ends with `set`."""
        return self._parameters[initializer]

    def changed(self) -> dict[str, np.ndarray]:
        """Initializer name -> values, of those weights and biases that differ from the dense model now."""
        return {
            name: self.get(name).numpy(force=True)
            for name, dense in self._dense.items()
            if not torch.equal(self.get(name), dense)
        }

    def reset(self) -> None:
        """Back to the dense weights."""
        for name, values in self._dense.items():
            self.set(name, values)

    def batch_size(self, wanted: int = BATCH_SIZE) -> int:
        """`wanted`, or the batch that the graph itself fixes."""
        return fixed_batch(self.model) or wanted

    def run(
        self,
        samples: Samples,
        start: Suspended | None = None,
        keep: Keep | None = None,
        keep_before: Sequence[int] = (),
    ) -> dict[str, torch.Tensor]:
        """Outputs for one batch; for `start`, `keep` and `keep_before` see `TorchGraph.run`."""
        if start is None and keep is None:
            return self.graph(_tensors(samples))
        return self.graph.run(_tensors(samples), start, keep, keep_before)

    def run_together(
        self, samples: Samples, after: Callable[[torch.nn.Module, list[torch.Tensor]], list[torch.Tensor]]
    ) -> None:
        """Run all samples node by node, in one batch or in as many as the graph needs; see `TorchGraph.run_together`.

        Samples that don't fill a batch that the graph fixes are left out.
        """
        size = self.batch_size(len(samples))
        whole = [batch for batch in samples.batches(size) if len(batch) == size]
        self.graph.run_together([_tensors(batch) for batch in whole], after)

    def outputs(self, samples: Samples, *, bfloat16: bool = False) -> Iterator[tuple[Samples, dict[str, torch.Tensor]]]:
        """Each batch of the samples with its outputs, without gradients; computed in bfloat16 where that is safe."""
        for batch in samples.batches(self.batch_size()):
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                outputs = self.run(batch)
            yield batch, outputs


class NothingToPrune(ValueError):
    """No layer of the network can be pruned."""


class Objective:
    """The calibration loss of the network with the weights that it has now.

    Args:
        network: with its dense weights; their outputs are the reference.
        samples: on which the loss is computed.
        loss: a name of LOSSES, a function of your own, or None for the one that fits the outputs.
    Attributes:
        name: of the loss.
        batches: the samples in batches; the first few make a small set of samples, more of them a larger one.
        stages: numbers of samples, each about twice the one before, up to all; each is a whole number of batches.

    On CPUs with bfloat16 instructions both networks run in bfloat16, which takes half the time; the loss itself
    is computed in float32.
    """

    def __init__(self, network: Network, samples: Samples, loss: str | Loss | None = None) -> None:
        self.network = network
        self._bfloat16 = network.bfloat16
        fixed = fixed_batch(network.model)
        sizes = growing_batches(len(samples)) if fixed is None else [fixed] * -(-len(samples) // fixed)
        ends = np.cumsum(sizes)
        self.batches = [samples.take(slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
        self.stages = stages(np.minimum(ends, len(samples)).tolist())
        network.reset()
        self._reference = [self._outputs(batch) for batch in self.batches]
        if loss is None:
            loss = default_loss(self._reference[0])
        if isinstance(loss, str) and loss not in LOSSES:
            raise LossError(f"unknown loss {loss!r}; known: {', '.join(LOSSES)}, or FILE.py:FUNCTION")
        self.name = loss if isinstance(loss, str) else getattr(loss, "__name__", "custom")
        self._loss = LOSSES[loss] if isinstance(loss, str) else loss
        self.of_batch(0)  # refuses a loss that doesn't fit before any work is done

    def __call__(self) -> float:
        """Mean loss over all samples.

        Raises:
            LossError: the loss is not a finite number.
        """
        return self.mean([self.of_batch(number) for number in range(len(self.batches))])

    def mean(self, losses: Sequence[float]) -> float:
        """Mean loss over the samples of the first batches, from the loss of each."""
        sizes = [len(batch) for batch in self.batches[: len(losses)]]
        return float(np.dot(losses, sizes) / sum(sizes))

    def of_batch(
        self, number: int, start: Suspended | None = None, keep: Keep | None = None, keep_before: Sequence[int] = ()
    ) -> float:
        """Mean loss over one batch; for the other arguments see `TorchGraph.run`.

        Raises:
            LossError: the loss is not a finite number.
        """
        batch = self.batches[number]
        target = None if batch.target is None else torch.from_numpy(np.asarray(batch.target))
        loss = float(self._loss(self._outputs(batch, start, keep, keep_before), self._reference[number], target))
        if not np.isfinite(loss):
            raise LossError(f"loss {self.name!r} is {loss} on the calibration data; check the network and the loss")
        return loss

    def _outputs(
        self, batch: Samples, start: Suspended | None = None, keep: Keep | None = None, keep_before: Sequence[int] = ()
    ) -> dict[str, torch.Tensor]:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            outputs = self.network.run(batch, start, keep, keep_before)
        return {name: v.float() if v.is_floating_point() else v for name, v in outputs.items()}


def growing_batches(count: int) -> list[int]:
    """Sizes of batches whose running sum meets BATCH_SIZE, twice that, four times that, ... and ends at `count`."""
    sizes: list[int] = []
    while (done := sum(sizes)) < count:
        sizes.append(min(max(BATCH_SIZE, min(done, LARGEST_BATCH)), count - done))
    return sizes


def stages(ends: Sequence[int]) -> tuple[int, ...]:
    """Of these running sums the first from BATCH_SIZE on, each next one at least twice as large, and the last.

    >>> stages([32, 64, 128, 192, 256, 300])
    (32, 64, 128, 256, 300)
    """
    found: list[int] = []
    for end in ends:
        if end >= (2 * found[-1] if found else BATCH_SIZE):
            found.append(end)
    return (*found, ends[-1]) if not found or found[-1] != ends[-1] else tuple(found)


def _tensors(samples: Samples) -> dict[str, torch.Tensor]:
    return {name: as_tensor(array) for name, array in samples.inputs.items()}


def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; emulated, it would be slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """An array as a tensor, images in the memory layout in which CPUs convolve fastest."""
    tensor = torch.from_numpy(array)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
