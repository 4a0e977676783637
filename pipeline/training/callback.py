"""What the callbacks for other people's Trainers share: gradual pruning over a part of the training's steps."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from torch import nn

from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.training.gradual import GradualPruning


class GradualCallback:
    """Prunes the trained module gradually to a profile.

    Args:
        model: the ONNX graph of the profile, with its dense weights; see `GradualPruning`.
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

    def _begin(self, module: nn.Module, total_steps: float) -> GradualPruning:
        """Start on this module, whose training takes so many steps of the optimizer."""
        steps = max(1, round(self._share * total_steps))
        self.pruning = GradualPruning(module, self._model, self._levels, steps=steps, names=self._names)
        return self.pruning
