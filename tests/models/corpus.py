"""Architectures as users bring them, written small, with random weights: NETWORKS[name]() -> (module, inputs).

Each keeps what its family is known for (windows, caches, masks, gates, skips, up-sampling, ...), because that is what
exporters turn into unusual graphs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = dict[str, Tensor]
NETWORKS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {}


def network(inputs: Callable[[], Inputs]):
    """Register a module class under its name, with a function that makes its inputs."""

    def register(make: type[nn.Module]) -> type[nn.Module]:
        NETWORKS[make.__name__] = lambda: (make(), inputs())
        return make

    return register


def image(size: int = 16, channels: int = 3, samples: int = 3) -> Callable[[], Inputs]:
    return lambda: {"x": torch.randn(samples, channels, size, size)}


def sequence(length: int = 12, width: int = 16, samples: int = 3) -> Callable[[], Inputs]:
    return lambda: {"x": torch.randn(samples, length, width)}


def tokens(length: int = 10, samples: int = 3) -> Callable[[], Inputs]:
    return lambda: {"ids": torch.randint(0, 50, (samples, length)), "mask": torch.ones(samples, length).long()}


def conv(i: int, o: int, k: int = 3, s: int = 1, g: int = 1, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o), act())


def head(width: int, classes: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


# --- images -----------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.a, self.b = conv(i, o, 3, stride, groups), conv(o, o, act=nn.Identity)
        self.skip = nn.Identity() if (i, stride) == (o, 1) else conv(i, o, 1, stride, act=nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(self.a(x)) + self.skip(x))


@network(image())
class ResNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 16), nn.MaxPool2d(3, 2, 1), Residual(16, 16), Residual(16, 32, 2), head(32))


@network(image())
class RegNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 16, 3, 2), Residual(16, 24, 2, 8), Residual(24, 24, 1, 8), head(24))


@network(image())
class Vgg(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(96, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 10),
        )  # fmt: skip


@network(image())
class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(16 + 8 * i), nn.ReLU(), nn.Conv2d(16 + 8 * i, 8, 3, 1, 1)) for i in range(3)
        )
        self.end = nn.Sequential(nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 20, 1), nn.AvgPool2d(2), head(20))

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.stem(x)]
        for block in self.blocks:
            parts.append(block(torch.cat(parts, 1)))
        return self.end(torch.cat(parts, 1))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, gate: type[nn.Module]) -> None:
        super().__init__()
        self.down, self.up, self.gate = nn.Conv2d(width, width // 2, 1), nn.Conv2d(width // 2, width, 1), gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Inverted(nn.Module):
    def __init__(self, width: int, act: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        wide = 2 * width
        self.layers = nn.Sequential(
            conv(width, wide, 1, act=act), conv(wide, wide, 5, g=wide, act=act), SqueezeExcite(wide, gate),
            conv(wide, width, 1, act=nn.Identity),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


@network(image())
class EfficientNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 16, 3, 2, act=nn.SiLU), Inverted(16, nn.SiLU, nn.Sigmoid), head(16))


@network(image())
class MobileNetV3(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            conv(3, 16, 3, 2, act=nn.Hardswish), Inverted(16, nn.Hardswish, nn.Hardsigmoid),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 32), nn.Hardswish(), nn.Linear(32, 10),
        )  # fmt: skip


@network(image())
class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 24, 4, 4), nn.Conv2d(24, 24, 7, padding=3, groups=24)
        self.norm, self.scale = nn.LayerNorm(24), nn.Parameter(torch.full((24,), 0.5))
        self.up, self.down, self.end = nn.Linear(24, 48), nn.Linear(48, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        x = x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)
        return self.end(x.mean((-2, -1)))


@network(image())
class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.end = conv(3, 32), head(32)
        self.branch = nn.Sequential(conv(16, 16, 1), conv(16, 16, 3, g=16, act=nn.Identity), conv(16, 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        x = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = x.shape
        return self.end(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


@network(image())
class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = conv(3, 8, 1), nn.Sequential(conv(3, 8, 1), conv(8, 16))
        self.five = nn.Sequential(nn.Conv2d(3, 8, (1, 7), padding=(0, 3)), nn.Conv2d(8, 8, (7, 1), padding=(3, 0)))
        self.pool, self.end = conv(3, 8, 1), head(40)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return self.end(torch.cat([self.one(x), self.three(x), self.five(x), self.pool(pooled)], 1))


@network(image())
class SqueezeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze = nn.Conv2d(3, 32, 3, 2), nn.Conv2d(32, 16, 1)
        self.narrow, self.wide = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.end = nn.Conv2d(32, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, ceil_mode=True)
        x = F.relu(self.squeeze(x))
        x = torch.cat([F.relu(self.narrow(x)), F.relu(self.wide(x))], 1)
        return F.adaptive_avg_pool2d(self.end(x), 1).flatten(1)


class Block(nn.Module):
    """A transformer block with one matrix for queries, keys and values."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, length, width = x.shape
        parts = self.qkv(self.norm1(x)).reshape(n, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@network(image())
class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 32, 4, 4), nn.Parameter(torch.randn(1, 1, 32))
        self.position, self.block, self.end = nn.Parameter(torch.randn(1, 17, 32)), Block(), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.end(self.block(x)[:, 0])


