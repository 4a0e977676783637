"""Gradual pruning in Hugging Face's Trainer: `Trainer(..., callbacks=[PruningCallback(model, profile.levels)])`.

Needs the package transformers, which is not installed with onnx-spdy.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from onnx_spdy.pipeline.training.callback import GradualCallback


class PruningCallback(GradualCallback, TrainerCallback):
    """Prunes the trained model gradually to a profile.

    Where the Trainer goes on from one of its checkpoints, pruning goes on from the zeros that are in it.

    For its arguments see `GradualCallback`.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        pruning = self._begin(model, state.max_steps)
        if state.global_step:
            pruning.resume(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        assert self.pruning is not None
        self.pruning.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        assert self.pruning is not None
        if self.pruning.finished:
            self.pruning.keep()  # also where an earlier state was loaded as the best one
