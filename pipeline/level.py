"""Compression levels: how a layer's weights may be compressed, as one comparable value with one spelling.

dense                    nothing is removed
unstructured@0.8700      87 % of the weights are zero, anywhere
block4@0.9000            zeros come in runs of 4 consecutive input channels
blockout4@0.9000         zeros are shared by 4 consecutive output channels; 2 and 8 likewise
2:4, 4:8, 1:4            at most N non-zeros in every M consecutive input channels
channels@0.2500          a quarter of a group's units (channels, feed-forward units, heads) is removed; see `Site.kept`
channels@1.0000          all of them, and the residual branch that they are in; of what is no branch as few as may stay
int8                     nothing is removed, and the layer, or the network of these widths, computes in int8
channels@0.2500+int8     both
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onnx_spdy.runtimes.errors import OnnxSpdyError

LOWEST_SPARSITY = 0.40
HIGHEST_SPARSITY = 0.99
SPARSE_LEVELS = 41
WIDTH_LEVELS = 40
CHANNELS = "channels"
INT8 = "int8"
NARROW_INT8 = f"{CHANNELS}+{INT8}"
WIDTHS = (CHANNELS, NARROW_INT8)  # patterns of groups of units
WHOLE = ("dense", INT8)  # patterns in which nothing is removed
BLOCKS = {  # pattern -> consecutive (output channels, input channels) that are zero together
    "unstructured": (1, 1), "block4": (1, 4), "blockout2": (2, 1), "blockout4": (4, 1), "blockout8": (8, 1),
}  # fmt: skip
GRADED = (*BLOCKS, *WIDTHS)  # patterns with a sparsity of their choice

_N_OF_M = re.compile(r"(\d+):(\d+)")


class LevelError(OnnxSpdyError, ValueError):
    """No such pattern or level."""


@dataclass(frozen=True)
class Level:
    """One compression level of a layer. Ordered by sparsity within a list; `str` and `parse` are exact inverses.

    Attributes:
        pattern: "dense", "int8", one of `BLOCKS`, "N:M", "channels" or "channels+int8".
        sparsity: fraction of zeros, in [0, 1), or of units that are removed, in [0, 1], to 4 decimals.
    """

    pattern: str
    sparsity: float

    def __post_init__(self) -> None:
        shape = _N_OF_M.fullmatch(self.pattern)
        if shape:
            kept, group = int(shape[1]), int(shape[2])
            if not 0 < kept < group or self.sparsity != round(1 - kept / group, 4):
                raise LevelError(f"level {self.pattern!r} keeps {kept} of {group}; N:M needs 0 < N < M")
        elif self.pattern not in (*WHOLE, *GRADED):
            raise LevelError(f"unknown pattern {self.pattern!r}; known: dense, {', '.join(GRADED)}, N:M such as 2:4")
        elif (self.sparsity == 0) != (self.pattern in WHOLE) or not self._fits:
            raise LevelError(f"sparsity {self.sparsity} does not fit pattern {self.pattern!r}; use 0 < sparsity < 1")
        if self.sparsity != round(self.sparsity, 4):
            raise LevelError(f"sparsity {self.sparsity} has more than 4 decimals; round it first")

    def __str__(self) -> str:
        removed, plus, precision = self.pattern.partition("+")
        return f"{removed}@{self.sparsity:.4f}{plus}{precision}" if self.pattern in GRADED else self.pattern

    @classmethod
    def parse(cls, text: str) -> Level:
        """The level that `str` wrote.

        Raises:
            LevelError: the text names no level; the message says which it was.
        """
        if shape := _N_OF_M.fullmatch(text):
            if not int(shape[2]):
                raise LevelError(f"level {text!r} has groups of 0 weights; write N:M such as 2:4")
            return cls(text, round(1 - int(shape[1]) / int(shape[2]), 4))
        removed, plus, precision = text.partition("+")
        pattern, at, sparsity = removed.partition("@")
        try:
            return cls(pattern + plus + precision, round(float(sparsity), 4) if at else 0.0)
        except ValueError as exc:
            raise LevelError(f"{text!r} is not a level ({exc}); write dense, unstructured@0.8700 or 2:4") from exc

    @property
    def _fits(self) -> bool:
        return 0 <= self.sparsity < 1 or (self.is_width and self.sparsity == 1)

    @property
    def block(self) -> tuple[int, int]:
        """Consecutive (output channels, input channels) that are zero together; N:M has single weights."""
        return BLOCKS.get(self.pattern, (1, 1))

    @property
    def group(self) -> tuple[int, int]:
        """(N, M) of an N:M pattern: at most N non-zeros in every M consecutive input channels."""
        kept, _, group = self.pattern.partition(":")
        return int(kept), int(group)

    @property
    def is_n_of_m(self) -> bool:
        return ":" in self.pattern

    @property
    def is_width(self) -> bool:
        """Whether it is for a group of units, which then are missing, and not for the weights of one layer."""
        return self.pattern in WIDTHS

    @property
    def is_int8(self) -> bool:
        """Whether the layer, or the whole network of some width, then computes in int8."""
        return self.pattern in (INT8, NARROW_INT8)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is removed."""
        return self.pattern in WHOLE

    @property
    def is_nothing(self) -> bool:
        """Whether nothing is left, where that can be."""
        return self.sparsity == 1

    def zeros(self, count: int) -> int:
        """How many of `count` weights or blocks this level sets to zero."""
        return round(self.sparsity * count)


