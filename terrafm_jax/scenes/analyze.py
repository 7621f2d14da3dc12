"""What to do with embeddings on disk: change between two, similar places, pictures."""

from __future__ import annotations

import csv
import dataclasses
import heapq
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from terrafm_jax.paths import write_atomically
from terrafm_jax.scenes import output
from terrafm_jax.scenes import tags as tags_lib
from terrafm_jax.scenes.errors import SceneError, first_line
from terrafm_jax.scenes.readback import Embedding, lonlat, lonlat_bounds, open_embedding, place_of, whole

_log = logging.getLogger(__name__)


def unit(values: np.ndarray) -> np.ndarray:
    """Vectors [..., d] of length one; NaN stays NaN."""
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)


def change(first: Path, second: Path, out: Path) -> tuple[dict[str, float], list[str]]:
    """Writes 1 - cosine of the tokens of two dates (0 = same, 2 = opposite) as a COG.

    Returns:
      Its quantiles, and reasons to doubt the comparison (also logged, and written to the tags).

    Raises:
      SceneError: other grid, weights, sensors, bands or sampling.
    """
    with open_embedding(first) as a, open_embedding(second) as b:
        _features(a), _features(b)
        faults = []
        if a.grid != b.grid:
            faults.append("they lie on different grids; embed both with the same --aoi, --gsd and --stride")
        if a.tags[tags_lib.WEIGHTS] != b.tags[tags_lib.WEIGHTS] or a.width != b.width:
            faults.append("they come from different weights; embed both with the same --checkpoint")
        wrong, doubts = tags_lib.against(a.tags, b.tags)
        faults += wrong
        if faults:
            raise SceneError(f"{first} and {second}: {'; '.join(faults)}")
        for text in doubts:
            _log.warning("%s and %s: %s", first, second, text)
        result = np.full((a.grid.height, a.grid.width, 1), np.nan, np.float32)
        for block in a.blocks():
            result[(*block, 0)] = 1.0 - (unit(a.read(block)) * unit(b.read(block))).sum(-1)
        tags = {k: v for k, v in a.tags.items() if k not in (tags_lib.JOB, tags_lib.WARNINGS)}
        tags |= {tags_lib.CHANGE: f"1 - cosine of {first.name} and {second.name}"}
        tags |= {tags_lib.WARNINGS: "; ".join(doubts)} if doubts else {}
        output.write_cog(out, result, a.grid, output.Meta(("change",), tags))
    found = result[np.isfinite(result)]
    return {f"p{q}": float(np.percentile(found, q)) for q in (50, 90, 99)} if found.size else {}, doubts


def _features(found: Embedding) -> None:
    """Raises SceneError if a file holds a map of change and no embedding."""
    if tags_lib.CHANGE in found.tags:
        raise SceneError(f"{found.path}: is a map of change and holds no embedding; give what it was made from")


def vector_at(found: Embedding, lon: float, lat: float) -> np.ndarray:
    """float32 [d]: the token of an embedding at a place. Raises SceneError if it is outside or nodata."""
    _features(found)
    place = place_of(found.grid, lon, lat)
    if place is None:
        west, south, east, north = lonlat_bounds(found.grid)
        raise SceneError(
            f"{found.path}: {lon:g}, {lat:g} (lon, lat) lies outside of longitudes {west:.4f} to {east:.4f}, "
            f"latitudes {south:.4f} to {north:.4f}; give a place inside"
        )
    row, column = place
    vector = found.read((slice(row, row + 1), slice(column, column + 1)))[0, 0]
    if not np.isfinite(vector).all():
        raise SceneError(f"{found.path}: there is no data at {lon:g}, {lat:g} (lon, lat); give another place")
    return vector