@network(image())
class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block, self.merge = nn.Conv2d(3, 32, 2, 2), Block(), nn.Linear(128, 48, bias=False)
        self.bias, self.end = nn.Parameter(torch.randn(4, 16, 16)), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(self.patches(x).permute(0, 2, 3, 1), (-2, -2), (1, 2))
        n, h, w, c = x.shape
        windows = x.view(n, h // 4, 4, w // 4, 4, c).transpose(2, 3).reshape(-1, 16, c)
        x = self.block(windows, self.bias).view(n, h // 4, w // 4, 4, 4, c).transpose(2, 3).reshape(n, h, w, c)
        x = torch.roll(x, (2, 2), (1, 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.end(self.merge(x).mean((1, 2)))


@network(image())
class MlpMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 32, 4, 4), nn.LayerNorm(32)
        self.mix = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.end = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.end(x.mean(1))


@network(image())
class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep, self.end = conv(3, 16), conv(16, 32), nn.Conv2d(16, 4, 1)
        self.up, self.join = nn.ConvTranspose2d(32, 16, 2, 2), conv(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x)
        return self.end(self.join(torch.cat([a, self.up(self.deep(F.max_pool2d(a, 2)))], 1)))


@network(image())
class FeaturePyramidDetector(nn.Module):
    """Two levels, three outputs: boxes, classes, objectness with decoded positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = conv(3, 16, 3, 2, act=nn.SiLU), conv(16, 32, 3, 2, act=nn.SiLU)
        self.lateral, self.reduce = nn.Conv2d(16, 24, 1), nn.Conv2d(32, 24, 1)
        self.boxes, self.classes = nn.Conv2d(24, 12, 3, 1, 1), nn.Conv2d(24, 15, 3, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = self.stem(x)
        b = self.reduce(self.deep(a))
        a = self.lateral(a) + F.interpolate(b, scale_factor=2.0, mode="nearest")
        boxes, classes = [], []
        for level, stride in ((a, 2), (b, 4)):
            n, _, h, w = level.shape
            ys, xs = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
            grid = torch.stack([xs, ys], -1).reshape(1, -1, 1, 2)
            raw = self.boxes(level).view(n, 3, 4, h * w).permute(0, 3, 1, 2)
            centre = (raw[..., :2].sigmoid() + grid) * stride
            boxes.append(torch.cat([centre, raw[..., 2:].exp()], -1).flatten(1, 2))
            classes.append(self.classes(level).view(n, 3, 5, h * w).permute(0, 3, 1, 2).flatten(1, 2))
        scores = torch.cat(classes, 1)
        return torch.cat(boxes, 1), scores[..., 1:].softmax(-1), scores[..., 0].sigmoid()


@network(image())
class RetinaNet(nn.Module):
    """The same head on every level: one weight, several convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = conv(3, 16, 3, 2), conv(16, 32, 3, 2)
        self.lateral, self.reduce = nn.Conv2d(16, 24, 1), nn.Conv2d(32, 24, 1)
        self.tower, self.classes = nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 12, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.stem(x)
        b = self.reduce(self.deep(a))
        a = self.lateral(a) + F.interpolate(b, scale_factor=2.0, mode="nearest")
        one, other = (self.classes(F.relu(self.tower(level))).flatten(2) for level in (a, b))
        return one, other


@network(lambda: {"a": torch.randn(3, 3, 16, 16), "b": torch.randn(3, 3, 16, 16)})
class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv(3, 16, 3, 2), Residual(16, 24, 2), head(24, 16))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(self.encoder(a), self.encoder(b))


@network(image())
class Detr(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.queries = nn.Conv2d(3, 32, 4, 4), nn.Parameter(torch.randn(5, 32))
        self.encoder = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0)
        self.decoder = nn.TransformerDecoderLayer(32, 4, 48, batch_first=True, dropout=0)
        self.classes, self.boxes = nn.Linear(32, 6), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.encoder(self.stem(x).flatten(2).transpose(1, 2))
        y = self.decoder(self.queries.expand(x.shape[0], -1, -1), memory)
        return self.classes(y), self.boxes(y).sigmoid()


@network(image(8))
class Espcn(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 5, padding=2), nn.Tanh(), nn.Conv2d(16, 16, 3, padding=1), nn.Tanh(),
            nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip


@network(image(8))
class Edsr(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = (nn.Conv2d(i, 16, 3, padding=1) for i in (3, 16, 16))
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y + 0.1 * self.b(F.relu(self.a(y)))
        return self.last(F.interpolate(y, scale_factor=2, mode="bicubic")) + F.interpolate(
            x, scale_factor=2, mode="bilinear", align_corners=False
        )


@network(image(8))
class Autoencoder(nn.Module):
    """The mean of a variational autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ELU(), nn.Flatten(), nn.Linear(256, 32))
        self.decoder = nn.Sequential(
            nn.Linear(16, 256), nn.Unflatten(1, (16, 4, 4)), nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        return self.decoder(mean), mean, log_variance


@network(lambda: {"x": torch.randn(3, 16)})
class Generator(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(16, 256), nn.Unflatten(1, (16, 4, 4)), nn.BatchNorm2d(16), nn.ReLU(),
            nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False), nn.InstanceNorm2d(8, affine=True), nn.LeakyReLU(0.2),
            nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.Mish(), nn.Conv2d(16, 3, 1), nn.Tanh(),
        )  # fmt: skip


@network(lambda: {"x": torch.randn(2, 2, 6, 8, 8)})
class Video(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d((1, 2, 2)),
            nn.Conv3d(8, 12, (3, 1, 1), padding=(1, 0, 0)), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(12, 24),
            nn.SELU(), nn.Linear(24, 10),
        )  # fmt: skip


@network(image())
class SpatialTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.where, self.what = nn.Linear(768, 6), nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        theta = self.where(x.flatten(1)).reshape(-1, 2, 3)
        base = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 16)] * 2, indexing="ij")[::-1], -1)
        base = torch.cat([base, torch.ones(16, 16, 1)], -1).reshape(1, 256, 3)
        grid = (base @ theta.transpose(1, 2)).reshape(-1, 16, 16, 2)
        return self.what(F.grid_sample(x, grid, align_corners=True)).amax((2, 3))


# --- sequences --------------------------------------------------------------------------------------------------


@network(tokens())
class Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions, self.norm = nn.Embedding(50, 32), nn.Embedding(16, 32), nn.LayerNorm(32)
        self.block, self.pooler = Block(), nn.Linear(32, 32)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])))
        hidden = self.block(x, (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min)
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return hidden, torch.tanh(self.pooler(mean))


@network(
    lambda: {
        "ids": torch.randint(0, 50, (3, 4)),
        "past_key": torch.randn(3, 4, 6, 8),
        "past_value": torch.randn(3, 4, 6, 8),
    }
)
class Gpt(nn.Module):
    """One decoder layer with a key-value cache; the head shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm, self.qkv = nn.Embedding(50, 32), nn.LayerNorm(32), nn.Linear(32, 96)
        self.out, self.up, self.down = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, ids: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.tokens(ids)
        q, k, v = (part.unflatten(2, (4, 8)).transpose(1, 2) for part in self.qkv(self.norm(x)).split(32, 2))
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
        new, total = q.shape[2], k.shape[2]
        causal = torch.ones(total, total, dtype=torch.bool).tril()[total - new :]
        scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~causal, float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x), approximate="tanh"))
        return F.linear(x, self.tokens.weight), k, v


