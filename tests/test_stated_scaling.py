"""What a GeoTIFF states of itself: scale and offset, with which all commands read the same values, and band names."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from data_prep_cells import geotiff as tif
from data_prep_cells import scene
from rasterio.transform import from_origin

from data_prep import geotiff
from terrafm_jax.evals.datasets import open_suite
from terrafm_jax.evals.datasets.base import DatasetError, canonical
from terrafm_jax.scenes import grid, read
from terrafm_jax.scenes.inputs import Declared, resolve
from terrafm_jax.sensors import SENSORS

L2A = SENSORS["s2_l2a"].band_names
AFFINE = from_origin(600_000, 5_400_000, 10, 10)


def write(path: Path, pixels: np.ndarray, names: tuple[str, ...], scale: Any = 1.0, offset: Any = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tif(pixels, AFFINE))
    with rasterio.open(path, "r+") as file:
        file.descriptions = names
        file.scales, file.offsets = (np.broadcast_to(v, len(names)).tolist() for v in (scale, offset))
    return path


def optical() -> np.ndarray:
    """uint16 [12, 48, 48] DN without an offset; the first rows zero in all bands, as nodata is."""
    bands = scene(3)["s2_l2a"]
    dn = np.stack([np.kron(bands[n], np.ones((48 // bands[n].shape[0],) * 2, np.uint16)) for n in L2A])
    dn[:, :6] = 0
    dn[2, 20:23] = 0  # dark ground in one band
    return dn


def prepared(folder: Path, out: Path, *flags: str) -> dict[str, Any]:
    """The one record of a folder, or what it was rejected for."""
    import tensorflow_datasets as tfds

    how = ["--source", str(folder), "--worldcover", "none", "--out", str(out), "--split-shares", "1,0,0", *flags]
    if geotiff.main(how):
        return {"rejected": next(csv.DictReader((out / "rejected.csv").read_text().splitlines()))["reason"]}
    (record,) = tfds.builder_from_directory(out).as_data_source("train")
    return record


def evaluated(folder: Path, inputs: str, key: str) -> np.ndarray:
    """[48, 48, C] in the sensor's unit as the encoder gets it, with nothing taken off."""
    (folder / "t.csv").write_text("file,value\n" + "".join(f"{p.name},1\n" for p in folder.glob("*.tif")))
    text = f"task: regression\nlabels: t.csv\nsplits: {{train: 1.0}}\ninputs: {inputs}\n"
    (folder / "dataset.yaml").write_text(text)
    (dataset,) = open_suite("folder", folder)
    return canonical(dataset.info.inputs[key], dataset.split("train")[0].images[key])


def embedded(path: Path, key: str) -> np.ndarray:
    """[48, 48, C] harmonized DN or dB as scenes read it."""
    date = resolve(f"{key}={path}", Declared())
    window = read.SceneReader([date], grid.target_grid([date])).read(0, 0, 48, 48)[key]
    return np.where(window.valid[..., None], window.values, np.nan)


@pytest.mark.parametrize(("scale", "shift"), [(1e-4, 0.0), (1e-4, -0.1), (1.0, -1000.0)])
@pytest.mark.parametrize("unit", ["", "reflectance"])
def test_optical_values_are_the_same_everywhere(tmp_path, scale, shift, unit):
    inside = 1000 if shift else 0
    dn = optical()
    stored = np.where((dn == 0).all(0), 0, dn + inside).astype(np.uint16)
    path = write(tmp_path / "in" / "S2L2A" / "a.tif", stored, L2A, scale, shift)
    expected = np.where((dn == 0).all(0), np.nan, dn).transpose(1, 2, 0)
    np.testing.assert_allclose(embedded(path, "s2_l2a"), expected, atol=0.01)
    if scale < 1 or not unit:
        said = f"{{s2_l2a: {{bands: [{', '.join(L2A)}]{unit and ', unit: ' + unit}}}}}"
        np.testing.assert_allclose(evaluated(path.parent, said, "s2_l2a"), expected, atol=0.01)
        record = prepared(tmp_path / "in", tmp_path / "out", *(("--s2-unit", unit) if unit else ()))["s2_l2a"]
        assert record["offset"] == inside
        if shift:
            assert record["offset_source"] == b"file"
        for group, names in SENSORS["s2_l2a"].groups.items():
            for i, name in enumerate(names):
                assert (record[group]["dn"][..., i] == stored[L2A.index(name)]).all()


