"""Gradual pruning in Lightning's Trainer: `Trainer(..., callbacks=[PruningCallback(model, profile.levels)])`.

Needs the package lightning, which is not installed with onnx-spdy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from lightning.pytorch.callbacks import Callback

from onnx_spdy.pipeline.gradual import GradualPruning
from onnx_spdy.pipeline.level import Level


class PruningCallback(Callback):
    """Prunes the trained module gradually to a profile; its state is part of Lightning's checkpoints.

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
        self._saved: Mapping[str, Any] | None = None
        self.pruning: GradualPruning | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError(
                "the Trainer has no last step, so pruning has no schedule; give it max_steps or max_epochs"
            )
        steps = max(1, round(self._share * total))
        self.pruning = GradualPruning(pl_module, self._model, self._levels, steps=steps, names=self._names)
        if self._saved is not None:
            self.pruning.load_state_dict(self._saved)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.pruning is not None
        if trainer.global_step > self.pruning.done:  # otherwise gradients were only accumulated
            self.pruning.step()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.pruning is None else self.pruning.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None
