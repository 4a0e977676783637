"""Optimal Brain Surgeon for all levels in sequence: second-order masks, least-squares reconstruction.

From one level to the next: drop the weights whose removal costs least by the OBS saliency
w^2 / [H^-1]_pp of the *reconstructed* weights, then minimise the layer's squared output error over the
weights that remain, by conjugate gradients that start from the level before. A step removes about
10 % of what is left, so the masks follow the greedy order of exact OBS closely at a few matrix
products a level instead of one elimination for each weight.

Sources: Hassibi & Stork, OBS (1993); Frantar & Alistarh, OBC (NeurIPS 2022), eq. 3; Meng et al., ALPS
(NeurIPS 2024), section 3.3 (conjugate gradients on a fixed mask).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.mask import select_mask

DAMPING = 1e-2  # of the mean diagonal: keeps directions that the samples barely saw from being overfitted
ITERATIONS = 8


def obs(weight: torch.Tensor, hessian: torch.Tensor, levels: Sequence[Level]) -> Iterator[torch.Tensor]:
    """See `Pruner`. Levels may come in any order; each is reconstructed from the one before."""
    dense = weight.flatten(1).float()  # (out, d)
    damped = _damped(hessian)  # (d, d)
    inverse_diagonal = torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal().clamp_min(1e-30).float()
    damped = damped.float()
    current = dense.clone()
    for level in levels:
        mask = select_mask((current.square() / inverse_diagonal).view(weight.shape), level).flatten(1)
        current = reconstruct(current, dense, damped, mask, ITERATIONS)
        yield current.view(weight.shape).to(weight.dtype)


def _damped(hessian: torch.Tensor) -> torch.Tensor:
    """H + damping in float64. An input that is always zero gets curvature 1: its weights are free and go first."""
    damped = hessian.double().clone()
    diagonal = damped.diagonal()
    alive = diagonal > 0
    mean = float(diagonal[alive].mean()) if bool(alive.any()) else 1.0
    diagonal += DAMPING * mean
    return damped


def reconstruct(
    start: torch.Tensor, dense: torch.Tensor, hessian: torch.Tensor, mask: torch.Tensor, iterations: int
) -> torch.Tensor:
    """Minimise tr((W - W0) H (W - W0)^T) over the weights that the mask keeps.

    Preconditioned conjugate gradients, all rows at once; every row is a system of its own.

    Args:
        start: (out, d), first guess; values outside the mask are dropped.
        dense: (out, d), W0.
        hessian: (d, d), positive definite.
        mask: (out, d) bool, True = keep.
        iterations: of conjugate gradients, one matrix product each, besides the one for the first residual.
    Returns:
        (out, d), exact zeros outside the mask.
    """
    weight = torch.where(mask, start, 0.0)
    if bool(mask.all()) or not bool(mask.any()):
        return dense.clone() if bool(mask.all()) else weight
    preconditioner = hessian.diagonal().reciprocal()
    residual = torch.where(mask, (dense - weight) @ hessian, 0.0)
    scaled = residual * preconditioner
    direction = scaled.clone()
    power = (residual * scaled).sum(1, keepdim=True)  # (out, 1)
    for _ in range(iterations):
        curved = torch.where(mask, direction @ hessian, 0.0)
        curvature = (direction * curved).sum(1, keepdim=True)
        step = torch.where(curvature > 0, power / curvature, 0.0)  # a row that has converged stays where it is
        weight.addcmul_(direction, step)
        residual.addcmul_(curved, step, value=-1)
        scaled = residual * preconditioner
        new_power = (residual * scaled).sum(1, keepdim=True)
        direction = scaled + direction * torch.where(power > 0, new_power / power, 0.0)
        power = new_power
    return weight