DENSE = Level("dense", 0.0)
DEFAULT_PATTERN = "unstructured"


def mixes_precisions(levels: Sequence[Level]) -> bool:
    """Whether each layer is in floating point or in int8, by choice."""
    return any(level.pattern == INT8 for level in levels[1:])


def any_int8(levels: Iterable[Level]) -> bool:
    """Whether something may compute in int8 then."""
    return any(level.is_int8 for level in levels)


def only_zeros(levels: Iterable[Level]) -> bool:
    """Whether no units are removed and nothing is in int8: the graph stays as it is then."""
    return not any(level.is_width or level.is_int8 for level in levels)


def levels_for(pattern: str) -> tuple[Level, ...]:
    """The levels of a search over one or more patterns, the whole network first, then from lowest to highest sparsity.

    Unstructured and block patterns get 41 sparsities from 0.40 to 0.99; each step removes the same
    fraction (9.7 %) of the weights that remain. An N:M pattern is one level, and so is one with its sparsity, such as
    `unstructured@0.5`. Widths get 40, a fortieth apart, the last of nothing; how many units that leaves of a group
    depends on what engines reward, see `Site.kept`. Patterns that are joined by commas, such as `unstructured,2:4`,
    make one list; of levels that are equally sparse those of the pattern that was named first come first. `int8` is the
    choice of each layer's precision.

    Source: Frantar & Alistarh, SPDY (ICML 2022), section 4 (sparsity grid).
    """
    names = [name.strip() for name in pattern.split(",")]
    if len(set(names)) < len(names):
        raise LevelError(f"pattern {pattern!r} names one twice; name each once")
    if {*WIDTHS, INT8} & {*names} and len(names) > 1:
        raise LevelError(
            f"pattern {pattern!r}: widths, int8 and zeros are searched one kind at a time; name one; for zeros in a "
            "narrow network run again on its model.onnx"
        )
    if names == [INT8]:
        return DENSE, Level(INT8, 0.0)
    whole = Level(INT8, 0.0) if NARROW_INT8 in names else DENSE
    return whole, *sorted((level for name in names for level in _levels_of(name)), key=lambda level: level.sparsity)


def _levels_of(pattern: str) -> list[Level]:
    if pattern in WHOLE:
        known = f"{', '.join(GRADED)}, {INT8} or N:M such as 2:4"
        raise LevelError(f"pattern {pattern!r} leaves nothing to choose; use {known}")
    if _N_OF_M.fullmatch(pattern):
        return [Level.parse(pattern)]
    if "@" in pattern:
        level = Level.parse(pattern)
        if level.is_width:
            raise LevelError(f"pattern {pattern!r}: one width alone leaves groups nothing to choose; name the kind")
        return [level]
    if pattern in WIDTHS:
        return [Level(pattern, round(number / WIDTH_LEVELS, 4)) for number in range(1, WIDTH_LEVELS + 1)]
    shrink = (1 - HIGHEST_SPARSITY) / (1 - LOWEST_SPARSITY)
    kept = [(1 - LOWEST_SPARSITY) * shrink ** (i / (SPARSE_LEVELS - 1)) for i in range(SPARSE_LEVELS)]
    return [Level(pattern, round(1 - k, 4)) for k in kept]
