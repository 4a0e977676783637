"""Runs of profiles: the network stitched to one of them on one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnx_spdy.models import Suspended
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.layer_database import LayerDatabase
from onnx_spdy.pipeline.loss import FittedLoss
from onnx_spdy.pipeline.network import Network, Weights
from onnx_spdy.pipeline.objective import Objective
from onnx_spdy.pipeline.stitch import Stitcher
from onnx_spdy.runtimes.atomic import WorkFolder

PREFIX_BYTES = 256 << 20  # activations that are kept, so that a profile is only run from its first changed layer on


class ProfileRuns:
    """Runs profiles; where only later layers changed since the last one on a batch, from there on.

    Where it is sent to, it has run nothing yet.

    Args:
        stitcher, objective: of one network.
        takes_files: whether the database's files go along when it is sent.
    """

    def __init__(self, stitcher: Stitcher, objective: Objective, *, takes_files: bool = False) -> None:
        self.objective = objective
        self._stitcher, self._takes_files = stitcher, takes_files
        self._folder: WorkFolder | None = None  # with the files that came along
        network = stitcher.network
        self._steps = [min(network.graph.step_of(layer.name) for layer in site.layers) for site in stitcher.sites]
        self._cuts: list[int] | None = None  # steps before which runs are suspended; found at the first run
        self._suspended: list[list[Suspended]] = [[] for _ in objective.batches]
        self._ran: list[tuple[int, ...] | None] = [None] * len(objective.batches)  # the choice of the last run

    def __reduce__(self) -> tuple[Callable[..., ProfileRuns], tuple[Any, ...]]:
        database, objective = self._stitcher.database, self.objective
        files = None
        if self._takes_files:
            files = {one["file"]: (database.folder / one["file"]).read_bytes() for one in database.layers.values()}
        return _arrived, (self._stitcher.network, database, files, objective.samples, objective.loss)

    def run(self, choice: tuple[int, ...], number: int) -> float:
        """Loss of the network stitched to a choice on one batch."""
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


def run_profile(runs: ProfileRuns, one: tuple[tuple[int, ...], int]) -> float:
    """Loss of a choice on the batch of a number: a task."""
    return runs.run(*one)


def _arrived(
    network: Network, database: LayerDatabase, files: Mapping[str, bytes] | None, samples: Samples, loss: FittedLoss
) -> ProfileRuns:
    folder = None
    if files is not None:
        folder = WorkFolder()
        for name, content in files.items():
            (Path(folder.name) / name).write_bytes(content)
        database = replace(database, folder=Path(folder.name))
    runs = ProfileRuns(Stitcher(network, database), Objective(network, samples, loss))
    runs._folder = folder
    return runs
