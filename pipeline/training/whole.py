"""Whole: what `--finetune full` adds to `gap`: the network is trained as one, from the dense one's outputs and labels.

It is `finetune` on a network that a run has made: zeros and widths stay, and one that will be in int8 is rounded as it
learns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from onnx import numpy_helper

from onnx_spdy.models import changed_initializers
from onnx_spdy.models.int8.form import Form
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.network import Network, PrunedNetwork
from onnx_spdy.pipeline.progress import Progress, ignore
from onnx_spdy.pipeline.ranges import RANGES
from onnx_spdy.pipeline.training.fake_int8 import FakeInt8
from onnx_spdy.pipeline.training.finetune import finetune
from onnx_spdy.pipeline.training.trainer import Training

MINUTES = 15.0  # unless the user says how long
EPOCHS = 100  # that few samples are seen at most


@dataclass(frozen=True)
class WholeTraining:
    """What a whole network is trained on.

    Attributes:
        samples: training samples; None for those of the calibration.
        seconds: at most.
    """

    samples: Samples | None = None
    seconds: float = 60 * MINUTES


def train_whole(
    network: Network,
    pruned: PrunedNetwork,
    samples: Samples,
    *,
    form: Form | None,
    seconds: float,
    seed: int,
    checkpoint: Path | None = None,
    progress: Progress = ignore,
) -> tuple[PrunedNetwork, Training]:
    """Train a pruned network; zeros and widths stay, so its speed stays what it is.

    Args:
        network: the dense one, the teacher.
        pruned: what to start from; where it is in int8 too, it is rounded with the ranges that were best there.
        samples: training samples; labels in `target` are used where the network is a classifier.
        form: of the engine that will run it in int8; None in floating point.
        seconds: at most; the learning rate follows.
        seed, progress: see `Trainer`.
        checkpoint: file from which a stopped training goes on; one of another network is replaced.
    Returns:
        The trained network, in floating point.
    """
    start = pruned.in_float()
    rounded = None if form is None else FakeInt8(
        form, pruned.int8.ranges if pruned.int8 else next(iter(RANGES)), pruned.int8_nodes
    )  # fmt: skip
    found = finetune(
        network.prepared, start, samples,
        int8=rounded, epochs=EPOCHS, seed=seed, time_limit_seconds=seconds,
        checkpoint=checkpoint, restart=True, progress=progress,
    )  # fmt: skip
    if found.training.interrupted:  # the stages after it would run on
        raise KeyboardInterrupt
    stored = {tensor.name: tensor for tensor in found.model.graph.initializer}
    weights = {
        name: torch.from_numpy(numpy_helper.to_array(stored[name]).copy())
        for name in changed_initializers(pruned.base.proto, found.model)
    }
    return replace(pruned, weights=weights, int8=None, trained_whole=True), found.training
