"""What a user calls a module: wrappers are taken off, and what isn't one is refused with what to give instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from onnx_spdy.models.graph import ModelError


def plain_module(given: Any) -> nn.Module:
    """The module inside of DataParallel, DistributedDataParallel or `torch.compile`; TorchScript as it is.

    Raises:
        ModelError: it is no module that can be exported.
    """
    if isinstance(given, torch.export.ExportedProgram) or _is_exported(given):
        raise ModelError("an exported program fixes its sizes: return the module that it was exported from")
    if isinstance(given, Mapping):
        raise ModelError(
            "a state_dict has weights but no network: make the module, call its load_state_dict, and return it"
        )
    if isinstance(given, type):
        raise ModelError(f"{given.__name__} is a class: return a module, {given.__name__}(...)")
    if not isinstance(given, nn.Module):
        raise ModelError(f"{type(given).__name__} is no torch.nn.Module: return a module and example inputs")
    if isinstance(given, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return plain_module(given.module)
    if (inner := getattr(given, "_orig_mod", None)) is not None:  # torch.compile
        return plain_module(inner)
    if any(tensor.is_meta for tensor in (*given.parameters(), *given.buffers())):
        raise ModelError("the module is on the meta device, without weights: load them first")
    return given


def plain_inputs(given: Any) -> Any:
    """Example inputs with tensors in the place of arrays.

    Raises:
        ModelError: they are none.
    """
    if not isinstance(given, torch.Tensor | np.ndarray | Mapping | list | tuple):
        raise ModelError(f"example inputs are {type(given).__name__}: give a tensor, a tuple or a dict of tensors")
    return _plain(given)


def _plain(given: Any) -> Any:
    if isinstance(given, np.ndarray):
        return torch.from_numpy(np.require(given, requirements=["C", "W"]))
    if isinstance(given, Mapping):
        return {name: _plain(value) for name, value in given.items()}
    if isinstance(given, list | tuple):
        return tuple(_plain(value) for value in given)
    return given


def _is_exported(given: Any) -> bool:
    """Whether it is the module of an ExportedProgram."""
    return isinstance(given, torch.fx.GraphModule) and any(
        kind.__module__.startswith("torch.export") for kind in type(given).__mro__
    )
