"""The latency model: seconds of every layer at every level in one environment, and of whole networks by them.

`measure.py` measures it. A network takes what its layers take at their levels, what a layer takes more because the one
before it runs dense, and what no pruning can remove. For widths the layers are groups of units, and two of them take
more together where one reads what the other makes: the product of what is kept of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnx_spdy.pipeline.artifact import WRONG_FIELD, ArtifactError, arrays_sha256, read_json, write_json
from onnx_spdy.pipeline.costs import Costs, Product
from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.solve_within import Limit
from onnx_spdy.runtimes import Environment, Measurement, Workload, resolved
from onnx_spdy.runtimes.errors import OnnxSpdyError

VERSION = 6
ARRAYS = {"seconds": float, "transition": float, "predecessor": int, "spread": float, "sparse": bool}


class NoSpeedup(OnnxSpdyError, ValueError):
    """The runtime can't run this network faster, whatever is pruned."""


@dataclass(frozen=True)
class Prediction:
    """How well the model predicted whole networks that it hadn't seen yet.

    Attributes:
        networks: how many.
        median, largest: of |predicted / measured - 1|; of the measured times' own noise, too.
    """

    networks: int
    median: float
    largest: float


@dataclass(frozen=True)
class LatencyTable:
    """Times of layers x levels in one environment.

    Attributes:
        layers: names of the prunable layers, or of the groups that get a width, in graph order: see `find_sites`.
        levels: the whole network first, then from lowest to highest sparsity.
        seconds: (layers, levels), cleaned: more zeros, or fewer units, are not slower in the same kind of kernel.
        transition: (layers, levels), seconds more, or less, where the layer before runs in a dense kernel.
        predecessor: (layers,) index of the layer that each one reads from, or NO_PREDECESSOR.
        spread: (layers, levels), relative standard deviation of `seconds`.
        sparse: (layers, levels) bool, whether the engine used a sparse kernel. For widths nowhere.
        kernels: (layers, levels), the engine's name of the kernel. For widths the one that takes longest in the dense
            network, of those that work on the group's units.
        products: seconds of several groups together, as of layers between two widths; not in `seconds`.
        rest_seconds: what no pruning can remove: everything outside these layers.
        rest: (kernel, outputs, seconds) of what runs outside these layers.
        dense: the whole dense network, end to end.
        prediction: how well the model does on networks that it hadn't seen; None where it had nothing to predict.
        foreign_cores: most cores that other programs kept busy during a measurement; None if that isn't known.
        fallback: which part of the dense network the engine doesn't optimise and why, or None.
        environment: in which all of it was measured.
        model_sha256: of the network.
        workload: `Workload.digest` of what it was measured with.
    """

    layers: tuple[str, ...]
    levels: tuple[Level, ...]
    seconds: np.ndarray
    transition: np.ndarray
    predecessor: np.ndarray
    spread: np.ndarray
    sparse: np.ndarray
    kernels: tuple[tuple[str, ...], ...]
    products: tuple[Product, ...]
    rest_seconds: float
    rest: tuple[tuple[str, str, float], ...]
    dense: Measurement
    prediction: Prediction | None
    foreign_cores: float | None
    fallback: str | None
    environment: Environment
    model_sha256: str
    workload: str

    @cached_property
    def costs(self) -> Costs:
        """The times of the layers, for the solver."""
        return Costs(self.seconds, self.transition, self.predecessor, ~self.sparse, self.products)

    def predict(self, choice: Sequence[int] | np.ndarray) -> float:
        """Seconds of the whole network with these level indices, (layers,)."""
        return self.rest_seconds + self.costs.total(choice)

    @cached_property
    def dense_seconds(self) -> float:
        """Seconds of the dense network, by the table where it is one of its networks: what speedups are relative to."""
        return self.dense.median if self.levels[0].is_int8 else self.predict([0] * len(self.layers))

    @cached_property
    def highest_speedup(self) -> float:
        """The speedup of the fastest profile."""
        return self.dense_seconds / self.predict(self.costs.fastest())

    def budget(self, speedup: float) -> float:
        """Seconds that all these layers together may take for a speedup of the whole network.

        Raises:
            NoSpeedup: more than the table allows; the message gives the highest reachable speedup.
        """
        budget = self.dense_seconds / speedup - self.rest_seconds
        if speedup > self.highest_speedup:
            raise NoSpeedup(
                f"a speedup of {speedup:g} can't be reached in {self.environment.runtime} at batch "
                f"{self.environment.batch}: the highest reachable is {self.highest_speedup:.2f} by the latency table; "
                "lower --speedup or raise --batch"
            )
        return budget

    def limits(self, speedup: float) -> Sequence[Limit]:
        """The same, for the solver.

        Raises:
            NoSpeedup: see `budget`.
        """
        return [Limit(self.costs, self.budget(speedup))]

    @cached_property
    def digest(self) -> str:
        """Hash of what profiles are searched with."""
        return arrays_sha256(
            {
                "seconds": self.seconds,
                "transition": self.transition,
                "predecessor": self.predecessor,
                "sparse": self.sparse,
                "rest_seconds": np.array(self.rest_seconds),
            }
            | {f"product {number} of {one.layers}": one.factors for number, one in enumerate(self.products)}
        )

    def check_workload(self, graph: onnx.GraphProto, workload: Workload, name: str = "the latency table") -> None:
        """Refuse this table for inputs of other shapes: a network of other work takes other times.

        Args:
            graph: of the network that the table is for.
            workload: what it is to be used for.
            name: of the table, for the message.
        Raises:
            ArtifactError: the inputs have other names, types or shapes than those that were measured with.
        """
        check_workload(name, self.workload, resolved(graph, workload))

    def break_even(self, layer: int) -> Level | None:
        """The level from which on this layer is faster than dense, whatever runs before it; None if there is none.

        That is, with all levels of its pattern that have more zeros; of several patterns that with fewest. What the
        layer shares with others counts as if they were whole.

        Args:
            layer: its index.
        """
        seconds = self.costs.alone(layer)
        after_dense = seconds + self.transition[layer]
        faster = (seconds < seconds[0]) & (after_dense < after_dense[0])
        found: dict[str, Level] = {}
        slower: set[str] = set()  # patterns
        for level, is_faster in zip(self.levels[:0:-1], faster[:0:-1], strict=True):
            if not is_faster:
                slower.add(level.pattern)
            elif level.pattern not in slower:
                found[level.pattern] = level
        return min(found.values(), key=lambda level: level.sparsity, default=None)

    def save(self, path: Path | str) -> None:
        """Write latency.json."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        content = {
            **fields,
            **{name: fields[name].tolist() for name in ARRAYS},
            "levels": [*map(str, self.levels)],
            "products": [{"layers": one.layers, "factors": one.factors.tolist()} for one in self.products],
            "dense": self.dense.to_json(),
            "prediction": self.prediction and vars(self.prediction),
            "environment": self.environment.to_json(),
        }
        write_json(path, "latency", VERSION, content)

    @classmethod
    def load(cls, path: Path | str) -> LatencyTable:
        """The table in a file.

        Raises:
            ArtifactError: missing, damaged or of another version.
        """
        content: dict[str, Any] = read_json(path, "latency", VERSION)
        try:
            table = cls._of(content)
            if table.seconds.shape != (len(table.layers), len(table.levels)) or not table.highest_speedup > 0:
                raise ValueError("it has another shape than its layers and levels")
        except WRONG_FIELD as exc:
            raise ArtifactError(f"{path} is damaged ({exc!r}); measure it again") from exc
        return table

    @classmethod
    def _of(cls, content: dict[str, Any]) -> LatencyTable:
        """The table that `save` wrote."""
        content |= {name: np.array(content[name], kind) for name, kind in ARRAYS.items()}
        content |= {
            "layers": tuple(content["layers"]),
            "levels": tuple(Level.parse(text) for text in content["levels"]),
            "kernels": tuple(tuple(row) for row in content["kernels"]),
            "products": tuple(Product(tuple(one["layers"]), np.array(one["factors"])) for one in content["products"]),
            "rest": tuple((kernel, outputs, seconds) for kernel, outputs, seconds in content["rest"]),
            "dense": Measurement.from_json(content["dense"]),
            "prediction": content["prediction"] and Prediction(**content["prediction"]),
            "environment": Environment.from_json(content["environment"]),
        }
        return cls(**{name: content[name] for name in cls.__dataclass_fields__})


def check_workload(name: str, digest: str, workload: Workload) -> None:
    """Refuse what was measured with inputs of other shapes.

    Args:
        name: of what was measured, for the message.
        digest: `Workload.digest` that it was measured with.
        workload: `resolved`, of this run.
    Raises:
        ArtifactError: the digests differ; the message gives the shapes of this run.
    """
    if digest != workload.digest:
        raise ArtifactError(
            f"{name} was measured with inputs of other shapes than this run's ({workload.shapes}): another sequence "
            "length or image size, say; measure it again with this data"
        )
