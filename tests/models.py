"""Small nets the tests explain, each with `steps`, the same net written for the oracle, and the stock video models.

Everything that users write and libraries trip over is in some `forward` here. `ZOO` lists the nets with input shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from oracle import Node, Walk, bounded
from torch import Tensor, nn


class Plain(nn.Module):
    """In-place and functional ReLU, dropout, identity, flatten: a sequence with nothing special in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool3d((1, 2, 2))
        self.second = nn.Conv3d(4, 5, (2, 3, 3), stride=(2, 1, 1), padding=(0, 1, 1))
        self.drop = nn.Dropout(0.5)
        self.same = nn.Identity()
        self.head = nn.Linear(5 * 2 * 3 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.first(x)))
        x = F.relu(self.second(x))
        x = self.same(self.drop(x))
        return self.head(torch.flatten(x, 1))

    def steps(self, w: Walk, x: Node) -> Node:
        x = w.each(torch.relu, w.pixel(self.first, x))
        x = w.max_pool(self.pool, x)
        x = w.each(torch.relu, w.conv(self.second, x))
        return w.dense(self.head, w.move(lambda v: v.flatten(1), x))


class Reused(nn.Module):
    """One convolution (also the pixel layer), one ReLU and one batch norm, each used more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm3d(3)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(3 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.relu(self.norm(self.conv(x)))
        return self.head(x.mean((3, 4)).flatten(1))

    def steps(self, w: Walk, x: Node) -> Node:
        def conv_norm(v: Tensor) -> Tensor:
            return self.norm(self.conv(v))

        x = w.each(torch.relu, w.pixel(conv_norm, x))
        for _ in range(2):
            x = w.each(torch.relu, w.conv(conv_norm, x))
        return w.dense(self.head, w.move(lambda v: v.flatten(1), w.add(lambda v: v.mean((3, 4)), x)))


class Residual(nn.Module):
    """`out + x`, `out += x`, a projected shortcut, ReLU in place on the sum and on a tensor that others read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 4, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm3d(4)
        self.a = nn.Conv3d(4, 4, 3, padding=1, bias=False)
        self.a_norm = nn.BatchNorm3d(4)
        self.b = nn.Conv3d(4, 6, 3, stride=2, padding=1)
        self.b_norm = nn.BatchNorm3d(6)
        self.shortcut = nn.Sequential(nn.Conv3d(4, 6, 1, stride=2, bias=False), nn.BatchNorm3d(6))
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem_norm(self.stem(x)))
        x = F.relu(self.a_norm(self.a(x)) + x)
        out = self.b_norm(self.b(x))
        out += self.shortcut(x)
        out.relu_()
        return self.head(self.pool(out).view(out.size(0), -1))

    def steps(self, w: Walk, x: Node) -> Node:
        x = w.each(torch.relu, w.pixel(lambda v: self.stem_norm(self.stem(v)), x))
        branch = w.conv(lambda v: self.a_norm(self.a(v)), x)
        x = w.each(torch.relu, w.add(torch.add, branch, x))
        branch = w.conv(lambda v: self.b_norm(self.b(v)), x)
        x = w.each(torch.relu, w.add(torch.add, branch, w.conv(self.shortcut, x)))
        return w.dense(self.head, w.move(lambda v: v.flatten(1), w.add(self.pool, x)))


