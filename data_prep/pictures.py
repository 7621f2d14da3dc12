"""Pictures of a prepared data set: map of the cells, class histogram, quick-looks, band histograms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.dataset import DataSet
from terrafm_jax import landcover
from terrafm_jax.data.sampling import SamplingSpec
from terrafm_jax.data.tiles import SPLITS, unpack_valid
from terrafm_jax.sensors import SENSORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


SPLIT_COLORS = dict(zip(SPLITS, ("#3b6fb6", "#e08214", "#b2182b"), strict=True))
NODATA = "#ff00ff"
VIEWS = (
    "Sentinel-2: B04, B03, B02",
    "Sentinel-2: B08, B04, B03",
    "Sentinel-1: VV, VH, VV-VH",
    "land cover: WorldCover",
)
_POINTS = 200_000  # tiles on the map; more would only lie on each other
_SAMPLE = 64  # records that the band histograms are made of


def draw_all(data: DataSet, out: Path, tiles: int) -> dict[str, str]:
    """Draws everything into ``out``; returns file name -> title, in the order to show."""
    made = {"map.png": "Where the tiles lie, by split and by majority land cover"}
    world_map(data, out / "map.png")
    class_histogram(data, out / "classes.png")
    made["classes.png"] = "Land cover before and after sampling"
    quick_looks(data, out / "tiles.png", tiles)
    made["tiles.png"] = "Tiles: true color, false color, Sentinel-1 (fixed ranges of dB), WorldCover in its own colors"
    records = [data.record(*place) for place in _places(data, _SAMPLE)]
    for key in SENSORS:
        if any(r[key]["present"] for r in records):
            band_histograms(data, records, key, out / f"bands_{key}.png")
            name = SENSORS[key].title.removesuffix(" RTC")  # the tiles may be GRD
            made[f"bands_{key}.png"] = f"{name}: values against the published statistics"
    return made


def _plt() -> Any:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    _plt().close(figure)


def _places(data: DataSet, count: int) -> list[tuple[str, int]]:
    """(split, number) of up to ``count`` records of the first split, land-cover classes in turn."""
    split = next(iter(data.splits))
    rows = data.index[split]["landcover"]
    queues = [np.flatnonzero(rows == i) for i in range(landcover.NUM_CATEGORIES) if (rows == i).any()]
    share = -(-count // len(queues))
    spread = [q[np.linspace(0, len(q) - 1, min(len(q), share)).astype(int)] for q in queues]
    rounds = [[int(q[i]) for q in spread if i < len(q)] for i in range(share)]
    chosen = [number for turn in rounds for number in turn]
    rest = [int(n) for n in np.linspace(0, len(rows) - 1, min(len(rows), 4 * count)).astype(int)]
    return [(split, n) for n in dict.fromkeys([*chosen, *rest])][:count]


# --- map --------------------------------------------------------------------------------------


def world_map(data: DataSet, path: Path) -> None:
    """All tiles on the map of the world, colored by split and by majority class; a small region is drawn larger."""
    plt = _plt()
    names = list(data.splits)
    rows = np.concatenate([data.index[n] for n in names])
    counts = np.bincount(rows["landcover"], minlength=landcover.NUM_CATEGORIES)
    split = np.repeat(np.arange(len(names)), [len(data.index[n]) for n in names])
    drawn = np.linspace(0, len(rows) - 1, min(len(rows), _POINTS)).astype(int)
    rows, split = rows[drawn], split[drawn]
    order = np.argsort(-np.bincount(split, minlength=len(names))[split], kind="stable")  # rare splits on top
    rows, split = rows[order], split[order]
    by_split = np.array([SPLIT_COLORS[n] for n in names])[split]
    by_class = np.array([c.color for c in landcover.CATEGORIES])[rows["landcover"]]
    splits = [(f"{n} ({len(data.index[n])})", SPLIT_COLORS[n]) for n in names]
    shown = [landcover.CATEGORIES[i] for i in np.argsort(-counts, kind="stable") if counts[i]]
    classes = [(f"{c.title} ({counts[landcover.category(c.name)]})", c.color) for c in shown]
    maps = [("tiles by split", by_split, splits), ("tiles by majority land cover", by_class, classes)]
    small = np.ptp(rows["lon"]) < 40 and np.ptp(rows["lat"]) < 30
    if small:
        maps.insert(0, ("where the region lies", by_split, splits))
    figure, axes = plt.subplots(len(maps), 1, figsize=(11, 5.4 * len(maps)), constrained_layout=True)
    size = float(np.clip(20_000 / max(len(rows), 1), 0.5, 24))
    for number, (axis, (title, colors, entries)) in enumerate(zip(axes, maps, strict=True)):
        axis.scatter(rows["lon"], rows["lat"], s=size, c=colors, linewidths=0.1, edgecolors="#333333")
        _legend(axis, entries)
        if small and number:
            _region(axis, title, rows)
        else:
            _world(axis, title)
    _save(figure, path)


def _region(axis: Axes, title: str, rows: np.ndarray) -> None:
    margin = max(0.1, 0.1 * float(max(np.ptp(rows["lon"]), np.ptp(rows["lat"]))))
    axis.set_xlim(rows["lon"].min() - margin, rows["lon"].max() + margin)
    axis.set_ylim(rows["lat"].min() - margin, rows["lat"].max() + margin)
    axis.set(title=title, facecolor="#f3f6f9", xlabel="longitude, °", ylabel="latitude, °")
    axis.set_aspect(1 / max(0.1, np.cos(np.radians(float(rows["lat"].mean())))))
    axis.grid(alpha=0.3)


def _legend(axis: Axes, entries: list[tuple[str, str]]) -> None:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], marker="o", linestyle="", color=c, markeredgecolor="#555555", label=t) for t, c in entries]
    axis.legend(handles=marks, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)


def _world(axis: Axes, title: str) -> None:
    axis.set(xlim=(-180, 180), ylim=(-90, 90), title=title, facecolor="#f3f6f9")
    axis.set(xlabel="longitude, °", ylabel="latitude, °")
    axis.set_xticks(range(-180, 181, 30))
    axis.set_yticks(range(-90, 91, 30))
    axis.axhline(0, color="#99a5b1", linewidth=0.7)
    axis.grid(alpha=0.35)


# --- classes ----------------------------------------------------------------------------------


def class_histogram(data: DataSet, path: Path) -> None:
    """Share of each category before sampling (with the sea that preparation dropped) and among what each mode draws."""
    from matplotlib.patches import Patch

    plt = _plt()
    orders = data.sampling()
    natural = orders.pop("uniform").natural_histogram()
    shares = {
        f"before sampling ({next(iter(data.splits))})": natural,
        **{_drawn(order.spec): order.expected_histogram() for order in orders.values()},
    }
    shown = [i for i in range(landcover.NUM_CATEGORIES) if natural[i] > 0]
    figure, axis = plt.subplots(figsize=(11, 4.5), constrained_layout=True)
    width = 0.8 / len(shares)
    marks: list[Any] = []
    for turn, (name, values) in enumerate(shares.items()):
        left = np.arange(len(shown)) + (turn - (len(shares) - 1) / 2) * width
        colors = [landcover.CATEGORIES[i].color for i in shown]
        lines = ["#dddddd" if _is_dark(color) else "#333333" for color in colors]  # hatching takes the edge's color
        hatch = ("", "//", "xx")[turn]
        axis.bar(left, 100 * values[shown], width, color=colors, edgecolor=lines, linewidth=0.6, hatch=hatch)
        marks.append(Patch(facecolor="#ffffff", edgecolor="#333333", linewidth=0.6, hatch=hatch, label=name))
    axis.set_xticks(range(len(shown)), [landcover.CATEGORIES[i].title for i in shown], rotation=25, ha="right")
    axis.set_ylabel("share of the tiles, %")
    axis.set_title("land cover before sampling, and of what sampling draws")
    axis.set_xlim(-0.5, max(len(shown), 5) - 0.5)  # one class alone would fill the picture
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _drawn(spec: SamplingSpec) -> str:
    setting = {"paper": f"sea_keep {spec.sea_keep:g}", "balanced": f"power {spec.power:g}"}[spec.mode]
    return f"drawn: {spec.mode}, {setting}"


def _is_dark(color: str) -> bool:
    red, green, blue = bytes.fromhex(color.lstrip("#"))
    return 0.3 * red + 0.6 * green + 0.1 * blue < 90


# --- quick-looks ------------------------------------------------------------------------------


def quick_looks(data: DataSet, path: Path, count: int) -> None:
    """A sheet of tiles, four pictures each."""
    plt = _plt()
    records = [data.record(*place) for place in _places(data, count)]
    pictures = [views(record) for record in records]
    kept = [v for v in range(len(VIEWS)) if any(found[v] is not None for found in pictures)]
    columns = 2 if len(records) > 1 else 1
    rows, wide = -(-len(records) // columns), len(kept)
    figure, axes = plt.subplots(
        rows, wide * columns, figsize=(1.9 * wide * columns, 2.15 * rows + 0.5), squeeze=False, layout="constrained"
    )
    figure.get_layout_engine().set(h_pad=0.08)  # or the topmost titles touch the edge
    for axis in axes.flat:
        axis.set_axis_off()
    shown: set[int] = set()
    for i, (record, found) in enumerate(zip(records, pictures, strict=True)):
        line = axes[i // columns, wide * (i % columns) : wide * (i % columns + 1)]
        for axis, view in zip(line, kept, strict=True):
            picture, name = found[view], VIEWS[view]
            if picture is None:
                axis.set_box_aspect(1)
                axis.text(0.5, 0.5, f"no {name.split(':')[0]}", fontsize=7, color="#777777", ha="center", va="center")
            else:
                axis.imshow(picture, interpolation="nearest")
            if i < columns and picture is not None:
                box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.5}
                axis.text(0.02, 0.02, name, fontsize=6, transform=axis.transAxes, bbox=box)
        title = landcover.CATEGORIES[record["landcover"]].title
        kinds = ", ".join(record[key]["kind"] or SENSORS[key].title for key in _shown_sensors(record))
        line[0].set_title(f"{record['tile_id']}  {title}  ({kinds})", fontsize=7, loc="left")
        if found[-1] is not None:
            shown |= set(np.unique(record["landcover_map"]).tolist())
    entries = [(landcover.CATEGORIES[c].title, landcover.CATEGORIES[c].color) for c in sorted(shown)]
    _patches(figure, [*entries, ("no measurement", NODATA)])
    _save(figure, path)


def _patches(figure: Any, entries: list[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=color, edgecolor="#555555", linewidth=0.5, label=title) for title, color in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=7, fontsize=8, frameon=False)


def views(record: dict[str, Any]) -> list[np.ndarray | None]:
    """True color, false color, Sentinel-1 composite and land cover of a record, each [H, W, 3] in 0..1 or None."""
    optical = next((key for key in _shown_sensors(record) if key != "s1"), None)
    true = _optical(record[optical], optical, ("B04", "B03", "B02")) if optical else None
    false = _optical(record[optical], optical, ("B08", "B04", "B03")) if optical else None
    radar = _radar(record["s1"]) if record["s1"]["present"] else None
    cover = None
    if (record["landcover_map"] != landcover.UNKNOWN).any():
        palette = np.array([tuple(bytes.fromhex(c.color.lstrip("#"))) for c in landcover.CATEGORIES]) / 255.0
        cover = palette[record["landcover_map"]]
    return [true, false, radar, cover]


def _shown_sensors(record: dict[str, Any]) -> list[str]:
    """What the quick-looks of a record show: Level 2A, or Level 1C where there is none, and Sentinel-1."""
    optical = [key for key in ("s2_l2a", "s2_l1c") if record[key]["present"]][:1]
    return [*optical, *(["s1"] if record["s1"]["present"] else [])]


def _optical(entry: dict[str, Any], key: str, bands: tuple[str, ...]) -> np.ndarray:
    """Percentiles 2..98 of the valid pixels to 0..1; the visible bands share one scale, or colors would lie."""
    names = SENSORS[key].groups["10m"]
    dn = np.asarray(entry["10m"]["dn"], np.float32)[..., [names.index(b) for b in bands]] - entry["offset"]
    valid = unpack_valid(entry["10m"]["valid"], dn.shape[1])
    shown = dn[valid] if valid.any() else dn.reshape(-1, dn.shape[-1])
    low, middle, high = np.percentile(shown, (2, 50, 98), axis=0)
    high = np.minimum(high, 2.2 * middle + 600.0)  # clouds must not blacken the ground
    span = np.maximum(high - low, 500.0)  # nor may noise of a uniform tile pass for structure
    visible = [i for i, band in enumerate(bands) if band != "B08"]
    span[visible] = span[visible].max()
    return _scaled(dn, low, low + span, valid)


def _radar(entry: dict[str, Any]) -> np.ndarray:
    """Fixed ranges of decibels, so that tiles compare with each other."""
    decibel = np.asarray(entry["10m"]["dn"], np.float32) * SENSORS["s1"].scale
    composite = np.stack([decibel[..., 0], decibel[..., 1], decibel[..., 0] - decibel[..., 1]], -1)
    low, high = np.array([-22.0, -29.0, 0.0]), np.array([-1.0, -7.0, 15.0])
    return _scaled(composite, low, high, unpack_valid(entry["10m"]["valid"], decibel.shape[1]))


def _scaled(values: np.ndarray, low: np.ndarray, high: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """``low``..``high`` to 0..1 per channel; pixels without a measurement get the color NODATA."""
    result = np.clip((values - low) / (high - low), 0, 1)
    result[~valid] = [part / 255 for part in bytes.fromhex(NODATA[1:])]
    return result


# --- bands ------------------------------------------------------------------------------------


def band_histograms(data: DataSet, records: list[dict[str, Any]], key: str, path: Path) -> None:
    """Harmonized values of a sample of the records per band, with mean +- 2 std here and as published."""
    plt = _plt()
    sensor = SENSORS[key]
    columns = 4 if len(sensor.bands) > 4 else len(sensor.bands)
    rows = -(-len(sensor.bands) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 2.4 * rows + 0.6), squeeze=False, constrained_layout=True
    )
    own = data.statistics.get("sensors", {}).get(key)
    digits = 0 if sensor.unit == "DN" else 1
    for i, (axis, band) in enumerate(zip(axes.flat, sensor.band_names, strict=False)):
        values = _values(records, key, band)
        mean, std = sensor.mean[i], sensor.std[i]
        low, high = np.percentile(values, (0.2, 99.8)) if len(values) else (0, 1)
        low, high = min(low, mean - 2 * std), max(high, mean + 2 * std)
        axis.hist(values, bins=80, range=(low, high), color="#8fa9bf", density=True)
        axis.axvspan(mean - 2 * std, mean + 2 * std, color="#e08214", alpha=0.14)
        axis.axvline(mean, color="#e08214", linewidth=1.6, label=f"published {mean:.{digits}f} ± {std:.{digits}f}")
        if own:
            m, s = own["mean"][i], own["std"][i]
            axis.axvline(
                m, color="#20496b", linewidth=1.6, linestyle="--", label=f"here {m:.{digits}f} ± {s:.{digits}f}"
            )
        axis.set_title(f"{band} ({sensor.unit})", fontsize=9)
        axis.set_yticks([])
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=6.5, frameon=False)
    for axis in axes[:, 0]:
        axis.set_ylabel("density of pixels", fontsize=8)
    for axis in axes.flat[len(sensor.bands) :]:
        axis.set_axis_off()
    figure.suptitle(_sample(records, key), fontsize=10)
    _save(figure, path)


def _sample(records: list[dict[str, Any]], key: str) -> str:
    """Title of the band histograms: how many tiles of which product kinds they show."""
    kinds = [record[key]["kind"] for record in records if record[key]["present"]]
    counted = ", ".join(f"{kinds.count(kind)} {kind or 'of unknown kind'}" for kind in sorted(set(kinds)))
    satellite = SENSORS[key].title.split()[0]
    harmonized = "; offset subtracted" if SENSORS[key].unit == "DN" else ""
    return f"{satellite}, tiles: {counted}{harmonized}\nshaded: published mean ± 2 std, which becomes 0..1"


def _values(records: list[dict[str, Any]], key: str, band: str) -> np.ndarray:
    """Valid values of one band in the sensor's unit, offset subtracted, at most 20,000 a record."""
    sensor = SENSORS[key]
    group = next(g for g, names in sensor.groups.items() if band in names)
    position = sensor.groups[group].index(band)
    found = [np.zeros(0, np.float32)]
    for record in records:
        entry = record[key]
        if entry["present"]:
            dn = entry[group]["dn"][..., position]
            kept = dn[unpack_valid(entry[group]["valid"], dn.shape[1])]
            kept = kept[:: max(1, len(kept) // 20_000)]
            found.append(kept.astype(np.float32) * sensor.scale - entry["offset"])
    return np.concatenate(found)
