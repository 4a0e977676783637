"""The list of operators in a page, made from the code.

python -m onnx_spdy.tools.operator_list models/operators/README.md
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

from onnx_spdy.models.operators import OPERATORS
from onnx_spdy.runtimes.atomic import replacing

BEGIN, END = "<!-- operators: begin -->", "<!-- operators: end -->"


def operator_list() -> str:
    """The paragraph between the two marks."""
    names = ", ".join(f"`{name}`" for name in sorted(OPERATORS, key=str.lower))
    return f"{BEGIN}\n{textwrap.fill(f'{len(OPERATORS)} operators: {names}.', 116)}\n{END}"


def renewed(text: str) -> str:
    """`text` with the present list between its marks."""
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda match: operator_list(), text, flags=re.DOTALL)


def main(path: Path) -> None:
    """Renew the list in a page."""
    text = renewed(path.read_text(encoding="utf8"))
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
