"""H as a diagonal and a few outer products: cheap to invert on the mask of every row, and close to H where it matters.

Layer inputs are strongly correlated: few directions hold most of H, and these make conjugate gradients slow. With
them in the preconditioner some iterations suffice, and the diagonal of its inverse is that of H_S^-1 to a few percent,
for every row's own S, which the OBS saliency wants.

Sources: Frangella, Tropp & Udell, Randomized Nystroem Preconditioning (2023) for low-rank preconditioners; the
inverse is Woodbury's identity.
"""

from __future__ import annotations

import torch

from onnx_spdy.pipeline.database.pruners.quadratic import inverse

OVERSAMPLED, PASSES = 16, 4  # of the subspace iteration
FLOOR = 1e-3  # of H's mean diagonal: the least that the diagonal part holds


class LowRank:
    """M = D + R R^T with the leading eigenvectors of H in R and M's diagonal that of H.

    Args:
        hessian: (d, d), positive definite.
        rank: how many eigenvectors.
    """

    def __init__(self, hessian: torch.Tensor, rank: int) -> None:
        width, diagonal = len(hessian), hessian.diagonal()
        rank = min(rank, width // 2)
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(width, min(width, rank + OVERSAMPLED), generator=generator).to(hessian)
        for _ in range(PASSES):
            basis = torch.linalg.qr(hessian @ basis).Q
        values, vectors = torch.linalg.eigh(basis.T @ hessian @ basis)
        first = len(values) - rank
        self._factor = basis @ vectors[:, first:] * values[first:].clamp_min(0).sqrt()  # (d, rank), R
        rest = diagonal - self._factor.square().sum(1)
        self._rest = rest.clamp_min(FLOOR * float(diagonal.mean()))  # (d,), D
        self._scaled = self._factor / self._rest[:, None]  # D^-1 R
        self._least = diagonal.reciprocal()  # of the diagonal of the inverse on any mask
        # R^T D^-1 R on a mask is a sum over what the mask keeps: for all rows one product with these pairs.
        self._pairs = torch.triu_indices(rank, rank)
        first_of, second_of = self._pairs
        self._gram = self._scaled[:, first_of] * self._factor[:, second_of]  # (d, pairs)
        self._square = self._scaled[:, first_of] * self._scaled[:, second_of] * torch.where(first_of == second_of, 1, 2)

    def on(self, mask: torch.Tensor) -> MaskedLowRank:
        """M^-1 on each row's mask (rows, d)."""
        rank = self._factor.shape[1]
        flat = mask.to(self._gram.dtype) @ self._gram
        small = flat.new_empty(len(mask), rank, rank)
        small[:, self._pairs[0], self._pairs[1]] = flat
        small[:, self._pairs[1], self._pairs[0]] = flat
        small.diagonal(dim1=1, dim2=2).add_(1.0)
        return MaskedLowRank(self, mask, inverse(small))


class MaskedLowRank:
    """M_S^-1 for the mask S of each row: what `reconstruct` takes as its preconditioner."""

    def __init__(self, whole: LowRank, mask: torch.Tensor, small: torch.Tensor) -> None:
        self._whole, self._mask, self._small = whole, mask, small  # small: (rows, rank, rank), (I + R_S^T D^-1 R_S)^-1

    def __call__(self, residual: torch.Tensor) -> torch.Tensor:
        """M_S^-1 times each row's residual (rows, d), which is zero outside the mask; so is what comes back."""
        whole = self._whole
        inner = torch.bmm(self._small, (residual @ whole._scaled).unsqueeze(2)).squeeze(2)
        return torch.where(self._mask, residual / whole._rest - inner @ whole._scaled.T, 0.0)

    def diagonal(self) -> torch.Tensor:
        """(rows, d) diagonal of M_S^-1; some positive number outside the mask."""
        whole = self._whole
        first_of, second_of = whole._pairs
        found = whole._rest.reciprocal() - self._small[:, first_of, second_of] @ whole._square.T
        return torch.maximum(found, whole._least)
