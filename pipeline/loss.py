"""Losses that score a compressed network on calibration samples: explicit, label-free by default.

A loss compares a batch of outputs with the dense network's outputs for the same samples (and with the
target where it needs one) and returns one number for each batch, averaged over its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

from onnx_spdy.runtimes.errors import OnnxSpdyError

Outputs = Mapping[str, torch.Tensor]
Loss = Callable[[Outputs, Outputs, torch.Tensor | None], torch.Tensor]


class LossError(OnnxSpdyError, ValueError):
    """The loss does not fit the network's outputs or the data."""


def kl_divergence(outputs: Outputs, dense: Outputs, target: torch.Tensor | None = None) -> torch.Tensor:
    """KL(dense || compressed) of the class distributions, mean over samples. First output: (samples, classes)."""
    (logits, reference) = _log_probabilities(outputs, dense)
    return functional.kl_div(logits, reference, reduction="batchmean", log_target=True)


def cross_entropy(outputs: Outputs, dense: Outputs, target: torch.Tensor | None = None) -> torch.Tensor:
    """Cross entropy with the labels, mean over samples. First output: (samples, classes); target: (samples,)."""
    if target is None:
        raise LossError("loss 'cross-entropy' needs labels; add an array 'target' to the data or use --loss kl")
    logits, _ = _log_probabilities(outputs, dense)
    if target.ndim != 1 or not 0 <= int(target.min()) <= int(target.max()) < logits.shape[1]:
        raise LossError(f"target {tuple(target.shape)} must hold one class of 0..{logits.shape[1] - 1} for each sample")
    return functional.nll_loss(logits, target.long())


def relative_squared_error(outputs: Outputs, dense: Outputs, target: torch.Tensor | None = None) -> torch.Tensor:
    """Squared distance to the dense outputs / squared dense outputs, mean over all floating-point outputs."""
    terms = [
        (outputs[name].float() - value.float()).square().sum() / value.float().square().sum().clamp_min(1e-20)
        for name, value in dense.items()
        if value.is_floating_point()
    ]
    if not terms:
        raise LossError(f"the network has no floating-point output among {list(dense)}; give a loss of your own")
    return torch.stack(terms).mean()


LOSSES: dict[str, Loss] = {
    "kl": kl_divergence,
    "cross-entropy": cross_entropy,
    "squared-error": relative_squared_error,
}


def default_loss(dense: Outputs) -> str:
    """`kl` for a classifier (one output of shape (samples, classes > 1)), `squared-error` otherwise.

    Rows of length 1 that are no probabilities are normalised embeddings.
    """
    values = list(dense.values())
    is_classifier = len(values) == 1 and values[0].ndim == 2 and values[0].shape[1] > 1
    return "kl" if is_classifier and not _are_directions(values[0]) else "squared-error"


def distillation_loss(
    outputs: torch.Tensor | Outputs, dense: torch.Tensor | Outputs, temperature: float = 1.0
) -> torch.Tensor:
    """What a pruned network learns from the dense one: KL divergence for a classifier, squared error otherwise.

    Args:
        outputs, dense: what both networks give for the same samples: a tensor, or name -> tensor. Gradients go through
            `outputs`.
        temperature: of a classifier's distributions; the loss is scaled so that gradients keep their size.
    Source: Hinton, Vinyals & Dean, Distilling the Knowledge in a Neural Network (2015), section 2.
    """
    mine = {"output": outputs} if isinstance(outputs, torch.Tensor) else outputs
    theirs = {"output": dense} if isinstance(dense, torch.Tensor) else dense
    theirs = {name: value.detach() for name, value in theirs.items()}
    if default_loss(theirs) != "kl":
        return relative_squared_error(mine, theirs)
    soft, reference = ((value / temperature).log_softmax(1) for value in _log_probabilities(mine, theirs))
    return temperature**2 * functional.kl_div(soft, reference, reduction="batchmean", log_target=True)


def _log_probabilities(outputs: Outputs, dense: Outputs) -> tuple[torch.Tensor, torch.Tensor]:
    name, reference = next(iter(dense.items()))
    if reference.ndim != 2 or reference.shape[1] < 2:
        raise LossError(
            f"output {name!r} has shape {tuple(reference.shape)}, a class loss needs (samples, classes); "
            "use --loss squared-error or a function of your own"
        )
    if _are_probabilities(reference):  # the graph ends in a Softmax
        smallest = torch.finfo(torch.float32).tiny
        return outputs[name].float().clamp_min(smallest).log(), reference.float().clamp_min(smallest).log()
    return outputs[name].float().log_softmax(1), reference.float().log_softmax(1)


def _are_directions(values: torch.Tensor) -> bool:
    lengths = values.float().norm(dim=1)
    return torch.allclose(lengths, torch.ones_like(lengths), atol=1e-2) and not _are_probabilities(values)


def _are_probabilities(values: torch.Tensor) -> bool:
    sums = values.float().sum(1)
    return bool((values >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-2)
