"""Attention as one operator, and what belongs to it."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from onnx_spdy.models.operators.operator import TORCH_DTYPES, Compute, Node, trimmed


def attention(node: Node) -> Compute:
    """Scaled dot-product attention with a key-value cache, grouped heads, softcap, causal and sliding windows."""
    return _Attention(node)


class _Attention:
    """One Attention node: (batch, heads, sequence, head size) or (batch, sequence, heads * head size) -> the same."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.heads: int | None = node.get("q_num_heads")
        self.key_heads: int | None = node.get("kv_num_heads")
        self.causal = bool(node.get("is_causal", 0))
        self.softcap: float = node.get("softcap", 0.0)
        self.scale: float | None = node.get("scale")
        self.window = (node.get("left_window_size", -1), node.get("right_window_size", -1))
        self.shown: int = node.get("qk_matmul_output_mode", 0)
        self.precision = TORCH_DTYPES.get(node.get("softmax_precision", 0))

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        past_key: Tensor | None = None,
        past_value: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        flat = query.dim() == 3
        if flat:
            assert self.heads is not None and self.key_heads is not None, "the standard demands them for 3-D inputs"
            query, key = _heads(query, self.heads), _heads(key, self.key_heads)
            value = _heads(value, self.key_heads)
        before = 0 if past_key is None else past_key.shape[2]
        if past_key is not None and past_value is not None:
            key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        groups = query.shape[1] // key.shape[1]
        root = sqrt(self.scale if self.scale is not None else query.shape[3] ** -0.5)
        scores = (query * root) @ (key.repeat_interleave(groups, 1) * root).transpose(-1, -2)
        shown = [scores]
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        shown.append(scores)
        bias = self._bias(scores, mask, before, lengths)
        masked = None
        if bias is not None:
            masked = (bias == float("-inf")).all(-1, keepdim=True)
            scores = scores + bias
        shown.append(scores)
        weights = torch.softmax(scores.to(self.precision or scores.dtype), -1)
        if masked is not None:  # a query that sees nothing gets zeros, not the NaN of an empty softmax
            weights = weights.masked_fill(masked, 0)
        weights = weights.to(query.dtype)
        shown.append(weights)
        result = weights @ value.repeat_interleave(groups, 1)
        if flat:
            result = result.transpose(1, 2).flatten(2)
        return trimmed(self.node, (result, key, value, shown[self.shown]))

    def _bias(self, scores: Tensor, mask: Tensor | None, before: int, lengths: Tensor | None) -> Tensor | None:
        """What is added to the scores: 0 where a query may look, -inf where it may not, and the mask's own numbers."""
        queries, keys = scores.shape[-2:]
        hidden = scores.new_full((), float("-inf"))
        bias = None
        if mask is not None:
            bias = torch.where(mask, torch.zeros_like(hidden), hidden) if mask.dtype == torch.bool else mask
            if keys > bias.shape[-1]:
                bias = torch.nn.functional.pad(bias, (0, keys - bias.shape[-1]), value=float("-inf"))
        allowed = torch.ones((queries, keys), dtype=torch.bool, device=scores.device)
        position = torch.arange(keys, device=scores.device)
        if self.causal or max(self.window) >= 0:
            last = torch.arange(queries, device=scores.device)[:, None] + before  # the key that stands at the query
            if lengths is not None:
                last = last + (lengths.reshape(-1, 1, 1, 1) - queries)
            ahead = position - last
            left, right = self.window
            if self.causal:
                allowed = allowed & (ahead <= 0)
            if left >= 0:
                allowed = allowed & (-ahead <= left)
            if right >= 0:
                allowed = allowed & (ahead <= right)
        if lengths is not None:
            allowed = allowed & (position < lengths.reshape(-1, 1, 1, 1))
        if self.causal or max(self.window) >= 0 or lengths is not None:
            limits = torch.where(allowed, torch.zeros_like(hidden), hidden)
            bias = limits if bias is None else bias + limits
        return bias


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def rotary_embedding(node: Node) -> Compute:
    interleaved, heads = node.get("interleaved", 0), node.get("num_heads", 0)
    part = node.get("rotary_embedding_dim", 0)

    def run(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
        if positions is not None:
            cos, sin = cos[positions.long()], sin[positions.long()]
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (batch, 1, sequence, half)
        y = x if x.dim() == 4 else _heads(x, heads)
        turned, rest = (y[..., :part], y[..., part:]) if part else (y, y[..., :0])
        a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
        real, imaginary = cos * a - sin * b, sin * a + cos * b
        turned = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
        y = torch.cat([turned, rest], -1)
        return y if x.dim() == 4 else y.transpose(1, 2).flatten(2)

    return run


def swiglu(node: Node) -> Compute:
    alpha = node.get("alpha", 1.0)
    return lambda a, b: a * torch.sigmoid(alpha * a) * b


def tensor_scatter(node: Node) -> Compute:
    """Write new keys or values into a cache of fixed size, for each sample at its own position."""
    axis, circular = node.get("axis", -2), node.get("mode", "linear") == "circular"

    def run(cache: Tensor, update: Tensor, starts: Tensor | None = None) -> Tensor:
        along = axis % cache.dim()
        where = torch.arange(update.shape[along], device=cache.device)[None]
        where = where.expand(cache.shape[0], -1) if starts is None else where + starts.reshape(-1, 1)
        if circular:
            where = where % cache.shape[along]
        shape = [1] * cache.dim()
        shape[0], shape[along] = where.shape
        return cache.scatter(along, where.reshape(shape).expand(update.shape).long(), update)

    return run
