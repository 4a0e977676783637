"""A network in int8, from one in floating point and calibration samples.

What is tried and measured, not assumed: the ranges of activations, and whether corrected biases are better, by the
calibration loss; of samples that neither was made from, where there are enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from onnx_spdy.models import Prepared, TorchGraph, find_layers, fixed_batch, prepare, write_weights
from onnx_spdy.models.agreement import Reference
from onnx_spdy.models.graph import ModelError, one_line, opset_of
from onnx_spdy.models.int8.form import Form
from onnx_spdy.models.int8.place import OPSET, find_placement
from onnx_spdy.models.int8.write import Integers, IntegerWeight, write_int8
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.hessian import collect_hessians
from onnx_spdy.pipeline.database.rounding import integer_weight
from onnx_spdy.pipeline.int8.biases import channel_means, corrected_biases
from onnx_spdy.pipeline.level import Level, any_int8
from onnx_spdy.pipeline.loss import Loss, fit_loss, numbers
from onnx_spdy.pipeline.network import Int8Network, Network, as_tensors
from onnx_spdy.pipeline.progress import Progress, ignore
from onnx_spdy.pipeline.ranges import RANGE_SAMPLES, RANGES, grids, observe
from onnx_spdy.pipeline.rows import sample_axes

MEANS = 64  # for the correction of biases
JUDGED = 128  # the last ones, on which variants are compared


def quantise(
    network: Network,
    samples: Samples,
    form: Form,
    *,
    layers: Collection[str] | None = None,
    ranges: Collection[str] = RANGES,
    loss: str | Loss | None = None,
    seed: int = 0,
    progress: Progress = ignore,
) -> Int8Network:
    """The network in int8.

    Args:
        network: in float32.
        samples: calibration samples.
        form: of the engine that will run it; see `FORMS`.
        layers: names of the nodes with weights that shall compute in int8; None for all that can.
        ranges: those of `RANGES` that are tried.
        loss: see `Objective`.
        progress: called with (steps done, steps, what is done).
    Raises:
        NothingToQuantise: no layer can; the message says why for the first few.
        RangeError: activations are NaN or infinite on the samples.
    """
    return _Quantising(network, samples, form, layers, ranges, loss, seed, progress).best()


def ready_for(levels: Iterable[Level], prepared: Prepared, samples: Samples | None = None) -> Prepared:
    """The network as a run with these levels takes it; see `with_int8_opset`."""
    return with_int8_opset(prepared, samples) if any_int8(levels) else prepared


def with_int8_opset(prepared: Prepared, samples: Samples | None = None) -> Prepared:
    """The network in an opset that has scales for channels, which is the same where it has one already.

    Args:
        samples: on which both are compared; None for random inputs.
    Raises:
        ModelError: it can't be converted, or computes something else then.
    """
    if (version := opset_of(prepared.proto)) >= OPSET:
        return prepared
    try:
        raised = onnx.version_converter.convert_version(prepared.proto, OPSET)
    except Exception as exc:  # it raises RuntimeError and whatever its operators' converters do
        raise ModelError(
            f"int8 needs opset {OPSET}, and this graph of opset {version} can't be converted: {one_line(str(exc))}; "
            "export it with a newer opset"
        ) from exc
    examples = samples.take(slice(0, fixed_batch(prepared.proto) or 2)).inputs if samples else None
    with Reference(prepared.proto, examples=examples) as reference:
        reference.check(raised, "the graph of a newer opset", "raising its opset")
    return prepare(raised, examples, samples.axes if samples else None)


class _Quantising:
    """One network on its way."""

    def __init__(
        self,
        network: Network,
        samples: Samples,
        form: Form,
        layers: Collection[str] | None,
        ranges: Collection[str],
        loss: str | Loss | None,
        seed: int,
        progress: Progress,
    ) -> None:
        self._network, self._form, self._ranges, self._progress = network, form, ranges, progress
        self._model = network.model
        self._placement = find_placement(self._model, form, layers)
        self._rng = np.random.default_rng(seed)
        self._some = network.first(samples, RANGE_SAMPLES)
        judged = network.last(samples, JUDGED)
        self._judged = network.batches(judged)
        self._loss = loss
        used = {name for weight in self._placement.weights for name in weight.nodes}
        self._layers = [layer for layer in find_layers(self._model, minimum_weights=0) if set(layer.nodes) & used]

    def best(self) -> Int8Network:
        steps = 3 + len(self._ranges)
        self._progress(0, steps, "ranges of activations")
        by_channel = self._placement.by_channel(self._form)
        seen = observe(self._network, self._placement.points, by_channel, self._some, self._rng)
        self._progress(1, steps, "rounding weights")
        weights = self._weights()
        judge = self._judge()
        tried = {name: Integers(grids(seen, self._form, RANGES[name]), weights) for name in self._ranges}
        losses: dict[str, float] = {}
        for number, (name, integers) in enumerate(tried.items()):
            self._progress(2 + number, steps, f"trying {name}")
            losses[name] = judge(self._written({}, integers))
        name = min(losses, key=losses.__getitem__)
        integers = tried[name]
        self._progress(steps - 1, steps, "correcting biases")
        biases = self._corrected_biases(integers)
        corrected = judge(self._written(biases, integers))
        if not corrected < losses[name]:
            biases = {}
        nodes = tuple(node for weight in self._placement.weights for node in weight.nodes)
        proto = self._written(biases, replace(integers, int32_bias=self._form.int32_bias))
        self._progress(steps, steps, name)
        return Int8Network(proto, name, bool(biases), min(corrected, losses[name]), nodes, self._placement.skipped)

    def _written(self, biases: Mapping[str, np.ndarray], integers: Integers) -> onnx.ModelProto:
        return write_int8(write_weights(self._model, biases), self._placement, integers)

    def _corrected_biases(self, integers: Integers) -> dict[str, np.ndarray]:
        batches = self._network.batches(self._network.first(self._some, MEANS))
        owners = [layer for layer in self._layers if layer.bias is not None and not layer.more_uses]
        wanted = channel_means(self._network, owners, batches)
        stored = {tensor.name: tensor for tensor in self._model.graph.initializer}
        biases = {layer.bias: numpy_helper.to_array(stored[layer.bias]) for layer in owners if layer.bias}
        return corrected_biases(TorchGraph(self._written({}, integers)).eval(), owners, batches, wanted, biases)

    def _weights(self) -> dict[str, IntegerWeight]:
        """All weights on their grids."""
        known = [layer for layer in self._layers if layer.prunable]
        hessians = collect_hessians(self._network, known, self._some) if known else {}
        of_weight = {layer.weight: hessians.pop(layer.name) for layer in known}
        stored = {tensor.name: tensor for tensor in self._model.graph.initializer}
        found = {}
        for weight in self._placement.weights:
            values = numpy_helper.to_array(stored[weight.name])
            found[weight.name] = integer_weight(values, weight.axis, of_weight.pop(weight.name, None))
        return found

    def _outputs(self, graph: TorchGraph, batch: Samples) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            return graph(as_tensors(batch))

    def _judge(self) -> Callable[[onnx.ModelProto], float]:
        """graph -> calibration loss on the judged samples; infinite where it isn't a number."""
        reference = [self._outputs(self._network.graph, batch) for batch in self._judged]
        first = self._judged[0]
        turned = self._outputs(self._network.graph, first.take(np.arange(len(first))[::-1]))
        axes = sample_axes(reference[0], turned, len(first))
        fitted = fit_loss(self._loss, reference, numbers(first.target), axes)

        def judge(model: onnx.ModelProto) -> float:
            graph = TorchGraph(model).eval()
            losses = [
                float(fitted(self._outputs(graph, batch), dense, numbers(batch.target)))
                for batch, dense in zip(self._judged, reference, strict=True)
            ]
            mean = float(np.average(losses, weights=[len(batch) for batch in self._judged]))
            return mean if math.isfinite(mean) else math.inf

        return judge
