"""Does a labelled data set look like what it is declared to be? A few samples, cheap tests, warnings in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from terrafm_jax import checks
from terrafm_jax.checks import EIGHT_BIT
from terrafm_jax.evals.datasets.base import Dataset, Input, Sample, Split, canonical, spread
from terrafm_jax.sensors import BASELINE_OFFSET, L1C_CIRRUS_THRESHOLD, L2A_THRESHOLD, SENSORS, band_name
from terrafm_jax.units import DN_PER_REFLECTANCE, NOISE_FLOOR

SAMPLES = 16
_WORDS = checks.Spelling("unit: {value}", "offset: {value:g}", "it to gdal_edit.py -a_nodata {value:g} FILE", "{key}:")
BESIDE = 100.0  # DN by which the median of another band may lie below that of B10


def doubts(dataset: Dataset) -> list[str]:
    """Sentences about inputs whose values contradict their declaration; empty when nothing looks wrong.

    Reads up to 16 samples spread over the first split. A sample that cannot be read is left to the evaluation.
    """
    split = next(iter(dataset.splits.values()))
    rows = spread(len(split), SAMPLES)
    levels = [checks.without_b10(k, i.bands) for k, i in dataset.info.inputs.items() if "L1C" not in i.level.upper()]
    found = [f"{dataset.info.name}: {text} If not, say level: L1C" for text in levels if text]
    for key, source in dataset.info.inputs.items():
        try:
            samples = [split[i] for i in rows]
            images = [canonical(source, s.images[key]).reshape(-1, len(source.mask))[:, source.mask] for s in samples]
        except (ValueError, OSError):
            return found
        empty = [s.id for s, image in zip(samples, images, strict=True) if not np.isfinite(image).all(1).any()]
        if empty:
            shown = f"{', '.join(empty[:5])}{' ...' * (len(empty) > 5)}"
            found.append(
                f"{dataset.info.name}, {key}: nothing was measured in {len(empty)} of {len(rows)} images: {shown}"
            )
        pixels = np.concatenate(images or [np.zeros((0, 1), np.float32)])
        pixels = pixels[np.isfinite(pixels).all(1)]
        if not len(pixels):
            continue
        text = _radar(pixels, source) if key == "s1" else _optical(pixels, source) or _order(source, samples)
        if not text and key != "s1" and not any(key in s.offset for s in samples):
            text = _baseline(pixels, source, _cirrus(source, samples))
        text = text or _odd(source, samples, images)
        found += [f"{dataset.info.name}, {key}: {text}"] if text else []
    return found


def _odd(source: Input, samples: Sequence[Sample], images: Sequence[np.ndarray]) -> str:
    """What shows in none of the values of all together: single images in another unit than the rest, nodata."""
    said, odd = checks.Declared(source.unit.lower()), dict[str, str]()
    for sample, pixels in zip(samples, images, strict=True):
        given = sample.images[source.sensor].reshape(-1, len(source.bands))[np.isfinite(pixels).all(1)]
        bands = {source.bands[i]: given[:, i] for i, _ in source.channels}
        found = checks.values(source.sensor, bands, said, spell=_WORDS, among=True) if len(given) else []
        for finding in found:
            if finding.sure:
                odd[sample.id] = finding.text
    names = list(odd)
    if not odd or len(odd) == len(samples):
        return odd[names[0]] if odd else ""
    return (
        f"{len(odd)} of {len(samples)} images looked at are not like the others ({', '.join(names[:5])}"
        f"{' ...' * (len(odd) > 5)}): {odd[names[0]]}; a data set has one unit for all"
    )


def unseen(name: str, classes: Sequence[str], splits: Mapping[str, Split]) -> list[str]:
    """Sentences on classes that other splits hold and train does not, and on a single one in train.

    Where labels are known without the pixels.
    """
    count = {}
    for split, samples in splits.items():
        labels = samples.labels
        if labels is None or not classes or not (labels.ndim == 2 or np.issubdtype(labels.dtype, np.integer)):
            return []
        count[split] = labels.sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=len(classes))
    train = count.pop("train", None)
    found = []
    for i, label in enumerate(classes) if train is not None else ():
        elsewhere = [f"{n[i]} in {split}" for split, n in count.items() if n[i]]
        found += [f"{label} ({', '.join(elsewhere)})"] if elsewhere and not train[i] else []
    texts = [f"{name}: train has no sample of {', '.join(found)}: nothing can learn them"] if found else []
    if train is not None and np.ndim(labels) == 1 and np.count_nonzero(train) == 1:
        texts.append(f"{name}: all samples of train are {classes[int(np.argmax(train))]}: scores say nothing")
    return texts


def _radar(pixels: np.ndarray, source: Input) -> str:
    low, high, middle = pixels.min(), pixels.max(), np.median(pixels)
    if source.unit == "dB" and low >= 0 and high > 0:
        return f"declared dB, but no value is negative ({low:.3g} to {high:.3g}): is it power (unit: power)?"
    if source.unit == "power" and middle > 10:
        return f"declared power, but its median is {10 ** (middle / 10):.3g}: amplitude? square and calibrate it first"
    value = low if low < NOISE_FLOOR else 0.0  # SNAP writes zeros
    share = np.mean((pixels == value).all(1))
    if source.unit == "dB" and share > checks.UNDECLARED:
        nodata = _WORDS.nodata.format(key=source.sensor, value=value)
        return f"{share:.1%} of the pixels are exactly {value:g} dB in all bands: if that is nodata, pass {nodata}"
    return checks.exchanged(*np.median(pixels, axis=0)) if pixels.shape[1] == len(SENSORS["s1"].bands) else ""


def _optical(pixels: np.ndarray, source: Input) -> str:
    high, middle = float(pixels.max()), float(np.median(pixels))
    if source.unit == "DN" and high <= 10:
        return f"declared DN, but no value is above {high:.3g}: is it reflectance (unit: reflectance)?"
    if source.unit == "DN" and high <= EIGHT_BIT:
        return f"declared DN, but no value is above {high:.3g}: eight-bit previews carry no reflectance"
    if source.unit == "reflectance" and middle > 1e5:
        return f"declared reflectance, but the median is {middle / DN_PER_REFLECTANCE:.3g}: is it DN (unit: DN)?"
    return ""


def _order(source: Input, samples: Sequence[Sample]) -> str:
    """Cirrus is the darkest band of Level-1C nearly everywhere: where another one is, the order is not as declared."""
    names = [band_name(b, SENSORS[source.sensor]) for b in source.bands]
    if "B10" not in names:
        return ""
    pixels = np.concatenate([s.images[source.sensor].reshape(-1, len(names)) for s in samples]).astype(np.float32)
    pixels = pixels[np.isfinite(pixels).all(1) & (pixels != 0).any(1)] * (
        DN_PER_REFLECTANCE if source.unit == "reflectance" else 1
    )
    if not len(pixels):
        return ""
    middle = np.median(pixels, axis=0)
    darkest, declared = int(middle.argmin()), names.index("B10")
    if middle[declared] - middle[darkest] < BESIDE:
        return ""
    return (
        f"band {declared + 1} is declared B10 (cirrus, the darkest), but its median is {middle[declared]:.0f} DN and "
        f"that of band {darkest + 1} ({names[darkest] or 'unnamed'}) {middle[darkest]:.0f}: is the order of the bands "
        "right? EuroSAT has B8A last"
    )


def _cirrus(source: Input, samples: Sequence[Sample]) -> float | None:
    """First percentile of B10 in DN, where the data set delivers it: nearly 0 without an offset."""
    names = [band_name(b, SENSORS[source.sensor]) for b in source.bands]
    if "B10" not in names:
        return None
    values = np.concatenate([np.ravel(s.images[source.sensor][..., names.index("B10")]) for s in samples])
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    return float(np.percentile(values, 1)) * (DN_PER_REFLECTANCE if source.unit == "reflectance" else 1)


def _baseline(pixels: np.ndarray, source: Input, cirrus: float | None) -> str:
    names = [n for n, there in zip(SENSORS[source.sensor].band_names, source.mask, strict=True) if there]
    levels = np.percentile(pixels, 1, axis=0)
    band, value = names[int(levels.argmin())], float(levels.min())
    if cirrus is not None:
        band, value = "B10", cirrus
    # Level-1C without B10 is judged like Level-2A: no threshold was measured for it.
    inside = value > (L2A_THRESHOLD if cirrus is None else L1C_CIRRUS_THRESHOLD)
    if inside and source.offset == 0:
        return f"offset 0, but the darkest percentile of {band} is {value:.0f} DN: is offset: 1000 inside?"
    if not inside and source.offset >= BASELINE_OFFSET:
        return f"offset {source.offset:g}, but {band} goes down to {value:.0f} DN: was it removed (offset: 0)?"
    return ""
