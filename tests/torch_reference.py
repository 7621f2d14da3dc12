"""TerraFM and the DINO head in plain PyTorch, written from the paper's description for the tests alone.

Shares nothing with the package: convolutions on NCHW images, every product as written, positions through
``F.interpolate``. Parameter names are those of the released state dict; ``fusion`` and the head have ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = {"s1": 2, "s2_l1c": 12, "s2_l2a": 12}


class Projection(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj1 = nn.Linear(3 * width, 3 * width, bias=False)
        self.norm_input = nn.LayerNorm(3 * width)
        self.proj2 = nn.Linear(3 * width, 3 * width)
        self.proj3 = nn.Linear(3 * width, width)


class Fusion(nn.Module):
    """Queries attend over the sensors present at each position; their normed results are pooled."""

    def __init__(self, width: int, queries: int, heads: int):
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.zeros(queries, 3 * width))
        self.key = nn.Linear(3 * width, 3 * width, bias=False)
        self.pool = nn.Parameter(torch.zeros(3 * width))

    def forward(self, tokens: list[Tensor], projection: Projection, present: Tensor) -> Tensor:
        """M tokens [B, N, 3d], present [B, M] -> [B, N, 3d] before proj2."""
        stacked = torch.stack(tokens, 2)
        b, n, m, width = stacked.shape
        k = self.key(stacked).view(b, n, m, self.heads, -1).permute(0, 1, 3, 2, 4)
        v = projection.proj1(stacked).view(b, n, m, self.heads, -1).permute(0, 1, 3, 2, 4)
        q = self.queries.view(len(self.queries), self.heads, -1).transpose(0, 1)
        mask = torch.where(present, 0.0, -torch.inf)[:, None, None, None, :].to(stacked.dtype)
        attended = F.softmax(q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5 + mask, -1) @ v
        z = projection.norm_input(attended.transpose(2, 3).reshape(b, n, len(self.queries), width))
        return (F.softmax(z @ self.pool, -1)[..., None] * z).sum(2)


class PatchEmbed(nn.Module):
    def __init__(self, width: int, queries: int, heads: int):
        super().__init__()
        for name, channels in CHANNELS.items():
            setattr(self, f"conv2d_{name}", nn.Conv2d(channels, 3 * width, 16, 16))
            setattr(self, f"{name}_embed", nn.Parameter(torch.zeros(1, 3 * width)))
        self.projection = Projection(width)
        if queries:
            self.fusion = Fusion(width, queries, heads)

    def stem(self, name: str, image: Tensor) -> Tensor:
        tokens = getattr(self, f"conv2d_{name}")(image).flatten(2).transpose(1, 2)
        return tokens + getattr(self, f"{name}_embed")

    def forward(self, images: dict[str, Tensor], present: Tensor | None) -> Tensor:
        tokens = [self.stem(name, image) for name, image in images.items()]
        if len(tokens) == 1:
            fused = self.projection.norm_input(self.projection.proj1(tokens[0]))
        else:
            if present is None:
                present = torch.ones(len(tokens[0]), len(tokens), dtype=torch.bool)
            fused = self.fusion(tokens, self.projection, present)
        return self.projection.proj3(self.projection.proj2(fused))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * (width // self.heads) ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class TerraFM(nn.Module):
    """``queries`` 0 is the released network. ``forward`` takes {sensor: [B, C, H, W]} and gives [B, 1 + N, d]."""

    def __init__(self, width: int, depth: int, heads: int, queries: int = 0, fusion_heads: int = 16):
        super().__init__()
        self.patch_embed = PatchEmbed(width, queries, fusion_heads)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 197, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def positions(self, height: int, width: int) -> Tensor:
        """Pixels -> [1, 1 + N, d], upstream's interpolation."""
        if height == width == 224:
            return self.pos_embed
        rows, columns = height // 16, width // 16
        grid = self.pos_embed[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
        factors = ((rows + 0.1) / 14, (columns + 0.1) / 14)
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
        if grid.shape[-2:] != (rows, columns):
            raise AssertionError((tuple(grid.shape), rows, columns))
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    def forward(
        self, images: dict[str, Tensor], present: Tensor | None = None, layers: tuple[int, ...] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        tokens = self.patch_embed(images, present)
        size = next(iter(images.values())).shape[-2:]
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1) + self.positions(*size)
        tapped = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in layers:
                tapped.append(self.norm(x))
        return self.norm(x), tapped


class DinoHead(nn.Module):
    """d -> hidden -> hidden -> bottleneck, unit length, weight-normed prototypes of gain 1."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int):
        super().__init__()
        self.mlp = nn.ModuleList([nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, bottleneck)])
        self.last_layer = nn.Linear(bottleneck, prototypes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp[2](F.gelu(self.mlp[1](F.gelu(self.mlp[0](x)))))
        return F.normalize(x, dim=-1) @ F.normalize(self.last_layer.weight, dim=1).T


def load(module: nn.Module, flat: dict) -> nn.Module:
    """Copies JAX parameters ("blocks/0/attn/qkv/kernel" -> array) into ``module``; every name must match."""
    state = {}
    for path, value in flat.items():
        names = path.split("/")
        value = torch.from_numpy(value.copy())
        if names[-1] == "kernel":
            if names[-2].startswith("conv2d_"):
                bands = CHANNELS[names[-2].removeprefix("conv2d_")]
                value = value.reshape(16, 16, bands, -1).permute(3, 2, 0, 1)
            else:
                value = value.T
            names[-1] = "weight"
        elif names[-1] == "scale":
            names[-1] = "weight"
        state[".".join(names)] = value
    module.load_state_dict(state, strict=True)
    return module.eval()
