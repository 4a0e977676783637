"""Repair: train what the masks left, so that every layer's output comes back to the dense network's.

Layer-wise pruning reconstructs each layer alone, on inputs that the dense network makes. Here the weights of all
pruned layers are trained together, masks fixed, on what the pruned network really sees: the mean over layers of the
relative squared error of each layer's output against the dense network's. No labels, a thousand samples, minutes.
A part of the samples is held out, and the state that does best there is kept, so few samples don't overfit and the
result is never worse there than the start; an epoch that makes nothing better is taken back and the rate lowered.

Source: Frantar & Alistarh, SPDY (ICML 2022), section 3.3 (global AdaPrune).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from onnx_spdy.pipeline.artifact import arrays_sha256
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.loss import SQUARED_ERROR, FittedLoss, fit_loss, relative_squared_error
from onnx_spdy.pipeline.network import Network, PrunedNetwork
from onnx_spdy.pipeline.progress import Progress, ignore
from onnx_spdy.pipeline.rows import sample_axes
from onnx_spdy.pipeline.training.checkpoint import Checkpoint
from onnx_spdy.pipeline.training.dense_outputs import DenseOutputs
from onnx_spdy.pipeline.training.gradual import KeptZeros
from onnx_spdy.pipeline.training.trainer import BATCH, Criterion, Trainer, Training
from onnx_spdy.pipeline.widths import kept_outputs, trained_and_compared
from onnx_spdy.runtimes.errors import OnnxSpdyError

NO_REPAIR = "none"
FULL = "full"
REPAIRS = (NO_REPAIR, "gap", FULL)  # what --finetune can be; gap: global AdaPrune; full: gap, then `whole.py`

LONGEST_SECONDS = 600  # of the repair in a run: wide inputs on few cores would take an hour; the schedule follows
STEPS = 300  # so that repair takes about as long whatever the number of samples
MOST_EPOCHS = 50
RATE = 0.01
FITTED_SAMPLES = 64  # that scale the loss of the network's own outputs


class UnknownRepair(OnnxSpdyError, ValueError):
    """No repair of that name."""


class FixedMasks:
    """Keeps the zeros that parameters have now while they are trained.

    Args:
        parameters: initializer -> parameter, of weights.
    """

    finished = True

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._kept = KeptZeros(self._parameters)

    def step(self, fraction: float) -> None:
        self._kept.step()

    def resume(self, fraction: float) -> None:
        self._kept = KeptZeros(self._parameters)


def check_repair(name: str) -> None:
    """Raises UnknownRepair: the message lists the known names."""
    if name not in REPAIRS:
        raise UnknownRepair(f"unknown repair {name!r}; known: {', '.join(REPAIRS)}")


def repair(
    network: Network,
    pruned: PrunedNetwork,
    samples: Samples,
    *,
    epochs: int | None = None,
    rate: float = RATE,
    batch: int = BATCH,
    seed: int = 0,
    time_limit_seconds: float | None = None,
    checkpoint: Path | None = None,
    progress: Progress = ignore,
) -> tuple[PrunedNetwork, Training | None]:
    """Repair a pruned network; zeros and widths stay, so its speed stays what it is.

    Where units were cut out, the narrow network is trained, which takes less, and every layer that lost something, or
    all of them where a branch is gone; what is compared are the outputs of the layers that took the units in, as far as
    they have them still.

    Args:
        network: the dense network.
        pruned: what to start from; weights and biases of its pruned layers are trained.
        samples: calibration samples, at least 2.
        epochs: at most; by default as many as make `STEPS` steps, and at most `MOST_EPOCHS`.
        rate, batch, seed, time_limit_seconds, progress: see `Trainer`.
        checkpoint: file from which a stopped repair goes on; one of another network or profile is replaced.
    Returns:
        The repaired network, and the mean relative squared error on held-out samples before and after; where nothing
        is pruned the same network, and None.
    """
    if not pruned.layers:
        return pruned, None
    epochs = epochs or min(MOST_EPOCHS, math.ceil(STEPS * batch / len(samples)))
    student = Network(pruned.base, for_pruning=False) if pruned.widths else network
    trained = compared = pruned.layers
    if pruned.widths:
        trained, compared = trained_and_compared(network.prepared, pruned)
    found = (name for layer in trained for name in (layer.weight, layer.bias) if name in student.trainable_names)
    names = [name for name in dict.fromkeys(found) if name is not None]
    saved = None
    if checkpoint:
        start = {name: student.values(name, pruned.weights).numpy(force=True) for name in names}
        made_from = {
            "model_sha256": network.sha256,
            "weights_sha256": arrays_sha256(start),
            "data_sha256": samples.sha256,
        }
        settings = {"epochs": epochs, "rate": rate, "batch": batch, "seed": seed}
        saved = Checkpoint(checkpoint, made_from | settings)
        saved.replace_other()
    dense = DenseOutputs(network, samples, compared, kept_outputs(network.prepared, pruned.widths))
    with student.trainable(names, pruned.weights) as parameters:
        masks = FixedMasks({layer.weight: parameters[layer.weight] for layer in trained if layer.weight in parameters})
        training, weights = Trainer(
            student, parameters, samples, dense, _criterion(network, samples, dense), masks,
            layers=compared, epochs=epochs, rate=rate, batch=batch, seed=seed, retreat=True,
            time_limit_seconds=time_limit_seconds, checkpoint=saved, progress=progress,
        ).run()  # fmt: skip
    if training.interrupted:  # the stages after it would run on
        raise KeyboardInterrupt
    return replace(pruned, weights={**pruned.weights, **weights}), training


def _criterion(network: Network, samples: Samples, dense: DenseOutputs) -> Criterion:
    """Mean over the layers' outputs and the network's: relative squared error; of the network's by channel.

    Channels are scaled by the dense outputs of the first batch.
    """
    names = network.graph.output_names
    some = np.arange(min(len(samples), network.batch_size(FITTED_SAMPLES)))
    index = network.whole(some)[: network.batch_size(FITTED_SAMPLES)]
    first = dense(index)
    own = {name: first[name] for name in names if first[name].is_floating_point()}
    per_channel: FittedLoss | None = None
    if own:
        per_channel = fit_loss(SQUARED_ERROR, [own], axes=sample_axes(own, dense(index[::-1]), len(index)))

    def criterion(
        outputs: Mapping[str, torch.Tensor], dense: Mapping[str, torch.Tensor], target: torch.Tensor | None
    ) -> torch.Tensor:
        inner = {name: value for name, value in dense.items() if name not in names}
        terms = len(inner) + len(own)
        loss = relative_squared_error(outputs, inner) * (len(inner) / terms) if inner else torch.zeros(())
        return loss if per_channel is None else loss + per_channel(outputs, dense) * (len(own) / terms)

    return criterion
