"""Gradual pruning while a network is trained: in your own loop, on your own module, to a searched profile.

Each layer's sparsity rises from dense to its level of the profile along a cubic: fast at first, when much can go,
and slowly at the end. The smallest weights go, in the level's pattern; what is gone stays exactly zero.

    pruning = GradualPruning(module, model, profile.levels, steps=2000)
    for images, labels in data:
        loss = distillation_loss(module(images), dense_module(images))
        loss.backward()
        optimizer.step()
        pruning.step()
        optimizer.zero_grad()

An averaged copy of the module (EMA, `torch.optim.swa_utils.AveragedModel`) holds means of weights that were pruned and
of what they were before: call `pruning.apply_to(copy)` before it is used or exported.

Source: Zhu & Gupta, To prune, or not to prune (2017), equation 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import onnx
import torch
from torch import nn

from onnx_spdy.pipeline.level import DENSE, Level
from onnx_spdy.pipeline.mask import select_mask
from onnx_spdy.pipeline.training.match import ModuleWeight, ParameterMismatch, match_weights

UPDATES = 50  # of the masks by default; more cost time and hardly change the result


class KeptZeros:
    """Keeps the zeros that parameters have now, whatever an optimizer does with its momentum and weight decay.

    Args:
        parameters: name -> parameter, of any shape.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self.parameters = dict(parameters)
        self.masks = {name: values.detach() != 0 for name, values in self.parameters.items()}

    def step(self) -> None:
        """Call it after each step of the optimizer."""
        with torch.no_grad():
            for name, values in self.parameters.items():
                mask = self.masks[name]
                if mask.device != values.device:  # the module was moved
                    mask = self.masks[name] = mask.to(values.device)
                values.masked_fill_(~mask, 0.0)  # a product would keep NaN, and leave -0.0

    def sparsity(self) -> dict[str, float]:
        """Name -> fraction of zeros that are kept."""
        return {name: 1 - float(mask.float().mean()) for name, mask in self.masks.items()}


