"""What runs between the layers of a network, fused: one graph in PyTorch in which each layer is an operator of ours.

Dense or sparse, a layer is a kernel that was chosen and measured; everything around it (biases, activations,
normalisations, attention) torch.compile makes into few kernels, as an engine would. Without that, a network spends most
of its time reading and writing activations (a BERT-base took 1.9 times as long on an H200), and a faster layer shows
less than it would in use. A graph is compiled once for all networks that differ in their weights only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

Forward = Callable[..., Any]
Compiled = Callable[[list[Tensor]], list[Tensor]]
Mark = Callable[[], Any]

# By how much of an output's norm fusing may change it: it rounds less often, which deep networks add up.
CLOSE = {"fp16": 0.01, "bf16": 0.06}


class Layers:
    """The layers of one network by number: how each is computed, and where it begins and ends in time.

    Args:
        forwards: (x, weight, bias or None) -> output, of the kernels that were chosen.
        dense: the same as the network computes it, from which the shape is known.
        images: whether the layer's output is an image, with channels last.
    """

    def __init__(self, forwards: Sequence[Forward], dense: Sequence[Forward], images: Sequence[bool]) -> None:
        self._forwards, self._dense, self._images = tuple(forwards), tuple(dense), tuple(images)
        self._mark: Mark | None = None
        self.order: list[int] = []  # in which they ran last

    @contextmanager
    def running(self, mark: Mark | None = None) -> Iterator[None]:
        """What the operator computes with inside; `mark` is called at the beginning and end of each layer."""
        global _running
        before, _running = _running, self
        self._mark = mark
        self.order.clear()
        try:
            yield
        finally:
            _running, self._mark = before, None

    def compute(self, number: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Run a layer."""
        self.order.append(number)
        if self._mark:
            self._mark()
        result = self._settled(number, _called(self._forwards[number], x, weight, bias))
        if self._mark:
            self._mark()
        return result

    def shape(self, number: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What `compute` gives, without values."""
        return self._settled(number, _called(self._dense[number], x, weight, bias))

    def _settled(self, number: int, result: Tensor) -> Tensor:
        """The one layout that the compiled graph was promised."""
        is_image = self._images[number] and result.dim() == 4
        return result.contiguous(memory_format=torch.channels_last if is_image else torch.contiguous_format)


_running: Layers | None = None  # an operator takes tensors and numbers only


@torch.library.custom_op("onnx_spdy::layer", mutates_args=())
def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, number: int) -> Tensor:
    assert _running is not None
    return _running.compute(number, x, weight, bias)


@_layer.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, number: int) -> Tensor:
    assert _running is not None
    return _running.shape(number, x, weight, bias)


def as_operator(number: int) -> Forward:
    """The forward of a layer's module that calls the operator."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.onnx_spdy.layer(x, weight, bias, number)

    return forward


class Tensors:
    """A module's parameters and buffers, as arguments of a graph instead of constants in it."""

    def __init__(self, module: nn.Module) -> None:
        self._places: list[tuple[dict[str, Any], str]] = []
        for owner in module.modules():
            for held in (owner._parameters, owner._buffers):
                self._places += [(held, name) for name, value in held.items() if value is not None]
        self.own = [held[name].detach() for held, name in self._places]
        self.names = frozenset(name for _, name in self._places)

    @contextmanager
    def replaced(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """The module computes with these instead."""
        before = [held[name] for held, name in self._places]
        try:
            self._put(tensors)
            yield
        finally:
            self._put(before)

    def _put(self, tensors: Sequence[Tensor]) -> None:
        for (held, name), tensor in zip(self._places, tensors, strict=True):
            held[name] = tensor


def fuse(
    module: nn.Module,
    tensors: Tensors,
    layers: Layers,
    inputs: Mapping[str, Tensor],
    compiler: Callable[[Any], Any],
) -> Compiled:
    """The module as one compiled graph: [parameters and buffers as `Tensors` has them, inputs] -> outputs.

    Args:
        module: maps inputs by name to outputs by name; the forwards of its layers are `as_operator`.
        tensors: of the module.
        inputs: of the shapes and types to come.
        compiler: of a torch.fx.GraphModule.
    Raises:
        Exception: whatever tracing or compiling raises; there is no end to what that may be.
    """
    count = len(tensors.own)

    def function(arguments: list[Tensor]) -> list[Tensor]:
        with tensors.replaced(arguments[:count]):
            return [*module(dict(zip(inputs, arguments[count:], strict=True))).values()]

    arguments = [*tensors.own, *inputs.values()]
    with torch.no_grad(), layers.running():
        compiled = compiler(make_fx(function)(arguments))
        compiled(arguments)
    return compiled


def is_close(actual: Sequence[Tensor], expected: Sequence[Tensor], precision: str) -> bool:
    """Whether fusing left the results as they were, up to rounding."""
    return all(
        float((one.double() - other.double()).norm()) <= CLOSE[precision] * float(other.double().norm())
        for one, other in zip(actual, expected, strict=True)
        if one.is_floating_point()
    )


def _called(forward: Forward, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    return forward(x, weight) if bias is None else forward(x, weight, bias)
