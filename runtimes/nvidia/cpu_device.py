"""The CPU in the place of a GPU, for tests and dry runs: everything but the kernels. Its times mean nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

from .. import host
from .cuda_device import Product, Run


class CpuDevice:
    """See `Device`. The "sparse" kernel is a dense product, in the name of which the word stand-in is."""

    place = "cpu"

    def check(self) -> str:
        """No engine's version."""
        return "stand-in"

    def fields(self) -> dict[str, Any]:
        """See `Device.fields`."""
        return {**host.fields(), "options": (("device", "stand-in for a GPU"),)}

    def replayable(self, run: Run) -> Run:
        """See `Device.replayable`."""
        return run

    def compiled(self, graph: Any) -> Any:
        """See `Device.compiled`."""
        return graph

    def seconds(self, replay: Run, iterations: int, *, cold: bool = False) -> list[float]:
        """See `Device.seconds`."""
        found = []
        for _ in range(iterations):
            start = perf_counter()
            replay()
            found.append(perf_counter() - start)
        return found

    def marked_seconds(self, run: Callable[[Run], Any], iterations: int, warmup: int) -> list[list[float]]:
        """See `Device.marked_seconds`."""
        found = []
        for _ in range(warmup + iterations):
            marks: list[float] = []
            _marked(run, marks)
            found.append([after - before for before, after in itertools.pairwise(marks)])
        return found[warmup:]

    def sparse_products(self, weight: Any, bias: Any, sample: Any) -> Iterator[tuple[str, Product]]:
        """See `Device.sparse_products`."""
        from torch.nn import functional

        yield "stand-in_2:4", lambda x: functional.linear(x, weight, bias)


def _marked(run: Callable[[Run], Any], marks: list[float]) -> None:
    run(lambda: marks.append(perf_counter()))
