"""Of which layers in int8 it depends whether a tensor is: what `place.py` decides for one choice of layers, for any."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from onnx_spdy.models.int8.form import Form
from onnx_spdy.models.int8.place import CLIPS, Placing

Clauses = frozenset[frozenset[str]]  # of each of these sets of layers at least one is in int8


@dataclass(frozen=True)
class Flow:
    """Of which layers in int8 it depends whether a tensor is.

    Attributes:
        made: what it takes for the tensor to be made in int8; None where it never is.
        read: for each reader that may read it in int8 what that takes.
        alone: whether these are all that read it.
        converts: whether a conversion would be here, and not behind what clips it or before what moves it.
        moved: whether values are only moved or picked to make it.
    """

    made: Clauses | None
    read: tuple[Clauses, ...]
    alone: bool
    converts: bool
    moved: bool


def find_flows(model: onnx.ModelProto, form: Form) -> dict[str, Flow]:
    """The tensors that may be in int8. Layers are named by their nodes.

    Raises:
        ModelError: see `find_placement`.
    """
    return _Flowing(model, form, None).flows()


class _Flowing(Placing):
    """A search in which all layers that can are in int8."""

    def flows(self) -> dict[str, Flow]:
        self._read: dict[str, tuple[Clauses, ...]] = {}
        for node in reversed(self._nodes.values()):
            for tensor in filter(None, node.output):
                readers = [reader for reader in self._readers.get(tensor, []) if self._reads(*reader)]
                self._read[tensor] = tuple(dict.fromkeys(self._needed_by(name) for name, _ in readers))
        made: dict[str, Clauses | None] = {}
        found = {}
        for name, node in self._nodes.items():
            for tensor in filter(None, node.output):
                made[tensor] = self._made(name, tensor, made.get(node.input[0]) if node.input else None)
                if made[tensor] is not None or self._read[tensor]:
                    alone, converts = self._is_wanted(tensor), self._converts(tensor)
                    found[tensor] = Flow(made[tensor], self._read[tensor], alone, converts, self._moves(name))
        return found

    def _needed_by(self, name: str) -> Clauses:
        """What it takes for a node to read an input in int8, where it may."""
        if name in self._weights:
            return frozenset({frozenset({name})})
        if self._is_product(name):
            return frozenset(frozenset({layer}) for layer in self._weights)
        behind = [clauses for output in self._nodes[name].output if output for clauses in self._read[output]]
        return _all_of(*behind, *([self._made_by(name)] if self._is_int8_between(name) else []))

    def _made(self, name: str, tensor: str, before: Clauses | None) -> Clauses | None:
        """What it takes for a node to make a tensor in int8; None where it never does.

        Args:
            before: the same of its first input.
        """
        if name in self._weights:
            return frozenset({frozenset({name})})
        if self._moves(name) or self._nodes[name].op_type in CLIPS:
            return before
        return _all_of(*self._read[tensor], self._made_by(name)) if self._is_int8_between(name) else None

    def _made_by(self, name: str) -> Clauses:
        """One of the layers that made what goes into a node."""
        return frozenset({self._makers(name)})

    def _converts(self, tensor: str) -> bool:
        maker, readers = self._maker[tensor], self._readers.get(tensor, [])
        is_moved = self._moves(maker) and self._takes(maker, 0)
        return not is_moved and any(self._nodes[name].op_type not in CLIPS for name, _ in readers)


def _all_of(*several: Clauses) -> Clauses:
    """All of these together, without clauses that others imply."""
    clauses = frozenset().union(*several)
    return frozenset(one for one in clauses if not any(other < one for other in clauses))
