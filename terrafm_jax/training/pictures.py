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
_CALM = 0.04  # least range of normalized values from black to white; 4 std are 1
_GAMMA = 0.6  # of true color: forest and water beside bare ground
_SHORT = {"s1": "S1", "s2_l1c": "L1C", "s2_l2a": "L2A"}


def unpatchify(patches: np.ndarray, patch: int) -> np.ndarray:
    """[h, w, p * p * C] -> [h * p, w * p, C], the inverse of ``models.terrafm.patchify``."""
    rows, cols, _ = patches.shape
    pixels = patches.reshape(rows, cols, patch, patch, -1).transpose(0, 2, 1, 3, 4)
    return pixels.reshape(rows * patch, cols * patch, -1)


def _shown(sensor: str, image: np.ndarray) -> np.ndarray:
    """Normalized [H, W, C] -> float32 [H, W, 3]: true color for Sentinel-2, (VV, VH, 0.5 + VV - VH) for Sentinel-1."""
    image = image.astype(np.float32)
    if sensor != "s1":
        return image[..., list(SENSORS[sensor].indices(["B04", "B03", "B02"]))]
    vv, vh = image[..., 0], image[..., 1]
    return np.stack([vv, vh, 0.5 + vv - vh], axis=-1)


def stretch(sensor: str, images: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """What is drawn black, [3] per channel, and how much above it is drawn white, in normalized values.

    One for all ``images`` (views of a tile, normalized [H, W, C]), so that a view brighter than another looks it.
    Radar fills the scale of the normalization (mean +- 2 std). Land in true color does not: clouds widen the std, and
    ground lies in the darkest tenth. There each channel loses its own 2nd percentile (haze), and all share one range.
    """
    pixels = np.concatenate([_shown(sensor, image)[image.any(-1)] for image in images] or [np.zeros((0, 3))])
    if sensor == "s1" or not len(pixels):  # zero in all bands: filled
        return np.zeros(3, np.float32), 1.0
    low, ground, high = np.percentile(pixels, (2, 25, 98), axis=0)
    span = min((high - low).max(), 8 * (ground - low).max() + 2 * _CALM)  # clouds must not blacken the ground
    return low.astype(np.float32), max(float(span), _CALM)  # nor may noise of a uniform tile pass for structure


def as_rgb(sensor: str, image: np.ndarray, low: np.ndarray | float = 0.0, span: float = 1.0) -> np.ndarray:
    """Normalized [H, W, C] -> uint8 [H, W, 3]; ``low`` and ``span`` of :func:`stretch`."""
    shown = np.clip((_shown(sensor, image) - low) / span, 0, 1)
    return (255 * shown ** (1.0 if sensor == "s1" else _GAMMA)).astype(np.uint8)


def view_sheet(sets: Sequence[ViewSet], spec: ViewSpec, samples: int = 4) -> Image.Image:
    """One row per sample and sensor, one column per view; the tag says which network saw the sensor.

    Views of a row share one stretch; the tag of an optical one gives the normalized values drawn black and white (0
    and 1 are the mean -+ 2 std), so that a tile far off the statistics is noticed. A gray picture means that neither
    network saw this sensor in this view.
    """
    columns = [(views, v) for views in sets for v in range(views.student.shape[1])]
    rows = min(samples, sets[0].student.shape[0])
    height = rows * (len(spec.sensors) * (_CELL + _TEXT) + 2 * _GAP)
    sheet = Image.new("RGB", (len(columns) * (_CELL + _GAP) + _GAP, height), "white")
    draw = ImageDraw.Draw(sheet)
    for row in range(rows):
        top = row * (len(spec.sensors) * (_CELL + _TEXT) + 2 * _GAP)
        for i, sensor in enumerate(spec.sensors):
            images = [unpatchify(views.patches[sensor][row, v], spec.patch) for views, v in columns]
            seen = [_seen(views, row, v, i) for views, v in columns]
            low, span = stretch(sensor, [image for image, by in zip(images, seen, strict=True) if by])
            scale = "" if sensor == "s1" else f" {low.mean():.2f}-{low.mean() + span:.2f}"
            for column, (image, by) in enumerate(zip(images, seen, strict=True)):
                picture = as_rgb(sensor, image, low, span) if by else np.full((*image.shape[:2], 3), 0xD8, np.uint8)
                place = (_GAP + column * (_CELL + _GAP), top + i * (_CELL + _TEXT) + _TEXT)
                text = f"{_SHORT.get(sensor, sensor)} {len(picture)} px{scale if by else ''}"
                _paste(sheet, draw, place, picture, text, by)
    return sheet


def _seen(views: ViewSet, row: int, v: int, sensor: int) -> list[str]:
    """The networks that saw a sensor in a view."""
    return [n for n, mask in (("student", views.student), ("teacher", views.teacher)) if mask[row, v, sensor]]


def _paste(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, place: tuple[int, int], picture: np.ndarray, text: str,
    seen: Sequence[str],
) -> None:  # fmt: skip
    sheet.paste(Image.fromarray(picture).resize((_CELL, _CELL), Image.Resampling.NEAREST), place)
    draw.text((place[0], place[1] - _TEXT + 1), text, fill="black")
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
