"""A fine-tuned TerraFM for PyTorch: images of named sensors go in, probabilities or values come out.

Needs PyTorch and nothing else. Lies in an exported folder as ``finetuned_terrafm.py`` beside ``modeling_terrafm.py``,
``config.json``, ``model.safetensors`` (encoder), ``task.json`` and ``head.safetensors``::

    from finetuned_terrafm import FineTuned
    model = FineTuned.from_pretrained("FOLDER")
    out = model({"s2_l2a": dn})     # [B, bands, H, W] in raw units; bands as in model.bands
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from modeling_terrafm import TerraFM, read_safetensors, sensors_present
except ImportError:  # inside the package
    from terrafm_jax.export.torch_model import TerraFM, read_safetensors, sensors_present


class LinearHead(nn.Module):
    """(BatchNorm and) one linear layer on the class token."""

    def __init__(self, width: int, outputs: int, norm: bool):
        super().__init__()
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.linear = nn.Linear(width, outputs)

    def forward(self, cls: Tensor, maps: list[Tensor]) -> Tensor:
        return self.linear(self.norm(cls))


class PatchHead(nn.Module):
    """Linear to classes x patch x patch of every patch token."""

    def __init__(self, width: int, outputs: int, patch: int):
        super().__init__()
        self.patch, self.outputs = patch, outputs
        self.linear = nn.Linear(width, outputs * patch * patch)

    def forward(self, cls: Tensor, maps: list[Tensor]) -> Tensor:
        x = self.linear(maps[-1])
        b, h, w, _ = x.shape
        x = x.reshape(b, h, w, self.patch, self.patch, self.outputs).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(b, self.outputs, h * self.patch, w * self.patch)


class Block(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class UperHead(nn.Module):
    """UPerNet on four maps of one grid (its auxiliary output serves training only and is left out)."""

    pools = (1, 2, 3, 6)

    def __init__(self, width: int, outputs: int, channels: int):
        super().__init__()
        self.neck0a, self.neck0b = (nn.ConvTranspose2d(width, width, 2, 2) for _ in range(2))
        self.neck0_norm = nn.BatchNorm2d(width)
        self.neck1 = nn.ConvTranspose2d(width, width, 2, 2)
        for bins in self.pools:
            self.add_module(f"pool{bins}", Block(width, channels, 1))
        for i in range(3):
            self.add_module(f"lateral{i}", Block(width, channels, 1))
            self.add_module(f"fpn{i}", Block(channels, channels, 3))
        self.pools_block = Block(width + len(self.pools) * channels, channels, 3)
        self.fuse = Block(4 * channels, channels, 3)
        self.classes = nn.Conv2d(channels, outputs, 1)

    def forward(self, cls: Tensor, maps: list[Tensor]) -> Tensor:
        a, b, c, d = (m.permute(0, 3, 1, 2) for m in maps)
        a = self.neck0b(F.gelu(self.neck0_norm(self.neck0a(a))))
        b = self.neck1(b)
        d = F.max_pool2d(d, 2, 2, ceil_mode=True)
        pooled = [d]
        for bins in self.pools:
            small = self.get_submodule(f"pool{bins}")(F.adaptive_avg_pool2d(d, bins))
            pooled.append(_resize(small, d.shape[2:]))
        levels = [self.get_submodule(f"lateral{i}")(x) for i, x in enumerate((a, b, c))]
        levels.append(self.pools_block(torch.cat(pooled, 1)))
        for i in (2, 1, 0):
            levels[i] = levels[i] + _resize(levels[i + 1], levels[i].shape[2:])
        outs = [self.get_submodule(f"fpn{i}")(levels[i]) for i in range(3)] + [levels[3]]
        fused = self.fuse(torch.cat([_resize(x, outs[0].shape[2:]) for x in outs], 1))
        return self.classes(fused)


def _resize(x: Tensor, size: Any) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class FineTuned(nn.Module):
    """Encoder and task head; :attr:`task` says what comes out, :attr:`classes` what the columns mean."""

    def __init__(self, encoder: TerraFM, task: dict[str, Any]):
        super().__init__()
        self.encoder, self.settings = encoder, task
        self.task, self.classes, self.bands = task["task"], task["classes"], task["bands"]
        width, outputs = encoder.config["width"], task["outputs"]
        if task["head"] == "upernet":
            self.head: nn.Module = UperHead(width, outputs, task["upernet_channels"])
        elif task["head"] == "patch_linear":
            self.head = PatchHead(width, outputs, encoder.config["patch"])
        else:
            self.head = LinearHead(width, outputs, task["head_norm"])

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> FineTuned:
        """Reads an exported folder; every tensor must match."""
        with open(os.path.join(folder, "task.json"), encoding="utf-8") as file:
            task = json.load(file)
        model = cls(TerraFM.from_pretrained(folder), task)
        model.head.load_state_dict(read_safetensors(os.path.join(folder, "head.safetensors")), strict=True)
        for sensor, names in task["bands"].items():
            model.encoder.keep_bands(sensor, names)
        return model.eval()

    def _prepared(self, sensor: str, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Normalized and resized over measured values alone; what has too few of them under it gets the mean."""
        mean, std = (getattr(self.encoder, f"{sensor}_{name}") for name in ("mean", "std"))
        x = (image - mean) / (4.0 * std)
        measured = torch.isfinite(x)
        x = torch.where(measured, x, torch.zeros_like(x))
        if tuple(x.shape[2:]) != tuple(size):
            how = {"mode": "bilinear", "align_corners": False, "antialias": True}
            weight = F.interpolate(measured.to(x.dtype), size, **how)
            total = F.interpolate(x, size, **how) / weight.clamp(min=1e-3)
            x = torch.where(weight > 1e-3, total, torch.zeros_like(total))
        return (x + 0.5).to(mean.dtype)

    def forward(self, images: dict[str, Tensor]) -> Tensor:
        """[B, bands, H, W] per sensor (harmonized DN, dB) -> probabilities [B, C], [B, C, H, W], or values [B, 1].

        NaN, and zero in all bands of Sentinel-2, say that nothing was measured. A sensor without any value in an
        image takes no part in its fusion.
        """
        images = self.encoder._checked(images, resized=True)
        if not set(images) <= set(self.bands):
            raise ValueError(f"sensors {list(images)}; expected some of those tuned on: {list(self.bands)}")
        images = {k: torch.where(self.encoder.nodata(k, x), torch.nan, x) for k, x in images.items()}
        own = next(iter(images.values())).shape[2:]
        size = self.settings["image_size"]
        patch = self.encoder.config["patch"]
        wanted = (size, size) if size else tuple(-(-n // patch) * patch for n in own)
        layers = tuple(self.settings["layers"])
        present = sensors_present([torch.isfinite(x) for x in images.values()]) if len(images) > 1 else None
        found = self.encoder.encode({k: self._prepared(k, x, wanted) for k, x in images.items()}, present, layers)
        maps = [m for _, m in found.layers] if layers else [found.patches]
        logits = self.head(found.cls, maps)
        if self.task == "segmentation":
            return _resize(logits, own).softmax(1)
        if self.task == "multilabel":
            return logits.sigmoid()
        if self.task == "regression":
            mean, deviation = self.settings["scale"]
            return logits * deviation + mean
        return logits.softmax(-1)
