"""Fine-tune: train a pruned network with the dense one as its teacher; masks fixed, or growing to a profile.

The network learns from the dense network's outputs (KL divergence for a classifier, relative squared error
otherwise) and from labels where the data has them. All convolutions and matrix products are trained with their
biases; everything else in the graph stays.

Source: Hinton, Vinyals & Dean (2015) for distillation; Zhu & Gupta (2017) for gradual pruning.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

from onnx_spdy.models import Prepared, changed_initializers, differences, model_sha256, to_canonical, write_weights
from onnx_spdy.pipeline.correct import StatisticsCorrection
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.deploy import DeployError, check_zeros_kept
from onnx_spdy.pipeline.level import DENSE, Level
from onnx_spdy.pipeline.loss import KL, FittedLoss, cross_entropy, distillation_loss, fit_loss, numbers
from onnx_spdy.pipeline.mask import level_violation
from onnx_spdy.pipeline.network import Network, Weights
from onnx_spdy.pipeline.progress import Progress, ignore
from onnx_spdy.pipeline.rows import sample_axes
from onnx_spdy.pipeline.training.checkpoint import Checkpoint
from onnx_spdy.pipeline.training.dense_outputs import DenseOutputs
from onnx_spdy.pipeline.training.fake_int8 import FakeInt8
from onnx_spdy.pipeline.training.gradual import UPDATES, GradualPruning
from onnx_spdy.pipeline.training.mirrored import with_mirrored
from onnx_spdy.pipeline.training.repair import FixedMasks
from onnx_spdy.pipeline.training.trainer import BATCH, Criterion, Pruning, Trainer, Training
from onnx_spdy.pipeline.widths import is_narrower
from onnx_spdy.runtimes.errors import OnnxSpdyError

EPOCHS = 10
RATE = 0.01
CORRECTION_SAMPLES = 64  # each of the `UPDATES` corrections is a forward pass of so many
FITTED_SAMPLES = 256  # that choose and scale the loss
PRUNING_SHARE = 0.5  # of a gradual training; the rest of it heals


class FinetuneError(OnnxSpdyError, ValueError):
    """The pruned network doesn't belong to the dense one."""


@dataclass(frozen=True)
class Finetuned:
    """A trained network.

    Attributes:
        model: the ONNX network.
        training: how it went; losses are those that were minimised.
        learnt_from: in words.
    """

    model: onnx.ModelProto
    training: Training
    learnt_from: str


class GradualMasks:
    """Prunes a network to levels in the first part of a training, and keeps it pruned in the rest.

    Each choice of masks is followed by a correction of statistics: exporters fold BatchNorm into the convolutions, and
    without it what a mask takes away shifts all later layers, which costs epochs to learn again.

    Args:
        network: in training; see `Network.trainable`.
        parameters: weights and biases of all its layers.
        levels: layer name -> level.
        correction: towards the dense network, or None.
    """

    def __init__(
        self,
        network: Network,
        parameters: Mapping[str, torch.nn.Parameter],
        levels: Mapping[str, Level],
        correction: StatisticsCorrection | None,
    ) -> None:
        self._pruning = GradualPruning(network.graph, network.model, levels, steps=UPDATES)
        self._layers = [layer for layer in network.layers if levels.get(layer.name, DENSE) != DENSE]
        self._parameters, self._correction = parameters, correction
        self._updates = 0

    @property
    def finished(self) -> bool:
        return self._updates >= UPDATES

    def step(self, fraction: float) -> None:
        due = _due(fraction)
        if due > self._updates:
            self._updates = due
            self._pruning.prune_to(due / UPDATES)
            if self._correction:
                self._correct(self._correction)
        else:
            self._pruning.keep()

    def resume(self, fraction: float) -> None:
        self._updates = _due(fraction)
        self._pruning.resume(self._updates)

    def _correct(self, correction: StatisticsCorrection) -> None:
        weights = {name: values.detach().clone() for name, values in self._parameters.items()}
        for name, values in correction.apply(weights, self._layers).items():
            self._parameters[name].data.copy_(values)


def _due(fraction: float) -> int:
    return min(UPDATES, int(fraction / PRUNING_SHARE * UPDATES))


