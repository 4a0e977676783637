"""What a search is given and what it may ask: times by the table, errors by the database, losses by the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.solve import InfeasibleTarget
from onnx_spdy.pipeline.solve_within import Limit, share, solve_within


class NetworkLoss(Protocol):
    """Scores profiles. What was asked before costs nothing."""

    def __call__(self, choice: np.ndarray, samples: int | None = None) -> float:
        """Calibration loss of the stitched network, for (layers,) level indices.

        Args:
            samples: on so many of the first selection samples; None for all of them.
        """


@dataclass(frozen=True)
class Seen:
    """A profile that was scored before, for another target perhaps.

    Attributes:
        choice: (layers,) level indices.
        samples, loss: its loss on so many of the first selection samples.
    """

    choice: tuple[int, ...]
    samples: int
    loss: float


@dataclass(frozen=True)
class SearchProblem:
    """Choose a level for each layer: least loss of the network within the time budgets.

    Attributes:
        levels: dense first, then from lowest to highest sparsity.
        limits: times of layers x levels and the budget of each device, by its latency table.
        errors: (layers, levels), relative squared output error of each layer, by the database.
        loss: calibration loss of the network stitched to a choice.
        each: the same of several choices on so many samples, in order, as an iterator; None to ask `loss` for each.
        magnitudes: layer index -> absolute values of its dense weights; of a group (units,) their norms.
        rng: the only source of randomness.
        stages: numbers of samples that `loss` can be asked for, growing; the last is all of them.
        seen: profiles that were scored before the search began.
        learned: (layers, levels) additive errors that led to the best profiles for other budgets.
        samples_run: how many samples were run through the network so far.
        sample_limit: how many this search may run, or None for as many as it finds worthwhile.
        tell: called with (best loss so far, evaluations so far, evaluations at least to come).
        is_over: whether the time limit has passed or the user asked to stop; a search then returns the best it has.
    """

    levels: tuple[Level, ...]
    limits: Sequence[Limit]
    errors: np.ndarray
    loss: NetworkLoss
    magnitudes: Callable[[int], np.ndarray]
    rng: np.random.Generator
    stages: tuple[int, ...] = (1,)
    seen: Sequence[Seen] = ()
    learned: Sequence[np.ndarray] = ()
    samples_run: Callable[[], int] = lambda: 0
    sample_limit: int | None = None
    tell: Callable[[float, int, int], None] = lambda loss, done, left: None
    is_over: Callable[[], bool] = lambda: False
    each: Callable[[Sequence[np.ndarray], int], Iterator[float]] | None = None

    @cached_property
    def layer_count(self) -> int:
        return len(self.errors)

    def losses(self, choices: Sequence[np.ndarray], samples: int) -> Iterator[float]:
        """The loss of each choice, in order, scored when it is asked for, or before where that is done in parallel."""
        if self.each is not None:
            return self.each(choices, samples)
        return (self.loss(choice, samples) for choice in choices)

    def share(self, choice: np.ndarray) -> float:
        """What a choice takes of the budget by the table, on the device where that is most."""
        return share(self.limits, choice)

    def is_feasible(self, choice: np.ndarray) -> bool:
        return self.share(choice) <= 1

    def solve(self, errors: np.ndarray) -> np.ndarray:
        """The choice of least total error within the budgets, for these (layers, levels) errors."""
        return solve_within(errors, self.limits)


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        choice: (layers,) level indices, within the budget.
        errors: (layers, levels), additive errors that the choice is optimal for; a neighbouring budget can be solved
            with them without another search. None where the search has no such model and is cheap enough to repeat.
    """

    choice: np.ndarray
    errors: np.ndarray | None = None


__all__ = ["InfeasibleTarget", "NetworkLoss", "SearchProblem", "SearchResult", "Seen"]
