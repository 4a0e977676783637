"""The loss of profiles: the network stitched to each of them, on few samples or on all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_spdy.models import Suspended
from onnx_spdy.pipeline.network import Weights
from onnx_spdy.pipeline.objective import Objective
from onnx_spdy.pipeline.stitch import Stitcher

PREFIX_BYTES = 256 << 20  # activations that are kept, so that a profile is only run from its first changed layer on


@dataclass(frozen=True)
class Score:
    """The loss of one profile on one batch."""

    choice: tuple[int, ...]
    batch: int
    loss: float


class ProfileLoss:
    """The calibration loss of the network stitched to a profile, on all samples or on the first of them.

    No profile is run on the same samples twice, and where only later layers changed since the last profile, the
    network is run from there on.

    Attributes:
        objective: the loss.
        log: what was run, in order.
        samples_run: samples that were run through the network for it, whole or from a later layer on.
    """

    def __init__(self, stitcher: Stitcher, objective: Objective) -> None:
        self.objective, self.samples_run = objective, 0
        self.log: list[Score] = []
        self._stitcher = stitcher
        self._seen: dict[tuple[int, ...], list[float]] = {}  # loss of each batch, from the first on
        self._earlier: dict[tuple[tuple[int, ...], int], float] = {}
        network = stitcher.network
        self._steps = [min(network.graph.step_of(layer.name) for layer in site.layers) for site in stitcher.sites]
        self._cuts: list[int] | None = None  # steps before which runs are suspended; found at the first run
        self._suspended: list[list[Suspended]] = [[] for _ in objective.batches]
        self._ran: list[tuple[int, ...] | None] = [None] * len(objective.batches)  # the choice of the last run

    def __call__(self, choice: np.ndarray, samples: int | None = None) -> float:
        """Mean loss of a choice, (layers,) index into the database's levels.

        Args:
            samples: on so many of the first samples, rounded up to whole batches; None for all.
        """
        key = tuple(np.asarray(choice).tolist())
        losses = self._seen.setdefault(key, [])
        wanted = self._batches_for(samples)
        for number in range(len(losses), wanted):
            earlier = self._earlier.get((key, number))
            self._add(Score(key, number, self._run(key, number) if earlier is None else earlier))
        return self.objective.mean(losses[:wanted])

    @property
    def evaluations(self) -> int:
        """How many profiles were run, on all samples or on some."""
        return len(self._seen)

    @property
    def known(self) -> list[tuple[tuple[int, ...], int, float]]:
        """Every profile that was run, first to last: its choice, on how many samples, and their loss."""
        ends = np.cumsum([len(batch) for batch in self.objective.batches]).tolist()
        return [
            (choice, ends[len(losses) - 1], self.objective.mean(losses))
            for choice, losses in self._seen.items()
            if losses
        ]

    def learn(self, log: Sequence[Score], began: int) -> None:
        """Take over what an earlier process ran for the same network, database and samples.

        Args:
            began: the first so many scores are known from now on; the others count as if they were run when they are
                asked for, so that a search that was stopped goes the same way again.
        """
        for score in log[:began]:
            if score.batch == len(self._seen.get(score.choice, ())):  # neither known already nor after a gap
                self._add(score)
        self._earlier |= {(score.choice, score.batch): score.loss for score in log[began:]}

    def _add(self, score: Score) -> None:
        self._seen.setdefault(score.choice, []).append(score.loss)
        self.log.append(score)
        self.samples_run += len(self.objective.batches[score.batch])

    def _batches_for(self, samples: int | None) -> int:
        count, batches = 0, self.objective.batches
        for number, batch in enumerate(batches):
            count += len(batch)
            if samples is not None and count >= samples:
                return number + 1
        return len(batches)

    def _run(self, choice: tuple[int, ...], number: int) -> float:
        levels = self._stitcher.database.levels
        weights = self._stitcher.weights([levels[index] for index in choice])
        ran, kept = self._ran[number], self._suspended[number]
        if ran is None:
            kept.clear()
        else:
            changed = [step for step, old, new in zip(self._steps, ran, choice, strict=True) if old != new]
            kept[:] = [one for one in kept if one.step <= min(changed, default=max(self._steps))]
        self._ran[number] = None  # in case the run fails
        start = max(kept, key=lambda one: one.step, default=None)
        if self._cuts is None:
            loss = self._measure_cuts(number, weights)
        else:
            loss = self.objective.of_batch(
                number,
                weights,
                start,
                kept.append,
                [cut for cut in self._cuts if start is None or cut > start.step],
            )
        self._ran[number] = choice
        return loss

    def _measure_cuts(self, number: int, weights: Weights) -> float:
        """Run a batch, and find out before which layers the runs of all batches can be kept in PREFIX_BYTES."""
        batches = self.objective.batches
        sizes: dict[int, int] = {}

        def keep(one: Suspended) -> None:
            sizes[one.step] = one.bytes

        loss = self.objective.of_batch(number, weights, keep=keep, keep_before=sorted({*self._steps})[1:])
        share = PREFIX_BYTES * len(batches[number]) / sum(map(len, batches))
        steps = sorted(step for step in sizes if sizes[step] <= share / 4)
        affordable = (steps[n - 1 :: n] for n in range(1, len(steps) + 1))
        self._cuts = next((cuts for cuts in affordable if sum(sizes[step] for step in cuts) <= share), [])
        return loss
