"""Searches: a problem in, the chosen level of each layer out. One file each, one line below."""

from __future__ import annotations

from collections.abc import Callable

from onnx_spdy.pipeline.search.methods.dp import dp
from onnx_spdy.pipeline.search.methods.erk import erk
from onnx_spdy.pipeline.search.methods.global_magnitude import global_magnitude
from onnx_spdy.pipeline.search.methods.problem import SearchProblem, SearchResult, Seen
from onnx_spdy.pipeline.search.methods.random_profiles import random
from onnx_spdy.pipeline.search.methods.spdy import spdy
from onnx_spdy.pipeline.search.methods.thompson import thompson
from onnx_spdy.pipeline.search.methods.uniform import uniform
from onnx_spdy.runtimes.errors import OnnxSpdyError

Search = Callable[[SearchProblem], SearchResult]

SEARCHES: dict[str, Search] = {
    "thompson": thompson,
    "spdy": spdy,
    "dp": dp,
    "uniform": uniform,
    "erk": erk,
    "global-magnitude": global_magnitude,
    "random": random,
}

DEFAULT_SEARCH = "thompson"
CONTINUING = frozenset({"thompson"})  # learn from profiles that were scored before, for whatever budget


class UnknownSearch(OnnxSpdyError, ValueError):
    """No search of that name."""


def search_named(name: str) -> Search:
    """The search of that name.

    Raises:
        UnknownSearch: the message lists the known names.
    """
    if name not in SEARCHES:
        raise UnknownSearch(f"unknown search {name!r}; known: {', '.join(SEARCHES)}")
    return SEARCHES[name]


__all__ = [
    "CONTINUING",
    "DEFAULT_SEARCH",
    "SEARCHES",
    "Search",
    "SearchProblem",
    "SearchResult",
    "Seen",
    "UnknownSearch",
    "search_named",
]
