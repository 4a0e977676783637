"""Gradual pruning in Lightning's Trainer: `Trainer(..., callbacks=[PruningCallback(model, profile.levels)])`.

Needs the package lightning, which is not installed with onnx-spdy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.callbacks import Callback

from onnx_spdy.pipeline.training.callback import GradualCallback


class PruningCallback(GradualCallback, Callback):
    """Prunes the trained module gradually to a profile; its state is part of Lightning's checkpoints.

    For its arguments see `GradualCallback`.
    """

    _saved: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError(
                "the Trainer has no last step, so pruning has no schedule; give it max_steps or max_epochs"
            )
        pruning = self._begin(pl_module, total)
        if self._saved is not None:
            pruning.load_state_dict(self._saved)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert self.pruning is not None
        if trainer.global_step > self.pruning.done:  # otherwise gradients were only accumulated
            self.pruning.step()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.pruning is None else self.pruning.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict or None
