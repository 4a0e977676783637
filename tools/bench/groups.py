"""What channels, feed-forward units and heads can be removed from networks, and how much work that saves at most.

At most: with one unit left in each group that can shrink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from onnx_spdy.models import Group, Prepared, find_groups, narrowed
from onnx_spdy.models.groups import KINDS
from onnx_spdy.models.work import multiply_accumulates
from onnx_spdy.tools.progress import ProgressBars
from onnx_spdy.tools.results import Json, write_results
from onnx_spdy.tools.specs import load_network
from onnx_spdy.tools.table import print_table

ALL = "all"


@dataclass(frozen=True)
class Row:
    """Groups of one kind in one network.

    Attributes:
        groups, units: that can shrink.
        branches: of these groups, those that go with a residual branch.
        fixed: groups that can't.
        removable: share of the network's multiply-accumulates that go when each of these groups has one unit left, or
            none.
        reasons: why the others can't, each once.
    """

    network: str
    kind: str
    groups: int
    units: int
    branches: int
    fixed: int
    removable: float
    reasons: tuple[str, ...]


def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="as in onnx-spdy")],
    json: Json = None,
) -> None:
    """Find the groups of these networks."""
    rows: list[Row] = []
    with ProgressBars() as bars:
        for number, model in enumerate(models, 1):
            rows += rows_of(Path(model.rpartition(":")[2] if ".py:" in model else model).stem, load_network(model))
            bars.stage("groups")(number, len(models), model)
            write_results(json, "bench_groups", {"rows": [asdict(row) for row in rows]})
    show(rows)


def rows_of(name: str, network: Prepared) -> list[Row]:
    """One row for each kind of groups in the network, and one for all together."""
    groups = find_groups(network)
    dense = sum(multiply_accumulates(network.proto).values())
    kinds = [kind for kind in KINDS if any(group.kind == kind for group in groups)]
    return [
        _row(name, kind, [one for one in groups if kind in (ALL, one.kind)], network, dense) for kind in (*kinds, ALL)
    ]


def _row(name: str, kind: str, groups: Sequence[Group], network: Prepared, dense: int) -> Row:
    open_ones = [group for group in groups if group.prunable]
    fewest = {group.name: [0] if group.branch is None else [] for group in open_ones}
    least = sum(multiply_accumulates(narrowed(network, fewest)).values())
    return Row(
        name, kind, len(open_ones), sum(group.units for group in open_ones),
        sum(group.branch is not None for group in open_ones), len(groups) - len(open_ones),
        1 - least / dense if dense else 0.0, tuple(dict.fromkeys(group.skip for group in groups if group.skip)),
    )  # fmt: skip


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    names = ("network", "kind", "groups", "units", "branches", "can't shrink", "removable work, at most")
    print_table(
        "Groups",
        names,
        [
            (row.network, row.kind, row.groups, row.units, row.branches, row.fixed, f"{row.removable:.1%}")
            for row in rows
        ],
    )
