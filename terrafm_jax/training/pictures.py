"""What the networks really get to see, before a run spends its hours: the views of a batch, the land cover drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from terrafm_jax import landcover
from terrafm_jax.sensors import SENSORS
from terrafm_jax.ssl.views import ViewSet, ViewSpec

_CELL, _GAP, _TEXT = 112, 6, 24  # px
_SHORT = {"s1": "S1", "s2_l1c": "L1C", "s2_l2a": "L2A"}


def unpatchify(patches: np.ndarray, patch: int) -> np.ndarray:
    """[h, w, p * p * C] -> [h * p, w * p, C], the inverse of ``models.terrafm.patchify``."""
    rows, cols, _ = patches.shape
    pixels = patches.reshape(rows, cols, patch, patch, -1).transpose(0, 2, 1, 3, 4)
    return pixels.reshape(rows * patch, cols * patch, -1)


def as_rgb(sensor: str, image: np.ndarray) -> np.ndarray:
    """Normalized [H, W, C] -> uint8 [H, W, 3]: true color for Sentinel-2, (VV, VH, VV - VH) for Sentinel-1.

    The scale is that of the normalization (mean +- 2 std), so an image that is too dark or too bright here is
    too dark or too bright for the network.
    """
    image = image.astype(np.float32)
    if sensor == "s1":
        vv, vh = image[..., 0], image[..., 1]
        shown = np.stack([vv, vh, 0.5 + vv - vh], axis=-1)
    else:
        shown = image[..., list(SENSORS[sensor].indices(["B04", "B03", "B02"]))]
    return (255 * np.clip(shown, 0, 1)).astype(np.uint8)


def view_sheet(sets: Sequence[ViewSet], spec: ViewSpec, samples: int = 4) -> Image.Image:
    """One row per sample and sensor, one column per view; the tag says which network saw the sensor.

    A gray picture means that neither network saw this sensor in this view.
    """
    columns = sum(s.student.shape[1] for s in sets)
    rows = min(samples, sets[0].student.shape[0])
    height = rows * (len(spec.sensors) * (_CELL + _TEXT) + 2 * _GAP)
    sheet = Image.new("RGB", (columns * (_CELL + _GAP) + _GAP, height), "white")
    draw = ImageDraw.Draw(sheet)
    for row in range(rows):
        top = row * (len(spec.sensors) * (_CELL + _TEXT) + 2 * _GAP)
        column = 0
        for views in sets:
            for v in range(views.student.shape[1]):
                for i, sensor in enumerate(spec.sensors):
                    place = (_GAP + column * (_CELL + _GAP), top + i * (_CELL + _TEXT) + _TEXT)
                    _paste(sheet, draw, place, views, (row, v), (i, sensor), spec.patch)
                column += 1
    return sheet


def _paste(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, place: tuple[int, int], views: ViewSet,
    which: tuple[int, int], sensor: tuple[int, str], patch: int,
) -> None:  # fmt: skip
    (row, v), (i, name) = which, sensor
    seen = [n for n, mask in (("student", views.student), ("teacher", views.teacher)) if mask[row, v, i]]
    picture = Image.fromarray(as_rgb(name, unpatchify(views.patches[name][row, v], patch)))
    size = f"{picture.width} px"
    if not seen:
        picture = Image.new("RGB", picture.size, "#d8d8d8")
    sheet.paste(picture.resize((_CELL, _CELL), Image.Resampling.NEAREST), place)
    draw.text((place[0], place[1] - _TEXT + 1), f"{_SHORT.get(name, name)} {size}", fill="black")
    draw.text((place[0], place[1] - _TEXT // 2), " + ".join(seen) or "unseen", fill="#0b6e4f" if seen else "#999999")


def save_views(path: Any, sets: Sequence[ViewSet], spec: ViewSpec) -> None:
    """Writes :func:`view_sheet` as a PNG to ``path`` (an etils path, local or remote)."""
    host = [s._replace(**{f: np.asarray(getattr(s, f)) for f in ("student", "teacher")},
                       patches={k: np.asarray(x, np.float32) for k, x in s.patches.items()}) for s in sets]  # fmt: skip
    # The teacher sees global views only.
    host[1:] = [s._replace(teacher=np.zeros_like(s.teacher)) for s in host[1:]]
    buffer = io.BytesIO()
    view_sheet(host, spec).save(buffer, format="PNG")
    path.write_bytes(buffer.getvalue())


def class_chart(before: np.ndarray, after: np.ndarray) -> Image.Image:
    """Two bars a category that occurs: its share before sampling (pale) and of what sampling draws.

    Args:
      before, after: shares that sum to 1, float [NUM_CATEGORIES].
    """
    shown = np.flatnonzero((before > 0) | (after > 0))
    bar, line, left, full = 11, 32, 170, 420  # px
    scale = full / max(float(before.max()), float(after.max()))
    chart = Image.new("RGB", (left + full + 60, (len(shown) + 1) * line), "white")
    draw = ImageDraw.Draw(chart)
    draw.text((left, 8), "share before sampling (pale), share drawn", fill="black")
    for row, i in enumerate(shown, 1):
        category, top = landcover.CATEGORIES[i], row * line
        color = np.frombuffer(bytes.fromhex(category.color[1:]), np.uint8)
        draw.text((6, top + 6), category.title, fill="black")
        for y, share, fill in ((top, before[i], (color // 3) + 168), (top + bar + 1, after[i], color)):
            width = round(scale * float(share))
            draw.rectangle((left, y, left + width, y + bar), fill=tuple(map(int, fill)), outline="#777777")
            draw.text((left + width + 5, y), f"{share:.1%}", fill="black")
    return chart


def save_classes(path: Any, before: np.ndarray, after: np.ndarray) -> None:
    """Writes :func:`class_chart` as a PNG to ``path`` (an etils path, local or remote)."""
    buffer = io.BytesIO()
    class_chart(before, after).save(buffer, format="PNG")
    path.write_bytes(buffer.getvalue())
