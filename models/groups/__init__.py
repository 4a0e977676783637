"""Structured pruning's first half: what must shrink together (channels, feed-forward units, attention heads)."""

from onnx_spdy.models.groups.find import find_groups
from onnx_spdy.models.groups.group import FFN, HEADS, INNER, KINDS, RESIDUAL, Axis, Branch, Group, GroupError, Size

__all__ = ["FFN", "HEADS", "INNER", "KINDS", "RESIDUAL", "Axis", "Branch", "Group", "GroupError", "Size", "find_groups"]
