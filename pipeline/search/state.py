"""What a search has scored so far, in a file: a search that was stopped goes the same way again, and on from there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from onnx_spdy.pipeline.artifact import fields_of, read_json, write_json
from onnx_spdy.pipeline.search.profile_loss import ProfileLoss, Score

VERSION = 1
SAVE_SECONDS = 10.0  # between two writes


class SearchState:
    """Keeps the log of scores, and where in it the search for each target began.

    Args:
        path: of the file, or None to keep nothing.
        question: what the scores are for; a file that answers another one is replaced.
    """

    def __init__(self, path: Path | None, question: Mapping[str, str]) -> None:
        self._path, self._question = path, dict(question)
        self._began: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._results: dict[str, tuple[int, Sequence[Sequence[float]]]] = {}  # with how many scores there were then
        self._log: list[Score] = []
        self._saved = 0.0
        if path is not None and path.exists():
            content = read_json(path, "search", VERSION)
            with fields_of(path):
                if content["question"] == self._question:
                    self._began, self._seconds = content["began"], content["seconds"]
                    self._results = content["results"]
                    self._log = [Score(tuple(choice), batch, loss) for choice, batch, loss in content["log"]]

    def resume(self, score: ProfileLoss, speedup: float) -> float:
        """Bring `score` to where the search for a speedup began, now or in an earlier process.

        Returns:
            Seconds that were spent on it already.
        """
        key = f"{speedup:g}"
        began = self._began.get(key, len(self._log))
        score.learn(self._log, began)
        self._began[key] = len(score.log)
        return self._seconds.get(key, 0.0)

    def recall(self, score: ProfileLoss) -> None:
        """Let `score` know everything that was ever scored."""
        score.learn(self._log, len(self._log))

    def learned(self, speedup: float) -> list[np.ndarray]:
        """(layers, levels) errors that led to the best profiles for other speedups, found before this search began."""
        began = self._began[f"{speedup:g}"]
        return [np.array(errors) for key, (known, errors) in self._results.items() if known <= began]

    def finish(self, speedup: float, score: ProfileLoss, errors: Sequence[Sequence[float]]) -> None:
        """Keep what a search ended with."""
        self._results[f"{speedup:g}"] = len(score.log), errors

    def keep(self, score: ProfileLoss, speedup: float, seconds: float, *, now: bool = False) -> None:
        """Write the file when the last time is long ago, or `now`."""
        if self._path is None or not (now or time.monotonic() - self._saved > SAVE_SECONDS):
            return
        self._seconds[f"{speedup:g}"] = seconds
        scored = {(one.choice, one.batch) for one in score.log}
        self._log = [*score.log, *(one for one in self._log if (one.choice, one.batch) not in scored)]
        log = [[list(one.choice), one.batch, one.loss] for one in self._log]
        write_json(
            self._path,
            "search",
            VERSION,
            {
                "question": self._question,
                "began": self._began,
                "seconds": self._seconds,
                "results": self._results,
                "log": log,
            },
        )
        self._saved = time.monotonic()