class GradualPruning:
    """Prunes a module's weights to a profile over a number of optimizer steps, and keeps them pruned afterwards.

    Zeros that the module has already count: a layer that is sparser than the schedule waits for it. Parameters that
    are replaced later, as `load_state_dict(assign=True)` does, are followed by their names.

    Args:
        module: yours, in any training state; its weights become sparse in place.
        model: the ONNX graph of the profile, with its dense weights: `load_model` of a run's `dense.onnx`, or the
            `proto` of what `prepare` returns.
        levels: layer name -> level, as `Profile.levels` has it.
        steps: optimizer steps until every layer is at its level; 0 prunes at once.
        every: steps between two choices of masks; by default there are `UPDATES`.
        names: layer -> parameter name where names and values don't tell; see `match_weights`.
    Raises:
        ParameterMismatch: a layer's weight isn't found among the module's parameters, or can't be pruned there; later,
            that a parameter is gone or has another shape.
    """

    def __init__(
        self,
        module: nn.Module,
        model: onnx.ModelProto,
        levels: Mapping[str, Level],
        *,
        steps: int,
        every: int | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        if steps < 0 or (every is not None and every < 1):
            raise ValueError(f"{steps} steps with a choice of masks every {every}: neither can be negative")
        self.levels = {name: level for name, level in levels.items() if level != DENSE}
        self.weights: dict[str, ModuleWeight] = match_weights(module, model, self.levels, names)
        self.steps, self.every = steps, every or max(1, steps // UPDATES)
        self.done = 0
        self._module = module
        parameters = dict(module.named_parameters())
        self._kept = KeptZeros({one.name: parameters[one.name] for one in self.weights.values()})
        if steps == 0:
            self.prune_to(1.0)

    @property
    def finished(self) -> bool:
        """Whether every layer is at its level."""
        return self.done >= self.steps

    def step(self) -> None:
        """Call it after each step of the optimizer: what is pruned becomes zero again, and more is pruned in time."""
        self.done += 1
        if self.done <= self.steps and (self.done % self.every == 0 or self.done == self.steps):
            self.prune_to(self.done / self.steps)
        else:
            self.keep()

    def keep(self) -> None:
        """Make zero again what is pruned."""
        self._follow()
        self._kept.step()

    def apply_to(self, copy: nn.Module) -> None:
        """Make zero in a copy of the module, an averaged one, say, what is pruned in the module now.

        Args:
            copy: with the same parameters, perhaps below a wrapper's prefix.
        Raises:
            ParameterMismatch: a pruned parameter isn't there.
        """
        self._follow()
        theirs = dict(copy.named_parameters())
        found = {}
        for name, values in self._kept.parameters.items():
            fitting = [name] if name in theirs else [other for other in theirs if other.endswith(f".{name}")]
            if len(fitting) != 1 or theirs[fitting[0]].shape != values.shape:
                raise ParameterMismatch(f"the copy has no parameter {name!r} of shape {tuple(values.shape)}")
            found[name] = theirs[fitting[0]]
        with torch.no_grad():
            for name, values in found.items():
                values.masked_fill_(~self._kept.masks[name].to(values.device), 0.0)

    def _follow(self) -> None:
        """Take parameters that replaced others, and prune them as those were."""
        if self._replaced():
            self._kept.step()

    def _replaced(self) -> bool:
        """Take parameters that replaced others; whether there were any."""
        now = dict(self._module.named_parameters())
        for name, values in self._kept.parameters.items():
            if name not in now or now[name].shape != values.shape:
                raise ParameterMismatch(f"the module's parameter {name!r} is gone, or has another shape than it had")
        found = any(now[name] is not values for name, values in self._kept.parameters.items())
        self._kept.parameters = {name: now[name] for name in self._kept.parameters}
        return found

    def prune_to(self, fraction: float) -> None:
        """Prune as far as the schedule is at a fraction (0 to 1) of its way. It never goes back."""
        self._follow()
        self._kept.step()  # weights that are gone have magnitude 0 and so stay gone
        with torch.no_grad():
            for name, one in self.weights.items():
                values = self._kept.parameters[one.name]
                level = level_at(self.levels[name], fraction)
                mask = select_mask(one.canonical(values).abs().float(), level)
                self._kept.masks[one.name] &= one.canonical(mask).to(self._kept.masks[one.name].device)
        self._kept.step()

    def sparsity(self) -> dict[str, float]:
        """Parameter name -> fraction of its weights that are pruned now."""
        self._follow()
        return self._kept.sparsity()

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on elsewhere, together with the module's and the optimizer's: steps done and masks."""
        return {"done": self.done, "masks": {name: mask.clone() for name, mask in self._kept.masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was.

        Raises:
            ValueError: it belongs to other parameters.
        """
        masks = state["masks"]
        own = {name: tuple(mask.shape) for name, mask in self._kept.masks.items()}
        if own != (theirs := {name: tuple(mask.shape) for name, mask in masks.items()}):
            odd = min(set(own.items()) ^ set(theirs.items()))
            raise ValueError(f"this state is of another module or profile: they differ in parameter {odd[0]!r}")
        self.done = int(state["done"])
        self._replaced()
        self._kept.masks = {name: mask.bool().clone() for name, mask in masks.items()}
        self._kept.step()

    def resume(self, done: int) -> None:
        """Go on after so many steps, with the zeros that the module has now: where only the module was saved."""
        self.done = done
        self._replaced()
        self._kept = KeptZeros(self._kept.parameters)


def level_at(level: Level, fraction: float) -> Level:
    """The level on the way from dense to `level` at a fraction (0 to 1) of the schedule.

    N:M patterns go through M-1:M, M-2:M, ... in the place of sparsities.

    Source: Zhu & Gupta (2017), equation 1: s = s_f (1 - (1 - fraction)^3).
    """
    if fraction >= 1 or level == DENSE:
        return level
    sparsity = level.sparsity * (1 - (1 - max(fraction, 0.0)) ** 3)
    if level.is_n_of_m:
        kept, group = level.group
        kept = max(kept, math.ceil(round((1 - sparsity) * group, 6)))
        return DENSE if kept == group else Level.parse(f"{kept}:{group}")
    rounded = round(sparsity, 4)
    return Level(level.pattern, rounded) if rounded else DENSE
