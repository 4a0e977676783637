"""A model of the network's loss that learns from every profile that was scored.

    log loss(profile) = offset[stage] + power * log sum over layers l of factor_l * d(l, level_l) ^ (1 + bend_l)

d are additive errors: what each layer costs at each level when it alone is compressed. Layers that hurt each other
more or less than that are corrected by the factors, and layers that hurt sooner or later than by the database by the
bends (around the level where each was scored alone, so that both are nearly independent). Factors (as logarithms),
bends, power and offsets have normal priors, and their posterior is the Laplace approximation: a few Gauss-Newton steps,
each a ridge regression. A loss on few samples is believed less than one on many: its variance is inversely
proportional to their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_spdy.pipeline.search.methods.problem import Seen

FACTOR_SPREAD = 1.0  # prior standard deviation of a factor's logarithm
BEND_SPREAD = 0.2
POWER_SPREAD = 0.3
OFFSET_SPREAD = 3.0
NOISE = 0.005, 0.3  # least and most of the logarithm of a loss on all samples that the model is believed not to explain
MOST = 20.0  # of the logarithm of what an error is multiplied by
LEAST_SHARE = 0.01  # of the median loss: less counts as this much, where the loss can be below the dense network's
TINY = 1e-12  # additive errors that count as none
STEPS = 6
FURTHEST = 1.0  # largest step of a parameter in one of the `STEPS`


@dataclass(frozen=True)
class Posterior:
    """What the model knows of the layers.

    Attributes:
        mean: (2 * layers,) logarithms of the factors, then the bends.
        root: (2 * layers, 2 * layers), its product with independent standard normal numbers has their covariance.
        relative: (layers, levels) log d, relative to the level around which the bends turn.
        noise: standard deviation of log loss that is left unexplained, on the most samples.
    """

    mean: np.ndarray
    root: np.ndarray
    relative: np.ndarray
    noise: float

    def likeliest(self) -> np.ndarray:
        """(layers, levels) logarithms of what the additive errors are to be multiplied by."""
        return self._logs(self.mean)

    def draw(self, rng: np.random.Generator, width: float = 1.0) -> np.ndarray:
        """(layers, levels) the same as it might be; `width` is in terms of the posterior's spread."""
        return self._logs(self.mean + width * (self.root @ rng.standard_normal(len(self.mean))))

    def _logs(self, parameters: np.ndarray) -> np.ndarray:
        factors, bends = parameters.reshape(2, -1, 1)
        return np.clip(factors + bends * self.relative, -MOST, MOST)


def fit(additive: np.ndarray, seen: Sequence[Seen], pivot: int) -> Posterior:
    """The posterior of factors and bends.

    Args:
        additive: (layers, levels), d above, > 0 where a layer is compressed.
        seen: profiles with their loss above the dense network's.
        pivot: index of the level around which the bends turn.
    """
    layers = len(additive)
    stages = sorted({one.samples for one in seen})
    own = 2 * layers
    spread = np.r_[np.full(layers, FACTOR_SPREAD), np.full(layers, BEND_SPREAD)]
    precision = np.r_[spread, POWER_SPREAD, np.full(len(stages), OFFSET_SPREAD)] ** -2.0
    parameters = np.zeros(len(precision))
    logs_of_errors = np.log(np.maximum(additive, TINY))
    relative = np.where(additive > TINY, logs_of_errors - logs_of_errors[:, [pivot]], 0.0)
    if not seen:
        return Posterior(parameters[:own], np.diag(spread), relative, NOISE[1])
    rows, choices = np.arange(layers), np.array([one.choice for one in seen])
    parts = additive[rows, choices] + TINY  # (profiles, layers)
    levels = relative[rows, choices]
    losses = np.array([one.loss for one in seen])
    logs = np.log(np.maximum(losses, max(LEAST_SHARE * float(np.median(losses)), TINY)))
    stage = np.array([stages.index(one.samples) for one in seen])
    trust = np.sqrt(np.array([one.samples for one in seen]) / stages[-1])
    centre = float(np.log(parts.sum(axis=1)).mean())  # so that power and offsets are nearly independent
    parameters[own + 1 :] = [logs[stage == number].mean() for number in range(len(stages))]
    prior = parameters.copy()
    noise = NOISE[1]
    for _ in range(STEPS):
        weighted = parts * np.exp(np.clip(parameters[:layers] + parameters[layers:own] * levels, -MOST, MOST))
        total = weighted.sum(axis=1)
        size = np.log(total) - centre
        power = 1 + parameters[own]
        residual = trust * (logs - (parameters[own + 1 :][stage] + power * size))
        shares = power * weighted / total[:, None]
        jacobian = np.zeros((len(seen), len(parameters)))
        jacobian[:, :layers] = shares
        jacobian[:, layers:own] = shares * levels
        jacobian[:, own] = size
        jacobian[np.arange(len(seen)), own + 1 + stage] = 1
        jacobian *= trust[:, None]
        information = jacobian.T @ jacobian
        noise = _noise(information, np.diag(precision), residual, noise)
        hessian = information / noise**2 + np.diag(precision)
        gradient = jacobian.T @ residual / noise**2 - precision * (parameters - prior)
        parameters = parameters + np.clip(np.linalg.solve(hessian, gradient), -FURTHEST, FURTHEST)
    covariance = np.linalg.inv(hessian)[:own, :own]
    return Posterior(parameters[:own], np.linalg.cholesky(covariance + 1e-12 * np.eye(own)), relative, noise)


def _noise(information: np.ndarray, precision: np.ndarray, residual: np.ndarray, noise: float) -> float:
    """The noise that residuals tell of, some of which the parameters took up already.

    Source: MacKay, Bayesian Interpolation (1992), section 4: the number of well-determined parameters.
    """
    determined = np.trace(np.linalg.solve(information + noise**2 * precision, information))
    left = max(len(residual) - float(determined), 0.1 * len(residual))
    return float(np.clip(np.sqrt(residual @ residual / left), *NOISE))
