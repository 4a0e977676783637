"""The search stage: from a latency table and a database to the profile that loses least at a target speedup."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from onnx_spdy.pipeline.artifact import arrays_sha256, check_same
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database import LayerDatabase
from onnx_spdy.pipeline.latency import LatencyTable
from onnx_spdy.pipeline.loss import Loss
from onnx_spdy.pipeline.network import Network, Objective
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.searches import DEFAULT_SEARCH, SearchProblem, SearchResult, search_named
from onnx_spdy.pipeline.stitch import ProfileLoss, Stitcher

SEARCH_SAMPLES = 128

Progress = Callable[[float, int, int], None]  # (best loss so far, evaluations done, evaluations at least to come)


class ProfileSearch:
    """Finds profiles for one network, table, database and loss.

    Args:
        network, table, database: what the profile is for.
        samples: calibration samples; a random `search_samples` of them score the profiles.
        loss: see `Objective`.
        search: a name of SEARCHES.
        search_samples: how many samples score a profile.
        seed: of everything random.
        time_limit_seconds: of one search, which then takes the best profile so far.
        progress: called after each evaluation.
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
        progress: Progress = lambda loss, done, left: None,
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
        self._search, self._seed, self._limit, self._progress = search, seed, time_limit_seconds, progress
        chosen = np.sort(np.random.default_rng(seed).permutation(len(samples))[:search_samples])
        self._objective = Objective(network, samples.take(chosen), loss)
        self._score = ProfileLoss(Stitcher(network, database), self._objective)
        self._names = [layer.name for layer in network.layers]
        self._made_from = {
            "model_sha256": network.sha256,
            "table_sha256": arrays_sha256(
                {"seconds": table.seconds, "entry": table.entry, "base": np.array(table.base_seconds)}
            ),
            "data_sha256": samples.sha256,
            "database_data_sha256": database.made_from["data_sha256"],
            "pruner": database.made_from["pruner"],
            "search_samples": str(search_samples),
            "time_limit_seconds": str(time_limit_seconds),
        }

    def find(self, speedup: float) -> Profile:
        """Search the profile for a speedup by the table.

        Raises:
            NoSpeedup, InfeasibleTarget: it can't be reached; the message says what can.
        """
        return self._profile(search_named(self._search)(self._problem(speedup)), speedup, speedup)

    def find_or_load(self, speedup: float, path: Path) -> Profile:
        """The profile in a file, when it was found for the same question; otherwise searched and written.

        Raises:
            ArtifactError: the file is damaged.
        """
        if path.exists():
            kept = Profile.load(path)
            question = (speedup, self._search, self._seed, self._objective.name, self._made_from)
            if (kept.target_speedup, kept.search, kept.seed, kept.loss_name, kept.made_from) == question:
                return kept
        profile = self.find(speedup)
        profile.save(path)
        return profile

    def aim(self, profile: Profile, speedup: float) -> Profile:
        """The profile for another speedup by the table, for the same target, with what the search has learned.

        Above the highest speedup that the table knows it is the profile for that one.

        Raises:
            InfeasibleTarget: the search has no profile that is as fast.
        """
        speedup = min(speedup, self._table.highest_speedup * (1 - 1e-6))  # the margin is for rounding
        problem = self._problem(speedup)
        if profile.errors is None:
            return self._profile(search_named(self._search)(problem), profile.target_speedup, speedup)
        errors = np.array(profile.errors)
        return self._profile(SearchResult(problem.solve(errors), errors), profile.target_speedup, speedup)

    def _problem(self, speedup: float) -> SearchProblem:
        deadline = time.monotonic() + (np.inf if self._limit is None else self._limit)
        network = self._network
        return SearchProblem(
            levels=self._table.levels,
            costs=self._table.costs,
            errors=self._database.errors(self._names),
            budget_seconds=self._table.budget(speedup),
            loss=self._score,
            magnitudes=lambda index: network.dense(network.layers[index].weight).abs().numpy(),
            rng=np.random.default_rng(self._seed),
            progress=self._progress,
            is_over=lambda: time.monotonic() > deadline,
        )

    def _profile(self, result: SearchResult, target: float, aim: float) -> Profile:
        predicted = self._table.predict(result.choice)
        return Profile(
            levels={name: self._table.levels[index] for name, index in zip(self._names, result.choice, strict=True)},
            target_speedup=target,
            aim_speedup=aim,
            predicted_seconds=predicted,
            predicted_speedup=self._table.dense_seconds / predicted,
            loss=self._score(result.choice),
            loss_name=self._objective.name,
            search=self._search,
            evaluations=self._score.evaluations,
            seed=self._seed,
            errors=None if result.errors is None else np.round(result.errors, 8).tolist(),
            made_from=self._made_from,
        )
