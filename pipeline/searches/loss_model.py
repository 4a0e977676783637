"""A model of the network's loss that learns from every profile that was scored.

    log loss(profile) = offset[stage] + power * log sum over layers l of factor_l * d(l, level_l)

d are additive errors: what each layer costs at each level when it alone is compressed. Layers that hurt each other
more or less than that are corrected by the factors. Factors (as logarithms), power and offsets have normal priors, and
their posterior is the Laplace approximation: a few Gauss-Newton steps, each a ridge regression.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnx_spdy.pipeline.searches.problem import Seen

FACTOR_SPREAD = 0.7  # prior standard deviation of a factor's logarithm
POWER_SPREAD = 0.3
OFFSET_SPREAD = 3.0
LEAST_NOISE = 0.02  # of the logarithm of a loss: what the model can't explain even where it has much to learn from
STEPS = 4
FURTHEST = 1.0  # largest step of a parameter in one of the `STEPS`


@dataclass(frozen=True)
class Posterior:
    """What the model knows of the layers' factors.

    Attributes:
        mean: (layers,) logarithms of the factors.
        root: (layers, layers), its product with independent standard normal numbers has their covariance.
        noise: standard deviation of log loss that is left unexplained.
    """

    mean: np.ndarray
    root: np.ndarray
    noise: float

    def draw(self, rng: np.random.Generator, width: float = 1.0) -> np.ndarray:
        """(layers,) logarithms of factors as they might be; `width` 0 gives the mean."""
        return self.mean + width * (self.root @ rng.standard_normal(len(self.mean)))


def fit(additive: np.ndarray, seen: Sequence[Seen], floor: float) -> Posterior:
    """The posterior of the factors.

    Args:
        additive: (layers, levels), d above, > 0 where a layer is compressed.
        seen: profiles with their loss above the dense network's.
        floor: losses below it count as this much.
    """
    layers = len(additive)
    stages = sorted({one.samples for one in seen})
    width = layers + 1 + len(stages)
    precision = np.r_[np.full(layers, FACTOR_SPREAD), POWER_SPREAD, np.full(len(stages), OFFSET_SPREAD)] ** -2.0
    parameters = np.zeros(width)
    if not seen:
        return Posterior(parameters[:layers], np.eye(layers) * FACTOR_SPREAD, LEAST_NOISE)
    parts = np.array([additive[np.arange(layers), one.choice] for one in seen]) + 1e-12  # (profiles, layers)
    logs = np.log([max(one.loss, floor) for one in seen])
    stage = np.array([stages.index(one.samples) for one in seen])
    centre = float(np.log(parts.sum(axis=1)).mean())  # so that power and offsets are nearly independent
    parameters[layers + 1 :] = [logs[stage == number].mean() for number in range(len(stages))]
    prior = parameters.copy()
    noise = 0.3
    for _ in range(STEPS):
        weighted = parts * np.exp(parameters[:layers])
        total = weighted.sum(axis=1)
        size = np.log(total) - centre
        residual = logs - (parameters[layers + 1 :][stage] + (1 + parameters[layers]) * size)
        jacobian = np.zeros((len(seen), width))
        jacobian[:, :layers] = (1 + parameters[layers]) * weighted / total[:, None]
        jacobian[:, layers] = size
        jacobian[np.arange(len(seen)), layers + 1 + stage] = 1
        noise = max(LEAST_NOISE, min(noise, float(np.sqrt(np.mean(residual**2)))))
        hessian = jacobian.T @ jacobian / noise**2 + np.diag(precision)
        gradient = jacobian.T @ residual / noise**2 - precision * (parameters - prior)
        parameters = parameters + np.clip(np.linalg.solve(hessian, gradient), -FURTHEST, FURTHEST)
    # H = C C^T, so C^-T z has covariance H^-1; its first rows are the factors'.
    root = np.linalg.inv(np.linalg.cholesky(hessian)).T
    covariance = (root @ root.T)[:layers, :layers]
    return Posterior(parameters[:layers], np.linalg.cholesky(covariance + 1e-12 * np.eye(layers)), noise)
