"""Why DeepSparse leaves a part of a network to ONNX Runtime: read from its diagnostic log."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NODE = re.compile(r"^Node (\d+): (\S+)")
_UNSUPPORTED = re.compile(r"supported/\S+\.cc:\d+\] Unsupported (.+)$")
_MESSAGE = re.compile(r"^Message: (.+)$")


def fallback_reasons(log: Iterable[str]) -> list[str]:
    """Reasons in the order of the log, each once.

    The log lists the network's nodes, says of some what it lacks, then lists the nodes of each part
    that it tries to compile. Nodes in no such part fall back even where it gives no reason for them.

    Args:
        log: lines that a worker started with --diagnose wrote while it opened one model.
    """
    reasons: list[str] = []
    network: dict[str, str] = {}  # node number -> operator
    compiled: set[str] = set()
    listing = ""
    for line in log:
        if "Printing GraphViewer" in line:
            listing = "network"
        elif "Printing subgraph" in line:
            listing = "part"
        elif match := _NODE.match(line):
            if listing == "network":
                network[match[1]] = match[2]
            else:
                compiled.add(match[1])
        elif match := _MESSAGE.match(line) or _UNSUPPORTED.search(line):
            reasons.append(" ".join(match[1].split()))
    left = [operator for number, operator in network.items() if number not in compiled]
    unexplained = [operator for operator in left if not any(operator in reason for reason in reasons)]
    if unexplained:
        reasons.append(f"operators not supported here: {', '.join(dict.fromkeys(unexplained))}")
    return list(dict.fromkeys(reasons))
