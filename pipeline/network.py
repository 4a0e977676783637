"""The network as the stages see it: a TorchGraph with its prunable layers and its dense weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
import torch

from onnx_spdy.models import Layer, Suspended, TorchGraph, find_layers, fixed_batch, model_sha256
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.padding import Padding

BATCH_SIZE = 32  # large enough for full speed on a CPU, small enough to stay in its caches

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
        self._changed: set[str] = set()

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
        (self._changed.discard if values is self._dense.get(initializer) else self._changed.add)(initializer)

    def is_dense(self, initializer: str) -> bool:
        """Whether a weight or bias has its dense values, `dense`, and no others that were `set`."""
        return initializer not in self._changed

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
        """Outputs for one batch, zero at padding; for `start`, `keep` and `keep_before` see `TorchGraph.run`."""
        if start is None and keep is None:
            outputs = self.graph(_tensors(samples))
        else:
            outputs = self.graph.run(_tensors(samples), start, keep, keep_before)
        padding = Padding(samples.inputs)
        return {name: padding.zeroed(values) for name, values in outputs.items()}

    def whole_batches(self, samples: Samples) -> list[Samples]:
        """All samples in one batch, or in as many as the graph needs; those that don't fill its batch are left out."""
        size = self.batch_size(len(samples))
        return [batch for batch in samples.batches(size) if len(batch) == size]

    def run_together(
        self, batches: Sequence[Samples], after: Callable[[torch.nn.Module, list[torch.Tensor]], list[torch.Tensor]]
    ) -> None:
        """Run all batches node by node; see `TorchGraph.run_together`."""
        self.graph.run_together([_tensors(batch) for batch in batches], after)

    def outputs(self, samples: Samples, *, bfloat16: bool = False) -> Iterator[tuple[Samples, dict[str, torch.Tensor]]]:
        """Each batch of the samples with its outputs, without gradients; computed in bfloat16 where that is safe."""
        for batch in samples.batches(self.batch_size()):
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                outputs = self.run(batch)
            yield batch, outputs


class NothingToPrune(ValueError):
    """No layer of the network can be pruned."""


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
