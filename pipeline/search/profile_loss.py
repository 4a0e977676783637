"""The loss of profiles: the network stitched to each of them, on few samples or on all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnx_spdy.pipeline.objective import Objective
from onnx_spdy.pipeline.search.profile_runs import ProfileRuns, run_profile
from onnx_spdy.pipeline.stitch import Stitcher
from onnx_spdy.pipeline.tasks import IN_PROCESS, Tasks


@dataclass(frozen=True)
class Score:
    """The loss of one profile on one batch."""

    choice: tuple[int, ...]
    batch: int
    loss: float


class ProfileLoss:
    """The calibration loss of the network stitched to a profile, on all samples or on the first of them.

    No profile is run on the same samples twice. A profile on a batch is a task.

    Args:
        stitcher, objective: of one network.
        tasks: who runs profiles.
    Attributes:
        objective: the loss.
        log: what was run, in order.
        samples_run: samples that were run through the network for it, whole or from a later layer on.
    """

    def __init__(self, stitcher: Stitcher, objective: Objective, tasks: Tasks = IN_PROCESS) -> None:
        self.objective, self.samples_run = objective, 0
        self.log: list[Score] = []
        self._seen: dict[tuple[int, ...], list[float]] = {}  # loss of each batch, from the first on
        self._earlier: dict[tuple[tuple[int, ...], int], float] = {}
        self._tasks = tasks
        is_seen = not tasks.is_parallel or tasks.sees(stitcher.database.folder)
        self._runs = ProfileRuns(stitcher, objective, takes_files=not is_seen)

    def __call__(self, choice: np.ndarray, samples: int | None = None) -> float:
        """Mean loss of a choice, (layers,) index into the database's levels.

        Args:
            samples: on so many of the first samples, rounded up to whole batches; None for all.
        """
        return next(self.each([choice], samples))

    def each(self, choices: Sequence[np.ndarray], samples: int | None = None) -> Iterator[float]:
        """The same of several choices, in order. Each counts as run when its loss is asked for.

        Where tasks are done in parallel, those of later choices are begun before.
        """
        keys = [tuple(np.asarray(choice).tolist()) for choice in choices]
        wanted = self._batches_for(samples)
        batches = [(key, number) for key in keys for number in range(len(self._seen.get(key, ())), wanted)]
        missing = [one for one in batches if one not in self._earlier]
        found = self._tasks.map(run_profile, self._runs, missing)
        for key in keys:
            losses = self._seen.setdefault(key, [])
            for number in range(len(losses), wanted):
                while (key, number) not in self._earlier:
                    index, loss = next(found)
                    self._earlier[missing[index]] = loss
                self._add(Score(key, number, self._earlier[key, number]))
            yield self.objective.mean(losses[:wanted])

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