def test_radar_values_are_the_same_everywhere(tmp_path):
    db = np.round(1000 * np.log10(np.stack([scene(3)["s1"][n] for n in ("VV", "VH")]))).astype(np.int16)
    db[:, :4] = -9999
    path = write(tmp_path / "in" / "S1RTC" / "a.tif", db, ("VV", "VH"), 0.01)
    with rasterio.open(path, "r+") as file:
        file.nodata = -9999
    expected = np.where(db == -9999, np.nan, db / 100).transpose(1, 2, 0)
    np.testing.assert_allclose(embedded(path, "s1"), expected, atol=0.001)
    np.testing.assert_allclose(evaluated(path.parent, "{s1: {bands: [VV, VH], unit: dB}}", "s1"), expected, atol=0.001)
    record = prepared(tmp_path / "in", tmp_path / "out")["s1"]["10m"]["dn"]
    np.testing.assert_array_equal(record, np.where(db == -9999, -32768, db).transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("scale", "shift", "reason"),
    [
        (2e-4, 0.0, "the files state scale 0.0002 and offset 0 in B01, .*expected a scale of 0.0001 or 1"),
        (1e-4, 0.1, "-1000 DN inside, expected 0..1000"),
        ([1e-4] * 11 + [1.0], 0.0, r"its bands state the scales \[0.0001, 1.0\]; rewrite them with one scale"),
        (1e-4, [-0.1] * 11 + [0.0], "offset 0 in B12 .*the same in all bands"),
    ],
)
def test_scales_that_leave_no_dn_are_not_prepared(tmp_path, scale, shift, reason):
    write(tmp_path / "in" / "S2L2A" / "a.tif", optical() + np.uint16(1000), L2A, scale, shift)
    found = prepared(tmp_path / "in", tmp_path / "out")
    assert re.search(reason, found["rejected"]), found["rejected"]


def test_an_offset_is_not_taken_off_twice(tmp_path):
    path = write(tmp_path / "S2L2A" / "a.tif", optical() + np.uint16(1000), L2A, 1e-4, -0.1)
    said = f"{{s2_l2a: {{bands: [{', '.join(L2A)}], offset: 1000}}}}"
    with pytest.raises(DatasetError, match=r"a\.tif: states the offset -0.1 itself .*declare offset 0"):
        evaluated(path.parent, said, "s2_l2a")
    rows = "file,location,sensor,offset\nS2L2A/a.tif,a,s2_l2a,{}\n"
    for offset, accepted in ((1000, True), (0, False)):
        (tmp_path / "list.csv").write_text(rows.format(offset))
        found = prepared(tmp_path, tmp_path / f"out{offset}", "--manifest", str(tmp_path / "list.csv"))
        assert ("rejected" not in found) == accepted, found


def test_a_manifest_that_names_bands_otherwise_than_the_file_is_told(tmp_path, capsys):
    path = write(tmp_path / "S2L2A" / "a.tif", optical(), L2A)
    rows = 'file,location,sensor,bands\nS2L2A/a.tif,a,s2_l2a,"{}"\n'
    swapped = (L2A[0], L2A[2], L2A[1], *L2A[3:])
    for names, descriptions, told in ((L2A, L2A, False), (swapped, L2A, True), (swapped, ("junk",) * 12, False)):
        with rasterio.open(path, "r+") as file:
            file.descriptions = descriptions
        (tmp_path / "list.csv").write_text(rows.format(",".join(names)))
        out = tmp_path / f"out{names[1]}{descriptions[0]}"
        record = prepared(tmp_path, out, "--manifest", str(tmp_path / "list.csv"))
        assert "rejected" not in record
        assert (
            "the manifest contradicts the names in the files: B03 for B02, B02 for B03" in capsys.readouterr().out
        ) == told
