"""Seconds of a network as the solver takes them: a constant, seconds of sites, and products of several."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnx_spdy.pipeline.costs import Product


class Terms:
    """Seconds as a constant, those of each site, and products of several.

    Attributes:
        constant: seconds whatever the choice.
        seconds: (sites, levels).
        products: of two sites or more.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.constant, self.seconds = 0.0, np.zeros(shape)
        self.products: list[Product] = []

    def add(self, factors: Mapping[int, np.ndarray], scale: float = 1.0) -> None:
        """Add so many times the product of a factor (levels,) of each of these sites."""
        if not factors:
            self.constant += scale
        elif len(factors) == 1:
            ((site, factor),) = factors.items()
            self.seconds[site] += scale * factor
        elif scale > 0 and all((factor > 0).any() for factor in factors.values()):
            sites = tuple(sorted(factors))
            product = Product(sites, np.maximum(0.0, [factors[site] for site in sites]))
            self.products.append(product.scaled(scale))