class Rearranged(nn.Module):
    """Cat, stack, split, chunk, slices, select, squeeze, permute, view, pad: on pixels and on features."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 4, 3)
        self.left = nn.Conv3d(2, 2, 1)
        self.right = nn.Conv3d(2, 3, (1, 3, 3), padding=(0, 1, 1))
        self.flat = nn.Conv2d(5, 4, 3)
        self.head = nn.Linear(4 * 2 * 4 + 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 1, 3, 4).contiguous().transpose(1, 2)
        x = F.relu(self.first(F.pad(x, (1, 0, 2, 1, 1, 1))))
        left, right = x.split(2, dim=1)
        left = F.relu(self.left(left))
        right = F.relu(self.right(right))
        x = torch.cat([left, right], dim=1)
        early, late = x[:, :, 0], x.select(2, -1)
        middle = x[:, :, 1:3].chunk(2, dim=2)[1].squeeze(2)
        x = torch.stack((early, middle, late), dim=1)
        x = x.reshape(-1, *x.shape[2:])
        x = F.relu(self.flat(x[:, :, ::2, 1:]))
        x = x.view(-1, 3, *x.shape[1:])
        tail = x[:, 1, :, 0, 0].unsqueeze(-1).transpose(1, 2).squeeze(1)
        x = torch.cat((x[:, 0], x[:, 2]), 2).flatten(1)
        return self.head(torch.cat([x, tail], dim=-1))

    def steps(self, w: Walk, x: Node) -> Node:
        x = w.move(lambda v: F.pad(v, (1, 0, 2, 1, 1, 1)), x)
        x = w.each(torch.relu, w.pixel(self.first, x))
        left = w.each(torch.relu, w.conv(self.left, w.move(lambda v: v[:, :2], x)))
        right = w.each(torch.relu, w.conv(self.right, w.move(lambda v: v[:, 2:], x)))
        x = w.move(lambda a, b: torch.cat([a, b], 1), left, right)
        frames = []
        for t in (0, 2, x.value.shape[2] - 1):
            frame = w.move(lambda v, t=t: v[:, :, t, ::2, 1:], x)
            frames.append(w.each(torch.relu, w.conv(self.flat, frame)))
        tail = w.move(lambda v: v[:, :, 0, 0], frames[1])
        x = w.move(lambda a, b: torch.cat([a, b], 2).flatten(1), frames[0], frames[2])
        return w.dense(self.head, w.move(lambda a, b: torch.cat([a, b], 1), x, tail))


class Arithmetic(nn.Module):
    """Differences of two signals, and signals with constants: numbers, buffers, in place, and reflected."""

    gain: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor([0.5, 2.0, 1.5, 3.0]).reshape(1, 4, 1, 1, 1))
        self.a = nn.Conv3d(3, 4, 1)
        self.b = nn.Conv3d(3, 4, 3, padding=1)
        self.c = nn.Conv3d(4, 3, 3, padding=1)
        self.head = nn.Linear(3 * 4 * 6 * 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x) * self.gain + 0.1)
        b = F.relu(0.5 * self.b(x))
        x = F.relu(a - b)
        x *= 2
        x = 1.0 - x / 3 - 0.25
        x = F.relu(self.c(x).sub(0.01).div(0.7))
        return 2 + self.head(x.flatten(1))

    def steps(self, w: Walk, x: Node) -> Node:
        a = w.each(lambda v: F.relu(v * self.gain + 0.1), w.pixel(self.a, x))
        b = w.each(lambda v: F.relu(0.5 * v), w.pixel(self.b, x))
        x = w.each(torch.relu, w.add(torch.sub, a, b))
        x = w.each(lambda v: 1.0 - v * 2 / 3 - 0.25, x)
        x = w.each(lambda v: F.relu((v - 0.01) / 0.7), w.conv(self.c, x))
        return w.each(lambda v: 2 + v, w.dense(self.head, w.move(lambda v: v.flatten(1), x)))


class Geometry(nn.Module):
    """Stride beyond the kernel, dilation, groups, padding='same' with even kernels, asymmetric kernels and paddings."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv3d(3, 6, (2, 4, 3), padding="same", groups=3),
                nn.Conv3d(6, 4, (1, 2, 3), padding="same", dilation=(1, 2, 1), groups=2),
                nn.Conv3d(4, 4, (1, 1, 2), stride=(1, 2, 3), padding=(0, 1, 0)),
                nn.Conv3d(4, 3, (3, 2, 1), dilation=(1, 2, 1), padding=(1, 0, 0)),
            ]
        )
        self.head = nn.Linear(3 * 4 * 2 * 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x), inplace=True)
        return self.head(x.flatten(1))

    def steps(self, w: Walk, x: Node) -> Node:
        x = w.each(torch.relu, w.pixel(self.convs[0], x))
        for conv in list(self.convs)[1:]:
            x = w.each(torch.relu, w.conv(conv, x))
        return w.dense(self.head, w.move(lambda v: v.flatten(1), x))


