"""TerraFM for PyTorch in one file: named sensors in raw units go in, class and patch tokens come out.

Needs PyTorch and nothing else. Lies in an exported folder as ``modeling_terrafm.py``, beside ``config.json``
(shape of the network, band order, statistics) and ``model.safetensors``::

    from modeling_terrafm import TerraFM
    model = TerraFM.from_pretrained("FOLDER")
    out = model({"s2_l2a": dn, "s1": db})     # [B, bands, H, W]: harmonized DN, dB; bands as in model.bands
    out.cls, out.patches                      # [B, d], [B, h, w, d]

Method: TerraFM, arXiv 2506.06281; the cross-attention over sensors is a reconstruction. Apache-2.0.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Features(NamedTuple):
    """cls [B, d], patches [B, h, w, d], and (cls, patches) of every requested layer, all after the final norm."""

    cls: Tensor
    patches: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...] = ()


class Projection(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj1 = nn.Linear(3 * width, 3 * width, bias=False)
        self.norm_input = nn.LayerNorm(3 * width)
        self.proj2 = nn.Linear(3 * width, 3 * width)
        self.proj3 = nn.Linear(3 * width, width)


class Fusion(nn.Module):
    """Learned queries attend to the sensors present at each position; their normed results are pooled."""

    def __init__(self, width: int, queries: int, heads: int):
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.zeros(queries, 3 * width))
        self.key = nn.Linear(3 * width, 3 * width, bias=False)
        self.pool = nn.Parameter(torch.zeros(3 * width))

    def forward(self, tokens: Tensor, values: Tensor, norm: nn.Module, present: Tensor) -> Tensor:
        """tokens, values [B, N, M, 3d], present bool [B, M] -> [B, N, 3d]."""
        b, n, m, width = tokens.shape
        keys = self.key(tokens).reshape(b, n, m, self.heads, -1)
        queries = self.queries.reshape(self.queries.shape[0], self.heads, -1)
        scores = torch.einsum("bnmhc,qhc->bnqhm", keys, queries) * keys.shape[-1] ** -0.5
        absent = torch.finfo(scores.dtype).min
        weights = scores.masked_fill(~present[:, None, None, None], absent).softmax(-1)
        fused = torch.einsum("bnqhm,bnmhc->bnqhc", weights, values.reshape(b, n, m, self.heads, -1))
        fused = norm(fused.reshape(b, n, self.queries.shape[0], width))
        return ((fused @ self.pool).softmax(-1)[..., None] * fused).sum(2)


class PatchEmbed(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, patch = config["width"], config["patch"]
        for sensor in config["sensors"]:
            conv = nn.Conv2d(len(config["bands"][sensor]), 3 * width, patch, patch)
            setattr(self, f"conv2d_{sensor}", conv)
            setattr(self, f"{sensor}_embed", nn.Parameter(torch.zeros(1, 3 * width)))
        self.projection = Projection(width)
        if config["fusion"]:
            self.fusion = Fusion(width, config["queries"], config["fusion_heads"])

    def forward(self, images: dict[str, Tensor], present: Tensor | None) -> Tensor:
        """Normalized images [B, C, H, W] -> [B, N, d]."""
        tokens = []
        for sensor, image in images.items():
            stem = getattr(self, f"conv2d_{sensor}")(image).flatten(2).transpose(1, 2)
            tokens.append(stem + getattr(self, f"{sensor}_embed"))
        p = self.projection
        if len(tokens) == 1:
            fused = p.norm_input(p.proj1(tokens[0]))
        else:
            stacked = torch.stack(tokens, 2)
            if present is None:
                present = torch.ones(stacked.shape[0], stacked.shape[2], dtype=torch.bool, device=stacked.device)
            fused = self.fusion(stacked, p.proj1(stacked), p.norm_input, present)
        return p.proj3(p.proj2(fused))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Head(nn.Module):
    """The DINO head: class tokens [B, d] -> logits [B, K]."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        sizes = (config["width"], config["head_hidden"], config["head_hidden"], config["head_bottleneck"])
        self.mlp = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.last_layer = nn.Linear(config["head_bottleneck"], config["prototypes"], bias=False)

    def forward(self, cls: Tensor) -> Tensor:
        x = self.mlp[2](F.gelu(self.mlp[1](F.gelu(self.mlp[0](cls)))))
        return F.normalize(x, dim=-1) @ F.normalize(self.last_layer.weight, dim=1).T


