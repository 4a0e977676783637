"""The search stage: from a latency table and a database to the profile that loses least at a target speedup."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from onnx_spdy.pipeline.artifact import check_same
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.layer_database import LayerDatabase
from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.network import Network
from onnx_spdy.pipeline.objective import Objective
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.progress import Listen, Progress, ignore, never
from onnx_spdy.pipeline.search.methods import (
    CONTINUING,
    SearchProblem,
    SearchResult,
    Seen,
    search_named,
)
from onnx_spdy.pipeline.search.profile_loss import ProfileLoss
from onnx_spdy.pipeline.search.settings import SearchSettings
from onnx_spdy.pipeline.search.state import SearchState
from onnx_spdy.pipeline.solve_within import Limit
from onnx_spdy.pipeline.stitch import Stitcher
from onnx_spdy.pipeline.tasks import IN_PROCESS, Tasks

logger = logging.getLogger(__name__)

ADJUSTING_SHARE = 8  # times the selection samples: how many may be run to adjust a profile to another speedup
SAME_LOSS = 0.01  # relative: what the same profile may differ by from one process to the next
SELECTION_SHARE = 0.75  # of the calibration samples, at most: the others are held out


class Times(Protocol):
    """What a latency table says of profiles, or several of one network do: see `LatencyTable`."""

    @property
    def layers(self) -> tuple[str, ...]: ...
    @property
    def levels(self) -> tuple[Level, ...]: ...
    @property
    def model_sha256(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def dense_seconds(self) -> float: ...
    @property
    def highest_speedup(self) -> float: ...
    def limits(self, speedup: float) -> Sequence[Limit]: ...
    def predict(self, choice: Sequence[int] | np.ndarray) -> float: ...


class ProfileSearch:
    """Finds profiles for one network, table, database and loss; each search knows what those before it scored.

    Args:
        network, table, database: what the profile is for.
        samples: calibration samples; a random `settings.samples` of them score the profiles, as many others are held
            out and tell what the profiles are worth on samples that they weren't selected by.
        settings: how to search.
        state: file that keeps every score, so that a search that was stopped continues; None keeps none.
        progress: called after each evaluation with (done, at least in all, note).
        listen: a context that a search runs in; what it gives says whether the user asked to stop.
        tasks: who scores profiles.
    Attributes:
        best_loss: of the search that runs, so far.
    Raises:
        ArtifactError: the database or the table was made for another network or other levels.
    """

    def __init__(
        self,
        network: Network,
        table: Times,
        database: LayerDatabase,
        samples: Samples,
        settings: SearchSettings,
        *,
        state: Path | None = None,
        progress: Progress = ignore,
        listen: Listen = never,
        tasks: Tasks = IN_PROCESS,
    ) -> None:
        self.stitcher = stitcher = Stitcher(network, database)
        self._names = [site.name for site in stitcher.sites]
        check_same(
            database.folder,
            {
                "layers": ([*table.layers], self._names),
                "model_sha256": (database.made_from["model_sha256"], network.sha256),
                "latency table's model_sha256": (table.model_sha256, network.sha256),
                "levels": ([*map(str, database.levels)], [*map(str, table.levels)]),
            },
        )
        self._network, self._table, self._database = network, table, database
        self._settings, self._progress, self._listen = settings, progress, listen
        self.best_loss = math.inf
        selection, held_out = split(samples, settings.samples, settings.seed)
        self._score = ProfileLoss(stitcher, Objective(network, selection, settings.loss), tasks)
        fitted = self._score.objective.loss
        self._held_out = ProfileLoss(stitcher, Objective(network, held_out, fitted)) if held_out else None
        logger.info("%s", fitted)
        self._made_from = {
            "model_sha256": network.sha256,
            "table_sha256": table.digest,
            "data_sha256": samples.sha256,
            "database_data_sha256": database.made_from["data_sha256"],
            "pruner": database.made_from["pruner"],
            "search_samples": str(settings.samples),
            "time_limit_seconds": str(settings.time_limit_seconds),
            "sample_limit": str(settings.sample_limit),
        }
        scored_by = {
            "search": settings.method,
            "seed": str(settings.seed),
            "loss": self._score.objective.name,
            **self._made_from,
        }
        self._state = SearchState(state, scored_by)

    @property
    def samples_run(self) -> int:
        """Samples that were run through the network so far to score profiles."""
        return self._score.samples_run

    def find(self, speedup: float) -> Profile:
        """Search the profile for a speedup by the table.

        Raises:
            NoSpeedup, InfeasibleTarget: it can't be reached; the message says what can.
        """
        self._table.limits(speedup)
        spent = self._state.resume(self._score, speedup)
        evaluations, samples_run = self._score.evaluations, self._score.samples_run
        self.best_loss = math.inf
        start = time.monotonic() - spent
        with self._listen() as wants_to_stop:

            def ended() -> str:
                if wants_to_stop():
                    return "interrupted"
                limit = self._settings.time_limit_seconds
                too_late = limit is not None and time.monotonic() - start > limit
                return "time limit" if too_late else "finished"

            def tell(loss: float, done: int, left: int) -> None:
                self.best_loss = loss
                self._progress(done, done + left, f"loss {loss:.5f}")
                self._state.keep(self._score, speedup, time.monotonic() - start)

            problem = self._problem(speedup, tell, lambda: ended() != "finished", self._state.learned(speedup))
            try:
                result = search_named(self._settings.method)(problem)
                if result.errors is not None:
                    self._state.finish(speedup, self._score, _rounded(result.errors))
            finally:
                self._state.keep(self._score, speedup, time.monotonic() - start, now=True)
            counts = self._score.evaluations - evaluations, self._score.samples_run - samples_run
            return self._profile(result, speedup, speedup, ended(), counts)

    def find_or_load(self, speedup: float, path: Path) -> Profile:
        """The profile in a file, when it was found for the same question; otherwise searched and written.

        Raises:
            ArtifactError: the file is damaged.
        """
        if path.exists():
            kept = Profile.load(path)
            settings = self._settings
            question = (speedup, settings.method, settings.seed, self._score.objective.name, self._made_from)
            is_same = (kept.target_speedup, kept.search, kept.seed, kept.loss_name, kept.made_from) == question
            if is_same and kept.ended != "interrupted" and self._is_right(kept):
                return kept
        profile = self.find(speedup)
        profile.save(path)
        return profile

    def _is_right(self, kept: Profile) -> bool:
        """Whether a profile from a file has the loss and the time that it says it has, by the network and the table."""
        levels = [*kept.levels.values()]
        choice = [self._table.levels.index(level) if level in self._table.levels else -1 for level in levels]
        if [*kept.levels] != self._names or -1 in choice:
            return False
        loss = self._score.objective(self.stitcher.weights(levels))  # really run, whatever was scored before
        found = loss, self._table.predict(choice)
        return bool(np.allclose(found, (kept.loss, kept.predicted_seconds), rtol=SAME_LOSS, atol=1e-12))

    def adjusted(self, profile: Profile, speedup: float) -> Profile:
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
            result = search_named(self._settings.method)(problem)
        else:
            errors = np.array(profile.errors)
            candidates = [SearchResult(problem.solve(errors), errors)]
            if self._settings.method in CONTINUING and profile.ended == "finished":
                short = replace(problem, learned=[errors], sample_limit=ADJUSTING_SHARE * problem.stages[-1])
                candidates.append(search_named(self._settings.method)(short))
            known = np.array([self._table.levels.index(level) for level in profile.levels.values()])
            if problem.is_feasible(known):
                candidates.append(SearchResult(known, errors))
            result = min(candidates, key=lambda one: self._score(one.choice))
        counts = profile.evaluations, profile.samples_run
        return self._profile(result, profile.target_speedup, speedup, profile.ended, counts)

    def _problem(
        self,
        speedup: float,
        tell: Callable[[float, int, int], None] = lambda loss, done, left: None,
        is_over: Callable[[], bool] = lambda: False,
        learned: Sequence[np.ndarray] = (),
    ) -> SearchProblem:
        network = self._network
        return SearchProblem(
            levels=self._table.levels,
            limits=self._table.limits(speedup),
            errors=self._database.errors(self._names),
            loss=self._score,
            magnitudes=lambda index: self.stitcher.sites[index].magnitudes(network.dense),
            rng=np.random.default_rng(self._settings.seed),
            stages=self._score.objective.stages,
            seen=[Seen(*one) for one in self._score.known],
            learned=learned,
            samples_run=lambda: self._score.samples_run,
            sample_limit=self._settings.sample_limit,
            tell=tell,
            is_over=is_over,
            each=self._score.each,
        )

    def _profile(
        self, result: SearchResult, target: float, table_target: float, ended: str, counts: tuple[int, int]
    ) -> Profile:
        predicted = self._table.predict(result.choice)
        return Profile(
            levels={name: self._table.levels[index] for name, index in zip(self._names, result.choice, strict=True)},
            target_speedup=target,
            table_target=table_target,
            predicted_seconds=predicted,
            predicted_speedup=self._table.dense_seconds / predicted,
            loss=self._score(result.choice),
            loss_name=self._score.objective.name,
            held_out_loss=None if self._held_out is None else self._held_out(result.choice),
            search=self._settings.method,
            evaluations=counts[0],
            samples_run=counts[1],
            ended=ended,
            seed=self._settings.seed,
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
