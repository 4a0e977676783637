"""Train: gradient steps on a network's weights with a held-out part of the samples as the judge.

What repair and fine-tuning share: Adam with a step relative to each tensor's size, a warm-up and a cosine, bfloat16
where the CPU multiplies it itself, the best state kept, a time limit, and a checkpoint from which stopped work
goes on to the same result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from onnx_spdy.models import Layer
from onnx_spdy.pipeline.data import DataError, Samples
from onnx_spdy.pipeline.loss import numbers
from onnx_spdy.pipeline.network import Network, Weights
from onnx_spdy.pipeline.progress import Progress, ignore
from onnx_spdy.pipeline.training.checkpoint import Checkpoint
from onnx_spdy.pipeline.training.dense_outputs import Capture, DenseOutputs
from onnx_spdy.pipeline.training.mirrored import WithMirrored
from onnx_spdy.runtimes.errors import OnnxSpdyError

Outputs = Mapping[str, torch.Tensor]
Criterion = Callable[[Outputs, Outputs, torch.Tensor | None], torch.Tensor]  # (outputs, dense outputs, target) -> mean

BATCH = 32
LARGEST_HELD_OUT = 256
WARM_UP = 0.05  # of all steps
SMALLEST_BIAS = 1e-3
RETREAT = 0.3  # of the rate is left after an epoch that made nothing better
CHECKS = 10  # of the held-out samples, at least, within a time limit
PATIENCE = 3  # epochs that make nothing better, until the rate is too high for what is left to learn
MIRRORED_FROM = 4  # passes over the samples, after which every other epoch is of mirrored images
SMALLEST_RATE = 1e-3  # of the rate that was given: where that doesn't help either, training ends


@dataclass(frozen=True)
class Training:
    """How a training ended.

    Attributes:
        loss_before, loss_after: on the held-out samples, at the start and of the state that was kept.
        epochs: done.
        held_out: samples that weren't trained on.
        stopped: why it ended, in words.
        interrupted: it can go on from its checkpoint.
    """

    loss_before: float
    loss_after: float
    epochs: int
    held_out: int
    stopped: str
    interrupted: bool = False


class Pruning(Protocol):
    """What keeps a network pruned, or prunes it on the way, while it is trained."""

    def step(self, fraction: float) -> None:
        """After an optimizer step, when this fraction of the training is done."""

    def resume(self, fraction: float) -> None:
        """Go on at this fraction with the weights that the network has now."""

    @property
    def finished(self) -> bool:
        """Whether the network is as sparse as it shall be; before that no state of it is kept."""


@dataclass
class _State:
    """Where a training is; what a checkpoint holds besides tensors."""

    epoch: int = 0
    step: int = 0
    elapsed_seconds: float = 0.0
    slower: float = 1.0  # what retreats have left of the rate
    before: float = math.inf
    best: float = math.inf
    best_epoch: int = 0
    retreated: int = 0  # after which epoch the last time
    stopped: str = ""
    best_values: dict[str, torch.Tensor] = field(default_factory=dict)


def split(samples: Samples, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on, and indices held out: an eighth, at least 16 where there are 32 samples or more.

    Raises:
        DataError: there is only one sample.
    """
    count = len(samples)
    if count < 2:
        raise DataError("training needs at least 2 samples: one to train on and one to judge by; give more --data")
    held = min(max(count // 8, min(16, count // 2)), LARGEST_HELD_OUT)
    order = np.random.default_rng([seed, 0]).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])