class TerraFM(nn.Module):
    """The encoder.

    Args:
      config: what ``config.json`` holds: width, depth, heads, hidden, patch, grid, sensors, bands, units, mean, std,
        fusion (with queries, fusion_heads) and head (with prototypes, head_hidden, head_bottleneck).
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        width = config["width"]
        self.bands: dict[str, list[str]] = config["bands"]
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config["grid"] ** 2, width))
        self.blocks = nn.ModuleList(Block(width, config["heads"], config["hidden"]) for _ in range(config["depth"]))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if config.get("head"):
            self.head = Head(config)
        for sensor in config["sensors"]:  # outside the state dict, which stays upstream's
            mean, std = (torch.tensor(config[name][sensor])[:, None, None] for name in ("mean", "std"))
            self.register_buffer(f"{sensor}_mean", mean, persistent=False)
            self.register_buffer(f"{sensor}_std", std, persistent=False)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> TerraFM:
        """Reads ``config.json`` and ``model.safetensors``; every tensor must match."""
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            model = cls(json.load(file)["torch"])
        model.load_state_dict(read_safetensors(os.path.join(folder, "model.safetensors")), strict=True)
        return model.eval()

    def normalize(self, sensor: str, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """Raw units [B, C, H, W] to the network's scale; what :meth:`measured` leaves out gets the mean."""
        mean, std = getattr(self, f"{sensor}_mean"), getattr(self, f"{sensor}_std")
        x = (image - (mean - 2.0 * std)) / (4.0 * std)
        x = torch.where(self.measured(sensor, image, mask), x, torch.full_like(x, 0.5))
        return x.to(mean.dtype)  # rasters may be float64

    def measured(self, sensor: str, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """bool [B, 1, H, W]: pixels of [B, C, H, W] that are finite in all bands, no nodata and not masked."""
        measured = torch.isfinite(image).all(1, keepdim=True) & ~self.nodata(sensor, image)
        return measured if mask is None else measured & ~mask[:, None]

    def nodata(self, sensor: str, image: Tensor) -> Tensor:
        """bool [B, 1, H, W]: zero in all bands of Sentinel-2; in some bands it is dark ground, and 0 dB a value."""
        zero = (image == 0).all(1, keepdim=True)
        return zero if self.config["units"][sensor] == "DN" else torch.zeros_like(zero)

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings [1, 1 + rows * columns, d], interpolated as the released code does."""
        grid = self.config["grid"]
        if (rows, columns) == (grid, grid):
            return self.pos_embed
        table = self.pos_embed[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, scale_factor=((rows + 0.1) / grid, (columns + 0.1) / grid), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], 1)

    def forward(
        self,
        images: dict[str, Tensor],
        present: Tensor | None = None,
        mask: Tensor | None = None,
        layers: tuple[int, ...] = (),
    ) -> Features:
        """Encodes images of one or several sensors.

        Args:
          images: sensor -> [B, bands, H, W] in raw units; H and W multiples of the patch. NaN, and zero in all bands
            of Sentinel-2, say that a pixel was not measured.
          present: bool [B, sensors of ``images`` in the model's order], for images that lack some. Without it a
            sensor takes no part in the fusion of an image in which it has no pixel.
          mask: bool [B, H, W], True where a pixel was not measured.
          layers: blocks (0-based, negative from the end) to return as well.
        """
        images = self._checked(images)
        if present is None and len(images) > 1:
            present = sensors_present([self.measured(k, x, mask) for k, x in images.items()])
        return self.encode({k: self.normalize(k, x, mask) for k, x in images.items()}, present, layers)

    def encode(
        self, images: dict[str, Tensor], present: Tensor | None = None, layers: tuple[int, ...] = ()
    ) -> Features:
        """The same for images that are normalized already (see :meth:`normalize`)."""
        images = self._checked(images)
        tokens = self.patch_embed(images, present)
        patch = self.config["patch"]
        rows, columns = (int(n) // patch for n in next(iter(images.values())).shape[-2:])
        x = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], 1) + self.positions(rows, columns)
        wanted = [i % len(self.blocks) for i in layers]
        tapped = {}
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in wanted:
                tapped[i] = self._split(x, rows, columns)
        return Features(*self._split(x, rows, columns), tuple(tapped[i] for i in wanted))

    def keep_bands(self, sensor: str, names: list[str]) -> TerraFM:
        """Cuts the stem of ``sensor`` to the named bands, in that order, for data that lacks the others."""
        if sensor not in self.bands:
            raise ValueError(f"sensor {sensor!r}; expected one of {list(self.bands)}")
        unknown = [name for name in names if name not in self.bands[sensor]]
        if unknown or not names:
            raise ValueError(f"{sensor}: unknown bands {unknown}; expected some of {self.bands[sensor]}")
        index = torch.tensor([self.bands[sensor].index(name) for name in names])
        conv = getattr(self.patch_embed, f"conv2d_{sensor}")
        conv.weight = nn.Parameter(conv.weight.detach()[:, index.to(conv.weight.device)].clone())
        conv.in_channels = len(names)
        for statistic in ("mean", "std"):
            name = f"{sensor}_{statistic}"
            setattr(self, name, getattr(self, name)[index.to(conv.weight.device)])
        self.bands = {**self.bands, sensor: list(names)}
        return self

    def _split(self, x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        return x[:, 0], x[:, 1:].reshape(x.shape[0], rows, columns, x.shape[-1])

    def _checked(self, images: dict[str, Tensor], resized: bool = False) -> dict[str, Tensor]:
        """Images in the model's order; ``resized``: sides come later. Raises TypeError, ValueError."""
        known, patch = self.config["sensors"], 1 if resized else self.config["patch"]
        if not isinstance(images, Mapping):
            raise TypeError(
                f"images: found {type(images).__name__}; expected a dict of sensor -> tensor [B, bands, H, W], "
                f"such as {{{known[-1]!r}: images}}; sensors are {known}"
            )
        if not images or any(sensor not in known for sensor in images):
            raise ValueError(f"sensors {list(images)}; expected some of {known}")
        if len(images) > 1 and not self.config["fusion"]:
            raise ValueError(f"sensors {list(images)} together, but these weights have no fusion; give one")
        for sensor, image in images.items():
            if not isinstance(image, Tensor):
                raise TypeError(f"{sensor}: found {type(image).__name__}; expected a torch.Tensor [B, bands, H, W]")
            if image.ndim != 4 or image.shape[1] != len(self.bands[sensor]) or any(n % patch for n in image.shape[2:]):
                sides = "" if resized else f", H and W multiples of {patch}"
                raise ValueError(
                    f"{sensor}: {tuple(image.shape)}; expected [B, {len(self.bands[sensor])}, H, W] "
                    f"({', '.join(self.bands[sensor])}){sides}"
                )
        first = next(iter(images.values()))
        if any(x.shape[0] != first.shape[0] or x.shape[2:] != first.shape[2:] for x in images.values()):
            shapes = {sensor: tuple(image.shape) for sensor, image in images.items()}
            raise ValueError(f"{shapes}; expected the same B, H and W of all sensors: the same ground, pixel by pixel")
        return {sensor: images[sensor] for sensor in known if sensor in images}


def sensors_present(measured: list[Tensor]) -> Tensor:
    """bool [B, sensors] of measured values [B, C, H, W] by sensor; all in an image of nothing, which stays defined."""
    present = torch.stack([m.flatten(1).any(1) for m in measured], 1)
    return present | ~present.any(1, keepdim=True)


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file (header length, JSON header, values), without the safetensors package."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = bytearray(file.read())
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        if stop > len(data):
            raise ValueError(f"{path}: truncated at tensor {name}; copy the file again")
        dtype = _DTYPES[entry["dtype"]]
        values = torch.frombuffer(data, dtype=dtype, count=(stop - start) // dtype.itemsize, offset=start)
        found[name] = values.reshape(entry["shape"]).float()
    return found
