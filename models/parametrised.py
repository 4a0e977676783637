"""Parameters that PyTorch computes a weight from: they can't be pruned, because zeros in them aren't zeros in it."""

from __future__ import annotations

from torch import nn

OLD_NORMS = (("_v", "_g"), ("_g", "_v"), ("_orig", "_mask"), ("_orig", "_u"))  # ending, and what stands beside it


def parametrisation_of(module: nn.Module, name: str) -> str | None:
    """The tensor that a parameter is a part of by a parametrisation (weight or spectral norm, pruning), or None.

    Args:
        name: in `module.named_parameters()`.
    """
    if ".parametrizations." in f".{name}":
        before, _, after = f".{name}".partition(".parametrizations.")
        return f"{before}.{after.split('.')[0]}".lstrip(".")
    beside = {*dict(module.named_parameters()), *dict(module.named_buffers())}
    for ending, other in OLD_NORMS:
        if name.endswith(ending) and name.removesuffix(ending) + other in beside:
            return name.removesuffix(ending)
    return None
