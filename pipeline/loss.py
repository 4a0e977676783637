"""Losses that score a compressed network on calibration samples: explicit, label-free by default.

A loss compares a batch of outputs with the dense network's outputs for the same samples (and with the
target where it needs one) and returns one number for each batch, averaged over its samples.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from onnx_spdy.pipeline.channel_error import ChannelScale, channel_scales, masked_alike
from onnx_spdy.pipeline.class_outputs import are_probabilities, class_output
from onnx_spdy.runtimes.errors import OnnxSpdyError

Outputs = Mapping[str, torch.Tensor]
Loss = Callable[[Outputs, Outputs, torch.Tensor | None], torch.Tensor]

KL, CROSS_ENTROPY, SQUARED_ERROR = "kl", "cross-entropy", "squared-error"
PER_CHANNEL = "squared-error per channel"  # what artifacts call SQUARED_ERROR: tells it from one norm for all


class LossError(OnnxSpdyError, ValueError):
    """The loss does not fit the network's outputs or the data."""


@dataclass(frozen=True)
class FittedLoss:
    """A loss that was chosen for, and scaled by, what a dense network gives.

    Attributes:
        name: as artifacts have it; it tells two functions apart whose code differs.
        reason: why it was chosen, in words.
        function: the loss itself.
    """

    name: str
    reason: str
    function: Loss

    def __call__(self, outputs: Outputs, dense: Outputs, target: torch.Tensor | None = None) -> torch.Tensor:
        return self.function(outputs, dense, target)

    def __str__(self) -> str:
        return f"loss: {self.name} ({self.reason}); --loss changes it"


def fit_loss(
    loss: str | Loss | FittedLoss | None,
    references: Sequence[Outputs],
    target: torch.Tensor | None = None,
    axes: Mapping[str, int] | None = None,
) -> FittedLoss:
    """The loss for a network.

    Args:
        loss: a name of LOSSES, a function of your own, one that was fitted already, or None for the one that fits.
        references: the dense network's outputs, batch by batch: what is chosen and every scale come from them.
        target: of these samples; numbers that aren't whole say that the outputs are no classes.
        axes: output -> the axis on which its samples lie (`rows.sample_axes`); by default the first.
    Raises:
        LossError: there is no loss of that name, or no output that it can compare.
    """
    if isinstance(loss, FittedLoss):
        return loss
    if callable(loss):
        return FittedLoss(loss_name(loss), "yours", _guarded(loss, loss_name(loss)))
    if loss is not None and loss not in LOSSES:
        raise LossError(f"unknown loss {loss!r}; known: {', '.join(LOSSES)}, or FILE.py:FUNCTION")
    if loss is None:
        loss, reason = _choice(references, target)
    else:
        reason = "as you asked"
    if loss != SQUARED_ERROR:
        return FittedLoss(loss, reason, LOSSES[loss])
    scales = channel_scales(references, axes)
    if not scales:
        raise LossError(f"the network has no floating-point output among {list(references[0])}; give --loss a function")

    def per_channel(outputs: Outputs, dense: Outputs, target: torch.Tensor | None = None) -> torch.Tensor:
        _check_sizes({name: dense[name] for name in scales}, outputs)
        _check_channels(scales, dense)
        return torch.stack([scale.error(outputs[name], dense[name]) for name, scale in scales.items()]).mean()

    return FittedLoss(PER_CHANNEL, reason, per_channel)


def kl_divergence(outputs: Outputs, dense: Outputs, target: torch.Tensor | None = None) -> torch.Tensor:
    """KL(dense || compressed) of the class distributions, mean over samples.

    The first floating-point output is (samples, classes): logits, log-probabilities or probabilities.
    """
    logits, reference = _log_probabilities(outputs, dense)
    return _divergence(logits, reference)


