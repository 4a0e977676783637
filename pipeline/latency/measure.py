"""Measuring the latency model: in the runtime, with the batch and threads of the user, on this machine or another.

First the engine says from which level on it runs each layer in a sparse kernel. Then networks whose layers are at
random levels are measured, each twice: the engine's own profile of it, and its time as a whole, a group of them in
turns with the dense network. What a layer takes depends on its neighbours, and only mixed networks show that; and
because every level occurs all over the measurement, drift of the machine hits all of them alike. `fit.py` makes
the table of it. The last networks are the ones that a search would choose; the model has to predict them before it may
learn from them.

Random zeros do, although the trained masks don't exist yet: an engine's time depends on where they are only weakly.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnx_spdy.models import Prepared, save_model
from onnx_spdy.pipeline.artifact import WRONG_FIELD, ArtifactError, check_same, read_json, write_json
from onnx_spdy.pipeline.costs import Costs
from onnx_spdy.pipeline.latency.fit import Fit, Row, Trial, fit_latency, together
from onnx_spdy.pipeline.latency.observation import Observation
from onnx_spdy.pipeline.latency.sampling import NETWORKS, imposed, plan_networks, predecessors
from onnx_spdy.pipeline.latency.table import LatencyTable, NoSpeedup, Prediction, check_workload
from onnx_spdy.pipeline.level import DENSE, Level, LevelError
from onnx_spdy.pipeline.progress import Progress, ignore
from onnx_spdy.pipeline.solve import InfeasibleTarget, solve
from onnx_spdy.runtimes import (
    Environment,
    LayerTime,
    Measurement,
    Runtime,
    RuntimeFailure,
    Session,
    Workload,
    is_busy,
    measure_interleaved,
    measure_undisturbed,
    reason_in,
    resolved,
)
from onnx_spdy.runtimes.atomic import WorkFolder
from onnx_spdy.runtimes.errors import OnnxSpdyError

VERSION = 3
PARTIAL = ".partial.json"
DENSE_ROUNDS = 12
CHOSEN_NETWORKS = 8  # of those that a search would choose
MORE_NETWORKS = 8  # at most, while the model doesn't predict them
PREDICTED_WELL = 0.02  # median error that is good enough
GROUP, CHOSEN_GROUP = 8, 4  # networks that are measured in turns, so that a phase of the machine is shared
GROUP_BYTES = 2 << 30  # of their weights in memory at once
PROFILE_SECONDS, ROUNDS_SECONDS = 0.4, 1.2  # of each network, so that small ones are run more often
RUNS_A_ROUND = 2
FEWEST_ROUNDS, MOST_ROUNDS = 4, 40
FEWEST_ITERATIONS, MOST_ITERATIONS = 3, 40
WARMUP = 2
LEAST_NOISE = 0.005
BUSY_WAITS_SECONDS = (1, 5, 10, 20, 30)

_SPARSITY = re.compile(r"-\d+(\.\d+)?%$")


class MachineBusy(OnnxSpdyError, ValueError):
    """Other programs use the CPU, so that nothing true can be measured."""


def measure_latency(
    dense: Prepared,
    runtime: Runtime,
    levels: Sequence[Level],
    workload: Workload,
    *,
    seed: int = 0,
    save: Path | None = None,
    allow_busy: bool = False,
    progress: Progress = ignore,
) -> LatencyTable:
    """Measure every prunable layer at every level.

    Args:
        dense: the network.
        runtime: the one that will run it.
        levels: dense first.
        workload: as in `Runtime.open`.
        seed: of the networks' levels and zeros.
        save: latency.json, written at the end. Until then what was measured is kept beside it, in
            latency.partial.json, and continued from.
        allow_busy: measure even while other programs use the CPU; the table says how much they used.
        progress: called with (measured, to measure, note).
    Raises:
        LevelError: levels of several patterns.
        NoSpeedup: the engine falls back for every prunable layer.
        MachineBusy: other programs used the CPU all the time; what was measured before is kept.
        RuntimeFailure: the engine is missing, refuses the network, crashes or hangs; the same.
        ArtifactError: what was kept is of another network, environment or question.
    """
    if len(patterns := sorted({level.pattern for level in levels} - {DENSE.pattern})) > 1:
        raise LevelError(f"a latency table of several patterns ({', '.join(patterns)}) isn't fitted yet; measure one")
    keep = save and save.with_suffix(PARTIAL)
    with WorkFolder() as folder:
        work = _Work(dense, runtime, levels, workload, seed, Path(folder), allow_busy, progress)
        try:
            table = work.measure(keep)
        except (RuntimeFailure, MachineBusy) as exc:
            if keep is None or not work.observations:
                raise
            raise type(exc)(
                f"{str(exc).rstrip('.')}; {len(work.observations)} measured networks are kept in {keep}, start again "
                "to go on from there"
            ) from exc
    if save and keep:
        table.save(save)
        keep.unlink(missing_ok=True)
    return table


class _Work:
    """One measurement."""

    def __init__(
        self,
        dense: Prepared,
        runtime: Runtime,
        levels: Sequence[Level],
        workload: Workload,
        seed: int,
        folder: Path,
        allow_busy: bool,
        progress: Progress,
    ) -> None:
        self._network, self._runtime, self._levels, self._seed = dense, runtime, tuple(levels), seed
        self._workload = resolved(dense.proto.graph, workload)
        self._layers = dense.prunable
        self._predecessor, self._source_of = predecessors(dense.proto.graph, self._layers)
        self._folder, self._allow_busy, self._progress = folder, allow_busy, progress
        self._row_of = {output: row for row, layer in enumerate(self._layers) for output in layer.outputs}
        self._path = folder / "dense.onnx"
        self.observations: list[Observation] = []

    def measure(self, keep: Path | None) -> LatencyTable:
        save_model(self._network.proto, self._path)
        with self._runtime.open(self._path, self._workload) as dense:
            question = self._question(dense.environment)
            if keep and keep.exists():
                self._continue(keep, question)
            reference = measure_interleaved({"dense": dense}, rounds=DENSE_ROUNDS)["dense"]
            self._progress(len(self.observations), NETWORKS + CHOSEN_NETWORKS, "kernels")
            sparse, kernels = self._kernels(dense)

            def measure(choices: np.ndarray, predicted: Sequence[float | None], left: int) -> None:
                self.observations += self._observe(dense, reference, choices, predicted)
                if keep:
                    content = {**question, "observations": [asdict(one) for one in self.observations]}
                    write_json(keep, "measurement", VERSION, content)
                self._progress(len(self.observations), len(self.observations) + left, "")

            plan = plan_networks(sparse, self._levels, np.random.default_rng(self._seed))
            while len(choices := plan[len(self.observations) :][: self._group(GROUP)]):
                left = len(plan) - len(self.observations) - len(choices)
                measure(choices, [None] * len(choices), left + CHOSEN_NETWORKS * bool(sparse.any()))
            fit = self._fit(sparse)
            while (left := self._networks_to_choose(sparse)) > 0:
                choices = self._chosen(fit, sparse, min(left, self._group(CHOSEN_GROUP)))
                measure(choices, [self._predict(fit, sparse, choice) for choice in choices], left - len(choices))
                fit = self._fit(sparse)
            return self._table(fit, sparse, kernels, dense)

    def _group(self, most: int) -> int:
        """How many networks may be open beside the dense one."""
        each = sum(tensor.ByteSize() for tensor in self._network.proto.graph.initializer)
        return _between(1, GROUP_BYTES / max(1, each) - 1, most)

    def _question(self, environment: Environment) -> dict[str, Any]:
        return {
            "model_sha256": self._network.sha256,
            "environment": environment.to_json(),
            "workload": self._workload.digest,
            "levels": [*map(str, self._levels)],
            "seed": self._seed,
        }

    def _continue(self, keep: Path, question: Mapping[str, Any]) -> None:
        content = read_json(keep, "measurement", VERSION)
        try:
            compared = {name: (content[name], question[name]) for name in ("model_sha256", "levels", "seed")}
            there, here = (Environment.from_json(one["environment"]) for one in (content, question))
            workload, observations = content["workload"], [*map(Observation.from_json, content["observations"])]
        except WRONG_FIELD as exc:
            raise ArtifactError(f"{keep} is damaged ({exc!r}); delete it to measure anew") from exc
        check_same(keep, compared | there.mismatch(here))
        check_workload(str(keep), workload, self._workload)
        self.observations = observations

    def _kernels(self, dense: Session) -> tuple[np.ndarray, list[list[str]]]:
        """For each layer and level whether the engine takes a sparse kernel, and its name.

        Where a layer changes to a sparse kernel is found by halving, for all layers at once.
        """
        highest = len(self._levels) - 1
        last_dense = np.zeros(len(self._layers), np.int64)
        _, dense_names = self._kernels_at(0, dense)
        is_sparse, sparse_names = self._kernels_at(highest, dense)
        first_sparse = np.where(is_sparse, highest, highest + 1)
        level = 1  # most likely all of them
        while (between := np.flatnonzero(is_sparse & (first_sparse - last_dense > 1))).size:
            kinds, _ = self._kernels_at(level, dense)
            first_sparse = np.where(kinds, np.minimum(first_sparse, level), first_sparse)
            last_dense = np.where(~kinds & (level < first_sparse), np.maximum(last_dense, level), last_dense)
            between = np.flatnonzero(is_sparse & (first_sparse - last_dense > 1))
            level = int(last_dense[between[0]] + first_sparse[between[0]]) // 2 if between.size else level
        sparse = np.arange(highest + 1) >= first_sparse[:, None]
        names = [
            # The name at the highest level tells why a layer isn't sparse at any, where the engine gives a reason.
            [
                sparse_name if one or (column and reason_in(sparse_name)) else dense_name
                for column, one in enumerate(row)
            ]
            for row, dense_name, sparse_name in zip(sparse, dense_names, sparse_names, strict=True)
        ]
        return sparse, names

    def _kernels_at(self, level: int, dense: Session) -> tuple[np.ndarray, list[str]]:
        """(layers,) bool whether each layer runs in a sparse kernel when all are at this level, and their names."""
        path, zeros = self._imposed(np.full(len(self._layers), level), level)
        rows = self._runtime.layer_seconds(
            path, self._workload, iterations=1, warmup=0, zeros=zeros, seed=level, merged=False
        )
        sparse, names = np.zeros(len(self._layers), bool), ["none of its own"] * len(self._layers)
        for one in rows:
            for row in self._layers_in(one):
                sparse[row] |= one.sparse
                names[row] = _SPARSITY.sub("", one.kernel)
        if level == 0 and not any(self._layers_in(one) for one in rows):
            raise NoSpeedup(
                f"{dense.environment.runtime} runs no prunable layer of this network by itself, so pruning can't "
                f"help: {dense.fallback or 'its profile names none of them'}"
            )
        return sparse, names

    def _layers_in(self, row: LayerTime) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self._row_of[name] for name in row.outputs if name in self._row_of))

    def _imposed(self, choice: np.ndarray, seed: int) -> tuple[Path, dict[str, float]]:
        """A file, and the zeros to draw in it where the engine is: the network travels once."""
        levels = {layer: self._levels[index] for layer, index in zip(self._layers, choice, strict=True)}
        zeros = {layer.weight: level.sparsity for layer, level in levels.items() if level.pattern == "unstructured"}
        others = {layer: level for layer, level in levels.items() if level.pattern not in ("unstructured", "dense")}
        if not others:
            return self._path, zeros
        path = self._folder / f"network-{seed % GROUP}.onnx"  # the next group takes the place of this one's files
        save_model(imposed(self._network.proto, others, np.random.default_rng(seed)), path)
        return path, zeros

    def _observe(
        self, dense: Session, reference: Measurement, choices: np.ndarray, predicted: Sequence[float | None]
    ) -> list[Observation]:
        """Measure a group of networks; again while other programs disturb."""
        cores = dense.environment.cores
        found, load = measure_undisturbed(
            self._runtime,
            lambda: self._observe_once(dense, reference, choices, predicted),
            lambda found: cores,
            iter(() if self._allow_busy else BUSY_WAITS_SECONDS),
            lambda load: self._note(f"other programs keep {load:.1f} cores busy, waiting"),
        )
        if is_busy(load, cores) and not self._allow_busy:
            raise MachineBusy(
                f"other programs keep {load:.1f} of the {cores} cores of {dense.environment.host} busy, so the times "
                "would be wrong; stop them, or measure all the same with --allow-busy"
            )
        return [replace(one, foreign_cores=load) for one in found]

    def _observe_once(
        self, dense: Session, reference: Measurement, choices: np.ndarray, predicted: Sequence[float | None]
    ) -> list[Observation]:
        iterations = _between(FEWEST_ITERATIONS, PROFILE_SECONDS / reference.median, MOST_ITERATIONS)
        share = len(choices) / (len(choices) + 1)  # of the turns; the dense network has the others
        rounds = _between(FEWEST_ROUNDS, share * ROUNDS_SECONDS / ((1 + RUNS_A_ROUND) * reference.median), MOST_ROUNDS)
        profiles = []
        with contextlib.ExitStack() as opened:
            sessions = {"dense": dense}
            for number, choice in enumerate(choices):
                seed = self._seed + len(self.observations) + number
                path, zeros = self._imposed(choice, seed)
                profiles.append(
                    self._runtime.layer_seconds(
                        path, self._workload, iterations=iterations, warmup=WARMUP, zeros=zeros, seed=seed
                    )
                )
                session = self._runtime.open(path, self._workload, zeros=zeros, seed=seed)
                sessions[str(number)] = opened.enter_context(session)
            times = measure_interleaved(sessions, rounds=rounds, iterations=RUNS_A_ROUND, warmup=WARMUP)
        return [
            Observation(
                choice=tuple(map(int, choice)),
                rows=tuple(profiles[number]),
                dense=times["dense"].seconds,
                network=times[str(number)].seconds,
                foreign_cores=None,
                predicted=predicted[number],
            )
            for number, choice in enumerate(choices)
        ]

    def _note(self, note: str) -> None:
        self._progress(len(self.observations), NETWORKS + CHOSEN_NETWORKS, note)

    def _dense(self) -> Measurement:
        """The dense network in all the turns."""
        return Measurement(tuple(value for one in self.observations for value in one.dense))

    def _fit(self, sparse: np.ndarray) -> Fit:
        # One for all: a few rounds can't tell the noise of one network.
        noise = max(LEAST_NOISE, float(np.median([one.noise for one in self.observations])))
        trials = [self._trial(one, noise) for one in self.observations]
        sparsities = [level.sparsity for level in self._levels]
        return fit_latency(trials, self._predecessor, self._source_of, sparsities, sparse, self._dense().median)

    def _trial(self, observation: Observation, noise: float) -> Trial:
        rows, pending = [], 0.0
        for time_ in observation.rows:
            pending += time_.seconds
            if time_.outputs:
                layers = self._layers_in(time_)
                rest = tuple(name for name in time_.outputs if name not in self._row_of)
                rows.append(Row(layers, rest, pending))
                pending = 0.0
        return Trial(observation.choice, together(rows), pending, observation.relative, noise)

    def _networks_to_choose(self, sparse: np.ndarray) -> int:
        """How many networks of a search's choice are still to be measured."""
        errors = [abs(math.log(one.predicted / one.relative)) for one in self.observations if one.predicted]
        if not sparse.any():
            return 0
        if len(errors) < CHOSEN_NETWORKS:
            return CHOSEN_NETWORKS - len(errors)
        good = np.median(errors[-CHOSEN_NETWORKS:]) <= PREDICTED_WELL
        return 0 if good else max(0, CHOSEN_NETWORKS + MORE_NETWORKS - len(errors))

    def _chosen(self, fit: Fit, sparse: np.ndarray, networks: int) -> np.ndarray:
        """(networks, layers) levels as a search chooses them: for some target, errors as SPDY's search draws them."""
        rng = np.random.default_rng([self._seed, len(self.observations)])
        costs = self._costs(fit, sparse)
        fastest = costs.total(costs.fastest())
        slowest = costs.total(np.zeros(len(self._layers), np.int64))
        prior = np.square(np.arange(len(self._levels)) / (len(self._levels) - 1))
        choices = []
        # Evenly in the speedup of the layers, so that targets of 1.5x and 3x are equally likely.
        for place in (rng.permutation(networks) + rng.random(networks)) / networks:
            budget = slowest / (1 + place * max(0.0, slowest / fastest - 1))
            try:
                choices.append(solve(rng.random((len(self._layers), 1)) * prior, costs, max(budget, fastest)))
            except InfeasibleTarget:  # by rounding only
                choices.append(costs.fastest())
        return np.array(choices)

    def _costs(self, fit: Fit, sparse: np.ndarray) -> Costs:
        return Costs(fit.seconds, fit.transition, self._predecessor, ~sparse)

    def _predict(self, fit: Fit, sparse: np.ndarray, choice: np.ndarray) -> float:
        costs = self._costs(fit, sparse)
        dense = fit.rest_seconds + costs.total(np.zeros(len(self._layers), np.int64))
        return (fit.rest_seconds + costs.total(choice)) / dense

    def _table(self, fit: Fit, sparse: np.ndarray, kernels: list[list[str]], dense: Session) -> LatencyTable:
        errors = [abs(one.predicted / one.relative - 1) for one in self.observations if one.predicted]
        loads = [one.foreign_cores for one in self.observations if one.foreign_cores is not None]
        kernel_of = {row.outputs: row.kernel for one in self.observations for row in one.rows}
        rest = [
            (next((kernel for names, kernel in kernel_of.items() if name in names), ""), name, seconds)
            for name, seconds in fit.rest.items()
        ]
        unnamed = fit.rest_seconds - sum(fit.rest.values())
        return LatencyTable(
            layers=tuple(layer.name for layer in self._layers),
            levels=self._levels,
            seconds=fit.seconds,
            transition=fit.transition,
            predecessor=np.asarray(self._predecessor),
            spread=fit.spread,
            sparse=sparse,
            kernels=tuple(map(tuple, kernels)),
            rest_seconds=fit.rest_seconds,
            rest=(*rest, ("what belongs to no tensor", "", unnamed)),
            dense=self._dense(),
            prediction=Prediction(len(errors), float(np.median(errors)), max(errors)) if errors else None,
            foreign_cores=max(loads) if loads else None,
            fallback=dense.fallback,
            environment=dense.environment,
            model_sha256=self._network.sha256,
            workload=self._workload.digest,
        )


def _between(least: int, value: float, most: int) -> int:
    return int(min(max(least, value), most))