def search(
    query: np.ndarray,
    paths: Sequence[Path],
    count: int,
    tags: Mapping[str, str] | None = None,
    said: list[str] | None = None,
) -> list[dict[str, Any]]:
    """The ``count`` most similar tokens (GeoTIFF, Zarr), windows or places (GeoParquet) of many outputs, best first.

    Reads block by block, so that memory does not grow with the number or size of outputs.

    Args:
      query: float32 [d]. tags: of the output that it comes from.
      said: collects reasons to doubt the comparison with an output; each is also logged.

    Raises:
      SceneError: unreadable, or of other weights.
    """
    compared = _Compared(tags or {}, len(query), [] if said is None else said)
    best: list[tuple[float, int, dict[str, Any]]] = []
    serial = 0
    for path in paths:
        for score, hit in _hits(unit(query), path, count, compared):
            serial += 1
            entry = (score, -serial, hit)
            if len(best) < count:
                heapq.heappush(best, entry)
            elif entry > best[0]:
                heapq.heapreplace(best, entry)
    return [{"similarity": round(score, 6), **hit} for score, _, hit in sorted(best, reverse=True)]


def _hits(query: np.ndarray, path: Path, count: int, compared: _Compared) -> Iterator[tuple[float, dict[str, Any]]]:
    if path.suffix.lower() in (".parquet", ".geoparquet"):
        yield from _parquet_hits(query, path, count, compared)
        return
    with open_embedding(path) as source:
        _features(source)
        compared(path, source.tags, source.width)
        for rows, columns in source.blocks():
            scores = (unit(source.read((rows, columns))) @ query).ravel()
            for i in _top(scores, count):
                down, across = divmod(int(i), columns.stop - columns.start)
                row, column = rows.start + down, columns.start + across
                lon, lat = lonlat(source.grid, row, column)
                yield float(scores[i]), {"file": str(path), "row": row, "column": column, "lon": lon, "lat": lat}


