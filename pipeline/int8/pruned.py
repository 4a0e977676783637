"""A pruned network in int8."""

from __future__ import annotations

from dataclasses import replace

from onnx_spdy.models import Prepared
from onnx_spdy.models.int8.form import Form
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.int8.quantise import quantise
from onnx_spdy.pipeline.loss import Loss
from onnx_spdy.pipeline.network import Network, PrunedNetwork
from onnx_spdy.pipeline.progress import Progress, ignore


def in_int8(
    pruned: PrunedNetwork,
    samples: Samples,
    form: Form,
    *,
    loss: str | Loss | None = None,
    seed: int = 0,
    progress: Progress = ignore,
) -> PrunedNetwork:
    """The same network with its numbers in int8; see `quantise`."""
    network = Network(Prepared(pruned.in_float()), for_pruning=False)
    return replace(pruned, int8=quantise(network, samples, form, loss=loss, seed=seed, progress=progress))
