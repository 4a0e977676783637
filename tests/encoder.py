"""A language model in the small: tokens with an attention mask, two transformer layers, and sentences for it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

TOKENS, WIDTH, LENGTH, HEADS = 60, 32, 12, 4


class Layer(nn.Module):
    """Attention and feed-forward, each with its LayerNorm after the residual, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = [part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)]
        scores = heads[0] @ heads[1].transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
        scores = scores + (1 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        x = self.norms[0](x + self.out((scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)))
        return self.norms[1](x + self.down(nn.functional.gelu(self.up(x))))


class Encoder(nn.Module):
    """Returns the states of all tokens and, if asked to, the normalised mean over the real ones."""

    def __init__(self, *, states: bool = True, embedding: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions, self.norm = (
            nn.Embedding(TOKENS, WIDTH),
            nn.Embedding(LENGTH, WIDTH),
            nn.LayerNorm(WIDTH),
        )
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.states, self.embedding = states, embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        x = self.norm(self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1])))
        for layer in self.layers:
            x = layer(x, attention_mask)
        weights = attention_mask[..., None].float()
        mean = nn.functional.normalize((x * weights).sum(1) / weights.sum(1), dim=1)
        return (*([x] if self.states else []), *([mean] if self.embedding else []))


def encoder(**outputs: bool) -> tuple[Encoder, dict[str, Tensor]]:
    """The module, the same each time, and example inputs."""
    torch.manual_seed(0)
    example = torch.ones(2, LENGTH, dtype=torch.long)
    return Encoder(**outputs).eval(), {"input_ids": example, "attention_mask": example}


def sentences(count: int = 64, *, padding: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    """Sentences of 3 to 6 tokens, filled up with the token `padding`."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(LENGTH) < rng.integers(3, 7, (count, 1))).astype(np.int64)
    ids = rng.integers(1, TOKENS, (count, LENGTH))
    return {"input_ids": np.where(mask == 1, ids, padding), "attention_mask": mask}
