"""Meeting the target: what counts is the measured speedup, so the table's answer is measured and corrected.

A latency table is off by some percent for a whole network: layers interact, and engines merge them. The profile that
the search found is therefore deployed and measured. Where its lower confidence bound misses the target, the next one
is searched for a speedup by the table that is higher by as much; where it overshoots, the slack goes back to accuracy.
Where the speedup is there and only its lower bound isn't, it is measured longer first: that takes less than another
profile, and wide bounds say little of how much faster the next one has to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.solve import InfeasibleTarget
from onnx_spdy.runtimes.errors import OnnxSpdyError

ATTEMPTS = 4
OVERSHOOT = 0.03  # of the target: more is given back
MARGIN = 0.01  # above the target, so that noise doesn't cost another attempt


M = TypeVar("M", bound="Measured")


class Measured(Protocol):
    """A measured speedup with its bounds: `Validation`, or those of several devices together."""

    @property
    def speedup(self) -> float: ...
    @property
    def lower(self) -> float: ...
    @property
    def upper(self) -> float: ...
    def with_more(self: M, other: M) -> M: ...


@dataclass(frozen=True)
class Attempt(Generic[M]):
    """A profile and what it measured."""

    profile: Profile
    validation: M

    def meets(self, target: float) -> bool:
        """Whether the measured lower bound is at or above the target."""
        return self.validation.lower >= target

    def is_unsure(self, target: float) -> bool:
        """Whether the target was measured, but not for long enough to be sure."""
        return self.validation.lower < target <= self.validation.speedup

    def settles(self, target: float) -> bool:
        """Whether the target is met, and not by much more than was asked for."""
        return target <= self.validation.lower <= target * (1 + OVERSHOOT)

    def is_promising(self, target: float) -> bool:
        """Whether it may be the one to keep."""
        return self.settles(target) or self.is_unsure(target)

    def to_json(self) -> dict[str, float]:
        return {
            "aim_speedup": self.profile.table_target,
            "predicted_speedup": self.profile.predicted_speedup,
            "loss": self.profile.loss,
            "measured_speedup": self.validation.speedup,
            "measured_speedup_lower": self.validation.lower,
        }


@dataclass(frozen=True)
class Outcome(Generic[M]):
    """How it ended.

    Attributes:
        kept: the attempt that is deployed: the one of least loss among those that meet the target; if none does,
            the one with the highest lower bound. Where it was chosen among several measurements, its validation is
            one that was made afterwards.
        attempts: all of them, in order, each with its last measurement.
        exhausted: there was nothing faster left to try.
    """

    kept: Attempt[M]
    attempts: tuple[Attempt[M], ...]
    exhausted: bool

    def missed(self, target: float) -> str | None:
        """Why the target is out of reach, in one line; None when it was met, or missed by noise only."""
        if not self.exhausted or self.kept.meets(target):
            return None
        found = self.kept.validation
        return (
            f"a speedup of {target:g} was not reached: the fastest profile measured {found.speedup:.3f} "
            f"({found.lower:.3f} to {found.upper:.3f}), and by the latency table there is nothing faster; it is "
            "deployed all the same; lower --speedup or raise --batch"
        )

    def measured_again(self, validation: M) -> Outcome[M]:
        """The same for what was deployed in the end, where that may have another speed than what was tried."""
        kept = Attempt(self.kept.profile, validation)
        return Outcome(kept, tuple(kept if one is self.kept else one for one in self.attempts), self.exhausted)


class TargetMissed(OnnxSpdyError, ValueError):
    """Everything was tried and measured, and the target is out of reach."""


def meet_target(
    target: float,
    first: Profile,
    search: Callable[[float], Profile],
    deploy_and_measure: Callable[[Profile], M],
    attempts: int = ATTEMPTS,
    predicted: Callable[[Profile], float] = lambda profile: profile.predicted_speedup,
) -> Outcome[M]:
    """Deploy, measure and search anew until the measured lower bound meets the target without much overshoot.

    What looks best after several looks was lucky, more likely than not. So unless the very first look settles it, what
    is kept is measured afresh, and only that counts; where it misses the target then, the search goes on.

    Args:
        target: speedup to meet.
        first: the search's profile, for the target by the table.
        search: a speedup by the table -> the profile for it, or for the highest that the table knows, which is
            then what its `table_target` says.
        deploy_and_measure: a profile -> what it measures.
        attempts: profiles that are tried, at most.
        predicted: a profile -> its speedup by the table, as it is by now.
    Returns:
        The outcome, whose `kept` is the last one that was deployed.
    """

    def afresh(one: Attempt[M]) -> Attempt[M]:
        found = Attempt(one.profile, deploy_and_measure(one.profile))
        if not found.is_unsure(target):
            return found
        return Attempt(one.profile, found.validation.with_more(deploy_and_measure(one.profile)))

    tried = [Attempt(first, deploy_and_measure(first))]
    if tried[0].settles(target):
        return Outcome(tried[0], (tried[0],), exhausted=False)
    while True:
        following, exhausted = None, False
        if len(tried) < attempts and not tried[-1].is_promising(target):
            following, exhausted = _next_profile(tried, tried[-1], target, search, predicted)
        if following is None:
            place = -1 if tried[-1].is_promising(target) else _best(tried, target)
            kept = tried[place] = afresh(tried[place])
            if not kept.meets(target) and not exhausted and len(tried) < attempts:
                following, exhausted = _next_profile(tried, kept, target, search, predicted)
        if following is None:
            if not kept.meets(target) and tried[best := _best(tried, target)] is not kept:
                kept = tried[best] = afresh(tried[best])
            return Outcome(kept, tuple(tried), exhausted)
        tried.append(Attempt(following, deploy_and_measure(following)))


def _next_profile(
    tried: Sequence[Attempt[M]],
    last: Attempt[M],
    target: float,
    search: Callable[[float], Profile],
    predicted: Callable[[Profile], float],
) -> tuple[Profile | None, bool]:
    """A profile that wasn't tried yet, and whether there is none because there is nothing faster.

    Args:
        last: the one of them that was measured last.
    """
    wanted = _next_table_target(tried, last, target, predicted)
    try:
        found = search(wanted)
        while not last.meets(target) and found.levels == last.profile.levels and found.table_target >= wanted:
            wanted *= 1 + MARGIN
            found = search(wanted)
    except InfeasibleTarget:
        return None, True
    if any(found.levels == one.profile.levels for one in tried):
        return None, found.table_target < wanted
    return found, False


def _next_table_target(
    tried: Sequence[Attempt[M]], last: Attempt[M], target: float, predicted: Callable[[Profile], float]
) -> float:
    """The speedup by the table that measures the target, if the table is wrong by the same factor as the last time.

    It isn't where a layer changes its kernel, so what was tried before bounds the answer: between a profile that missed
    and a faster one that met the target, the middle is next.
    """
    # From what the table says of the profile itself: where steps are coarse that is more than was asked for.
    wanted = predicted(last.profile) * target * (1 + MARGIN) / last.validation.lower
    missed = max((predicted(one.profile) for one in tried if not one.meets(target)), default=0.0)
    met = min((predicted(one.profile) for one in tried if one.meets(target)), default=math.inf)
    return math.sqrt(missed * met) if missed < met < math.inf and not missed < wanted < met else wanted


def _best(tried: Sequence[Attempt[M]], target: float) -> int:
    """The place of the one of least loss among those that meet the target; else of the highest lower bound."""
    meeting = [place for place, one in enumerate(tried) if one.meets(target)]
    if meeting:
        return min(meeting, key=lambda place: tried[place].profile.loss)
    return max(range(len(tried)), key=lambda place: tried[place].validation.lower)
