"""TerraFM's networks in plain PyTorch, as the paper describes them: what our step is measured against.

Written for the benchmark from the paper and the released code's parameter names, with the means a good
engineer would reach for: convolution stems, fused qkv, scaled_dot_product_attention, one batch per crop
size. ``folded`` gives the peer our weight products for stems, fusion and projection.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class PeerSpec:
    """Shape of the networks; ``bands`` per sensor, in the order of the masks.

    ``folded`` and ``room`` are our optimizations: a folded stem runs over the share ``room`` of the views plus one,
    those that see its sensor first.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    patch: int = 16
    grid: int = 14
    bands: tuple[tuple[str, int], ...] = (("s1", 2), ("s2_l1c", 12), ("s2_l2a", 12))
    queries: int = 5
    fusion_heads: int = 16
    drop_path: float = 0.1
    prototypes: int = 65536
    head_hidden: int = 2048
    head_bottleneck: int = 256
    folded: bool = False
    room: float = 1.0


class PatchEmbed(nn.Module):
    """Images of all sensors and a mask of those present -> tokens [N, T, d], by cross-attention of queries."""

    def __init__(self, spec: PeerSpec):
        super().__init__()
        self.spec, wide = spec, 3 * spec.width
        self.stems = nn.ModuleDict({s: nn.Conv2d(c, wide, spec.patch, spec.patch) for s, c in spec.bands})
        self.embeds = nn.ParameterDict({s: nn.Parameter(torch.zeros(1, wide)) for s, _ in spec.bands})
        self.queries = nn.Parameter(torch.randn(spec.queries, wide) * 0.02)
        self.key = nn.Linear(wide, wide, bias=False)
        self.pool = nn.Parameter(torch.randn(wide) * 0.02)
        self.proj1 = nn.Linear(wide, wide, bias=False)
        self.norm_input = nn.LayerNorm(wide)
        self.proj2, self.proj3 = nn.Linear(wide, wide), nn.Linear(wide, spec.width)

    def forward(self, images: Mapping[str, Tensor], present: Tensor) -> Tensor:
        return self._folded(images, present) if self.spec.folded else self._unfolded(images, present)

    def _unfolded(self, images: Mapping[str, Tensor], present: Tensor) -> Tensor:
        heads, size = self.spec.fusion_heads, 3 * self.spec.width // self.spec.fusion_heads
        tokens = [stem(images[s]).flatten(2).transpose(1, 2) + self.embeds[s] for s, stem in self.stems.items()]
        x = torch.stack(tokens, 2)  # [N, T, M, D]
        n, t, m, wide = x.shape
        k = self.key(x).view(n, t, m, heads, size)
        v = self.proj1(x).view(n, t, m, heads, size)
        q = self.queries.view(-1, heads, size).to(k.dtype)
        scores = torch.einsum("ntmhc,qhc->nthqm", k, q).float() * size**-0.5
        scores = scores.masked_fill(~present[:, None, None, None, :], float("-inf"))
        fused = torch.einsum("nthqm,ntmhc->ntqhc", scores.softmax(-1).to(v.dtype), v)
        normed = self.norm_input(fused.reshape(n, t, -1, wide))
        share = (normed.float() @ self.pool.float()).softmax(-1).to(normed.dtype)
        return self.proj3(self.proj2((share[..., None] * normed).sum(2)))

    def _folded(self, images: Mapping[str, Tensor], present: Tensor) -> Tensor:
        """The same function with stem, key, query and value weights multiplied first, and proj3 proj2 as one."""
        spec, wide = self.spec, 3 * self.spec.width
        heads, size = spec.fusion_heads, wide // spec.fusion_heads
        asked = torch.einsum(
            "hcd,qhc->qhd", self.key.weight.view(heads, size, wide), self.queries.view(-1, heads, size)
        )
        columns = torch.cat([self.proj1.weight, asked.reshape(-1, wide) * size**-0.5])
        values, scores = [], []
        for seen, (s, stem) in zip(present.T, self.stems.items(), strict=True):
            kernel = columns @ stem.weight.flatten(1)
            bias = columns @ (stem.bias + self.embeds[s][0])
            x = self._product(self._patches(images[s]), kernel, bias, seen)
            values.append(x[..., :wide].unflatten(-1, (heads, size)))
            scores.append(x[..., wide:].unflatten(-1, (spec.queries, heads)))
        score = torch.stack(scores, -1).float().masked_fill(~present[:, None, None, None, :], float("-inf"))
        weight = score.softmax(-1)  # [N, T, Q, H, M]
        core = self._pooled(values, weight)
        out = self.proj3.weight @ self.proj2.weight
        kernel = out * self.norm_input.weight
        bias = out @ self.norm_input.bias + self.proj3.weight @ self.proj2.bias + self.proj3.bias
        return F.linear(core.to(values[0].dtype), kernel, bias)

    def _product(self, patches: Tensor, kernel: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
        """A folded stem over as many views as ``room`` allows, those that see the sensor first; zeros for the rest."""
        count = len(patches)
        places = min(count, math.ceil(count * self.spec.room) + 1)
        if places == count:
            return F.linear(patches, kernel, bias)
        rows = seen.to(torch.int8).argsort(descending=True, stable=True)[:places]
        found = F.linear(patches[rows], kernel, bias)
        return found.new_zeros(count, *found.shape[1:]).index_copy(0, rows, found)

    def _pooled(self, values: Sequence[Tensor], weight: Tensor) -> Tensor:
        """Normalized, pooled vectors without forming one per query: moments from sums and the Gram matrix."""
        wide = 3 * self.spec.width
        v = torch.stack(values, -2).float()  # [N, T, H, M, c]
        pool = (self.pool * self.norm_input.weight).view(self.spec.fusion_heads, -1)
        mean = torch.einsum("ntqhm,nthm->ntq", weight, v.sum(-1)) / wide
        gram = torch.einsum("nthmc,nthlc->nthml", v, v)
        second = torch.einsum("ntqhm,ntqhl,nthml->ntq", weight, weight, gram) / wide
        inverse = torch.rsqrt((second - mean.square()).clamp_min(0) + self.norm_input.eps)
        asked = torch.einsum("ntqhm,nthmc,hc->ntq", weight, v, pool)
        logits = (asked - mean * pool.sum()) * inverse + (self.pool * self.norm_input.bias).sum()
        share = logits.softmax(-1) * inverse
        mixed = torch.einsum("ntq,ntqhm->nthm", share, weight)
        return (mixed[..., None] * v).sum(-2).flatten(-2) - (share * mean).sum(-1)[..., None]

    def _patches(self, image: Tensor) -> Tensor:
        n, c, height, width = image.shape
        p = self.spec.patch
        x = image.view(n, c, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(n, (height // p) * (width // p), c * p * p)


class Block(nn.Module):
    """Pre-norm attention and MLP; drop path per sample."""

    def __init__(self, spec: PeerSpec, rate: float):
        super().__init__()
        d, hidden = spec.width, int(spec.width * spec.mlp_ratio)
        self.heads, self.rate = spec.heads, rate
        self.norm1, self.norm2 = nn.LayerNorm(d, eps=1e-6), nn.LayerNorm(d, eps=1e-6)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.fc1, self.fc2 = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)
        x = x + self._drop(self.proj(attended))
        return x + self._drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    def _drop(self, x: Tensor) -> Tensor:
        if not (self.training and self.rate):
            return x
        keep = 1.0 - self.rate
        return x * (torch.empty(len(x), 1, 1, device=x.device, dtype=x.dtype).bernoulli_(keep) / keep)


class Backbone(nn.Module):
    """Class tokens [N, d] of views of one size."""

    def __init__(self, spec: PeerSpec):
        super().__init__()
        self.spec = spec
        self.patch_embed = PatchEmbed(spec)
        self.cls_token = nn.Parameter(torch.randn(1, 1, spec.width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + spec.grid**2, spec.width) * 0.02)
        self.blocks = nn.ModuleList(Block(spec, float(r)) for r in torch.linspace(0, spec.drop_path, spec.depth))
        self.norm = nn.LayerNorm(spec.width, eps=1e-6)

    def forward(self, images: Mapping[str, Tensor], present: Tensor) -> Tensor:
        side = next(iter(images.values())).shape[-1] // self.spec.patch
        x = self.patch_embed(images, present)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self._positions(side)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def _positions(self, side: int) -> Tensor:
        grid = self.spec.grid
        if side == grid:
            return self.pos_embed
        table = self.pos_embed[:, 1:].view(1, grid, grid, -1).permute(0, 3, 1, 2)
        scale = (side + 0.1) / grid  # upstream's rule
        table = F.interpolate(table, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], table.permute(0, 2, 3, 1).reshape(1, side * side, -1)], 1)


class Head(nn.Module):
    """DINO head: MLP, L2 norm, weight-normed prototypes with the gain fixed at one."""

    def __init__(self, spec: PeerSpec):
        super().__init__()
        h, b = spec.head_hidden, spec.head_bottleneck
        self.mlp = nn.Sequential(
            nn.Linear(spec.width, h), nn.GELU(), nn.Linear(h, h), nn.GELU(), nn.Linear(h, b)
        )  # fmt: skip
        self.last_layer = nn.Parameter(torch.empty(spec.prototypes, b).uniform_(-(b**-0.5), b**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.mlp(x).float(), dim=-1), F.normalize(self.last_layer, dim=-1))


class Network(nn.Module):
    """Backbone and head; views of each size in one batch, the head once."""

    def __init__(self, spec: PeerSpec):
        super().__init__()
        self.backbone, self.head = Backbone(spec), Head(spec)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, sizes: Sequence[tuple[Mapping[str, Tensor], Tensor]], samples: int) -> Tensor:
        """Logits [B, V, K] of (images, present) per size, sample-major."""
        tokens = [self.backbone(*views).view(samples, -1, self.backbone.spec.width) for views in sizes]
        merged = torch.cat(tokens, 1)
        return self.head(merged.flatten(0, 1)).view(samples, merged.shape[1], -1)


def dino_loss(student: Tensor, teacher: Tensor, center: Tensor, student_temp: float, teacher_temp: float) -> Tensor:
    """Mean cross-entropy over (teacher view i, student view j != i), with as few passes over [B, V, K] as possible."""
    g, v = teacher.shape[1], student.shape[1]
    probs = ((teacher.float() - center) / teacher_temp).softmax(-1)
    scaled = student.float() / student_temp
    lse = scaled.logsumexp(-1)
    agreement = (scaled * probs.sum(1, keepdim=True)).sum(-1)
    own = (scaled[:, :g] * probs).sum(-1)
    total = (g * lse - agreement).sum() - (lse[:, :g] - own).sum()
    return total / (len(student) * g * (v - 1))
