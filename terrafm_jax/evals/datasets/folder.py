"""Any labelled folder: ``class_name/*.tif``, image and mask pairs, or a CSV of labels, described by a short YAML.

``dataset.yaml`` lies in the folder, or elsewhere with ``root: DIR``. Fields and examples: docs/evaluation.md.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax.evals.datasets import faults, files
from terrafm_jax.evals.datasets.base import SPLITS, TASKS, Dataset, DatasetError, DatasetInfo, Input, Sample, Split
from terrafm_jax.evals.datasets.shares import random_splits
from terrafm_jax.sensors import SENSORS, band_name

log = logging.getLogger(__name__)

_FIELDS = {
    "name": str, "root": str, "task": str, "classes": list, "inputs": dict, "masks": str, "mask_suffix": str,
    "labels": (str, dict), "splits": (str, dict), "ignore": int, "license": str, "licence": str, "note": str,
    "unit": str,
}  # fmt: skip
_INPUT_FIELDS = {
    "bands": list, "unit": str, "offset": (int, float), "level": str, "folder": str, "suffix": str, "after": str,
}  # fmt: skip


_LEVEL = "; thirteen bands, B10 among them, are Level-1C: sensor s2_l1c"
_WORDS = {str: "text", list: "a list", dict: "a mapping", int: "a whole number", float: "a number"}


def open_folder(path: str | Path) -> list[Dataset]:
    """Opens a folder with ``dataset.yaml`` in it, or a YAML file. Raises DatasetError naming every bad field."""
    path = Path(path)
    file = path if path.suffix in (".yaml", ".yml") else path / "dataset.yaml"
    if not file.exists():
        raise DatasetError(
            f"{file}: not found. Say there what the images are, e.g.\n"
            "  task: classification\n  inputs: {s2_l2a: {bands: [B02, B03, B04, B08], unit: DN}}"
        )
    import yaml

    try:
        spec = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise DatasetError(f"{file}: not valid YAML ({str(e).splitlines()[0]})") from e
    return [_Reader(file, spec).dataset()]


def _faults(found: Any, fields: dict[str, Any], where: str) -> list[str]:
    """Fields that nobody knows, and values of another type than theirs."""
    if not isinstance(found, dict):
        return [f"{where[:-1]} is no mapping"]
    faults = []
    for name in (str(n) for n in found if n not in fields):
        near = difflib.get_close_matches(name.lower(), fields, 1, 0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"expected some of {sorted(fields)}"
        faults.append(f"unknown field {where + name!r}, {hint}")
    for name in (n for n in found if n in fields):
        kinds = fields[name] if isinstance(fields[name], tuple) else (fields[name],)
        if not isinstance(found[name], kinds) or isinstance(found[name], bool):
            expected = " or ".join(_WORDS[kind] for kind in kinds if kind is not int or float not in kinds)
            faults.append(f"{where}{name} = {found[name]!r}, expected {expected}")
    classes = found["classes"] if isinstance(found.get("classes"), list) else []
    twice = [name for name, count in Counter(map(str, classes)).items() if count > 1]
    faults += [f"classes name {', '.join(twice)} twice"] if twice else []
    if any(isinstance(name, bool) for name in classes):
        faults.append("classes hold yes or no, which YAML takes for truth values: quote them")
    return faults


def _input(key: str, entry: dict[str, Any]) -> Input:
    bands = tuple(str(name) for name in entry["bands"])
    return Input(key, bands, entry.get("unit", ""), float(entry.get("offset", 0)), entry.get("level", ""))


class _Reader:
    def __init__(self, file: Path, spec: Any):
        if not isinstance(spec, dict):
            raise DatasetError(f"{file}: expected a mapping with at least 'inputs', found {type(spec).__name__}")
        faults = _faults(spec, _FIELDS, "")
        declared = spec.get("inputs") or {}
        for key, entry in declared.items() if isinstance(declared, dict) else ():
            faults += _faults(entry, _INPUT_FIELDS, f"inputs.{key}.")
            faults += [f"inputs.{key} needs 'bands'"] if isinstance(entry, dict) and "bands" not in entry else []
        task = spec.get("task", "classification")
        faults += [f"task {task!r}, expected one of {list(TASKS)}"] if task not in TASKS else []
        if faults or not declared:
            raise DatasetError(f"{file}: {'; '.join(faults) or 'names no inputs: expected at least one sensor there'}")
        self.file, self.spec, self.task = file, spec, task
        self.root = (file.parent / spec.get("root", ".")).resolve()
        files.need(self.root, f"the folder 'root' of {file}")
        self.declared = declared
        try:
            self.inputs = {k: _input(k, v) for k, v in declared.items()}
        except DatasetError as e:  # it knows no file
            raise DatasetError(f"{file}: inputs: {e}") from e

    def dataset(self) -> Dataset:
        first = next(iter(self.declared))
        images = self._find(first)
        if not images:
            suffix = self.declared[first].get("suffix", "")
            named = f" whose name ends in {suffix!r} (inputs.{first}.suffix)" if suffix else ""
            raise DatasetError(f"{self._folder(first)}: no .tif below it{named}")
        self._check_bands(images[0])
        kept, targets, classes = self._targets(images)
        info = DatasetInfo(
            name=self.spec.get("name", self.root.name),
            task=self.task,
            classes=tuple(classes),
            inputs={i.sensor: i for i in self.inputs.values()},
            ignore=int(self.spec.get("ignore", -1)),
            note=self.spec.get("note", ""),
            unit=self.spec.get("unit", ""),
            license=self.spec.get("license", self.spec.get("licence", "")),
        )

        def read(i: int) -> Sample:
            path = kept[i]
            files.refuse_other_places([*dict.fromkeys(file for file in self._files(path) if file.is_file())])
            loaded = {self.inputs[k].sensor: self._image(k, path) for k in self.inputs}
            after = None
            if self.task == "change":
                after = {self.inputs[k].sensor: self._image(k, path, self._after(k)) for k in self.inputs}
            target = targets[i] if targets is not None else self._mask(path, loaded, info)
            return Sample(self._relative(path), loaded, target, after=after, path=str(path))

        labels = None if targets is None else np.asarray(targets)

        @functools.cache
        def state(i: int) -> str:
            files = (path.stat() for path in self._files(kept[i]) if path.exists())
            return " ".join(f"{found.st_size}:{found.st_mtime_ns}" for found in files)

        whole = Split([self._relative(p) for p in kept], faults.naming_all(read, len(kept)), labels, state)
        # A share of 0, or of a few images, makes no split: readers would be told that there is one and find it empty.
        return Dataset(info, {k: whole.subset(rows) for k, rows in self._splits(kept, labels).items() if rows})

    # --- files ---

    def _folder(self, key: str) -> Path:
        return self.root / self.declared[key].get("folder", "")

    def _after(self, key: str) -> Path:
        if "after" not in self.declared[key]:
            raise DatasetError(f"{self.file}: task change needs inputs.{key}.after (the folder of the second date)")
        return self.root / self.declared[key]["after"]

    def _find(self, key: str) -> list[Path]:
        suffix = self.declared[key].get("suffix", "")
        folder = files.need(self._folder(key), f"images of {key}")
        found = (p for p in folder.rglob("*") if p.suffix.lower() in (".tif", ".tiff") and p.name.endswith(suffix))
        found = (p for p in found if not p.name.startswith("."))  # macOS leaves ._a.tif beside a.tif
        masks = self.root / self.spec.get("masks", ".")
        inside = folder in masks.parents  # masks below the images' folder are not images
        return sorted(p for p in found if not (inside and masks in p.parents))

    def _relative(self, path: Path) -> str:
        """Name shared by all sensors and the mask: path below the sensor's folder without its suffix."""
        first = next(iter(self.declared))
        name = path.relative_to(self._folder(first)).as_posix()
        return name.removesuffix(self.declared[first].get("suffix", "")) or name

    def _files(self, path: Path) -> list[Path]:
        """Every file of the sample of an image: images of all sensors and dates, and the mask."""
        name = self._relative(path)
        folders = [
            (k, f) for k in self.inputs for f in (self._folder(k), self.root / self.declared[k].get("after", "."))
        ]
        found = [folder / (name + self.declared[k].get("suffix", "")) for k, folder in folders]
        return [*found, self.root / self.spec.get("masks", ".") / (name + self.spec.get("mask_suffix", ""))]

    def _image(self, key: str, path: Path, folder: Path | None = None) -> np.ndarray:
        folder = folder or self._folder(key)
        file = files.need(folder / (self._relative(path) + self.declared[key].get("suffix", "")), key)
        image = files.read_image(
            file, self.inputs[key], look=lambda src: self._check_names(file, key, src.descriptions)
        )
        self._check_count(file, key, image.shape[-1])
        return image

    def _mask(self, path: Path, images: Mapping[str, np.ndarray], info: DatasetInfo) -> np.ndarray:
        name = self._relative(path) + self.spec.get("mask_suffix", "")
        file = files.need(self.root / self.spec["masks"] / name, f"the mask of {path.name}")
        mask = files.read_tiff(file)
        if self.task != "segmentation":
            return mask[..., 0].astype(np.int64)
        return faults.check_mask(file, mask, next(iter(images.values())), info.classes, info.ignore)

    def _check_count(self, file: Path, key: str, count: int) -> None:
        declared = self.inputs[key]
        if count != len(declared.bands):
            hint = _LEVEL if count == 13 and declared.sensor == "s2_l2a" else ""
            raise DatasetError(f"{file}: {count} bands, {self.file} declares {len(declared.bands)}{hint}")

    def _check_bands(self, path: Path) -> None:
        """A raster that names its bands must agree with the declaration; junk names count as none."""
        for key in self.inputs:
            suffix = self.declared[key].get("suffix", "")
            file = files.need(self._folder(key) / (self._relative(path) + suffix), f"the {key} image of {path.name}")
            found = files.tiff_header(file)
            self._check_count(file, key, found["count"])
            self._check_names(file, key, found["descriptions"])

    def _check_names(self, file: Path, key: str, descriptions: Sequence[str | None]) -> None:
        declared = self.inputs[key]
        names = [band_name(d, SENSORS[declared.sensor]) if d else None for d in descriptions]
        wanted = [band_name(b, SENSORS[declared.sensor]) for b in declared.bands]
        if len(names) == len(wanted) and all(names) and any(w and n != w for n, w in zip(names, wanted, strict=True)):
            raise DatasetError(f"{file}: names its bands {names}, {self.file} declares {wanted}")

    # --- labels ---

    def _targets(self, images: list[Path]) -> tuple[list[Path], list[Any] | None, list[str]]:
        classes = [str(name) for name in self.spec.get("classes", ())]
        if self.spec.get("masks"):
            if self.task not in ("segmentation", "change"):
                raise DatasetError(f"{self.file}: 'masks' belong to segmentation and change, the task is {self.task}")
            if self.task == "segmentation" and len(classes) < 2:
                raise DatasetError(
                    f"{self.file}: task segmentation needs 'classes', a name for each number in the masks"
                )
            return images, None, classes
        if self.task in ("segmentation", "change"):
            raise DatasetError(f"{self.file}: task {self.task} needs 'masks' (a folder)")
        if self.task == "classification" and "labels" not in self.spec:
            return self._from_folders(images, classes)
        return self._from_table(images, classes)

    def _from_folders(self, images: list[Path], classes: list[str]) -> tuple[list[Path], list[int], list[str]]:
        names = [p.parent.name for p in images]
        stray = [p.name for p in images if p.parent == self._folder(next(iter(self.declared)))]
        if stray and not classes:  # the name of the whole folder would become a class
            raise DatasetError(f"{self.root}: {len(stray)} images lie in no class folder: {faults.few(stray)}")
        others = sorted(set(names) - set(classes)) if classes else []
        if others:
            log.warning("%s: class folders left out, as they are none of classes: %s", self.file, faults.few(others))
        classes = classes or self._found(names)
        kept = [(p, classes.index(n)) for p, n in zip(images, names, strict=True) if n in classes]
        if len(classes) < 2 or not kept:
            raise DatasetError(f"{self.root}: class folders {sorted(set(names))}, expected at least two of {classes}")
        return [p for p, _ in kept], [c for _, c in kept], classes

    def _from_table(self, images: list[Path], classes: list[str]) -> tuple[list[Path], list[Any], list[str]]:
        """Labels from a CSV (columns file and label, or file and labels joined by ';') or from a raster tag."""
        source = self.spec.get("labels")
        if isinstance(source, dict) and "tag" in source:
            rows = {p: self._tag(p, source["tag"]) for p in images}
        else:
            column = {"multilabel": "labels", "regression": "value"}.get(self.task, "label")
            table = self.root / str(source)
            given = ((r["file"], r[column]) for r in files.read_csv(table, ("file", column)))
            rows = faults.by_image(table, given, _matcher(images), images)
        if not rows:
            raise DatasetError(f"{self.file}: labels name none of the {len(images)} images below {self.root}")
        kept = sorted(rows)
        if self.task == "regression":
            return kept, [_value(p, rows[p]) for p in kept], []
        split = {p: v if isinstance(v, list) else _names(v) for p, v in rows.items()}
        missing = [p.name for p in kept if not classes and any(str(name).lower() == "nan" for name in split[p])]
        if missing:
            raise DatasetError(
                f"{self.file}: {len(missing)} images have the label 'nan', which is how missing ones are written: "
                f"{missing[:5]}; leave their rows out, or say classes if it is one"
            )
        classes = classes or self._found(name for names in split.values() for name in names)
        strange = sorted({name for names in split.values() for name in names} - set(classes))
        if strange:
            raise DatasetError(f"{self.file}: labels {strange} are none of the classes {classes}")
        if self.task == "multilabel":
            return kept, [np.array([c in split[p] for c in classes]) for p in kept], classes
        bare = [p.name for p in kept if not split[p]]
        if bare:
            raise DatasetError(f"{self.file}: {len(bare)} images have no label: {bare[:5]}")
        several = [f"{p.name} {split[p]}" for p in kept if len(split[p]) > 1]
        if several:
            text = f"{len(several)} images have several labels: {', '.join(several[:5])}; is the task multilabel?"
            raise DatasetError(f"{self.file}: {text}")
        return kept, [classes.index(split[p][0]) for p in kept], classes

    def _found(self, names: Iterable[str]) -> list[str]:
        """Classes by their names alone, sorted."""
        classes = sorted(set(names))
        faults.tell_alike(self.file, classes)
        return classes

    def _tag(self, path: Path, tag: str) -> Any:
        text = files.tiff_header(path)["tags"].get(tag)
        if text is None:
            raise DatasetError(f"{path}: no tag {tag!r}")
        try:
            return json.loads(text)
        except ValueError as error:
            raise DatasetError(f"{path}: tag {tag!r} = {text[:40]!r} is not JSON ({error})") from error

    # --- splits ---

    def _splits(self, images: list[Path], labels: np.ndarray | None) -> dict[str, list[int]]:
        """From a CSV with columns file and split, from shares, or 60/20/20; random shares are seeded and stratified."""
        if "splits" not in self.spec:
            self._unused_splits()
        given = self.spec.get("splits", {"train": 0.6, "val": 0.2, "test": 0.2})
        if isinstance(given, str):
            rows = ((r["file"], r["split"]) for r in files.read_csv(self.root / given, ("file", "split")))
            found: dict[str, list[int]] = {}
            position = {p: i for i, p in enumerate(images)}
            for path, split in faults.by_image(self.root / given, rows, _matcher(images), images).items():
                name = {"valid": "val", "validation": "val"}.get(split, split)
                found.setdefault(name, []).append(position[path])
            unknown = sorted(set(found) - set(SPLITS))
            if unknown or not found:
                raise DatasetError(f"{self.root / given}: splits {sorted(found)}, expected some of {list(SPLITS)}")
            return found
        try:
            shares = {k: float(given[k]) for k in SPLITS if k in given}
            seed = int(given.get("seed", 0))
        except (TypeError, ValueError, AttributeError):
            shares, seed = {}, 0
        if not shares or abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) < 0:
            expected = f"shares of {list(SPLITS)} that sum to 1, or a CSV file"
            raise DatasetError(f"{self.file}: splits {given}, expected {expected}")
        return random_splits(len(images), labels, shares, seed)

    def _unused_splits(self) -> None:
        """A table beside the images that looks like splits is easily taken for used."""
        found = sorted(p.name for p in self.root.glob("*split*.csv"))
        if found:
            log.warning(
                "%s: %s is ignored and splits are drawn at random; to use it say splits: %s",
                self.file, ", ".join(found), found[0],
            )  # fmt: skip


def _value(path: Path, found: Any) -> float:
    try:
        value = float(found)
    except (TypeError, ValueError):
        value = np.nan
    if not np.isfinite(value):  # of the mean over all, one such value leaves nothing
        raise DatasetError(f"{path}: value {found!r}, expected a number")
    return value


def _names(text: str) -> list[str]:
    return [t.strip() for t in text.split(";") if t.strip()]


def _matcher(images: list[Path]) -> Callable[[str], Path | None]:
    """Finds the image a table means: tables give paths below this folder, below one of its parents, or bare names.

    The longest end of the path that any image has decides. What is returned raises DatasetError for a name of several.
    """
    ends: dict[str, list[Path]] = {}
    for path in images:
        for i in range(len(path.parts)):
            ends.setdefault("/".join(path.parts[i:]), []).append(path)

    def match(name: str) -> Path | None:
        parts = Path(name).parts
        for i in range(len(parts)):
            found = ends.get("/".join(parts[i:]), [])
            if len(found) > 1 and not i:
                raise DatasetError(f"{name!r} names {len(found)} images: {', '.join(map(str, found[:3]))}; say which")
            if found:
                return found[0] if len(found) == 1 else None  # of several, none lies where the name says
        return None

    return match