def finetune(
    dense: Prepared,
    pruned: onnx.ModelProto,
    samples: Samples,
    *,
    levels: Mapping[str, Level] | None = None,
    int8: FakeInt8 | None = None,
    epochs: int = EPOCHS,
    rate: float = RATE,
    batch: int = BATCH,
    seed: int = 0,
    time_limit_seconds: float | None = None,
    checkpoint: Path | None = None,
    restart: bool = False,
    progress: Progress = ignore,
) -> Finetuned:
    """Train a pruned network.

    Args:
        dense: the prepared dense network, the teacher.
        pruned: the same graph with the weights to start from; its zeros stay. The dense one itself with `levels`. Or
            a narrower one, as `run` writes it for widths, which is trained as it is.
        samples: training samples; labels in `target` are used where the network is a classifier.
        levels: layer name -> level that is reached gradually; None keeps just the zeros that are there.
        int8: how it is rounded while it learns, for one that will be in int8; what is returned isn't rounded.
        epochs, rate, batch, seed, time_limit_seconds, progress: see `Trainer`.
        checkpoint: file from which a stopped training goes on.
        restart: replace a checkpoint of another training instead of refusing it.
    Raises:
        FinetuneError: the graphs differ in more than weights of layers.
        NotCorrected: the samples of a gradual training don't fill one batch of the network.
        ArtifactError: the checkpoint is of another training.
    """
    network = Network(dense)
    narrow = is_narrower(pruned, dense.proto)
    if levels is not None and (narrow or any(level.is_width for level in levels.values())):
        raise FinetuneError(
            "a profile of widths can't be reached gradually; give PRUNED, the narrow network, and no profile"
        )
    student = Network(Prepared(pruned), for_pruning=False) if narrow else network
    start = _start(network, student, pruned)
    saved = None
    if checkpoint:
        settings = {"epochs": epochs, "rate": rate, "batch": batch, "seed": seed}
        target = None if levels is None else {name: str(level) for name, level in levels.items()}
        made_from = {"dense": dense.sha256, "pruned": model_sha256(pruned), "data": samples.sha256}
        rounded = {} if int8 is None else {"int8": f"{int8.form.name}, {int8.ranges}"}
        saved = Checkpoint(checkpoint, {**made_from, "levels": target, **rounded, **settings})
        if restart:
            saved.replace_other()
        saved.check()
    mirrored = with_mirrored(samples)
    outputs = DenseOutputs(network, samples if mirrored is None else mirrored)
    loss = _fitted_loss(network, samples, outputs)
    labels = loss.name == KL and _has_labels(network, samples, outputs)
    correction = None if levels is None else _correction(network, samples)
    with ExitStack() as stack:
        if int8 is not None:
            stack.enter_context(int8.rounding(student, start, samples, seed))
        parameters = stack.enter_context(student.trainable([*start], start))
        if levels is None:
            masks: Pruning = FixedMasks({layer.weight: parameters[layer.weight] for layer in student.layers})
        else:
            masks = GradualMasks(network, parameters, levels, correction)
        training, weights = Trainer(
            student, parameters, samples, outputs, _criterion(loss, labels), masks,
            epochs=epochs, rate=rate, batch=batch, seed=seed, mirrored=mirrored,
            time_limit_seconds=time_limit_seconds, checkpoint=saved, progress=progress,
        ).run()  # fmt: skip
    trained = write_weights(
        pruned if narrow else dense.proto, {name: values.numpy(force=True) for name, values in weights.items()}
    )
    check_zeros_kept(pruned, trained)
    if levels is not None:
        _check_levels(network, weights, levels)
    return Finetuned(trained, training, "the dense network and labels" if labels else "the dense network")


def _correction(network: Network, samples: Samples) -> StatisticsCorrection:
    """On few samples."""
    return StatisticsCorrection(network, network.first(samples, CORRECTION_SAMPLES))


def _trained(network: Network) -> list[str]:
    """Weights and biases of all layers, also of those that aren't pruned."""
    layers, known = (*network.layers, *network.skipped), network.trainable_names
    names = dict.fromkeys(name for layer in layers for name in (layer.weight, layer.bias) if name in known)
    return [name for name in names if name is not None]


def _start(dense: Network, student: Network, pruned: onnx.ModelProto) -> Weights:
    """The pruned network's values of everything that is trained."""
    names = _trained(student)
    if student is dense:
        if found := differences(dense.model, pruned):
            raise FinetuneError(
                f"the pruned graph differs from the dense one: {found[0]}; give the dense.onnx of its run"
            )
        if other := set(changed_initializers(dense.model, pruned)) - set(names):
            raise FinetuneError(f"initializer {min(other)!r} of the pruned network differs, and belongs to no layer")
    stored = {tensor.name: tensor for tensor in pruned.graph.initializer}
    return {name: torch.from_numpy(onnx.numpy_helper.to_array(stored[name]).copy()) for name in names}


def _fitted_loss(network: Network, samples: Samples, outputs: DenseOutputs) -> FittedLoss:
    """What is learnt from the dense network, chosen and scaled by its outputs for the first samples."""
    size = network.batch_size()
    index = network.whole(np.arange(min(len(samples), max(size, FITTED_SAMPLES))))
    references = [outputs(index[begin : begin + size]) for begin in range(0, len(index), size)]
    axes = sample_axes(references[0], outputs(index[:size][::-1]), len(index[:size]))
    return fit_loss(None, references, numbers(samples.target), axes)


def _has_labels(network: Network, samples: Samples, outputs: DenseOutputs) -> bool:
    """Whether the target holds classes of a classifier."""
    target = samples.target
    if target is None or target.ndim != 1 or target.dtype.kind not in "iu":
        return False
    first = outputs(network.whole(np.arange(min(network.batch_size(), len(samples))))[: network.batch_size()])
    classes = next(value for value in first.values() if value.is_floating_point()).shape[-1]
    return 0 <= int(target.min()) <= int(target.max()) < classes


def _criterion(distilled: FittedLoss, labels: bool) -> Criterion:
    def criterion(
        outputs: Mapping[str, torch.Tensor], dense: Mapping[str, torch.Tensor], target: torch.Tensor | None
    ) -> torch.Tensor:
        loss = distillation_loss(outputs, dense, loss=distilled)
        return loss + cross_entropy(outputs, dense, target) if labels and target is not None else loss

    return criterion


def _check_levels(network: Network, weights: Weights, levels: Mapping[str, Level]) -> None:
    for layer in network.layers:
        weight = to_canonical(layer, weights[layer.weight])
        if layer.name in levels and (problem := level_violation(weight, levels[layer.name])):
            raise DeployError(f"layer {layer.name!r} is not {levels[layer.name]}: {problem}")
