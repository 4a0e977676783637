"""Pruners: a layer's weights and its Hessian in, its weights at each level out. One file each, one line below.

For widths, a name has a unit pruner besides: see units.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from onnx_spdy.pipeline.database.pruners.adaprune import adaprune
from onnx_spdy.pipeline.database.pruners.magnitude import magnitude
from onnx_spdy.pipeline.database.pruners.magnitude_units import magnitude_units
from onnx_spdy.pipeline.database.pruners.obc import obc
from onnx_spdy.pipeline.database.pruners.obs import obs
from onnx_spdy.pipeline.database.pruners.obs_units import obs_units
from onnx_spdy.pipeline.database.pruners.sparsegpt import sparsegpt
from onnx_spdy.pipeline.database.pruners.units import UnitPruner
from onnx_spdy.pipeline.level import Level
from onnx_spdy.runtimes.errors import OnnxSpdyError


class Pruner(Protocol):
    """Compress one layer to several levels."""

    def __call__(self, weight: torch.Tensor, hessian: torch.Tensor, levels: Sequence[Level]) -> Iterator[torch.Tensor]:
        """Yield the layer's weights at each level, in the order of `levels`.

        Args:
            weight: (out, in, *kernel), dense.
            hessian: (d, d) with d = in * prod(kernel): mean over samples and positions of x x^T, where
                x (d,) is the layer's input patch and the layer computes `weight.flatten(1) @ x`.
            levels: from the lowest to the highest sparsity; patterns may be mixed, and dense may be among them.
        Yields:
            (out, in, *kernel), exact zeros where the level prunes; a new tensor for each level.
        """


PRUNERS: dict[str, Pruner] = {
    "magnitude": magnitude,
    "adaprune": adaprune,
    "sparsegpt": sparsegpt,
    "obc": obc,
    "obs": obs,
}

UNIT_PRUNERS: dict[str, UnitPruner] = {
    "magnitude": magnitude_units,
    "obs": obs_units,
}

DEFAULT_PRUNER = "obs"


class UnknownPruner(OnnxSpdyError, ValueError):
    """No pruner of that name."""


@dataclass(frozen=True)
class NamedPruner:
    """A pruner, and what a database calls it.

    Attributes:
        name: in the database.
        prune: what it does to a layer.
        prune_units: what it does to the consumers of a group's units; None where it can't choose widths.
    """

    name: str
    prune: Pruner
    prune_units: UnitPruner | None = None


def pruner_named(name: str) -> NamedPruner:
    """The pruner of that name.

    Raises:
        UnknownPruner: the message lists the known names.
    """
    if name not in PRUNERS:
        raise UnknownPruner(f"unknown pruner {name!r}; known: {', '.join(PRUNERS)}")
    return NamedPruner(name, PRUNERS[name], UNIT_PRUNERS.get(name))


def one_level(function: Callable[[torch.Tensor, torch.Tensor, Level], torch.Tensor]) -> Pruner:
    """A pruner from a function `(weight, hessian, level) -> weight` that knows one level at a time.

    It gets copies, which it may change.

    Raises:
        PrunerResult: when the function returns something else than a tensor of real numbers.
    """

    def pruner(weight: torch.Tensor, hessian: torch.Tensor, levels: Sequence[Level]) -> Iterator[torch.Tensor]:
        for level in levels:
            found = function(weight.clone(), hessian.clone(), level)
            if isinstance(found, np.ndarray) and found.dtype.kind == "f":
                found = torch.from_numpy(found)
            if not isinstance(found, torch.Tensor) or not found.is_floating_point():
                kind = found.dtype if isinstance(found, (torch.Tensor, np.ndarray)) else type(found).__name__
                raise PrunerResult(
                    f"the pruner returned {kind} at {level}; it must return the weights as a float tensor"
                )
            if found.is_meta:
                raise PrunerResult(f"the pruner returned a tensor without values (on the meta device) at {level}")
            yield (found.to_dense() if found.layout != torch.strided else found).detach().to(weight)

    return pruner


class PrunerResult(OnnxSpdyError, ValueError):
    """A pruner returned no weights."""


class PrunerFailed(OnnxSpdyError, ValueError):
    """A pruner returned weights that are not what its level says."""
