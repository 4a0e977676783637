"""Levels of width: networks that lack some units of their groups, in floating point or in int8."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onnx_spdy.models import Prepared, narrowed, save_model
from onnx_spdy.pipeline.latency.equations import Fit, Trial
from onnx_spdy.pipeline.latency.fit_widths import fit_widths
from onnx_spdy.pipeline.latency.in_int8 import InInt8
from onnx_spdy.pipeline.latency.kind import Profile
from onnx_spdy.pipeline.latency.places import Places
from onnx_spdy.pipeline.latency.sampling import plan_networks
from onnx_spdy.pipeline.level import Level
from onnx_spdy.pipeline.site import find_sites
from onnx_spdy.runtimes import LayerTime

GONE = 0.15  # share of the networks without a branch, of each of them


class Widths:
    """Each group keeps some of its units; see `Kind`. Which of them makes no difference in time."""

    def __init__(self, network: Prepared, levels: Sequence[Level], in_int8: InInt8 | None = None) -> None:
        self._network, self._levels, self._sites = network, tuple(levels), find_sites(network, levels)
        self._in_int8 = in_int8
        self._places = Places.of(network.proto.graph, self._sites)
        self._kept = np.array([[site.kept(level) for level in levels] for site in self._sites])  # (sites, levels)
        self.kernels: tuple[tuple[str, ...], ...] = ()
        self.names = tuple(site.name for site in self._sites)

    def look(self, rows: Sequence[LayerTime], profile: Profile, dense: Path) -> bool:
        """Every engine is faster with fewer units. As its kernel counts, at every level, the one that takes longest."""
        if self._in_int8 is not None:  # which has other kernels
            own = dense.with_name("int8.onnx")
            rows = profile(self.network([0] * len(self._sites), 0, dense, own)[0], {}, 0)
        longest: dict[int, LayerTime] = {}
        for row in rows:
            for site in self.works_on(row):
                if site not in longest or row.seconds > longest[site].seconds:
                    longest[site] = row
        names = [longest[site].kernel if site in longest else "none of its own" for site in range(len(self._sites))]
        self.kernels = tuple((name,) * len(self._levels) for name in names)
        return True

    def works_on(self, row: LayerTime) -> tuple[int, ...]:
        """Indices of the groups whose units the tensors in a row have, or are made of."""
        return tuple(sorted({site for name in row.outputs for site in self._places.sites.get(name, ())}))

    def plan(self, rng: np.random.Generator) -> np.ndarray:
        """(networks, sites) level indices of the networks to measure."""
        plan = plan_networks(np.ones_like(self._kept, bool), self._levels, rng)
        mixed = np.flatnonzero(plan.any(axis=1))
        for site in np.flatnonzero((self._kept == 0).any(axis=1)):
            gone = rng.permutation(mixed)[: round(GONE * len(mixed))]
            plan[gone, site] = len(self._levels) - 1
        return plan

    def network(self, choice: Sequence[int], seed: int, dense: Path, own: Path) -> tuple[Path, dict[str, float]]:
        """A narrower file, one in int8, or the dense one."""
        keep = {
            site.name: range(kept[level])
            for site, kept, level in zip(self._sites, self._kept, choice, strict=True)
            if kept[level] < kept[0]
        }
        if not keep and self._in_int8 is None:
            return dense, {}
        model = narrowed(self._network, keep) if keep else self._network.proto
        save_model(self._in_int8.written(model) if self._in_int8 else model, own)
        return own, {}

    def fit(self, trials: Sequence[Trial], dense_seconds: float) -> Fit:
        """See `fit_widths`."""
        kept, is_dense = self._kept / self._kept[:, :1], self._in_int8 is None
        return fit_widths(trials, self._places, kept, dense_seconds, first_is_dense=is_dense)