@network(tokens())
class Llama(nn.Module):
    """RMS norm, rotary positions, grouped heads, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(50, 32), nn.RMSNorm(32)
        self.q, self.k, self.v = (nn.Linear(32, width, bias=False) for width in (32, 16, 16))
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.end = nn.Linear(32, 50, bias=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.tokens(ids)
        y, length = self.norm(x), ids.shape[1]
        angles = torch.arange(length)[:, None] / 100 ** (torch.arange(4) / 4)
        cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)

        def turned(z: Tensor) -> Tensor:
            a, b = z.chunk(2, -1)
            return z * cos + torch.cat([-b, a], -1) * sin

        q, k, v = (layer(y).unflatten(2, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (z.repeat_interleave(2, 1) for z in (turned(k), v))
        allowed = torch.ones(length, length, dtype=torch.bool).tril() & (mask[:, None, None] > 0)
        x = x + F.scaled_dot_product_attention(turned(q), k, v, attn_mask=allowed).transpose(1, 2).flatten(2)
        return self.end(x + self.down(F.silu(self.gate(x)) * self.up(x)))


@network(lambda: {"ids": torch.randint(0, 50, (3, 8)), "target_ids": torch.randint(0, 50, (3, 5))})
class T5(nn.Module):
    """Encoder and decoder with relative positions in buckets."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.relative = nn.Embedding(50, 32), nn.Embedding(8, 4)
        self.encoder, self.decoder, self.cross = Block(), Block(), nn.MultiheadAttention(32, 4, batch_first=True)
        self.end = nn.Linear(32, 50, bias=False)

    def bias(self, length: int) -> Tensor:
        distance = torch.arange(length)[None] - torch.arange(length)[:, None]
        large = 4 + (torch.log(distance.abs().float().clamp(min=1) / 4) * 2).long().clamp(0, 3)
        return self.relative(torch.where(distance.abs() < 4, distance.abs(), large)).permute(2, 0, 1)[None]

    def forward(self, ids: Tensor, target_ids: Tensor) -> Tensor:
        memory = self.encoder(self.tokens(ids), self.bias(ids.shape[1]))
        length = target_ids.shape[1]
        causal = torch.full((length, length), float("-inf")).triu(1)
        y = self.decoder(self.tokens(target_ids), self.bias(length) + causal)
        return self.end(y + self.cross(y, memory, memory, need_weights=False)[0])