class Trainer:
    """One training of a network.

    Args:
        network: what is trained; see `Network.trainable`.
        parameters: its weights and biases that are trained, with the values to start from.
        samples: of which a part is held out.
        dense: the dense network's outputs for these samples.
        criterion: what is minimised, of the network's outputs, the dense ones and the target; mean over samples.
        pruning: what keeps it pruned.
        layers: whose outputs the criterion sees beside the network's; `dense` must have the same.
        epochs: passes over the samples that are not held out.
        rate: Adam's step, relative to the root mean square of each tensor: the same for networks of any scale.
        batch: samples in a step.
        seed: of the split and the order of samples.
        retreat: after an epoch that made nothing better on the held-out samples go back to the best state and on from
            there at `RETREAT` of the rate; so the rate fits the network, whatever it began with. Without it only after
            `PATIENCE` of them, or one that left the network worse than it began.
        mirrored: the samples and their mirror images, which are then trained on too; `dense` must have the same.
        time_limit_seconds: learning rate and pruning then follow the clock where it is ahead of the steps.
        checkpoint: written after each epoch; the training goes on from it where there is one.
        progress: called with (steps done, steps, note).
    """

    def __init__(
        self,
        network: Network,
        parameters: Mapping[str, torch.nn.Parameter],
        samples: Samples,
        dense: DenseOutputs,
        criterion: Criterion,
        pruning: Pruning,
        *,
        layers: Sequence[Layer] = (),
        epochs: int,
        rate: float,
        batch: int = BATCH,
        seed: int = 0,
        retreat: bool = False,
        mirrored: WithMirrored | None = None,
        time_limit_seconds: float | None = None,
        checkpoint: Checkpoint | None = None,
        progress: Progress = ignore,
    ) -> None:
        self.network, self.samples, self.dense = network, samples, dense
        self.criterion, self.pruning = criterion, pruning
        self.parameters = parameters
        self.layers, self.epochs, self.batch, self.seed = layers, epochs, batch, seed
        self.begins_pruned = pruning.finished
        self.retreat, self.mirrored = retreat, mirrored
        self.limit, self.checkpoint = time_limit_seconds, checkpoint
        self.progress = progress
        self.train_index, self.held_index = split(samples, seed)
        self.steps = epochs * math.ceil(len(self.train_index) / batch)
        self.rates = [rate * _size(values) for values in self.parameters.values()]
        groups = [{"params": [values]} for values in self.parameters.values()]
        self.optimizer = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.99))
        self.state = _State()

    def run(self) -> tuple[Training, Weights]:
        """Train; the weights are those of the best state."""
        for values in self.parameters.values():
            values.requires_grad_(True)
        try:
            with Capture(self.network, self.layers) as capture:
                self._epochs(capture)
        finally:
            for values in self.parameters.values():
                values.requires_grad_(False)
                values.grad = None
            self._finish()
        state = self.state
        stopped = state.stopped or f"interrupted after {state.epoch} epochs"
        training = Training(state.before, state.best, state.epoch, len(self.held_index), stopped, not state.stopped)
        return training, {name: values.detach().clone() for name, values in self.parameters.items()}

    def _epochs(self, capture: Capture) -> None:
        state = self.state
        if self.checkpoint and self.checkpoint.path.exists():
            self._load()
        else:
            state.before = self._held_out_loss(capture)
            if not math.isfinite(state.before):
                raise TrainingDiverged(f"the held-out loss is {state.before} before any step; check network and data")
            if self.pruning.finished:
                self._remember(state.before)
        start = time.monotonic() - state.elapsed_seconds
        while not state.stopped:
            try:
                self._epoch(capture, start)
            except KeyboardInterrupt:
                if not state.best_values:
                    raise
                return
            state.epoch += 1
            state.elapsed_seconds = time.monotonic() - start
            loss = self._held_out_loss(capture)
            if self.pruning.finished and loss < state.best:
                self._remember(loss)
            elif self._is_too_fast(loss):
                self._retreat()
            state.stopped = self._why_stop() if math.isfinite(loss) else self._diverged(loss)
            self._save()

    def _is_too_fast(self, loss: float) -> bool:
        """Whether the rate is too high for the network, by the loss after an epoch that made nothing better."""
        if not (self.pruning.finished and math.isfinite(loss)):
            return False
        idle = self.state.epoch - max(self.state.best_epoch, self.state.retreated)
        return self.retreat or idle >= PATIENCE or (self.begins_pruned and loss > self.state.before)

    def _epoch(self, capture: Capture, start: float) -> None:
        """A pass over the samples, or a part of one where that takes too much of the time."""
        began = time.monotonic()
        order = np.random.default_rng([self.seed, 1, self.state.epoch]).permutation(self.train_index)
        passes = self.state.step * self.batch / len(order)  # where time is short an epoch is less than one
        if self.mirrored is not None and passes >= MIRRORED_FROM and self.state.epoch % 2:
            order = order + len(self.samples)
        for begin in range(0, len(order), self.batch):
            fraction = self._fraction(time.monotonic() - start)
            self._step(capture, order[begin : begin + self.batch], fraction)
            self.state.step += 1
            self.pruning.step(self._fraction(time.monotonic() - start))
            best = "" if math.isinf(self.state.best) else f"held-out loss {self.state.best:.5f}"
            self.progress(self.state.step, self.steps, best)
            now = time.monotonic()
            if self.limit is not None and (now - start >= self.limit or now - began >= self.limit / CHECKS):
                return

    def _step(self, capture: Capture, index: np.ndarray, fraction: float) -> None:
        schedule = min(1.0, fraction / WARM_UP) * 0.5 * (1 + math.cos(math.pi * fraction))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.state.slower * schedule
        self.optimizer.zero_grad()
        index = self.network.whole(index)
        for part, outputs, dense, target in self._parts(capture, index):
            (self.criterion(outputs, dense, target) * (len(part) / len(index))).backward()
        self.optimizer.step()

    def _parts(
        self, capture: Capture, index: np.ndarray
    ) -> Iterator[tuple[np.ndarray, Outputs, Outputs, torch.Tensor | None]]:
        """The samples at `index` with both networks' outputs, in one part unless the graph fixes a smaller batch."""
        size = self.network.batch_size(len(index))
        for begin in range(0, len(index), size):
            part = index[begin : begin + size]
            batch = (self.mirrored or self.samples).take(part)
            yield part, capture(batch), self.dense(part), numbers(batch.target)

    def _held_out_loss(self, capture: Capture) -> float:
        index, total = self.network.whole(self.held_index), 0.0
        size = self.network.batch_size(self.batch)
        with torch.no_grad():
            for begin in range(0, len(index), size):
                for part, outputs, dense, target in self._parts(capture, index[begin : begin + size]):
                    total += float(self.criterion(outputs, dense, target)) * len(part)
        return total / len(index)

    def _fraction(self, elapsed: float) -> float:
        """How much of the work is done, 0 to 1: of the steps, or of the time where that ends first."""
        return min(1.0, max(self.state.step / self.steps, elapsed / self.limit if self.limit else 0.0))

    def _why_stop(self) -> str:
        state = self.state
        if self.limit is not None and state.elapsed_seconds >= self.limit:
            return f"the time limit ended it in epoch {state.epoch}"
        if state.epoch >= self.epochs:
            return f"all {state.epoch} epochs done, the state of epoch {state.best_epoch} kept"
        if state.slower < SMALLEST_RATE:
            return f"no smaller rate made it better after epoch {state.best_epoch}"
        return ""

    def _diverged(self, loss: float) -> str:
        reason = f"the held-out loss became {loss} in epoch {self.state.epoch}; lower the learning rate"
        if not self.state.best_values:
            raise TrainingDiverged(reason)
        return reason

    def _remember(self, loss: float) -> None:
        self.state.best, self.state.best_epoch = loss, self.state.epoch
        self.state.best_values = {name: values.detach().clone() for name, values in self.parameters.items()}

    def _retreat(self) -> None:
        self.state.slower *= RETREAT
        self.state.retreated = self.state.epoch
        self._finish()
        for moments in self.optimizer.state.values():
            moments["exp_avg"].zero_()  # it points to where it got worse

    def _finish(self) -> None:
        for name, values in self.state.best_values.items():
            self.parameters[name].data.copy_(values)

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        tensors = {f"best/{name}": values for name, values in self.state.best_values.items()}
        if not self.state.stopped:
            tensors |= {f"now/{name}": values for name, values in self.parameters.items()}
            for number, values in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{number}/{key}": value for key, value in values.items()}
        numbers = {key: value for key, value in vars(self.state).items() if key != "best_values"}
        numbers["best"] = None if math.isinf(self.state.best) else self.state.best
        self.checkpoint.write(tensors, numbers)

    def _load(self) -> None:
        assert self.checkpoint is not None
        tensors, header = self.checkpoint.read()
        for key in ("epoch", "step", "elapsed_seconds", "slower", "before", "best_epoch", "retreated", "stopped"):
            setattr(self.state, key, header[key])
        self.state.best = math.inf if header["best"] is None else header["best"]
        self.state.best_values = {k.removeprefix("best/"): v for k, v in tensors.items() if k.startswith("best/")}
        if self.state.stopped:
            return
        for name, values in self.parameters.items():
            values.data.copy_(tensors[f"now/{name}"])
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, number, what = key.split("/")
                moments.setdefault(int(number), {})[what] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.pruning.resume(self._fraction(self.state.elapsed_seconds))


class TrainingDiverged(OnnxSpdyError, ValueError):
    """The loss is no finite number, and there is no earlier state to keep."""


def _size(values: torch.Tensor) -> float:
    """Root mean square of the values that aren't zero; at least `SMALLEST_BIAS` for a bias, which may be all zero."""
    kept = values.detach()[values.detach() != 0].float()
    size = float(kept.square().mean().sqrt()) if kept.numel() else 0.0
    return max(size, SMALLEST_BIAS) if values.ndim == 1 else size