def cross_entropy(outputs: Outputs, dense: Outputs, target: torch.Tensor | None = None) -> torch.Tensor:
    """Cross entropy with the labels, mean over samples. First output: (samples, classes); target: (samples,)."""
    if target is None:
        raise LossError(
            "loss 'cross-entropy' needs labels that are numbers; add an array 'target' to the data or use --loss kl"
        )
    logits, _ = _log_probabilities(outputs, dense)
    values = target.double()  # any type of number, also NaN
    fitting = (values >= 0) & (values < logits.shape[1]) & (values == values.floor())
    if target.ndim != 1 or not bool(fitting.all()):
        raise LossError(f"target {tuple(target.shape)} must hold one class of 0..{logits.shape[1] - 1} for each sample")
    return functional.nll_loss(logits, target.long())


def channel_squared_error(outputs: Outputs, dense: Outputs, target: torch.Tensor | None = None) -> torch.Tensor:
    """Squared error of each channel / its variance, mean over channels and outputs; scaled by this batch alone."""
    return fit_loss(SQUARED_ERROR, [dense])(outputs, dense, target)


def relative_squared_error(outputs: Outputs, dense: Outputs, target: torch.Tensor | None = None) -> torch.Tensor:
    """Squared distance to the dense tensors / squared dense tensors, mean over all of them: for hidden layers."""
    _check_sizes(dense, outputs)
    terms = [
        (outputs[name].float() - value.float()).square().sum() / value.float().square().sum().clamp_min(1e-20)
        for name, value in dense.items()
        if value.is_floating_point()
    ]
    if not terms:
        raise LossError(f"the network has no floating-point output among {list(dense)}; give a loss of your own")
    return torch.stack(terms).mean()


LOSSES: dict[str, Loss] = {
    KL: kl_divergence,
    CROSS_ENTROPY: cross_entropy,
    SQUARED_ERROR: channel_squared_error,
}


def distillation_loss(
    outputs: torch.Tensor | Outputs,
    dense: torch.Tensor | Outputs,
    temperature: float = 1.0,
    loss: FittedLoss | None = None,
) -> torch.Tensor:
    """What a pruned network learns from the dense one: KL divergence for a classifier, squared error otherwise.

    Args:
        outputs, dense: what both networks give for the same samples: a tensor, or name -> tensor. Gradients go through
            `outputs`.
        temperature: of a classifier's distributions; the loss is scaled so that gradients keep their size.
        loss: from `fit_loss(None, [dense outputs of some batches])`, so that small batches neither choose nor scale
            by themselves; None lets each batch do so. A tensor is called "output".
    Source: Hinton, Vinyals & Dean, Distilling the Knowledge in a Neural Network (2015), section 2.
    """
    mine = {"output": outputs} if isinstance(outputs, torch.Tensor) else outputs
    theirs = {"output": dense} if isinstance(dense, torch.Tensor) else dense
    theirs = {name: value.detach() for name, value in theirs.items()}
    loss = loss or fit_loss(None, [theirs])
    if loss.name != KL:
        return loss(mine, theirs)
    logits, reference = _log_probabilities(mine, theirs)
    soft, reference = ((value / temperature).log_softmax(1) for value in (logits, reference))
    return temperature**2 * _divergence(soft, reference)


def loss_name(loss: Loss) -> str:
    """What artifacts call a function: its name and a checksum of its code; other code's scores aren't reused."""
    identity = getattr(loss, "identity", None)
    if identity is None:
        code = getattr(loss, "__code__", None) or getattr(type(loss).__call__, "__code__", None)
        try:
            text = inspect.getsource(code).encode() if code else repr(type(loss)).encode()
        except (OSError, TypeError):  # typed into an interpreter
            text = code.co_code + repr((code.co_consts, code.co_names)).encode() if code else b""
        identity = f"{getattr(loss, '__name__', 'custom')}@{hashlib.sha256(text).hexdigest()[:12]}"
    return identity


def numbers(target: np.ndarray | None) -> torch.Tensor | None:
    """A target as losses get it; None where it is text, which only a metric can read."""
    return None if target is None or target.dtype.kind not in "fiub" else torch.from_numpy(np.asarray(target))