@network(lambda: {"mel": torch.randn(2, 20, 16), "ids": torch.randint(0, 50, (2, 5))})
class Whisper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(20, 32, 3, padding=1), nn.Conv1d(32, 32, 3, 2, 1)
        self.position, self.encoder = nn.Parameter(torch.randn(8, 32)), Block()
        self.tokens = nn.Embedding(50, 32)
        self.decoder = nn.TransformerDecoderLayer(32, 4, 48, batch_first=True, dropout=0, norm_first=True)

    def forward(self, mel: Tensor, ids: Tensor) -> Tensor:
        x = F.gelu(self.b(F.gelu(self.a(mel)))).transpose(1, 2) + self.position
        causal = torch.full((5, 5), float("-inf")).triu(1)
        y = self.decoder(self.tokens(ids), self.encoder(x), tgt_mask=causal)
        return y @ self.tokens.weight.t()


@network(sequence())
class Conformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.block, self.norm = nn.Linear(16, 32), Block(), nn.LayerNorm(32)
        self.gate, self.depthwise = nn.Conv1d(32, 64, 1), nn.Conv1d(32, 32, 5, padding=2, groups=32)
        self.batch, self.out, self.end = nn.BatchNorm1d(32), nn.Conv1d(32, 32, 1), nn.Linear(32, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.up(x))
        y = F.glu(self.gate(self.norm(x).transpose(1, 2)), 1)
        x = x + self.out(F.silu(self.batch(self.depthwise(y)))).transpose(1, 2)
        return self.end(x).log_softmax(-1)


@network(lambda: {"x": torch.randn(3, 16, 20)})
class TemporalConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(16, 16, 3, dilation=2**i) for i in range(3))
        self.end = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + F.relu(layer(F.pad(x, (2 * 2**i, 0))))
        return self.end(x[..., -1])


