"""Class maps as a GIS reads them: color table in the TIFF, names and attribute table in GDAL's sidecar."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from terrafm_jax import landcover
from terrafm_jax.finetuning import legend
from terrafm_jax.finetuning.predict import write_mask

rasterio = pytest.importorskip("rasterio")


def through_gdal(path, folder):
    """GDAL's own account of band 1: what a virtual copy says, and the sidecar of a copy whose format holds no table."""
    import rasterio.shutil

    rasterio.shutil.copy(str(path), str(folder / "copy.vrt"), driver="VRT")
    rasterio.shutil.copy(str(path), str(folder / "copy.png"), driver="PNG")
    band = ET.parse(folder / "copy.vrt").find("VRTRasterBand")
    table = ET.parse(folder / "copy.png.aux.xml").find("PAMRasterBand/GDALRasterAttributeTable")
    return band, table


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_class_maps_carry_colors_and_names(tmp_path):
    names = ["oil & gas <wells>", "Wälder", "water"]
    path = tmp_path / "map.tif"
    write_mask(path, np.array([[0, 1], [2, 255]]), "", names)
    with rasterio.open(path) as found:
        assert found.colorinterp == (rasterio.enums.ColorInterp.palette,)
        colors = [found.colormap(1)[i][:3] for i in range(3)]
        assert path.name + ".aux.xml" in {p.rsplit("/")[-1] for p in found.files}
        assert found.nodata == 255
    assert colors == [(230, 159, 0), (86, 180, 233), (0, 158, 115)]
    band, table = through_gdal(path, tmp_path)
    assert band.findtext("ColorInterp") == "Palette"
    assert [c.text for c in band.find("CategoryNames")] == names
    assert table.get("tableType") == "thematic"
    assert [f.findtext("Usage") for f in table.iter("FieldDefn")] == ["5", "2", "6", "7", "8"]
    rows = [[f.text for f in row] for row in table.iter("Row")]
    assert rows == [[str(i), n, *map(str, c)] for i, (n, c) in enumerate(zip(names, colors, strict=True))]


def test_worldcover_keeps_its_colors():
    assert legend.colors(["water", "Tree cover", "BUILT"]) == [(0, 100, 200), (0, 100, 0), (250, 0, 0)]
    assert len(legend.colors(landcover.NAMES)) == landcover.NUM_CATEGORIES
    assert legend.colors(["water", "vineyard"])[0] == (230, 159, 0)  # one foreign class: a palette for all
    assert legend.colors([]) == []


def test_colors_differ_up_to_24_classes():
    assert len(set(legend.colors([f"class {i}" for i in range(24)]))) == 24
    many = legend.colors([f"class {i}" for i in range(250)])
    assert many[24] == many[0]
    assert all(0 <= v <= 255 for c in many for v in c)
