"""How layers are compressed: one value from the command line to the database."""

from __future__ import annotations

from dataclasses import dataclass, field

from onnx_spdy.models.int8.form import OPENVINO, Form
from onnx_spdy.pipeline.database.pruners import DEFAULT_PRUNER, UNIT_PRUNERS, NamedPruner, pruner_named
from onnx_spdy.pipeline.level import DEFAULT_PATTERN, Level, levels_for, mixes_precisions
from onnx_spdy.runtimes.errors import OnnxSpdyError


class SeveralLevels(OnnxSpdyError, ValueError):
    """Layers were to be pruned one after another, and there are several levels that those before may have."""


class NoUnitPruner(OnnxSpdyError, ValueError):
    """A pruner of single weights was asked for widths."""


@dataclass(frozen=True)
class Compression:
    """How layers are compressed.

    Attributes:
        levels: the whole network first, then from lowest to highest sparsity.
        pruner: what compresses a layer to them.
        memory_bytes: of the whole process while the database is built: where the Hessians of all layers don't fit, the
            layers are taken some at a time. None: as many as have 4 GiB of them.
        form: of the engine, where each layer's precision is chosen.
        sequential: whether a layer's Hessian is that of its inputs when all layers before it are pruned, so that it
            makes up for what they lost. There is one level then, besides dense.
            Source: Frantar & Alistarh, SparseGPT (ICML 2023), section 4 (blocks are pruned one after another).
    Raises:
        NoUnitPruner: there are widths among the levels, and the pruner can't choose units.
        SeveralLevels: they are to be pruned one after another, to more than one level.
    """

    levels: tuple[Level, ...] = field(default_factory=lambda: levels_for(DEFAULT_PATTERN))
    pruner: NamedPruner = field(default_factory=lambda: pruner_named(DEFAULT_PRUNER))
    memory_bytes: int | None = None
    form: Form = OPENVINO
    sequential: bool = False

    @property
    def made_by(self) -> str:
        """What makes the weights, in words."""
        if mixes_precisions(self.levels):
            return f"int8 for {self.form.name}"
        return f"{self.pruner.name}, sequential" if self.sequential else self.pruner.name

    def __post_init__(self) -> None:
        if self.pruner.prune_units is None and any(level.is_width for level in self.levels):
            raise NoUnitPruner(
                f"pruner '{self.pruner.name}' prunes single weights and can't choose widths; "
                f"take {' or '.join(UNIT_PRUNERS)}"
            )
        if self.sequential and (len(self.levels) != 2 or self.levels[1].is_whole):
            raise SeveralLevels(
                f"--sequential needs one level of zeros that all layers get, not {len(self.levels) - 1} levels; "
                "name it in --pattern: 2:4, or unstructured@0.5"
            )
