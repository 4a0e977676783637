"""Searches: a problem in, the chosen level of each layer out. One file each, one line below."""

from __future__ import annotations

from collections.abc import Callable

from onnx_spdy.pipeline.searches.global_magnitude import global_magnitude
from onnx_spdy.pipeline.searches.problem import SearchProblem, SearchResult
from onnx_spdy.pipeline.searches.spdy import spdy
from onnx_spdy.pipeline.searches.uniform import uniform

Search = Callable[[SearchProblem], SearchResult]

SEARCHES: dict[str, Search] = {
    "spdy": spdy,
    "uniform": uniform,
    "global-magnitude": global_magnitude,
}

DEFAULT_SEARCH = "spdy"


class UnknownSearch(ValueError):
    """No search of that name."""


def search_named(name: str) -> Search:
    """The search of that name.

    Raises:
        UnknownSearch: the message lists the known names.
    """
    if name not in SEARCHES:
        raise UnknownSearch(f"unknown search {name!r}; known: {', '.join(SEARCHES)}")
    return SEARCHES[name]
