"""The search stage: from a latency table and a database to the profile that loses least at a target speedup."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np

from onnx_spdy.pipeline.artifact import arrays_sha256, check_same
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.layer_database import LayerDatabase
from onnx_spdy.pipeline.latency.table import LatencyTable
from onnx_spdy.pipeline.loss import Loss
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.objective import Objective
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.search.methods import (
    CONTINUING,
    DEFAULT_SEARCH,
    SearchProblem,
    SearchResult,
    Seen,
    search_named,
)
from onnx_spdy.pipeline.search.profile_loss import ProfileLoss
from onnx_spdy.pipeline.search.state import SearchState
from onnx_spdy.pipeline.stitch import Stitcher

SEARCH_SAMPLES = 512
AIM_SHARE = 8  # times the selection samples: how many images aiming anew may take
SELECTION_SHARE = 0.75  # of the calibration samples, at most: the others are held out

Progress = Callable[[float, int, int], None]  # (best loss so far, evaluations done, evaluations at least to come)
Listen = Callable[[], AbstractContextManager[Callable[[], bool]]]  # listens for the user's wish to stop


@contextlib.contextmanager
def never() -> Iterator[Callable[[], bool]]:
    """Nobody wishes to stop."""
    yield lambda: False


class ProfileSearch:
    """Finds profiles for one network, table, database and loss; each search knows what those before it scored.

    Args:
        network, table, database: what the profile is for.
        samples: calibration samples; a random `search_samples` of them score the profiles, as many others are held
            out and tell what the profiles are worth on samples that they weren't selected by.
        loss: see `Objective`.
        search: a name of SEARCHES.
        search_samples: how many samples score a profile; at most three quarters of all.
        seed: of everything random.
        time_limit_seconds: of one search, which then takes the best profile so far.
        image_limit: samples that one search may run through the network; None for what it finds worthwhile.
        state: file that keeps every score, so that a search that was stopped continues; None keeps none.
        progress: called after each evaluation.
        listen: a context that a search runs in; what it gives says whether the user asked to stop.
    Raises:
        ArtifactError: the database was made for another network or other levels.
    """

    def __init__(
        self,
        network: Network,
        table: LatencyTable,
        database: LayerDatabase,
        samples: Samples,
        *,
        loss: str | Loss | None = None,
        search: str = DEFAULT_SEARCH,
        search_samples: int = SEARCH_SAMPLES,
        seed: int = 0,
        time_limit_seconds: float | None = None,
        image_limit: int | None = None,
        state: Path | None = None,
        progress: Progress = lambda loss, done, left: None,
        listen: Listen = never,
    ) -> None:
        check_same(
            database.folder,
            {
                "layers": ([*table.layers], [layer.name for layer in network.layers]),
                "model_sha256": (database.made_from["model_sha256"], network.sha256),
                "levels": ([*map(str, database.levels)], [*map(str, table.levels)]),
            },
        )
        self._network, self._table, self._database = network, table, database
        self._search, self._seed, self._limit, self._image_limit = search, seed, time_limit_seconds, image_limit
        self._progress, self._listen = progress, listen
        selection, held_out = split(samples, search_samples, seed)
        stitcher = Stitcher(network, database)
        self._score = ProfileLoss(stitcher, Objective(network, selection, loss))
        self._held_out = ProfileLoss(stitcher, Objective(network, held_out, loss)) if held_out else None
        self._names = [layer.name for layer in network.layers]
        self._made_from = {
            "model_sha256": network.sha256,
            "table_sha256": arrays_sha256(
                {
                    "seconds": table.seconds,
                    "entry": table.entry,
                    "before": table.before,
                    "sparse": table.sparse,
                    "base": np.array(table.base_seconds),
                }
            ),
            "data_sha256": samples.sha256,
            "database_data_sha256": database.made_from["data_sha256"],
            "pruner": database.made_from["pruner"],
            "search_samples": str(search_samples),
            "time_limit_seconds": str(time_limit_seconds),
            "image_limit": str(image_limit),
        }
        scored_by = {"search": search, "seed": str(seed), "loss": self._score.objective.name, **self._made_from}
        self._state = SearchState(state, scored_by)

    @property
    def images(self) -> int:
        """Samples that were run through the network so far to score profiles."""
        return self._score.images

    def find(self, speedup: float) -> Profile:
        """Search the profile for a speedup by the table.

        Raises:
            NoSpeedup, InfeasibleTarget: it can't be reached; the message says what can.
        """
        self._table.budget(speedup)
        spent = self._state.resume(self._score, speedup)
        evaluations, images = self._score.evaluations, self._score.images
        start = time.monotonic() - spent
        with self._listen() as wants_to_stop:

            def ended() -> str:
                if wants_to_stop():
                    return "interrupted"
                too_late = self._limit is not None and time.monotonic() - start > self._limit
                return "time limit" if too_late else "finished"

            def progress(loss: float, done: int, left: int) -> None:
                self._progress(loss, done, left)
                self._state.keep(self._score, speedup, time.monotonic() - start)

            problem = self._problem(speedup, progress, lambda: ended() != "finished", self._state.learned(speedup))
            try:
                result = search_named(self._search)(problem)
                if result.errors is not None:
                    self._state.finish(speedup, self._score, _rounded(result.errors))
            finally:
                self._state.keep(self._score, speedup, time.monotonic() - start, now=True)
            counts = self._score.evaluations - evaluations, self._score.images - images
            return self._profile(result, speedup, speedup, ended(), counts)

    def find_or_load(self, speedup: float, path: Path) -> Profile:
        """The profile in a file, when it was found for the same question; otherwise searched and written.

        Raises:
            ArtifactError: the file is damaged.
        """
        if path.exists():
            kept = Profile.load(path)
            question = (speedup, self._search, self._seed, self._score.objective.name, self._made_from)
            is_same = (kept.target_speedup, kept.search, kept.seed, kept.loss_name, kept.made_from) == question
            if is_same and kept.ended != "interrupted":
                return kept
        profile = self.find(speedup)
        profile.save(path)
        return profile

    def aim(self, profile: Profile, speedup: float) -> Profile:
        """The profile for another speedup by the table, for the same target, with what the search has learned.

        A search that goes on from what was scored before does so, briefly; otherwise it is the solution for the errors
        that the profile is optimal for. Where the profile is fast enough and better than that, it stays. Above the
        highest speedup that the table knows it is the profile for that one.

        Raises:
            InfeasibleTarget: the search has no profile that is as fast.
        """
        speedup = min(speedup, self._table.highest_speedup * (1 - 1e-6))  # the margin is for rounding
        self._state.recall(self._score)
        problem = self._problem(speedup)
        if profile.errors is None:
            result = search_named(self._search)(problem)
        else:
            errors = np.array(profile.errors)
            candidates = [SearchResult(problem.solve(errors), errors)]
            if self._search in CONTINUING and profile.ended == "finished":
                short = replace(problem, learned=[errors], image_limit=AIM_SHARE * problem.stages[-1])
                candidates.append(search_named(self._search)(short))
            known = np.array([self._table.levels.index(level) for level in profile.levels.values()])
            if problem.is_feasible(known):
                candidates.append(SearchResult(known, errors))
            result = min(candidates, key=lambda one: self._score(one.choice))
        counts = profile.evaluations, profile.images
        return self._profile(result, profile.target_speedup, speedup, profile.ended, counts)

    def _problem(
        self,
        speedup: float,
        progress: Progress = lambda loss, done, left: None,
        is_over: Callable[[], bool] = lambda: False,
        learned: Sequence[np.ndarray] = (),
    ) -> SearchProblem:
        network = self._network
        return SearchProblem(
            levels=self._table.levels,
            costs=self._table.costs,
            errors=self._database.errors(self._names),
            budget_seconds=self._table.budget(speedup),
            loss=self._score,
            magnitudes=lambda index: network.dense(network.layers[index].weight).abs().numpy(),
            rng=np.random.default_rng(self._seed),
            stages=self._score.objective.stages,
            seen=[Seen(*one) for one in self._score.known],
            learned=learned,
            images=lambda: self._score.images,
            image_limit=self._image_limit,
            progress=progress,
            is_over=is_over,
        )

    def _profile(self, result: SearchResult, target: float, aim: float, ended: str, counts: tuple[int, int]) -> Profile:
        predicted = self._table.predict(result.choice)
        return Profile(
            levels={name: self._table.levels[index] for name, index in zip(self._names, result.choice, strict=True)},
            target_speedup=target,
            aim_speedup=aim,
            predicted_seconds=predicted,
            predicted_speedup=self._table.dense_seconds / predicted,
            loss=self._score(result.choice),
            loss_name=self._score.objective.name,
            held_out_loss=None if self._held_out is None else self._held_out(result.choice),
            search=self._search,
            evaluations=counts[0],
            images=counts[1],
            ended=ended,
            seed=self._seed,
            errors=None if result.errors is None else _rounded(result.errors),
            made_from=self._made_from,
        )


def split(samples: Samples, wanted: int, seed: int) -> tuple[Samples, Samples | None]:
    """The samples that select profiles, a random `wanted` or SELECTION_SHARE of all, and as many others, or None."""
    order = np.random.default_rng(seed).permutation(len(samples))
    count = min(wanted, max(1, round(SELECTION_SHARE * len(samples))))
    selected, held_out = order[:count], order[count : 2 * count]
    return samples.take(np.sort(selected)), samples.take(np.sort(held_out)) if len(held_out) else None


def _rounded(errors: np.ndarray) -> list[list[float]]:
    """To 8 significant digits: errors of layers may differ by many orders of magnitude."""
    return [[float(f"{value:.8g}") for value in row] for row in errors.tolist()]
