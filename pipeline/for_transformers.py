"""Gradual pruning in Hugging Face's Trainer: `Trainer(..., callbacks=[PruningCallback(model, profile.levels)])`.

Needs the package transformers, which is not installed with onnx-spdy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from transformers import TrainerCallback

from onnx_spdy.pipeline.gradual import GradualPruning
from onnx_spdy.pipeline.level import Level


class PruningCallback(TrainerCallback):
    """Prunes the trained model gradually to a profile.

    Where the Trainer goes on from one of its checkpoints, pruning goes on from the zeros that are in it.

    Args:
        model: the ONNX network of the profile, with its dense weights.
        levels: layer name -> level.
        share: of the training's steps after which the profile is reached.
        names: see `GradualPruning`.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        levels: Mapping[str, Level],
        *,
        share: float = 0.5,
        names: Mapping[str, str] | None = None,
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share {share} is no part of a training; give a number above 0 and up to 1")
        self._model, self._levels, self._share, self._names = model, levels, share, names
        self.pruning: GradualPruning | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        steps = max(1, round(self._share * state.max_steps))
        self.pruning = GradualPruning(model, self._model, self._levels, steps=steps, names=self._names)
        if state.global_step:
            self.pruning.resume(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        assert self.pruning is not None
        self.pruning.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        assert self.pruning is not None
        if self.pruning.finished:
            self.pruning.keep()  # also where an earlier state was loaded as the best one
