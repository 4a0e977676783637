"""What all tests share: nothing is fetched, the longest files come first, and what was skipped is one line."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

# Before transformers is imported, here and in the processes that tests start.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
# Networks here are small: a second thread gains little, and where the machine is busy, threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files that take minutes: of several processes, none begins one at the end and lets the others wait.
LONGEST = frozenset({"test_readme.py", "test_end_to_end.py"})

# A reason that matches the pattern is counted as the name; the first one counts. Others are counted as they are.
GROUPS = {
    r"deepsparse|engine's worker": "no DeepSparse",
    r"GPU|TensorRT|tensorrt|cuda|CUDA|cuSPARSELt": "no GPU or TensorRT",
    r"shared/|development networks": "no development data",
    r"sshd|by ssh": "no ssh server",
    r"there is no \w+ here": "no such program",
    r"written back|older exporter|`fake` runtime": "known gaps of the corpus",
}


def summary(reports: Sequence[pytest.TestReport | pytest.CollectReport]) -> str:
    """What was skipped, by reason, the most frequent first: 'skipped 3: 2 no ssh server, 1 there is no zsh here'."""
    counts = Counter(_group(reason_of(report.longrepr)) for report in reports)
    parts = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    return f"skipped {counts.total()}: {parts}"


def reason_of(longrepr: object) -> str:
    reason = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return str(reason).removeprefix("Skipped: ").split("\n")[0]


def _group(reason: str) -> str:
    found = next((name for pattern, name in GROUPS.items() if re.search(pattern, reason)), None)
    return found or (reason if len(reason) <= 80 else f"{reason[:77]}...")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    stats: Mapping[str, list] = terminalreporter.stats
    if skipped := stats.get("skipped"):
        terminalreporter.write_line(summary(skipped))
