"""Measuring the latency model: in the runtime, with the batch and threads of the user, on this machine or another.

First the engine says from which level on it runs each layer in a sparse kernel, where levels are zeros. Then networks
whose layers, or groups of units, are at random levels are measured, each twice: the engine's own profile of it, and its
time as a whole, a group of them in turns with the dense network. What a layer takes depends on its neighbours, and only
mixed networks show that; and because every level occurs all over the measurement, drift of the machine hits all of them
alike. `equations.py` makes the table of it. The last networks are the ones that a search would choose; the model has to
predict them before it may learn from them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnx_spdy.models import Prepared, save_model
from onnx_spdy.models.int8.form import form_for
from onnx_spdy.models.int8.write import in_float
from onnx_spdy.pipeline.artifact import WRONG_FIELD, ArtifactError, check_same, read_json, write_json
from onnx_spdy.pipeline.latency.equations import Fit, Row, Trial
from onnx_spdy.pipeline.latency.in_int8 import InInt8
from onnx_spdy.pipeline.latency.kind import Kind, Profile
from onnx_spdy.pipeline.latency.observation import Observation
from onnx_spdy.pipeline.latency.precisions import Precisions
from onnx_spdy.pipeline.latency.sampling import NETWORKS, columns_of
from onnx_spdy.pipeline.latency.table import LatencyTable, NoSpeedup, Prediction, check_workload
from onnx_spdy.pipeline.latency.widths import Widths
from onnx_spdy.pipeline.latency.zeros import Zeros
from onnx_spdy.pipeline.level import Level, LevelError, any_int8, only_zeros
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
MOST_CHOSEN_SPEEDUP = 5.0  # of the sites: nobody asks for networks of which nothing is left
GROUP, CHOSEN_GROUP = 8, 4  # networks that are measured in turns, so that a phase of the machine is shared
GROUP_BYTES = 2 << 30  # of their weights in memory at once
PROFILE_SECONDS, ROUNDS_SECONDS = 0.4, 1.2  # of each network, so that small ones are run more often
RUNS_A_ROUND = 2
FEWEST_ROUNDS, MOST_ROUNDS = 4, 40
FEWEST_ITERATIONS, MOST_ITERATIONS = 3, 40
WARMUP = 2
LEAST_NOISE = 0.005
BUSY_WAITS_SECONDS = (1, 5, 10, 20, 30)


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
    """Measure every site at every level: each prunable layer with zeros, or each group of units at a width.

    Args:
        dense: the network.
        runtime: the one that will run it.
        levels: the whole network first.
        workload: as in `Runtime.open`.
        seed: of the networks' levels and zeros.
        save: latency.json, written at the end. Until then what was measured is kept beside it, in
            latency.partial.json, and continued from.
        allow_busy: measure even while other programs use the CPU; the table says how much they used.
        progress: called with (measured, to measure, note).
    Raises:
        LevelError: widths or int8 among levels of other patterns.
        NothingToPrune: widths, and no group of the network can shrink.
        NoSpeedup: the engine falls back for every prunable layer.
        MachineBusy: other programs used the CPU all the time; what was measured before is kept.
        RuntimeFailure: the engine is missing, refuses the network, crashes or hangs; the same.
        ArtifactError: what was kept is of another network, environment or question.
    """
    patterns = sorted({level.pattern for level in levels[1:]})
    if len(patterns) > 1 and not only_zeros(levels):
        raise LevelError(f"one latency table of {', '.join(patterns)} isn't fitted yet; measure one of them")
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


def kind_of(network: Prepared, levels: Sequence[Level], runtime: Runtime, workload: Workload) -> Kind:
    """What these levels do to the network's time.

    Raises:
        NothingToPrune: widths, and no group of the network can shrink.
        NoForm: int8, and it isn't known how the runtime wants it written.
        ModelError, NothingToQuantise: int8, and the network can't be; see `find_placement`.
    """
    in_int8 = InInt8(network, form_for(runtime.name), workload) if any_int8(levels) else None
    if any(level.is_width for level in levels):
        return Widths(network, levels, in_int8)
    return Precisions(network, levels, in_int8) if in_int8 else Zeros(network, levels)


@dataclass(frozen=True)
class _Network:
    """A network to measure: a file, and the zeros to draw in it where the engine is."""

    path: Path
    zeros: dict[str, float]
    seed: int


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
        self._kind = kind_of(dense, levels, runtime, self._workload)
        self._allow_busy, self._progress = allow_busy, progress
        self._path = folder / "dense.onnx"
        self._expected = NETWORKS + CHOSEN_NETWORKS  # networks to measure, as long as the plan isn't made
        self._tensors = {name for node in dense.proto.graph.node for name in node.output}
        self.observations: list[Observation] = []

    def measure(self, keep: Path | None) -> LatencyTable:
        save_model(self._network.proto, self._path)
        with self._runtime.open(self._path, self._workload) as dense:
            question = self._question(dense.environment)
            if keep and keep.exists():
                self._continue(keep, question)
            reference = measure_interleaved({"dense": dense}, rounds=DENSE_ROUNDS)["dense"]
            self._note("kernels")
            profile = self._profile_once()
            rows = profile(self._path, {}, 0)
            if not any(map(self._kind.works_on, rows)):
                raise NoSpeedup(
                    f"{dense.environment.runtime} runs no prunable layer of this network by itself, so pruning can't "
                    f"help: {dense.fallback or 'its profile names none of them'}"
                )
            gains = self._kind.look(rows, profile, self._path)

            def measure(choices: np.ndarray, predicted: Sequence[float | None], left: int) -> None:
                self.observations += self._observe(dense, reference, choices, predicted)
                if keep:
                    content = {**question, "observations": [asdict(one) for one in self.observations]}
                    write_json(keep, "measurement", VERSION, content)
                self._progress(len(self.observations), len(self.observations) + left, "")

            plan = self._kind.plan(np.random.default_rng(self._seed))
            self._expected = len(plan) + CHOSEN_NETWORKS * gains
            while len(choices := plan[len(self.observations) :][: self._group(GROUP)]):
                left = len(plan) - len(self.observations) - len(choices)
                measure(choices, [None] * len(choices), left + CHOSEN_NETWORKS * gains)
            fit = self._fit()
            while gains and (left := self._networks_to_choose()) > 0:
                choices = self._chosen(fit, min(left, self._group(CHOSEN_GROUP)))
                measure(choices, [fit.relative(choice) for choice in choices], left - len(choices))
                fit = self._fit()
            return self._table(fit, dense)

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

    def _profile_once(self) -> Profile:
        def profile(path: Path, zeros: dict[str, float], seed: int) -> list[LayerTime]:
            rows = self._runtime.layer_seconds(
                path, self._workload, iterations=1, warmup=0, zeros=zeros, seed=seed, merged=False
            )
            return self._renamed(rows)

        return profile

    def _renamed(self, rows: Sequence[LayerTime]) -> list[LayerTime]:
        """Rows of a network in int8, with the tensors' names in floating point."""
        return [replace(row, outputs=in_float(row.outputs, self._tensors)) for row in rows]

    def _observe(
        self, dense: Session, reference: Measurement, choices: np.ndarray, predicted: Sequence[float | None]
    ) -> list[Observation]:
        """Measure a group of networks; again while other programs disturb."""
        cores = dense.environment.cores
        networks = []
        for number, choice in enumerate(choices):
            seed = self._seed + len(self.observations) + number
            # The next group takes the place of this one's files.
            own = self._path.with_name(f"network-{number}.onnx")
            networks.append(_Network(*self._kind.network(choice, seed, self._path, own), seed))
        found, load = measure_undisturbed(
            self._runtime,
            lambda: self._observe_once(dense, reference, networks, choices, predicted),
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
        self,
        dense: Session,
        reference: Measurement,
        networks: Sequence[_Network],
        choices: np.ndarray,
        predicted: Sequence[float | None],
    ) -> list[Observation]:
        iterations = _between(FEWEST_ITERATIONS, PROFILE_SECONDS / reference.median, MOST_ITERATIONS)
        share = len(choices) / (len(choices) + 1)  # of the turns; the dense network has the others
        rounds = _between(FEWEST_ROUNDS, share * ROUNDS_SECONDS / ((1 + RUNS_A_ROUND) * reference.median), MOST_ROUNDS)
        profiles = []
        with contextlib.ExitStack() as opened:
            sessions = {"dense": dense}
            for number, one in enumerate(networks):
                rows = self._runtime.layer_seconds(
                    one.path, self._workload, iterations=iterations, warmup=WARMUP, zeros=one.zeros, seed=one.seed
                )
                profiles.append(self._renamed(rows))
                session = self._runtime.open(one.path, self._workload, zeros=one.zeros, seed=one.seed)
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
        self._progress(len(self.observations), self._expected, note)

    def _dense(self) -> Measurement:
        """The dense network in all the turns."""
        return Measurement(tuple(value for one in self.observations for value in one.dense))

    def _fit(self) -> Fit:
        # One for all: a few rounds can't tell the noise of one network.
        noise = max(LEAST_NOISE, float(np.median([one.noise for one in self.observations])))
        trials = [self._trial(one, noise) for one in self.observations]
        return self._kind.fit(trials, self._dense().median)

    def _trial(self, observation: Observation, noise: float) -> Trial:
        rows, pending = [], 0.0
        for time_ in observation.rows:
            pending += time_.seconds
            if time_.outputs:
                rows.append(Row(time_.outputs, pending))
                pending = 0.0
        return Trial(observation.choice, tuple(rows), pending, observation.relative, noise)

    def _networks_to_choose(self) -> int:
        """How many networks of a search's choice are still to be measured."""
        errors = [abs(math.log(one.predicted / one.relative)) for one in self.observations if one.predicted]
        if len(errors) < CHOSEN_NETWORKS:
            return CHOSEN_NETWORKS - len(errors)
        good = np.median(errors[-CHOSEN_NETWORKS:]) <= PREDICTED_WELL
        return 0 if good else max(0, CHOSEN_NETWORKS + MORE_NETWORKS - len(errors))

    def _chosen(self, fit: Fit, networks: int) -> np.ndarray:
        """(networks, layers) levels as a search chooses them: for some target, errors as SPDY's search draws them."""
        rng = np.random.default_rng([self._seed, len(self.observations)])
        costs = fit.costs
        fastest = costs.total(costs.fastest())
        slowest = costs.total(np.zeros(len(self._kind.names), np.int64))
        prior = np.square(np.arange(len(self._levels)) / (len(self._levels) - 1))
        patterns = columns_of(self._levels)
        pattern_of = np.zeros(len(self._levels), np.int64)
        for number, columns in enumerate(patterns.values()):
            pattern_of[columns] = number
        choices = []
        # Evenly in the speedup of the layers, so that targets of 1.5x and 3x are equally likely.
        highest = min(MOST_CHOSEN_SPEEDUP, slowest / fastest)
        for place in (rng.permutation(networks) + rng.random(networks)) / networks:
            budget = slowest / (1 + place * max(0.0, highest - 1))
            try:
                errors = rng.random((len(self._kind.names), len(patterns)))[:, pattern_of] * prior
                choices.append(solve(errors, costs, max(budget, fastest)))
            except InfeasibleTarget:  # by rounding only
                choices.append(costs.fastest())
        return np.array(choices)

    def _table(self, fit: Fit, dense: Session) -> LatencyTable:
        errors = [abs(one.predicted / one.relative - 1) for one in self.observations if one.predicted]
        loads = [one.foreign_cores for one in self.observations if one.foreign_cores is not None]
        kernel_of = {row.outputs: row.kernel for one in self.observations for row in one.rows}
        rest = [
            (next((kernel for names, kernel in kernel_of.items() if name in names), ""), name, seconds)
            for name, seconds in fit.rest.items()
        ]
        unnamed = fit.rest_seconds - sum(fit.rest.values())
        return LatencyTable(
            layers=self._kind.names,
            levels=self._levels,
            seconds=fit.seconds,
            transition=fit.transition,
            predecessor=fit.predecessor,
            spread=fit.spread,
            sparse=fit.sparse,
            kernels=self._kind.kernels,
            products=fit.products,
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