def _guarded(loss: Loss, name: str) -> Loss:
    """A user's loss: it gets copies, so that nothing it changes reaches the network's outputs, and returns a number."""

    def called(outputs: Outputs, dense: Outputs, target: torch.Tensor | None = None) -> torch.Tensor:
        copies = [{key: value.clone() for key, value in values.items()} for values in (outputs, dense)]
        result = loss(copies[0], copies[1], None if target is None else target.clone())
        if isinstance(result, torch.Tensor) and result.numel() == 1 and not (result.is_complex() or result.is_meta):
            return result.reshape(())
        if isinstance(result, (int, float, np.floating, np.integer)) and not isinstance(result, bool):
            with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
                return torch.tensor(float(result))
        what = f"shape {tuple(result.shape)}" if hasattr(result, "shape") else repr(result)[:40]
        raise LossError(f"loss {name!r} returned {type(result).__name__} ({what}); it must return one real number")

    return called


def _choice(references: Sequence[Outputs], target: torch.Tensor | None) -> tuple[str, str]:
    """The loss that fits, and why."""
    floating = {name: value for name, value in references[0].items() if value.is_floating_point()}
    shown = ", ".join(f"{name!r} ({', '.join(['samples', *map(str, v.shape[1:])])})" for name, v in floating.items())
    if len(floating) != 1:
        return SQUARED_ERROR, f"outputs are {shown}"
    ((name, first),) = floating.items()
    one_width = len({outputs[name].shape[1:] for outputs in references}) == 1
    if first.ndim != 2 or first.shape[1] < 2 or not one_width:
        return SQUARED_ERROR, f"outputs are {shown}"
    values = torch.cat([outputs[name] for outputs in references]) if len(references) > 1 else first
    why_not = class_output(values, target)
    if why_not is None:
        return KL, f"output {name!r} looks like {first.shape[1]} classes"
    return SQUARED_ERROR, f"output {shown} {why_not}"


def _check_sizes(dense: Outputs, outputs: Outputs) -> None:
    """Refuse to compare what has another size in each network: boxes that were found, say.

    Raises:
        LossError: the message names the output and both shapes.
    """
    for name, value in dense.items():
        if outputs[name].shape != value.shape:
            raise LossError(
                f"{name!r} has a size that depends on the data, {tuple(value.shape)} in the dense network and "
                f"{tuple(outputs[name].shape)} in the pruned one, so they can't be compared: cut the graph before the "
                "node that selects (NonMaxSuppression, NonZero, TopK), or give --loss a function"
            )


def _check_channels(scales: Mapping[str, ChannelScale], dense: Outputs) -> None:
    """Refuse an output whose number of channels depends on the data.

    Raises:
        LossError: the message names it and both numbers.
    """
    for name, scale in scales.items():
        if scale.axis is not None and dense[name].shape[scale.axis] != len(scale.variance):
            raise LossError(
                f"{name!r} has {len(scale.variance)} channels for some samples and {dense[name].shape[scale.axis]} for "
                "others, so one scale can't serve all: give --loss a function"
            )


def _log_probabilities(outputs: Outputs, dense: Outputs) -> tuple[torch.Tensor, torch.Tensor]:
    name, reference = next(((n, v) for n, v in dense.items() if v.is_floating_point()), next(iter(dense.items())))
    if reference.ndim != 2 or reference.shape[1] < 2:
        raise LossError(
            f"output {name!r} has shape {tuple(reference.shape)}, a class loss needs (samples, classes); "
            "use --loss squared-error or a function of your own"
        )
    _check_sizes({name: reference}, outputs)
    if are_probabilities(reference):  # the graph ends in a Softmax
        smallest = torch.finfo(torch.float32).tiny
        return outputs[name].float().clamp_min(smallest).log(), reference.float().clamp_min(smallest).log()
    return outputs[name].float().log_softmax(1), reference.float().log_softmax(1)


def _divergence(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL of two (samples, classes) log-probabilities, mean over samples; a class of probability 0 adds nothing."""
    nothing = masked_alike(logits, reference) | (reference == -torch.inf)
    difference = torch.where(nothing, 0.0, reference - torch.where(nothing, 0.0, logits))
    return (reference.exp() * difference).sum(1).mean()
