"""Where the units of groups are in a network, and which of its tensors an engine computes together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx

from onnx_spdy.models.groups import Branch
from onnx_spdy.pipeline.latency.equations import Trial
from onnx_spdy.pipeline.site import Site

Sites = frozenset[int]
# Of rows that are one equation: the sites that they depend on, and those in whose branch they are.
Key = tuple[Sites, Sites]
NOWHERE: Key = (frozenset(), frozenset())


@dataclass(frozen=True)
class Places:
    """Where in a network the units of sites are.

    Attributes:
        names: of the tensors that nodes make, in graph order.
        readers: tensor -> those that the nodes make which read it.
        sites: tensor -> indices of the sites whose units the node that makes it reads or makes.
        products: tensor -> pairs of them between which a weight of that node lies, lower index first.
        branches: site -> what goes when nothing of it is kept, of those of which that is so.
        fused: tensor -> the one that it is made from, where it runs in the row of that one if none names it.
    """

    names: tuple[str, ...]
    readers: Mapping[str, tuple[str, ...]]
    sites: Mapping[str, Sites]
    products: Mapping[str, frozenset[tuple[int, int]]]
    branches: Mapping[int, Branch] = field(default_factory=dict)
    fused: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: onnx.GraphProto, sites: Sequence[Site]) -> Places:
        """Those of the groups of these sites."""
        touched: dict[str, set[int]] = {}  # value or stored tensor -> sites
        roles: dict[tuple[str, str], set[int]] = {}  # (stored tensor, role) -> sites
        for number, site in enumerate(sites):
            assert site.group is not None
            for value in site.group.values:
                touched.setdefault(value, set()).add(number)
            for axis in site.group.axes:
                touched.setdefault(axis.initializer, set()).add(number)
                roles.setdefault((axis.initializer, axis.role), set()).add(number)
        names, readers, found, products = [], dict[str, list[str]](), {}, {}
        for node in graph.node:
            outputs = [name for name in node.output if name]
            own = frozenset(one for name in (*node.input, *outputs) for one in touched.get(name, ()))
            pairs = frozenset(
                (min(one, other), max(one, other))
                for name in node.input
                for one in roles.get((name, "in"), ())
                for other in roles.get((name, "out"), ())
                if one != other
            )
            names += outputs
            for name in node.input:
                readers.setdefault(name, []).extend(outputs)
            for name in outputs:
                found[name], products[name] = own, pairs
        branches = {number: site.group.branch for number, site in enumerate(sites) if site.group and site.group.branch}
        read = {name: tuple(those) for name, those in readers.items()}
        return cls(tuple(names), read, found, products, branches)

    def key(self, block: Iterable[str]) -> Key:
        """Which rows the rows of some tensors are one equation with."""
        names = {*block}
        gates = frozenset(site for site, branch in self.branches.items() if not names.isdisjoint(branch.gone))
        return frozenset().union(*(self.sites[name] for name in names)), gates


def blocks(
    trials: Sequence[Trial], places: Places, gone: Sequence[Iterable[int]] | None = None
) -> list[dict[tuple[str, ...], float]]:
    """For each trial the tensors that run together -> seconds.

    What an engine joins in one row depends on the widths. So what is in one row in any trial counts as joined in all of
    them; but for what is left of branches that are gone, since that runs with whatever comes before it. A tensor that
    no row names runs in the row of what reads it, or of what it is fused with.

    Args:
        gone: for each trial the sites whose branch isn't there; None for none.
    """
    root = {name: name for name in places.names}

    def find(name: str) -> str:
        while root[name] != name:
            root[name] = root[root[name]]
            name = root[name]
        return name

    rows: list[list[tuple[str, float]]] = []  # of each trial: a tensor of the row, and its seconds
    for number, trial in enumerate(trials):
        missing = [places.branches[site] for site in (gone[number] if gone else ())]
        left = {name for branch in missing for name in branch.left}
        away = {name for branch in missing for name in branch.gone}
        own: list[tuple[str, float]] = []
        row_of: dict[str, str] = {}
        for row in trial.rows:
            lasting = [name for name in row.outputs if name not in left]
            own.append(((lasting or row.outputs)[0], row.seconds))
            row_of |= {name: lasting[0] for name in lasting}
        rows.append(own)
        for name in places.names:
            if name not in row_of and places.fused.get(name) in row_of:
                row_of[name] = row_of[places.fused[name]]
        for name in reversed(places.names):
            unnamed = name not in row_of and name not in left and name not in away
            if unnamed and (found := [row_of[one] for one in places.readers.get(name, ()) if one in row_of]):
                row_of[name] = found[0]
        for name, other in row_of.items():
            root[find(name)] = find(other)
    members: dict[str, list[str]] = {}
    for name in places.names:
        members.setdefault(find(name), []).append(name)
    result = []
    for own in rows:
        seconds: dict[tuple[str, ...], float] = {}
        for name, value in own:
            block = tuple(members[find(name)])
            seconds[block] = seconds.get(block, 0.0) + value
        result.append(seconds)
    return result
