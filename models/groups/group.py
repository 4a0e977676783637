"""What has to shrink together: the values that `find_groups` returns.

Errors:

    GroupError(ModelError)            a group that doesn't exist or can't shrink, or units that it doesn't have
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from onnx_spdy.models.graph import ModelError

INNER = "inner"
FFN = "ffn"
HEADS = "heads"
RESIDUAL = "residual"
KINDS = (INNER, FFN, HEADS, RESIDUAL)


class GroupError(ModelError):
    """A group that doesn't exist or can't shrink, or units that it doesn't have."""


@dataclass(frozen=True)
class Axis:
    """An axis of a stored tensor on which a group's units lie.

    Attributes:
        initializer: name of the stored tensor.
        axis: number of the axis, from 0.
        role: `out`: it makes the units (rows of a weight); `in`: it takes them in (columns of a weight), so that
            zeros there remove a unit from the network; `between`: a bias, a scale, a depthwise kernel, ...
        indices: (units) for each unit its indices on that axis, ascending; () for a unit that has none there.
    """

    initializer: str
    axis: int
    role: str
    indices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Size:
    """A number elsewhere in the graph that depends on the width: in a Reshape's shape, a Split's sizes, `group`, ...

    Attributes:
        node: name of the node that reads it.
        place: number of the node's input that is a stored tensor, or name of the node's attribute.
        element: which of its values, counted in the flat tensor or list.
        less: (units) by how much it goes down with each unit that is removed; negative where it counts from the end.
    """

    node: str
    place: int | str
    element: int
    less: tuple[int, ...]


@dataclass(frozen=True)
class Branch:
    """What leaves the graph when no unit of a group is kept; see `branch_of`.

    Attributes:
        ends: names of the consumers' nodes, in whose place their biases stand then.
        sums: names of the additions that are left with one operand and a constant.
        gone: names of the tensors that aren't made then, in graph order.
        left: of those that `sums` make, alone or in one kernel with what follows.
        dropped: stored tensors that are zero then, too: the consumers' biases, where nothing before the sum could add
            them instead. An addition that is left there would cost more than it is worth.
    """

    ends: tuple[str, ...]
    sums: tuple[str, ...]
    gone: tuple[str, ...]
    left: tuple[str, ...]
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Axes of stored tensors that must shrink together, and what depends on them.

    Units of a group are interchangeable: each value in the network that has one of them has all. So as long as one is
    kept, nothing becomes empty.

    Attributes:
        name: of its first producer; with the place in brackets where several groups have the same one.
        kind: `inner`: channels between layers; `ffn`: units of a feed-forward block, between matrix products only;
            `heads`: attention heads, where several queries share keys and values those with all their queries;
            `residual`: a width that additions couple.
        units: how many there are.
        axes: of stored tensors, in the order in which the tensors are stored.
        sizes: numbers that hold the width.
        producers: names of the layers whose outputs the units are.
        consumers: names of the layers that take them in.
        values: names of the values inside the network that get narrower.
        skip: why it can't shrink, in words; None if it can.
        branch: what goes when none of its units is kept; None where one has to stay.
    """

    name: str
    kind: str
    units: int
    axes: tuple[Axis, ...]
    sizes: tuple[Size, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    values: tuple[str, ...]
    skip: str | None
    branch: Branch | None = None

    @property
    def prunable(self) -> bool:
        return self.skip is None

    def removed(self, keep: Iterable[int]) -> tuple[int, ...]:
        """The units besides those that are kept, ascending.

        Raises:
            GroupError: the group can't shrink; none is kept of one that is no branch, or one that it doesn't have.
        """
        kept = set(keep)
        if self.skip is not None:
            raise GroupError(f"group '{self.name}' can't shrink: {self.skip}")
        if not kept and self.branch is None:
            raise GroupError(f"none of the {self.units} units of group '{self.name}' is kept: keep at least one")
        if wrong := sorted(kept - set(range(self.units))):
            raise GroupError(f"group '{self.name}' has units 0 to {self.units - 1}, not {wrong[0]}")
        return tuple(unit for unit in range(self.units) if unit not in kept)
