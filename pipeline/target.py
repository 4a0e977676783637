"""The closed loop: what counts is the measured speedup, so the table's answer is measured and corrected.

A latency table is off by some percent for a whole network: layers interact, and engines merge them. The
profile that the search found is therefore deployed and measured. Where its lower confidence bound misses the
target, the next profile aims higher by as much; where it overshoots, the slack goes back to accuracy. Where the speedup
is there and only its lower bound isn't, it is measured longer first: that takes less than another profile, and wide
bounds say little of how much higher to aim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.solve import InfeasibleTarget
from onnx_spdy.pipeline.validate import Validation

ATTEMPTS = 4
OVERSHOOT = 0.03  # of the target: more is given back
MARGIN = 0.01  # aimed at above the target, so that noise doesn't cost another attempt


@dataclass(frozen=True)
class Attempt:
    """A profile and what it measured."""

    profile: Profile
    validation: Validation

    def meets(self, target: float) -> bool:
        """Whether the measured lower bound is at or above the target."""
        return self.validation.lower >= target

    def is_unsure(self, target: float) -> bool:
        """Whether the target was measured, but not for long enough to be sure."""
        return self.validation.lower < target <= self.validation.speedup

    def to_json(self) -> dict[str, float]:
        return {
            "aim_speedup": self.profile.aim_speedup,
            "predicted_speedup": self.profile.predicted_speedup,
            "loss": self.profile.loss,
            "measured_speedup": self.validation.speedup,
            "measured_speedup_lower": self.validation.lower,
        }


@dataclass(frozen=True)
class Outcome:
    """How the loop ended.

    Attributes:
        kept: the attempt that is deployed: the one of least loss among those that meet the target; if none does,
            the one with the highest lower bound.
        attempts: all of them, in order.
        exhausted: there was nothing faster left to try.
    """

    kept: Attempt
    attempts: tuple[Attempt, ...]
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


class TargetMissed(ValueError):
    """Everything was tried and measured, and the target is out of reach."""


def reach(
    target: float,
    first: Profile,
    resolve: Callable[[float], Profile],
    realise: Callable[[Profile], Validation],
    attempts: int = ATTEMPTS,
) -> Outcome:
    """Deploy, measure and aim again until the measured lower bound meets the target without much overshoot.

    Args:
        target: speedup to reach.
        first: the search's profile, which aims at the target by the table.
        resolve: a speedup by the table -> the profile for it, or for the highest that the table knows, which is
            then what its `aim_speedup` says.
        realise: deploys a profile and measures it.
        attempts: at most.
    Returns:
        The outcome, whose `kept` is the last one that `realise` was called with.
    """

    def measured_longer(one: Attempt) -> Attempt:
        return Attempt(one.profile, one.validation.with_more(realise(one.profile)))

    exhausted = False
    tried: list[Attempt] = []
    profile = first
    while True:
        tried.append(Attempt(profile, realise(profile)))
        if tried[-1].is_unsure(target):
            tried[-1] = measured_longer(tried[-1])
        lower = tried[-1].validation.lower
        if len(tried) == attempts or target <= lower <= target * (1 + OVERSHOOT):
            break
        wanted = _next_aim(tried, target)
        try:
            following = resolve(wanted)
            while lower < target and following.levels == profile.levels and following.aim_speedup >= wanted:
                wanted *= 1 + MARGIN
                following = resolve(wanted)
        except InfeasibleTarget:
            exhausted = True
            break
        if any(following.levels == one.profile.levels for one in tried):
            exhausted = following.aim_speedup < wanted
            break
        profile = following
    best = _best(tried, target)
    if best is not tried[-1]:
        # Measured again, and judged by both: it was chosen among several, perhaps for its luck.
        best = measured_longer(best)
    return Outcome(best, tuple(tried), exhausted)


def _next_aim(tried: Sequence[Attempt], target: float) -> float:
    """The speedup by the table that measures the target, if the table is wrong by the same factor as the last time.

    It isn't where a layer changes its kernel, so what was tried before bounds the answer: between a profile that missed
    and a faster one that met the target, the middle is next.
    """
    # From what the table says of the profile itself: where steps are coarse that is more than was aimed at.
    last = tried[-1]
    wanted = last.profile.predicted_speedup * target * (1 + MARGIN) / last.validation.lower
    missed = max((one.profile.predicted_speedup for one in tried if not one.meets(target)), default=0.0)
    met = min((one.profile.predicted_speedup for one in tried if one.meets(target)), default=math.inf)
    return math.sqrt(missed * met) if missed < met < math.inf and not missed < wanted < met else wanted


def _best(tried: Sequence[Attempt], target: float) -> Attempt:
    meeting = [one for one in tried if one.meets(target)]
    if meeting:
        return min(meeting, key=lambda one: one.profile.loss)
    return max(tried, key=lambda one: one.validation.lower)
