"""Magnitude of units: those that their consumers weigh least go, the other weights stay. The yardstick."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from onnx_spdy.pipeline.database.pruners.units import Consumer


def magnitude_units(
    consumers: Sequence[Consumer], widths: Sequence[int]
) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """See `UnitPruner`; the Hessians aren't used. A consumer's squared weights count relative to all that it has."""
    share = torch.zeros(len(consumers[0].columns), dtype=torch.float64)
    for one in consumers:
        power = one.weight.flatten(1).double().square().sum(0)  # (d,)
        share += torch.stack([power[columns].sum() for columns in one.columns]) / power.sum().clamp_min(1e-300)
    order = share.sort(descending=True, stable=True).indices
    for width in widths:
        weights = [one.weight.clone() for one in consumers]
        for one, weight in zip(consumers, weights, strict=True):
            weight.flatten(1)[:, torch.cat([one.columns[unit] for unit in order[width:]])] = 0.0
        yield order[:width].sort().values, weights
