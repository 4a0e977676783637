"""The layer's problem that the second-order pruners share: minimise tr((W - W0) H (W - W0)^T) on a mask.

Every row of W is a problem of its own with the same H. Two ways to solve it: conjugate gradients for all rows at once
(`reconstruct`), and exactly for nested masks of a row from one factorisation (`solve_nested`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from onnx_spdy.runtimes.errors import OnnxSpdyError

LARGEST = 1e30  # of the mean square of a layer's inputs; beyond this, and below its inverse, float32 runs out
DAMPING = 1e-2  # of the mean diagonal: keeps directions that the samples barely saw from being overfitted


class UnusableHessian(OnnxSpdyError, ValueError):
    """A layer's Hessian holds what no mean of squares can be, or what can't be computed with in float32."""


def check_hessian(hessian: torch.Tensor) -> None:
    """Refuse a Hessian from which a pruner would make anything.

    Raises:
        UnusableHessian: NaN, infinite or negative squares, or means beyond `LARGEST`.
    """
    diagonal = hessian.diagonal().double()
    if not bool(torch.isfinite(hessian).all()):
        raise UnusableHessian("the layer's inputs are NaN or infinite for some samples, or overflow when squared")
    if bool((diagonal < 0).any()):
        raise UnusableHessian(f"its Hessian has a negative mean square, {float(diagonal.min()):.1e}")
    mean = float(diagonal.mean())
    if mean > LARGEST or 0 < mean < 1 / LARGEST:
        raise UnusableHessian(
            f"the mean square of the layer's inputs is {mean:.1e}, too {'large' if mean > 1 else 'small'} to compute "
            "with in float32: scale the data or the layer before it"
        )


def cholesky(matrix: torch.Tensor, *, upper: bool = False) -> torch.Tensor:
    """The Cholesky factor of (..., d, d).

    Raises:
        UnusableHessian: it isn't positive definite.
    """
    try:
        return torch.linalg.cholesky(matrix, upper=upper)
    except torch.linalg.LinAlgError as exc:
        raise UnusableHessian("its Hessian is not positive definite, even with damping") from exc


def damped(hessian: torch.Tensor) -> torch.Tensor:
    """H + `DAMPING` of its mean diagonal, float64: positive definite, also where the samples leave H rank deficient.

    An input that is always zero has only the damping as curvature: its weights cost next to nothing and go first. A
    layer whose inputs are all zero gets the identity, so its weights go by magnitude.

    Raises:
        UnusableHessian: see `check_hessian`.
    """
    check_hessian(hessian)
    result = hessian.double().clone()
    diagonal = result.diagonal()
    alive = diagonal > 0
    diagonal += DAMPING * float(diagonal[alive].mean()) if bool(alive.any()) else 1.0
    return result


def inverse(hessian: torch.Tensor) -> torch.Tensor:
    """(..., d, d) H^-1 of positive definite H."""
    return torch.cholesky_inverse(cholesky(hessian))


def inflation(hessian: torch.Tensor, inverted: torch.Tensor) -> torch.Tensor:
    """(d,) [H^-1]_pp H_pp of each input: 1 where it is correlated with no other, more the better others predict it."""
    return inverted.diagonal() * hessian.diagonal()


def reconstruct(
    start: torch.Tensor,
    dense: torch.Tensor,
    hessian: torch.Tensor,
    mask: torch.Tensor,
    iterations: int,
    precondition: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Minimise over the weights that the mask keeps, by preconditioned conjugate gradients, all rows at once.

    Args:
        start: (out, d), first guess; values outside the mask are dropped.
        dense: (out, d), W0.
        hessian: (d, d), positive definite.
        mask: (out, d) bool, True = keep.
        iterations: of conjugate gradients, one matrix product each, besides the one for the first residual.
        precondition: an approximate inverse of H on the mask, applied to the (out, d) residuals of all rows.
    Returns:
        (out, d), exact zeros outside the mask.
    Source: Meng et al., ALPS (NeurIPS 2024), section 3.3.
    """
    weight = torch.where(mask, start, 0.0)
    if bool(mask.all()) or not bool(mask.any()):
        return dense.clone() if bool(mask.all()) else weight
    residual = torch.where(mask, (dense - weight) @ hessian, 0.0)
    scaled = precondition(residual)
    direction = scaled
    power = (residual * scaled).sum(1, keepdim=True)  # (out, 1)
    for left in reversed(range(iterations)):
        curved = torch.where(mask, direction @ hessian, 0.0)
        curvature = (direction * curved).sum(1, keepdim=True)
        step = torch.where(curvature > 0, power / curvature, 0.0)  # a row that has converged stays where it is
        weight.addcmul_(direction, step)
        if left:
            residual.addcmul_(curved, step, value=-1)
            scaled = precondition(residual)
            new_power = (residual * scaled).sum(1, keepdim=True)
            direction = scaled + direction * torch.where(power > 0, new_power / power, 0.0)
            power = new_power
    return weight


def solve_nested(
    hessian: torch.Tensor, target: torch.Tensor, order: torch.Tensor, counts: Sequence[int]
) -> list[torch.Tensor]:
    """The exact minimisers of rows that share nested masks, from one Cholesky factorisation.

    The leading part of a Cholesky factor is the factor of the leading part, so each mask costs one triangular solve.

    Args:
        hessian: (d, d), positive definite.
        target: (rows, d), W0 H.
        order: (n,) columns; a mask keeps the first so many of them.
        counts: how many each mask keeps.
    Returns:
        (rows, d) for each count.
    """
    order = order[: max(counts, default=0)]
    factor = cholesky(hessian[order.unsqueeze(1), order])
    halfway = torch.linalg.solve_triangular(factor, target[:, order].mT, upper=False)
    found = []
    for count in counts:
        weight = torch.zeros_like(target)
        part = torch.linalg.solve_triangular(factor[:count, :count].mT, halfway[:count], upper=True)
        weight[:, order[:count]] = part.mT
        found.append(weight)
    return found