@network(lambda: {"x": torch.randn(2, 1, 32)})
class WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 16, 2)
        self.filters = nn.ModuleList(nn.Conv1d(16, 16, 2, dilation=d) for d in (1, 2, 4))
        self.gates = nn.ModuleList(nn.Conv1d(16, 16, 2, dilation=d) for d in (1, 2, 4))
        self.skips, self.end = nn.ModuleList(nn.Conv1d(16, 24, 1) for _ in range(3)), nn.Conv1d(24, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.first(x), 0
        for filter_, gate, skip in zip(self.filters, self.gates, self.skips, strict=True):
            y = torch.tanh(filter_(x)) * torch.sigmoid(gate(x))
            total = total + skip(y)[..., -20:]
            x = x[..., -y.shape[-1] :] + y
        return self.end(F.relu(total))


@network(sequence())
class SpeechLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm = nn.Linear(16, 24), nn.LSTM(24, 16, batch_first=True, bidirectional=True)
        self.end = nn.Linear(32, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.lstm(torch.relu(self.first(x)))[0])


@network(sequence())
class SpeechGru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.rnn, self.end = nn.GRU(16, 16, 2, batch_first=True), nn.RNN(16, 16), nn.Linear(16, 20)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(x)
        return self.end(self.rnn(y.transpose(0, 1))[1][0])


# --- tables, points, graphs -------------------------------------------------------------------------------------


@network(lambda: {"x": torch.randn(4, 20)})
class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Linear(20, 32), nn.BatchNorm1d(32), nn.PReLU(), nn.Linear(32, 32), nn.Softplus(), nn.Linear(32, 10)
        )


@network(lambda: {"user": torch.randint(0, 30, (4,)), "item": torch.randint(0, 40, (4,)), "dense": torch.randn(4, 8)})
class Dlrm(nn.Module):
    """Embeddings, products of all pairs, a deep part: also what neural collaborative filtering is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items, self.below = nn.Embedding(30, 16), nn.Embedding(40, 16), nn.Linear(8, 16)
        self.above = nn.Sequential(nn.Linear(19, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, user: Tensor, item: Tensor, dense: Tensor) -> Tensor:
        x = self.below(dense)
        parts = torch.stack([x, self.users(user), self.items(item)], 1)
        pairs = torch.bmm(parts, parts.transpose(1, 2))
        rows, columns = torch.tril_indices(3, 3, -1)
        return torch.sigmoid(self.above(torch.cat([x, pairs[:, rows, columns]], 1)))


@network(lambda: {"categories": torch.randint(0, 12, (4, 5)), "numbers": torch.randn(4, 6)})
class TabTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.block = nn.Embedding(12, 32), Block()
        self.norm, self.end = nn.LayerNorm(6), nn.Sequential(nn.Linear(166, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        return self.end(torch.cat([self.block(self.table(categories)).flatten(1), self.norm(numbers)], 1))


@network(lambda: {"points": torch.randn(3, 24, 3)})
class PointNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Sequential(nn.Conv1d(3, 16, 1), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten())
        self.matrix, self.a, self.b = nn.Linear(16, 9), nn.Conv1d(3, 32, 1), nn.Conv1d(32, 32, 1)
        self.end = nn.Linear(32, 10)

    def forward(self, points: Tensor) -> Tensor:
        matrix = self.matrix(self.turn(points.transpose(1, 2))).view(-1, 3, 3) + torch.eye(3)
        x = torch.bmm(points, matrix).transpose(1, 2)
        return self.end(self.b(F.relu(self.a(x))).amax(2))


@network(lambda: {"features": torch.randn(2, 9, 16), "adjacency": (torch.rand(2, 9, 9) > 0.6).float()})
class GraphConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, features: Tensor, adjacency: Tensor) -> Tensor:
        degrees = adjacency.sum(-1, keepdim=True).clamp(min=1)
        x = F.relu(self.a(adjacency @ features / degrees))
        x = torch.einsum("bij,bjk->bik", adjacency, self.b(x)) / degrees
        scores = x.norm(dim=-1)
        best = scores.topk(4, 1).indices
        return torch.gather(x, 1, best[..., None].expand(-1, -1, 16)).mean(1)
