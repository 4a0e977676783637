"""The command line. Exit codes: 0 done; 1 an expected failure, one line on stderr; 2 wrong usage; 130 Ctrl-C.

It imports nothing large before `main`, where a Ctrl-C during the seconds that imports take ends it as quietly as later.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from onnx_spdy.tools.interrupt import ending_at_once


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script: expected failures become one line and exit code 1."""
    with ending_at_once():
        from onnx_spdy.tools.commands import app
        from onnx_spdy.tools.expected import one_line_errors
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("onnx_spdy.pipeline.search.profile_search").setLevel(logging.INFO)  # which loss was chosen
    with one_line_errors():
        app(arguments)


if __name__ == "__main__":
    main()
