"""Whether an output (samples, columns) is a distribution over classes: what KL divergence can compare.

A softmax of anything else either hides every error (landmarks in pixels make it one-hot) or is blind to what all
columns have in common (angles, scores that don't exclude each other, embeddings).
"""

from __future__ import annotations

import torch

NEAR = 1e-2
SURE = 0.8  # mean largest probability above which columns that differ more than samples are no logits
SATURATED = 0.99  # and above which a softmax that always says the same class says nothing
MASKED = -1e4  # and below: logits that are switched off


def class_output(values: torch.Tensor, target: torch.Tensor | None = None) -> str | None:
    """Why an output is no class distribution, in words; None where it looks like one.

    Logits that were trained by cross entropy have rows around zero, because its gradients sum to zero; their columns
    differ from sample to sample more than from each other.

    Args:
        values: (samples, columns) of the dense network.
        target: of these samples, or None.
    """
    if target is not None and target.is_floating_point() and bool((target != target.round()).any()):
        return "has targets that are no classes"
    values = values.float()
    if values.isnan().any():
        return "holds NaN"
    if are_probabilities(values):
        return "always says the same class with certainty" if _is_constant_one_hot(values) else None
    if are_probabilities(values.exp()):  # LogSoftmax
        return "always says the same class with certainty" if _is_constant_one_hot(values.exp()) else None
    open_ = values > MASKED  # (samples, columns)
    count = open_.sum(1, keepdim=True).clamp_min(1)
    kept = torch.where(open_, values, 0.0)
    if _are_directions(kept):
        return "holds directions (rows of length 1)"
    if bool(((kept >= 0) & (kept <= 1)).all()):
        return "holds scores in 0..1 that don't add up to 1"
    middle = kept.sum(1, keepdim=True) / count
    within_rows = torch.where(open_, kept - middle, 0.0).square().sum() / open_.sum()
    if float(middle.square().mean()) > float(within_rows):
        return "has rows that aren't around zero, as logits are"
    probabilities = torch.where(open_, values, -torch.inf).softmax(1)
    sure = float(probabilities.amax(1).nanmean())
    if sure > SATURATED and len(probabilities.argmax(1).unique()) == 1:
        return "makes a softmax that always says the same class"
    column_means = kept.sum(0) / open_.sum(0).clamp_min(1)
    around = torch.where(open_, kept - column_means, 0.0).square().sum() / open_.sum()
    if sure > SURE and float(column_means.var(correction=0)) > float(around):
        return "has columns that differ more than its samples"
    return None


def are_probabilities(values: torch.Tensor) -> bool:
    """Whether rows are positive and add up to 1."""
    sums = values.float().sum(1)
    return bool((values >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=NEAR)


def _is_constant_one_hot(values: torch.Tensor) -> bool:
    largest = values.amax(1)
    return len(values) > 1 and float(largest.min()) > 1 - 1e-6 and len(values.argmax(1).unique()) == 1


def _are_directions(values: torch.Tensor) -> bool:
    lengths = values.norm(dim=1)
    return torch.allclose(lengths, torch.ones_like(lengths), atol=NEAR)