def _parquet_hits(
    query: np.ndarray, path: Path, count: int, compared: _Compared
) -> Iterator[tuple[float, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        tags = {k.decode(): v.decode() for k, v in (file.schema_arrow.metadata or {}).items()}
        if tags_lib.WEIGHTS not in tags or "embedding" not in file.schema_arrow.names:
            raise SceneError(f"{path}: is no embedding of this program (metadata {tags_lib.WEIGHTS} is missing)")
        x, y = ("centre_lon", "centre_lat") if "centre_lon" in file.schema_arrow.names else ("lon", "lat")
        row = 0
        for batch in file.iter_batches(4096, columns=["embedding", x, y]):
            vectors = np.asarray(batch["embedding"].flatten()).reshape(len(batch), -1)
            compared(path, tags, vectors.shape[1])
            scores = unit(vectors) @ query
            for i in _top(scores, count):
                lon, lat = batch[x][int(i)].as_py(), batch[y][int(i)].as_py()
                yield float(scores[i]), {"file": str(path), "row": row + int(i), "column": 0, "lon": lon, "lat": lat}
            row += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise SceneError(f"{path}: cannot be read as Parquet ({first_line(error)}); fetch or write it again") from None


@dataclasses.dataclass
class _Compared:
    """Whether outputs can be compared with a query of ``width`` features from an output with ``tags``."""

    tags: Mapping[str, str]
    width: int
    said: list[str]

    def __call__(self, path: Path, tags: Mapping[str, str], width: int) -> None:
        """Logs reasons to doubt the comparison. Raises SceneError for other weights."""
        expected = self.tags.get(tags_lib.WEIGHTS, "")
        if (expected and tags[tags_lib.WEIGHTS] != expected) or width != self.width:
            raise SceneError(f"{path}: comes from other weights than the query; embed both with the same --checkpoint")
        wrong, doubts = tags_lib.against(self.tags, tags)
        for text in (f"{path.name} and the query: {t}" for t in wrong + doubts):
            if text not in self.said:
                self.said.append(text)
                _log.warning(text)


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    """Positions of the largest finite scores."""
    finite = np.flatnonzero(np.isfinite(scores))
    if len(finite) > count:
        finite = finite[np.argpartition(-scores[finite], count - 1)[:count]]
    return finite


def write_hits(out: Path, hits: Sequence[dict[str, Any]]) -> None:
    """Hits as CSV, or as GeoJSON points for ``.geojson`` and ``.json``."""
    try:
        if out.suffix.lower() in (".geojson", ".json"):
            features = [
                {"type": "Feature", "geometry": {"type": "Point", "coordinates": [h["lon"], h["lat"]]}, "properties": h}
                for h in hits
            ]
            out.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
            return
        with open(out, "w", newline="") as file:
            writer = csv.DictWriter(file, ["similarity", "file", "row", "column", "lon", "lat"])
            writer.writeheader()
            writer.writerows(hits)
    except OSError as error:
        raise SceneError(f"{out}: cannot be written ({first_line(error)})") from None


# --- pictures ------------------------------------------------------------------------------------


def change_picture(path: Path, out: Path) -> tuple[float, float] | None:
    """A map of change as gray, dark where nothing changed; None, and no picture, if the file is none.

    Returns the values shown as black and as white.
    """
    with open_embedding(path) as source:
        if tags_lib.CHANGE not in source.tags:
            return None
        image = whole(source)[..., 0]
    shown, ends = _gray(image, (0, 99))
    _save_image(out, shown)
    return ends


def pca_picture(path: Path, out: Path) -> np.ndarray:
    """The three main components of the tokens as red, green and blue; returns their shares of the variance."""
    with open_embedding(path) as source:
        width = source.width
        count, total, square = 0, np.zeros(width), np.zeros((width, width))
        for block in source.blocks():
            values = source.read(block).reshape(-1, width)
            values = values[np.isfinite(values).all(-1)].astype(np.float64)
            count, total, square = count + len(values), total + values.sum(0), square + values.T @ values
        if count < 4:
            raise SceneError(f"{path}: holds {count} valid tokens, a picture needs some; embed a larger area")
        mean = total / count
        shares, axes = np.linalg.eigh(square / count - np.outer(mean, mean))
        axes = axes[:, ::-1][:, :3]
        axes = axes * np.where(axes[np.abs(axes).argmax(0), np.arange(3)] < 0, -1, 1)  # the same colors every time
        image = np.full((source.grid.height, source.grid.width, 3), np.nan, np.float32)
        for block in source.blocks():
            image[block] = (source.read(block) - mean) @ axes
    low, high = np.nanpercentile(image, (2, 98), axis=(0, 1))
    _save_image(out, (image - low) / np.maximum(high - low, 1e-12))
    return np.maximum(shares[::-1][:3], 0) / max(shares.sum(), 1e-12)


def similarity_picture(path: Path, lon: float, lat: float, out: Path) -> tuple[float, float]:
    """Cosine similarity of every token to the one at a place, dark to bright; the place itself is red.

    Returns the values shown as black and as white.
    """
    with open_embedding(path) as source:
        query = unit(vector_at(source, lon, lat))
        image = np.full((source.grid.height, source.grid.width), np.nan, np.float32)
        for block in source.blocks():
            image[block] = unit(source.read(block)) @ query
        place = place_of(source.grid, lon, lat)
    shown, ends = _gray(image, (2, 100))
    shown[place] = (1, 0, 0)
    _save_image(out, shown)
    return ends


def _gray(values: np.ndarray, percentiles: tuple[float, float]) -> tuple[np.ndarray, tuple[float, float]]:
    """[H, W] -> [H, W, 3], 0 at the lower percentile of the valid values, 1 at the upper one; and these two values."""
    if not np.isfinite(values).any():
        return np.repeat(values[..., None], 3, -1), (np.nan, np.nan)
    low, high = (float(v) for v in np.nanpercentile(values, percentiles))
    return np.repeat(((values - low) / max(high - low, 1e-12))[..., None], 3, -1), (low, high)


def _save_image(out: Path, image: np.ndarray) -> None:
    """[H, W, 3] in 0..1 as PNG with nodata transparent; small images are enlarged."""
    valid = np.isfinite(image).all(-1)
    pixels = (np.clip(np.nan_to_num(image), 0, 1) * 255).round().astype(np.uint8)
    picture = Image.fromarray(np.dstack([pixels, valid.astype(np.uint8) * 255]))
    factor = max(1, 512 // max(picture.size))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    try:
        picture.save(buffer, Image.registered_extensions()[out.suffix.lower()])
    except (KeyError, OSError, ValueError) as error:  # no format, or one without transparency
        raise SceneError(f"{out}: no picture can be written so ({first_line(error)}); give a .png") from None
    try:
        write_atomically(out, buffer.getvalue())
    except OSError as error:
        raise SceneError(f"{out}: cannot be written ({error.strerror})") from None
