"""Stitching: a profile's weights from the database make a pruned network, corrected where that is better.

Widths are zeros for what is missing, as in a network of whole width, until here, where the units are cut out.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from onnx_spdy.models import Layer
from onnx_spdy.pipeline.artifact import check_same
from onnx_spdy.pipeline.correct import NotCorrected, StatisticsCorrection
from onnx_spdy.pipeline.data import Samples
from onnx_spdy.pipeline.database.layer_database import LayerDatabase
from onnx_spdy.pipeline.level import DENSE, Level, mixes_precisions
from onnx_spdy.pipeline.loss import Loss, LossError
from onnx_spdy.pipeline.network import Network, PrunedNetwork, Weights
from onnx_spdy.pipeline.objective import Objective
from onnx_spdy.pipeline.profile import Profile
from onnx_spdy.pipeline.site import find_sites
from onnx_spdy.pipeline.widths import cut_out

CORRECTED = "mean and variance of each pruned layer's output channels"
JUDGED_SAMPLES = 128
WEIGHTS_BYTES = 512 << 20  # unpacked weights that are kept for the next profile


class Stitcher:
    """Gives the weights of profiles; those that were used last are kept unpacked.

    Args:
        network, database: the database was made for this network.
    Attributes:
        sites: what a level is chosen for, in the order of the database.
    """

    def __init__(self, network: Network, database: LayerDatabase) -> None:
        self.network, self.database = network, database
        self.sites = find_sites(network.prepared, database.levels)
        self._unpacked: OrderedDict[tuple[int, Level], Weights] = OrderedDict()  # last used last
        self._unpacked_bytes = 0

    def weights(self, levels: Sequence[Level]) -> Weights:
        """The weights of the network whose sites are at these levels; dense ones are left out.

        Where several groups feed one layer, side by side, what each of them changes there is added up.
        """
        found: dict[str, torch.Tensor] = {}
        for number, level in enumerate(levels):
            if not self.sites[number].changes(level):
                continue
            for name, values in self._of(number, level).items():
                found[name] = values if name not in found else _both(found[name], values, self.network.dense(name))
        return found

    def weights_when_asked(self, levels: Sequence[Level]) -> Weights:
        """The same without widths, each read when it is asked for, so that they are never in memory together."""
        chosen = {
            site.layers[0].weight: (number, level)
            for number, (site, level) in enumerate(zip(self.sites, levels, strict=True))
            if site.changes(level)
        }
        return _WhenAsked(chosen, lambda number, level: self.database.weights(self.network, self.sites[number], level))

    def changed(self, levels: Mapping[str, Level]) -> tuple[Layer, ...]:
        """The layers whose weights differ from the dense ones, in graph order."""
        changed = [layer for site in self.sites if site.changes(levels.get(site.name, DENSE)) for layer in site.layers]
        return tuple(sorted(dict.fromkeys(changed), key=lambda layer: self.network.graph.step_of(layer.name)))

    def widths(self, levels: Mapping[str, Level]) -> dict[str, tuple[int, ...]]:
        """The units that stay in each group that has fewer of them at its level."""
        kept = {site: self.database.kept(site, levels[site.name]) for site in self.sites if site.group is not None}
        return {site.name: units for site, units in kept.items() if site.group and len(units) < site.group.units}

    def _of(self, number: int, level: Level) -> Weights:
        key = number, level
        if key in self._unpacked:
            self._unpacked.move_to_end(key)
            return self._unpacked[key]
        weights = self.database.weights(self.network, self.sites[number], level)
        self._unpacked[key] = weights
        self._unpacked_bytes += _bytes(weights)
        while self._unpacked_bytes > WEIGHTS_BYTES:
            self._unpacked_bytes -= _bytes(self._unpacked.popitem(last=False)[1])
        return weights


def _both(one: torch.Tensor, other: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """A weight from which two groups took units: the sum of the changes, with the zeros of both."""
    return (one + (other - dense)).masked_fill_((one == 0) | (other == 0), 0.0)


def _bytes(weights: Weights) -> int:
    return sum(values.nbytes for values in weights.values())


class _WhenAsked(Mapping[str, torch.Tensor]):
    """Weights that are read from the database each time that one is asked for."""

    def __init__(self, chosen: Mapping[str, tuple[int, Level]], read: Callable[[int, Level], Weights]) -> None:
        self._chosen, self._read = chosen, read

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read(*self._chosen[name])[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._chosen)

    def __len__(self) -> int:
        return len(self._chosen)


class CorrectedStitcher:
    """Makes pruned networks of profiles, corrected where that is better.

    Networks without normalisation of their own lose much without the correction, others gain nothing from it (ResNet-18
    at 3x: top-1 58 without, 80 with it; MiniLM at 87 % sparsity: Spearman 90.1 and 89.7), so the loss decides, of the
    last `JUDGED_SAMPLES` calibration samples.

    Args:
        stitcher: of the network and database that the profiles are for; what it keeps unpacked serves a search as well.
        samples: calibration samples for the correction of statistics, or None for none.
        loss: see `Objective`.
    """

    def __init__(self, stitcher: Stitcher, samples: Samples | None, loss: str | Loss | None = None) -> None:
        self._stitcher, self._samples = stitcher, samples
        self._network = network = stitcher.network
        self._correction: StatisticsCorrection | None = None
        self._uncorrected = "not applied: no data was given"
        if samples is not None:
            try:
                # Those too small for zeros can lose units all the same.
                layers = [*dict.fromkeys(layer for site in stitcher.sites for layer in site.layers)]
                self._correction = StatisticsCorrection(network, samples, layers)
                judged = network.last(samples, JUDGED_SAMPLES)
                self._judge = Objective(network, judged, loss, corrected=False)
            except NotCorrected as exc:
                self._uncorrected = f"not applied: {exc}"

    def stitch(self, profile: Profile) -> PrunedNetwork:
        """The pruned network of a profile.

        Raises:
            ArtifactError: the profile belongs to another network.
        """
        database = self._stitcher.database
        check_same(
            database.folder,
            {
                "model_sha256": (profile.made_from["model_sha256"], self._network.sha256),
                "layers": ([*profile.levels], [site.name for site in self._stitcher.sites]),
                "pruner": (profile.made_from["pruner"], database.made_from["pruner"]),
                "data_sha256": (profile.made_from["database_data_sha256"], database.made_from["data_sha256"]),
            },
        )
        return self.stitch_levels(profile.levels)

    def stitch_levels(self, levels: Mapping[str, Level]) -> PrunedNetwork:
        """The same for levels that nobody searched.

        Args:
            levels: of each site of the database, by name.
        Raises:
            ArtifactError: the database belongs to another network.
        """
        stitcher, database = self._stitcher, self._stitcher.database
        check_same(database.folder, {"model_sha256": (database.made_from["model_sha256"], self._network.sha256)})
        if mixes_precisions(database.levels):  # weights are rounded, and biases corrected, when it is written
            return PrunedNetwork(self._network.prepared, {}, levels)
        layers = stitcher.changed(levels)
        chosen = [*levels.values()]
        eager = self._correction is not None or any(level.is_width for level in chosen)
        plain = stitcher.weights(chosen) if eager else stitcher.weights_when_asked(chosen)
        weights, corrected = plain, self._uncorrected
        if self._correction is not None:
            weights = self._correction.apply(plain, layers)
            corrected = CORRECTED
            if self._loss(weights) > self._loss(plain):
                weights, corrected = plain, "not applied: the calibration loss is lower without it"
        pruned = PrunedNetwork(self._network.prepared, weights, levels, layers, corrected=corrected)
        widths = stitcher.widths(levels)
        return cut_out(pruned, widths, self._samples) if widths else pruned

    def _loss(self, weights: Weights) -> float:
        try:
            return self._judge(weights)
        except LossError:  # of a network that is pruned beyond use; the correction may bring it back
            return math.inf