class Pools(nn.Module):
    """Ceil-mode, padded, dilated and overlapping max pools; average pools that count the padding and that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 3, 1)
        self.max_pools = nn.ModuleList(
            [
                nn.MaxPool3d(2, stride=(2, 1, 1), ceil_mode=True),
                nn.MaxPool3d((1, 3, 3), stride=1, padding=(0, 1, 1)),
                nn.MaxPool3d((1, 2, 2), stride=1, dilation=(1, 2, 3)),
            ]
        )
        self.average_pools = nn.ModuleList(
            [
                nn.AvgPool3d((1, 2, 2), stride=1, padding=(0, 1, 1)),
                nn.AvgPool3d(2, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
                nn.AvgPool3d((1, 2, 1), stride=1, divisor_override=3),
                nn.AdaptiveAvgPool3d((1, None, 2)),
            ]
        )
        self.head = nn.Linear(3 * 2 * 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        for pool in (*self.max_pools, *self.average_pools):
            x = pool(x)
        return self.head(x.flatten(1))

    def steps(self, w: Walk, x: Node) -> Node:
        x = w.each(torch.relu, w.pixel(self.conv, x))
        for pool in self.max_pools:
            x = w.max_pool(pool, x)
        for pool in self.average_pools:
            x = w.add(pool, x)
        return w.dense(self.head, w.move(lambda v: v.flatten(1), x))


class Sums(nn.Module):
    """Means and sums over one or several dimensions, kept or dropped, and a linear layer over the last of many."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=1)
        self.mix = nn.Linear(6, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x)).mean(-1)
        x = F.relu(self.mix(x)).sum(dim=3, keepdim=True)
        return self.head(torch.mean(x, [2, 3]))

    def steps(self, w: Walk, x: Node) -> Node:
        x = w.add(lambda v: v.mean(-1), w.each(torch.relu, w.pixel(self.conv, x)))
        x = w.add(lambda v: v.sum(3, keepdim=True), w.each(torch.relu, w.dense(self.mix, x)))
        return w.dense(self.head, w.add(lambda v: v.mean((2, 3)), x))


class Norms(nn.Module):
    """Batch norm on pixels, after a convolution, after one with another user, after ReLU, and after a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.BatchNorm3d(3)
        self.a = nn.Conv3d(3, 4, 3, padding=1)
        self.a_norm = nn.BatchNorm3d(4)
        self.b = nn.Conv3d(4, 4, 3, padding=1)
        self.b_norm = nn.BatchNorm3d(4, affine=False)
        self.late = nn.BatchNorm3d(4)
        self.c = nn.Conv3d(4, 4, 1)
        self.fc = nn.Linear(4 * 4 * 3 * 3, 6)
        self.fc_norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a_norm(self.a(self.pixels(x))))
        raw = self.b(x)
        x = F.relu(self.b_norm(raw)) + F.relu(raw)
        x = F.relu(self.c(self.late(x)))
        x = F.avg_pool3d(x, (1, 2, 2)).flatten(1)
        return self.head(F.relu(self.fc_norm(self.fc(x))))

    def steps(self, w: Walk, x: Node) -> Node:
        x = w.affine(self.pixels, x)
        x = w.each(torch.relu, w.pixel(lambda v: self.a_norm(self.a(v)), x))
        raw = w.conv(self.b, x)
        normed = w.each(lambda v: F.relu(self.b_norm(v)), raw)
        x = w.add(torch.add, normed, w.each(torch.relu, raw))
        x = w.each(torch.relu, w.conv(self.c, w.each(self.late, x)))
        x = w.move(lambda v: v.flatten(1), w.add(lambda v: F.avg_pool3d(v, (1, 2, 2)), x))
        x = w.each(torch.relu, w.dense(lambda v: self.fc_norm(self.fc(v)), x))
        return w.dense(self.head, x)


def given_statistics(norm: nn.Module, of: Tensor) -> Callable[[Tensor], Tensor]:
    """What a group, instance, layer or RMS norm does to anything, with the statistics of one value: an affine map."""
    groups = {nn.GroupNorm: lambda n: n.num_groups, nn.InstanceNorm3d: lambda n: n.num_features}
    if type(norm) in groups:
        by_group = of.reshape(1, groups[type(norm)](norm), -1)
        mean, var = by_group.mean(-1), by_group.var(-1, unbiased=False)
        each = of.shape[1] // by_group.shape[1]
        shape = (-1, *[1] * (of.ndim - 2))
        mean, var = (value.repeat_interleave(each).view(shape) for value in (mean[0], var[0]))
        weight = torch.ones(()) if norm.weight is None else norm.weight.view(shape)
        bias = torch.zeros(()) if norm.bias is None else norm.bias.view(shape)
    else:
        dims = tuple(range(-len(norm.normalized_shape), 0))
        centred = isinstance(norm, nn.LayerNorm)
        mean = of.mean(dims, keepdim=True)[0] if centred else torch.zeros(())
        var = (of - mean).square().mean(dims, keepdim=True)[0]
        weight, bias = norm.weight, norm.bias if centred else torch.zeros(())
    scale = weight / torch.sqrt(var + norm.eps)
    return lambda v: (v - mean) * scale + bias


class Statistics(nn.Module):
    """Group, instance, layer and RMS norm: after layers, after a permuted one, after ReLU, with negative weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv3d(3, 4, 3, padding=1)
        self.groups = nn.GroupNorm(2, 4)
        self.b = nn.Conv3d(4, 4, 3, padding=1, bias=False)
        self.instances = nn.InstanceNorm3d(4, affine=True)
        self.c = nn.Conv3d(4, 6, (1, 3, 3))
        self.channels = nn.LayerNorm(6)
        self.wide = nn.Linear(6, 8)
        self.root = nn.RMSNorm(8, eps=1e-6)
        self.narrow = nn.Linear(8, 6)
        self.plain = nn.InstanceNorm3d(6)
        self.late = nn.GroupNorm(3, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.groups(self.a(x)))
        x = F.relu(self.instances(self.b(x)))
        x = self.channels(self.c(x).permute(0, 2, 3, 4, 1))
        x = self.narrow(F.gelu(self.root(self.wide(x)))).permute(0, 4, 1, 2, 3)
        x = self.late(F.relu(self.plain(x)))
        return self.head(x.mean((2, 3, 4)))

    def steps(self, w: Walk, x: Node) -> Node:
        def normed(kind: Callable[..., Node], layer: Callable[[Tensor], Tensor], norm: nn.Module, x: Node) -> Node:
            of = given_statistics(norm, layer(x.value))
            return kind(lambda v: of(layer(v)), x)

        x = w.each(torch.relu, normed(w.pixel, self.a, self.groups, x))
        x = w.each(torch.relu, normed(w.conv, self.b, self.instances, x))
        x = normed(w.conv, lambda v: self.c(v).permute(0, 2, 3, 4, 1), self.channels, x)
        x = w.each(F.gelu, normed(w.dense, self.wide, self.root, x))
        x = normed(w.dense, lambda v: self.narrow(v).permute(0, 4, 1, 2, 3), self.plain, x)
        x = w.each(self.late, w.each(torch.relu, x))
        return w.dense(self.head, w.add(lambda v: v.mean((2, 3, 4)), x))


