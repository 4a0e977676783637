"""Layer Hessians from one pass over the calibration samples, or in parts, layer after layer, where memory is short.

For a layer that computes W x on input patches x (d,), the squared output error of changed weights is
tr((W - W0) H (W - W0)^T) with H = E[x x^T] (d, d), the mean over samples and positions, without padding.
Everything that the pruners know about the data is in H.

Source: Frantar & Alistarh, OBC (NeurIPS 2022), section 3 (H = 2 X X^T there; a constant factor changes nothing).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from onnx_spdy.models import InputPatches, Layer, Suspended
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.matmul import fast_float32
from onnx_spdy.pipeline.database.patch_products import Part, PatchProducts
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.padding import Padding
from onnx_spdy.pipeline.progress import Progress, ignore

KEPT_BYTES = 1 << 28  # of values between layers


def hessian_bytes(layer: Layer) -> int:
    """Memory that a layer needs while its Hessian is collected: the long sum, the short one and a product."""
    return 16 * int(np.prod(layer.shape[1:])) ** 2


def collect_hessians(
    network: Network,
    layers: Sequence[Layer],
    samples: Samples,
    progress: Progress = ignore,
) -> dict[str, torch.Tensor]:
    """The Hessian of each layer in the dense network, all from one pass; see `CalibrationPass.hessians`."""
    return CalibrationPass(network, samples).hessians(layers, progress)


class CalibrationPass:
    """Calibration samples on their way through the dense network, which stop where Hessians are wanted.

    Args:
        network: run with its dense weights.
        samples: calibration samples.
    """

    def __init__(self, network: Network, samples: Samples) -> None:
        self._network = network
        self._batches = network.batches(samples)
        self._stopped: list[Suspended] = []  # each batch where it stopped; none where they start again

    def hessians(
        self, layers: Sequence[Layer], progress: Progress = ignore, *, goes_on: bool = False
    ) -> dict[str, torch.Tensor]:
        """The Hessian of each of these layers.

        The samples go on from where they stopped when Hessians of earlier layers were made, up to the last of these.
        What flows between layers is kept up to `KEPT_BYTES`; where it is more, they start again.

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
        Returns:
            layer name -> H (d, d) float64, d = in * prod(kernel), in the order of `weight.flatten(1)`.
        """
        graph = self._network.graph
        sums = {layer.name: _Sum(self._network, layer) for layer in layers}
        places = {name: layer.name for layer in layers for name in layer.nodes}
        steps = [graph.step_of(name) for name in places]
        before: list[Suspended] | list[None] = self._stopped
        if not self._stopped or self._stopped[0].step > min(steps):
            before = [None] * len(self._batches)
        self._stopped = []
        hooks = [graph.node(name).register_forward_pre_hook(sums[layer].hook) for name, layer in places.items()]
        done = 0
        try:
            for batch, start in zip(self._batches, before, strict=True):
                for one in sums.values():
                    one.padding = Padding(batch.samples_first)
                with torch.inference_mode():
                    stopped = self._network.advance(batch, start, max(steps) + 1)
                if goes_on and stopped.bytes * len(self._batches) <= KEPT_BYTES:
                    self._stopped.append(stopped)
                done += len(batch)
                progress(done, sum(map(len, self._batches)), "")
        finally:
            for hook in hooks:
                hook.remove()
        if len(self._stopped) < len(self._batches):  # a batch may be smaller than others
            self._stopped = []
        self._network.let_go()
        return {name: one.mean() for name, one in sums.items()}


class _Sum:
    """Running sum of x x^T of one layer: products and short sums in float32, the long sum in float64."""

    FLUSH = 8  # products added in float32 before they go to the float64 sum, which costs several times as much

    def __init__(self, network: Network, layer: Layer) -> None:
        self._products = PatchProducts(InputPatches(network.model, layer))
        self._total: dict[Part, torch.Tensor] = {}
        self._recent: dict[Part, torch.Tensor] = {}
        self._calls = self._count = 0
        self._has_positions = layer.op != "Conv"  # before its channels
        self.padding = Padding({})  # of the batch that runs

    def hook(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        values = inputs[0].float()
        if self._has_positions:
            values = self.padding.real_rows(values)
        self._count += self._products.count(values)
        self._calls += 1
        for part, product in self._products(values):
            self._recent[part] = self._recent[part].add_(product) if part in self._recent else product
        if self._calls % self.FLUSH == 0:
            self._flush()

    def _flush(self) -> None:
        for part, recent in self._recent.items():
            if part in self._total:
                self._total[part] += recent.cpu()
            else:
                self._total[part] = recent.cpu().double()
        self._recent = {}

    def mean(self) -> torch.Tensor:
        with torch.inference_mode():  # as the sums were made
            self._flush()
        return self._products.matrix(self._total).div_(max(1, self._count))


@fast_float32()
def squared_error(change: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(D H D^T): mean squared output error of a layer whose weights change by D (out, d)."""
    return float(((change @ hessian) * change).sum())
