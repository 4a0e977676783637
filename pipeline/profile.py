"""A profile: the level of each layer that a search chose, for which target, and from what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_spdy.pipeline.artifact import fields_of, read_json, write_json
from onnx_spdy.pipeline.level import Level

VERSION = 3
NUMBERS = (
    "target_speedup", "table_target", "predicted_seconds", "predicted_speedup", "loss", "evaluations", "samples_run",
)  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """The result of a search.

    Attributes:
        levels: layer name -> level, for every prunable layer in graph order.
        target_speedup: what was asked for.
        table_target: the speedup by the table that was asked of the solver, so that the measurement meets the target.
        predicted_seconds: of the whole network, by the latency table.
        predicted_speedup: dense seconds of the table / predicted_seconds.
        loss, loss_name: calibration loss of the stitched network, on the samples that the search selected by.
        held_out_loss: the same on calibration samples that the search never saw; None where there are none left.
        search, evaluations, samples_run: who found it, how many profiles were scored for that, and how many samples
            were run through the network.
        ended: why the search ended: one of "finished", "time limit", "interrupted".
        seed: of the search.
        errors: (layers, levels), the additive errors that the choice is optimal for, to solve for another speedup
            without another search; None where the search has none.
        made_from: hashes of what it belongs to: model_sha256, table_sha256, data_sha256, pruner.
    """

    levels: Mapping[str, Level]
    target_speedup: float
    table_target: float
    predicted_seconds: float
    predicted_speedup: float
    loss: float
    loss_name: str
    held_out_loss: float | None
    search: str
    evaluations: int
    samples_run: int
    ended: str
    seed: int
    errors: Sequence[Sequence[float]] | None
    made_from: Mapping[str, str]

    def save(self, path: Path | str) -> None:
        levels = {name: str(level) for name, level in self.levels.items()}
        write_json(path, "profile", VERSION, {**self.__dict__, "levels": levels, "made_from": dict(self.made_from)})

    @classmethod
    def load(cls, path: Path | str) -> Profile:
        """The profile in a file.

        Raises:
            ArtifactError: missing, damaged or of another version.
        """
        content = read_json(path, "profile", VERSION)
        with fields_of(path):
            levels = {name: Level.parse(text) for name, text in content["levels"].items()}
            if wrong := [name for name in NUMBERS if type(content[name]) not in (int, float)]:
                raise TypeError(f"{wrong[0]} is {content[wrong[0]]!r}")
            if content["errors"] is not None and np.array(content["errors"], np.float64).ndim != 2:
                raise ValueError("errors are no table of numbers")
            return cls(**{name: content[name] for name in cls.__dataclass_fields__ if name != "levels"}, levels=levels)
