"""The closed loop: what counts is the measured speedup, so the table's answer is measured and corrected.

A latency table is off by some percent for a whole network: layers interact, and engines merge them. The
profile that the search found is therefore deployed and measured. Where its lower confidence bound misses the
target, the next profile aims higher by as much; where it overshoots, the slack goes back to accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnx_spdy.pipeline.latency import NoSpeedup
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.solve import InfeasibleTarget
from onnx_spdy.pipeline.validate import Validation

ATTEMPTS = 6
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

    def to_json(self) -> dict[str, float]:
        return {
            "aim_speedup": self.profile.aim_speedup,
            "predicted_speedup": self.profile.predicted_speedup,
            "loss": self.profile.loss,
            "measured_speedup": self.validation.speedup,
            "measured_speedup_lower": self.validation.lower,
        }


def reach(
    target: float,
    first: Profile,
    resolve: Callable[[float], Profile],
    realise: Callable[[Profile], Validation],
    attempts: int = ATTEMPTS,
) -> tuple[Attempt, list[Attempt]]:
    """Deploy, measure and aim again until the measured lower bound meets the target without much overshoot.

    Args:
        target: speedup to reach.
        first: the search's profile, which aims at the target by the table.
        resolve: a speedup by the table -> the profile for it.
        realise: deploys a profile and measures it.
        attempts: at most.
    Returns:
        (the attempt to keep, all attempts). Kept is the one of least loss among those that meet the target; if none
        does, the one with the highest lower bound. It is the last one that `realise` was called with.
    """
    tried: list[Attempt] = []
    profile = first
    while True:
        tried.append(Attempt(profile, realise(profile)))
        lower = tried[-1].validation.lower
        if len(tried) == attempts or target <= lower <= target * (1 + OVERSHOOT):
            break
        try:
            following = resolve(profile.aim_speedup * target * (1 + MARGIN) / lower)
        except (NoSpeedup, InfeasibleTarget):
            break  # by the table there is nothing faster
        if any(following.levels == one.profile.levels for one in tried):
            break
        profile = following
    best = _best(tried, target)
    if best is not tried[-1]:
        realise(best.profile)
    return best, tried


def _best(tried: Sequence[Attempt], target: float) -> Attempt:
    meeting = [one for one in tried if one.meets(target)]
    if meeting:
        return min(meeting, key=lambda one: one.profile.loss)
    return max(tried, key=lambda one: one.validation.lower)