class Attending(nn.Module):
    """A non-local block, scaled dot-product attention with and without masks, and a transformer's encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, stride=(1, 2, 2), padding=1)
        self.theta, self.phi, self.g = (nn.Conv3d(4, 2, 1) for _ in range(3))
        self.out = nn.Conv3d(2, 4, 1)
        self.norm = nn.LayerNorm(4)
        self.tokens = nn.Linear(4, 12)
        self.mix = nn.Linear(4, 4)
        self.inner = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True)
        self.head = nn.Linear(4, 5)

    def weights(self, x: Tensor) -> Tensor:
        return torch.softmax(self.theta(x).flatten(2).transpose(1, 2) @ self.phi(x).flatten(2), -1)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.tokens(self.norm(x)).chunk(3, -1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        y = torch.matmul(self.weights(x), self.g(x).flatten(2).transpose(1, 2)).transpose(1, 2)
        x = x + self.out(y.reshape(-1, 2, *x.shape[2:]))
        x = x.flatten(2).transpose(1, 2)
        query, key, value = self.heads(x)
        x = x + self.mix(F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(self.inner(x).mean(1))

    def steps(self, w: Walk, x: Node) -> Node:
        def added(x: Node, y: Node) -> Node:
            return w.add(torch.add, x, y)

        x = w.each(torch.relu, w.pixel(self.conv, x))
        weights, shape = self.weights(x.value), x.value.shape[2:]
        g = w.conv(self.g, x)
        y = w.conv(lambda v: weights @ v.flatten(2).transpose(1, 2), g)
        y = w.move(lambda v: v.transpose(1, 2).reshape(len(v), 2, *shape), y)
        x = w.move(lambda v: v.flatten(2).transpose(1, 2), added(x, w.conv(self.out, y)))

        query, key, _ = self.heads(x.value)
        scores = (query @ key.transpose(-2, -1) / 2**0.5).masked_fill(
            torch.ones(key.shape[-2:][:1] * 2).triu(1).bool(), -torch.inf
        )
        causal = scores.softmax(-1)
        value = w.dense(lambda v: v @ self.tokens.weight[8:].T + self.tokens.bias[8:], w.each(self.norm, x))
        value = w.move(lambda v: v.unflatten(-1, (2, 2)).transpose(1, 2), value)
        y = w.move(lambda v: v.transpose(1, 2).flatten(2), w.dense(lambda v: causal @ v, value))
        x = added(x, w.dense(self.mix, y))

        inner = self.inner
        normed = w.each(inner.norm1, x)
        joint, bias = inner.self_attn.in_proj_weight, inner.self_attn.in_proj_bias
        query, key = (normed.value @ joint[i : i + 4].T + bias[i : i + 4] for i in (0, 4))
        of_heads = [part.unflatten(-1, (2, 2)).transpose(1, 2) for part in (query, key)]
        own = torch.softmax(of_heads[0] @ of_heads[1].transpose(-2, -1) / 2**0.5, -1)
        value = w.dense(lambda v: v @ joint[8:].T + bias[8:], normed)
        value = w.move(lambda v: v.unflatten(-1, (2, 2)).transpose(1, 2), value)
        y = w.move(lambda v: v.transpose(1, 2).flatten(2), w.dense(lambda v: own @ v, value))
        x = added(x, w.dense(inner.self_attn.out_proj, y))
        y = w.each(torch.relu, w.dense(inner.linear1, w.each(inner.norm2, x)))
        x = added(x, w.dense(inner.linear2, y))
        return w.dense(self.head, w.add(lambda v: v.mean(1), x))


class Images(nn.Module):
    """A 2D net on images (N, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        self.a_norm = nn.BatchNorm2d(4)
        self.max = nn.MaxPool2d(3, stride=2, padding=1)
        self.b = nn.Conv2d(4, 6, 3, padding="same")
        self.average = nn.AvgPool2d(2, stride=1)
        self.gather = nn.AdaptiveAvgPool2d((2, 1))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.max(F.relu(self.a_norm(self.a(x))))
        x = self.gather(self.average(F.relu(self.b(x))))
        return self.head(torch.flatten(x, start_dim=1))

    def steps(self, w: Walk, x: Node) -> Node:
        x = w.max_pool(self.max, w.each(torch.relu, w.pixel(lambda v: self.a_norm(self.a(v)), x)))
        x = w.add(self.gather, w.add(self.average, w.each(torch.relu, w.conv(self.b, x))))
        return w.dense(self.head, w.move(lambda v: v.flatten(1), x))


class Series(nn.Module):
    """A 1D net on series (N, C, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(2, 4, 5, padding=2)
        self.a_norm = nn.BatchNorm1d(4)
        self.max = nn.MaxPool1d(3, stride=2, ceil_mode=True)
        self.b = nn.Conv1d(4, 4, 3, dilation=2, padding="same", groups=4)
        self.average = nn.AvgPool1d(2)
        self.gather = nn.AdaptiveAvgPool1d(2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.max(F.relu(self.a_norm(self.a(x))))
        return self.head(self.gather(self.average(F.relu(self.b(x)))).flatten(1))

    def steps(self, w: Walk, x: Node) -> Node:
        kernel = nn.MaxPool1d((3,), (2,), (0,), (1,), ceil_mode=True)
        x = w.max_pool(kernel, w.each(torch.relu, w.pixel(lambda v: self.a_norm(self.a(v)), x)))
        x = w.add(self.gather, w.add(self.average, w.each(torch.relu, w.conv(self.b, x))))
        return w.dense(self.head, w.move(lambda v: v.flatten(1), x))


class Perceptron(nn.Module):
    """Linear layers only, on feature vectors (N, F)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 12, bias=False), nn.ReLU(), nn.Linear(12, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def steps(self, w: Walk, x: Node) -> Node:
        x = w.each(torch.relu, w.pixel(self.net[0], x))
        x = w.each(torch.relu, w.dense(self.net[2], x))
        return w.dense(self.net[4], x)


class Activations(nn.Module):
    """ReLU6, LeakyReLU, SiLU, GELU, sigmoid: what follows sees negative inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv3d(3, 3, (1, 3, 3), padding=(0, 1, 1)) for _ in range(6))
        self.activations = nn.ModuleList(
            [nn.ReLU6(), nn.LeakyReLU(0.1), nn.SiLU(inplace=True), nn.GELU(), nn.GELU("tanh"), nn.Sigmoid()]
        )
        self.head = nn.Linear(3 * 4 * 6 * 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv, activation in zip(self.convs, self.activations, strict=True):
            x = activation(conv(x))
        return self.head(x.flatten(1))

    def steps(self, w: Walk, x: Node) -> Node:
        x = w.each(self.activations[0], w.pixel(self.convs[0], x))
        for conv, activation in list(zip(self.convs, self.activations, strict=True))[1:]:
            x = w.each(activation, w.conv(conv, x))
        return w.dense(self.head, w.move(lambda v: v.flatten(1), x))


class SqueezeExcite(nn.Module):
    """x * sigmoid(fc(relu(fc(mean(x))))), in X3D's manner."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.gate = nn.Sequential(nn.Conv3d(channels, 2, 1), nn.ReLU(), nn.Conv3d(2, channels, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.pool(x))


class Gated(nn.Module):
    """An X3D-style net: split stem, depthwise convolutions, squeeze-excite, SiLU, residual, a gate written first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem_xy = nn.Conv3d(3, 4, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), bias=False)
        self.stem_t = nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0), groups=4, bias=False)
        self.stem_norm = nn.BatchNorm3d(4)
        self.expand = nn.Sequential(nn.Conv3d(4, 6, 1, bias=False), nn.BatchNorm3d(6), nn.ReLU(inplace=True))
        self.depthwise = nn.Conv3d(6, 6, 3, padding=1, groups=6, bias=False)
        self.depthwise_norm = nn.BatchNorm3d(6)
        self.excite = SqueezeExcite(6)
        self.swish = nn.SiLU(inplace=True)
        self.project = nn.Sequential(nn.Conv3d(6, 4, 1, bias=False), nn.BatchNorm3d(4))
        self.gate = nn.Conv3d(4, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem_t(self.stem_xy(x))))
        out = self.depthwise_norm(self.depthwise(self.expand(x)))
        out = self.project(self.swish(self.excite(out)))
        out += x
        out = F.relu(out)
        out = torch.sigmoid(self.gate(out)) * out
        return self.head(F.dropout(out.mean([-1, -2, -3]), 0.5, self.training))

    def steps(self, w: Walk, x: Node) -> Node:
        x = w.conv(lambda v: self.stem_norm(self.stem_t(v)), w.pixel(self.stem_xy, x))
        x = w.each(torch.relu, x)
        out = w.each(torch.relu, w.conv(lambda v: self.expand[1](self.expand[0](v)), x))
        out = w.conv(lambda v: self.depthwise_norm(self.depthwise(v)), out)
        out = w.each(lambda v: F.silu(self.excite(v)), out)
        out = w.conv(self.project, out)
        out = w.each(torch.relu, w.add(torch.add, out, x))
        out = w.each(lambda v: torch.sigmoid(self.gate(v)) * v, out)
        return w.dense(self.head, w.add(lambda v: v.mean((-1, -2, -3)), out))


class SlowFast(nn.Module):
    """Two pathways sliced inside forward, a lateral convolution, concatenation, two pooled heads."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.slow_norm = nn.BatchNorm3d(4)
        self.fast = nn.Conv3d(3, 2, (3, 3, 3), padding=(1, 1, 1))
        self.lateral = nn.Conv3d(2, 4, (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0), bias=False)
        self.slow_2 = nn.Conv3d(8, 5, (1, 3, 3))
        self.fast_2 = nn.Conv3d(2, 2, 3, padding=(1, 0, 0))
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        slow, fast = x[:, :, ::2], x
        slow = F.relu(self.slow_norm(self.slow(slow)))
        fast = F.relu(self.fast(fast))
        slow = torch.cat([slow, F.relu(self.lateral(fast))], dim=1)
        slow = F.relu(self.slow_2(slow))
        fast = F.relu(self.fast_2(fast))
        pooled = [F.adaptive_avg_pool3d(path, 1) for path in (slow, fast)]
        return self.head(torch.cat(pooled, dim=1).flatten(1))

    def steps(self, w: Walk, x: Node) -> Node:
        slow = w.pixel(lambda v: self.slow_norm(self.slow(v)), w.move(lambda v: v[:, :, ::2], x))
        fast = w.each(torch.relu, w.pixel(self.fast, x))
        lateral = w.each(torch.relu, w.conv(self.lateral, fast))
        slow = w.move(lambda a, b: torch.cat([a, b], 1), w.each(torch.relu, slow), lateral)
        slow = w.each(torch.relu, w.conv(self.slow_2, slow))
        fast = w.each(torch.relu, w.conv(self.fast_2, fast))
        slow, fast = (w.add(lambda v: F.adaptive_avg_pool3d(v, 1), path) for path in (slow, fast))
        return w.dense(self.head, w.move(lambda a, b: torch.cat([a, b], 1).flatten(1), slow, fast))


class Normalising(nn.Module):
    """(x - mean) / std in forward, zero padding after it, and a second pixel layer that sees the picture inverted."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.45]).reshape(3, 1, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.25, 0.3]).reshape(3, 1, 1, 1))
        self.a = nn.Conv3d(3, 4, 3, padding=1)
        self.b = nn.Conv3d(3, 4, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        a = F.relu(self.a(F.pad(x, (1, 1, 0, 0), value=0.5)))
        b = F.relu(self.b(1 - x))
        return self.head(torch.cat([a.mean((2, 3, 4)), b.mean((2, 3, 4))], 1))

    def steps(self, w: Walk, x: Node) -> Node:
        x = w.affine(lambda v: (v - self.mean) / self.std, x)
        a = w.move(lambda v: F.pad(v, (1, 1, 0, 0), value=0.5), x)
        a = w.each(torch.relu, w.pixel(self.a, a))
        b = w.each(torch.relu, w.pixel(self.b, w.affine(lambda v: 1 - v, x)))
        a, b = (w.add(lambda v: v.mean((2, 3, 4)), path) for path in (a, b))
        return w.dense(self.head, w.move(lambda p, q: torch.cat([p, q], 1), a, b))


class MapHead(nn.Module):
    """S3D's head: pooled, a 1x1x1 convolution to class maps, their mean. The mean is explained in front of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=1)
        self.pool = nn.AvgPool3d((2, 3, 3), stride=1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Conv3d(4, 5, 1, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv(x)))
        return torch.mean(self.classifier(x), dim=(2, 3, 4))

    def steps(self, w: Walk, x: Node) -> Node:
        x = w.add(self.pool, w.each(torch.relu, w.pixel(self.conv, x)))
        x = w.conv(self.classifier[1], w.add(lambda v: v.mean((2, 3, 4), keepdim=True), x))
        return w.move(lambda v: v.flatten(1), x)


class WithArguments(nn.Module):
    """forward takes more than the input: a tensor per example, a number, a switch, and something that may be None."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(
        self, x: Tensor, prior: Tensor, scale: float = 1.0, squash: bool = False, extra: Tensor | None = None
    ) -> Tensor:
        x = F.relu(self.conv(x))
        if squash:
            x = F.relu6(x)
        x = self.head(x.mean((2, 3, 4))) * scale + prior
        return x if extra is None else x + extra

    def steps(self, w: Walk, x: Node, prior: Tensor, scale: float, squash: bool, extra: Tensor | None) -> Node:
        x = w.each(F.relu6 if squash else torch.relu, w.pixel(self.conv, x))
        x = w.dense(self.head, w.add(lambda v: v.mean((2, 3, 4)), x))
        return w.each(lambda v: v * scale + prior + (0 if extra is None else extra), x)


class TwoInputs(nn.Module):
    """Pictures and optical flow, each with its own first layer and bounds."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures = nn.Conv3d(3, 4, 3)
        self.flow = nn.Conv3d(2, 4, (1, 3, 3))
        self.head = nn.Linear(8, 5)

    def forward(self, pictures: Tensor, flow: Tensor) -> Tensor:
        a = F.relu(self.pictures(pictures)).mean((2, 3, 4))
        b = F.relu(self.flow(flow)).mean((2, 3, 4))
        return self.head(torch.cat([a, b], 1))

    def steps(self, w: Walk, pictures: Node, flow: Node) -> Node:
        a = w.each(torch.relu, w.pixel(self.pictures, pictures))
        b = w.each(torch.relu, w.pixel(self.flow, flow))
        a, b = (w.add(lambda v: v.mean((2, 3, 4)), path) for path in (a, b))
        return w.dense(self.head, w.move(lambda p, q: torch.cat([p, q], 1), a, b))


class Refused(nn.Module):
    """Operations no layer covers, four of them, in a submodule and in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3)
        self.block = nn.Sequential(nn.Conv3d(4, 4, 1), nn.LogSigmoid())
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(F.relu(self.conv(x)))
        x = torch.exp(x)  # refused
        x = x * x.mean(1, keepdim=True)  # refused
        x = torch.softmax(x, dim=1)  # refused
        return self.head(x.mean((2, 3, 4)))


@dataclass(frozen=True)
class Case:
    """A net of the zoo: how to build it, the shape of one example, bounds, and further arguments of its forward."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[Any, ...] = (3, 4, 6, 6)
    low: Any = (-2.1, -2.0, -1.8)
    high: Any = (2.2, 2.4, 2.6)
    args: tuple[Any, ...] = ()

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return randomized(self.build()).to(dtype).eval()

    def inputs(self, n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
        shapes = self.shape if isinstance(self.shape[0], tuple) else (self.shape,)
        bounds = zip(self.low, self.high, strict=True) if len(shapes) > 1 else ((self.low, self.high),)
        made = tuple(
            between(low, high, (n, *shape), seed + i, dtype)
            for i, (shape, (low, high)) in enumerate(zip(shapes, bounds, strict=True))
        )
        return made if len(shapes) > 1 else made[0]


PRIOR = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(3, 5)

ZOO = [
    Case("plain", Plain),
    Case("reused", Reused),
    Case("residual", Residual),
    Case("rearranged", Rearranged),
    Case("arithmetic", Arithmetic),
    Case("geometry", Geometry),
    Case("pools", Pools),
    Case("sums", Sums),
    Case("norms", Norms),
    Case("statistics", Statistics),
    Case("attending", Attending, (3, 3, 4, 4)),
    Case("images", Images, (3, 11, 10)),
    Case("series", Series, (2, 15), (-1.0, -2.0), (3.0, 1.5)),
    Case("perceptron", Perceptron, (7,), -1.0, 2.0),
    Case("activations", Activations),
    Case("gated", Gated, (3, 4, 8, 8)),
    Case("slow-fast", SlowFast),
    Case("normalising", Normalising, low=0.0, high=1.0),
    Case("map-head", MapHead),
    Case("arguments", WithArguments, args=(PRIOR, 0.5, True, None)),
    Case("two-inputs", TwoInputs, ((3, 4, 6, 6), (2, 4, 6, 6)), (-2.0, (-1.0, -3.0)), (2.5, (1.0, 0.5))),
]


def zoo(name: str) -> Case:
    return next(case for case in ZOO if case.name == name)


def between(low: Any, high: Any, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random input of this shape, uniform between its bounds."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low, high = bounded(low, x), bounded(high, x)
    return (low + (high - low) * x).to(dtype)


def randomized(model: nn.Module) -> nn.Module:
    """The model with random batch-norm statistics, scales of both signs, and shifts."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0.0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                sign = torch.where(torch.rand(module.num_features) < 0.1, -1.0, 1.0)
                module.weight.data = sign * torch.empty(module.num_features).uniform_(0.7, 1.4)
                nn.init.normal_(module.bias, 0.1, 0.1)
        elif (
            isinstance(module, (nn.GroupNorm, nn.InstanceNorm3d, nn.LayerNorm, nn.RMSNorm))
            and module.weight is not None
        ):
            sign = torch.where(torch.rand(module.weight.shape) < 0.4, -1.0, 1.0)
            module.weight.data = sign * torch.empty(module.weight.shape).uniform_(0.7, 1.4)
            if not isinstance(module, nn.RMSNorm):
                nn.init.normal_(module.bias, 0.1, 0.1)
    return model


STOCK = {
    "r3d_18": (8, 32, 32),
    "mc3_18": (8, 32, 32),
    "r2plus1d_18": (8, 32, 32),
    "s3d": (13, 209, 209),
    "c3d": (16, 112, 112),
}
"""The stock models and the smallest clip (T, H, W) each takes, or a small one where any will do."""


def stock_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A stock model with random weights and random batch-norm statistics, in eval mode, for ten classes."""
    from torchvision.models import video

    from captum_dtd.models import C3D

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = C3D(num_classes=10) if name == "c3d" else getattr(video, name)(weights=None, num_classes=10)
        return randomized(model).to(dtype).eval()
