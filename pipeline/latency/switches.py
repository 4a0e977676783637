"""What depends on which layers are in int8, in terms that a solver can add up.

An addition is in int8 where all layers that read it are; a conversion is where one is that reads what another made in
floating point. Such a condition is written as cases that exclude each other, each of some layers in int8 and some that
aren't: then the seconds it costs are a sum of products, with a factor for each layer (`costs.Product`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

Case = frozenset[tuple[int, bool]]  # (layer, whether it is in int8), of different layers
Cases = tuple[Case, ...]  # of which at most one is true
ALWAYS: Cases = (frozenset(),)
NEVER: Cases = ()


def all_in_int8(layers: Iterable[int]) -> Cases:
    """These layers all are.

    >>> holds(all_in_int8([0, 2]), [True, False, True])
    True
    """
    return (frozenset((layer, True) for layer in layers),)


def any_in_each(clauses: Iterable[Iterable[int]]) -> Cases:
    """Of each of these sets of layers at least one is.

    >>> holds(any_in_each([[0], [1, 2]]), [True, False, True])
    True
    """
    found = ALWAYS
    for clause in clauses:
        found = both(found, either([all_in_int8([layer]) for layer in clause]))
    return found


def negated(cases: Cases) -> Cases:
    """None of the cases is true.

    >>> sorted(map(sorted, negated(all_in_int8([0, 1]))))
    [[(0, False)], [(0, True), (1, False)]]
    """
    found = ALWAYS
    for case in cases:
        ordered = sorted(case)
        firsts = (frozenset({*ordered[:place], (layer, not state)}) for place, (layer, state) in enumerate(ordered))
        found = both(found, tuple(firsts))
    return found


def both(one: Cases, other: Cases) -> Cases:
    """A case of one and a case of the other are true."""
    return tuple(a | b for a in one for b in other if _agree(a, b))


def either(several: Sequence[Cases]) -> Cases:
    """At least one of these conditions is true."""
    found, none = NEVER, ALWAYS
    for one in several:
        found += both(none, one)
        none = both(none, negated(one))
    return found


def holds(cases: Cases, in_int8: Sequence[bool]) -> bool:
    """Whether one of the cases is true."""
    return any(all(bool(in_int8[layer]) == state for layer, state in case) for case in cases)


def _agree(one: Collection[tuple[int, bool]], other: Collection[tuple[int, bool]]) -> bool:
    return not any((layer, not state) in other for layer, state in one)
