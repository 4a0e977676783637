"""How profiles are searched: one value from the command line to the search."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_spdy.pipeline.loss import Loss
from onnx_spdy.pipeline.search.methods import DEFAULT_SEARCH, search_named

SEARCH_SAMPLES = 512


@dataclass(frozen=True)
class SearchSettings:
    """How profiles are searched.

    Attributes:
        method: a name of SEARCHES.
        loss: see `Objective`.
        samples: how many calibration samples score a profile; at most three quarters of all.
        sample_limit: how many samples one search may run through the network; None for what it finds worthwhile.
        time_limit_seconds: of one search, which then takes the best profile so far.
        seed: of everything random.
    Raises:
        UnknownSearch: no method of that name.
    """

    method: str = DEFAULT_SEARCH
    loss: str | Loss | None = None
    samples: int = SEARCH_SAMPLES
    sample_limit: int | None = None
    time_limit_seconds: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        search_named(self.method)
