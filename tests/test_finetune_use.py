"""What comes after fine-tuning: reading the network back, maps of scenes, the PyTorch export against our outputs."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import labelled_fake as fake
import numpy as np
import pytest

from terrafm_jax import provenance, weights
from terrafm_jax.evals import progress
from terrafm_jax.evals.datasets.base import DatasetError, DatasetInfo, Input
from terrafm_jax.evals.encoders import random_encoder
from terrafm_jax.finetuning import export, legend
from terrafm_jax.finetuning import map as mapping
from terrafm_jax.finetuning.network import TuneSpec
from terrafm_jax.finetuning.tuned import Tuned
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.scenes import run
from terrafm_jax.sensors import S2_L2A, Statistics
from terrafm_jax.weights import WeightsError

rasterio = pytest.importorskip("rasterio")
TINY = ModelSpec(width=32, depth=4, heads=2, grid=2, prototypes=16, head_hidden=16, head_bottleneck=8, fusion_heads=4)

ONE, BOTH = ("s2_l2a",), ("s1", "s2_l2a")


def tuned_folder(
    folder,
    head: str,
    task: str,
    inputs=ONE,
    outputs: int = 3,
    seed: int = 0,
    side: int = 0,
    more: Mapping[str, Any] = MappingProxyType({}),
    **fields,
) -> Tuned:
    """A workdir as a finished run leaves it, with random weights and lively batch norms."""
    spec = TuneSpec(TINY, inputs, task, outputs, head, image_size=32, upernet_channels=8, **fields)
    backbone = jax.device_get(random_encoder(TINY, 0, 32, Statistics.published()).params)
    params, state = spec.make_head().init(jax.random.key(1 + seed))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: np.asarray(x) + 0.2 * rng.random(x.shape).astype(np.float32), state)
    bands = {"s1": ["VV", "VH"], "s2_l2a": ["B02", "B03", "B04", "B08"]}
    recorded = {
        **{k: v for k, v in dataclasses.asdict(spec).items() if k != "model"},
        "classes": ["a", "b", "c"][:outputs] if task != "regression" else [], "scale": [5.0, 2.0],
        "bands": {k: bands[k] for k in inputs}, **({"image_px": side} if side else {}), **more,
    }  # fmt: skip
    weights.save_npz(folder / "best/head", {"head": params, "head_state": state}, recorded)
    meta = {"model": dataclasses.asdict(TINY), "statistics": json.loads(Statistics.published().to_json()), "step": 1}
    weights.save_npz(folder / "best", {"backbone": backbone}, meta)
    return Tuned(folder)


def pixels(size: int, count: int = 2) -> np.ndarray:
    mean, std = Statistics.published().arrays("s2_l2a")
    return (mean + 0.5 * std * np.random.default_rng(0).normal(size=(count, size, size, 12))).astype(np.float32)


def test_reads_back_and_ignores_other_bands(tmp_path):
    tuned = tuned_folder(tmp_path, "linear", "classification", head_norm=True)
    x = pixels(32)
    scores = tuned({"s2_l2a": x})
    assert scores.shape == (2, 3)
    np.testing.assert_allclose(scores.sum(1), 1, atol=1e-5)
    changed = x.copy()
    changed[..., S2_L2A.band_names.index("B12")] = 9000
    np.testing.assert_array_equal(scores, tuned({"s2_l2a": changed}))
    np.testing.assert_allclose(tuned({"s2_l2a": x + 1000}, {"s2_l2a": 1000}), scores, atol=1e-4)
    with pytest.raises(ValueError, match=r"tuned on \['s2_l2a'\], given \['s1'\]"):
        tuned({"s1": x[..., :2]})
    with pytest.raises(ValueError, match=r"lacks s2_l2a bands \['B08'\]"):
        tuned.check_bands({"s2_l2a": ["B02", "B03", "B04"]})
    with pytest.raises(WeightsError, match="holds no fine-tuned network"):
        Tuned(tmp_path / "nothing")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "task", "size", "inputs"),
    [("linear", "classification", 20, BOTH), ("linear", "multilabel", 32, ONE), ("linear", "regression", 48, ONE),
     ("patch_linear", "segmentation", 40, ONE), ("upernet", "segmentation", 32, BOTH)],
)  # fmt: skip
def test_pytorch_export_equals_ours(tmp_path, head, task, size, inputs):
    torch = pytest.importorskip("torch")
    from terrafm_jax.finetuning.torch_task import FineTuned

    outputs = 1 if task == "regression" else 3
    tuned = tuned_folder(tmp_path / "run", head, task, inputs, outputs, head_norm=True)
    assert export.main(["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert {"finetuned_terrafm.py", "modeling_terrafm.py", "task.json", "head.safetensors", "model.safetensors"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    model = FineTuned.from_pretrained(tmp_path / "out")
    assert model.classes == tuned.classes
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"## Fine-tuned for {task}" in card
    assert "FineTuned.from_pretrained" in card
    assert all(", ".join(names) in card for names in (*tuned.bands.values(), tuned.classes))
    radar = np.random.default_rng(1).normal(-12, 3, (2, size, size, 2)).astype(np.float32)
    whole = {k: x for k, x in (("s1", radar), ("s2_l2a", pixels(size))) if k in inputs}
    holes = {k: x.copy() for k, x in whole.items()}  # of all bands, of one band, of a sensor
    holes["s2_l2a"][:, 3:12, :9] = np.nan
    holes["s2_l2a"][0, :, 10:13, 1] = np.nan
    holes[inputs[0]][1] = np.nan
    for images in (whole, holes):
        given = {k: torch.tensor(x[..., tuned.mask(k)]).permute(0, 3, 1, 2) for k, x in images.items()}
        with torch.no_grad():
            theirs = model(given).numpy()
        theirs = theirs.transpose(0, 2, 3, 1) if task == "segmentation" else theirs
        np.testing.assert_allclose(tuned(images), theirs, rtol=1e-3, atol=2e-5)
    optical = given["s2_l2a"]
    gone = optical.isnan().all(1, keepdim=True)
    optical = torch.where(optical.isnan() & ~gone, 0, optical)  # one band without a value, dark in the other
    with torch.no_grad():
        torch.testing.assert_close(
            model({**given, "s2_l2a": torch.where(gone, 0, optical)}), model({**given, "s2_l2a": optical})
        )
    if inputs == BOTH:
        with pytest.raises(ValueError, match=r"s1: \(2, 1, .*expected \[B, 2, H, W\] \(VV, VH\)$"):
            model({**given, "s1": given["s1"][:, :1]})
    untuned = next(iter(model.encoder.bands.keys() - set(inputs)))
    other = torch.zeros(1, len(model.encoder.bands[untuned]), size, size)
    for bad, words in ((other, "expected a dict"), ({}, "expected some of"), ({untuned: other}, "of those tuned on")):
        with pytest.raises((TypeError, ValueError), match=words):
            model(bad)


def test_export_without_a_network_is_one_line(tmp_path, capsys):
    assert export.main(["--workdir", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.slow
def test_maps_cover_the_scene_pixel_by_pixel(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PAUSE_S", 0.0)
    tuned = tuned_folder(tmp_path / "run", "patch_linear", "segmentation")
    (tmp_path / "run/results.jsonl").write_text('{"protocol": "some-protocol/1"}\n')
    (tmp_path / "run/config.json").write_text(json.dumps({"data.dir": str(tmp_path / "data"), "seed": 0}))
    scene = pixels(70, 1)[0][:, :55].clip(1, 20000).astype(np.uint16)
    scene[:20, :20] = 0  # no data
    names = tuned.bands["s2_l2a"]
    kept = [S2_L2A.band_names.index(b) for b in names]
    file = fake.tiff(tmp_path / "scene.tif", scene[..., kept], names=names)
    out = tmp_path / "map.tif"
    code = mapping.main(["--workdir", str(tmp_path / "run"), "--sensor", f"s2_l2a={file}", "--out", str(out)])
    assert code == 0
    steps = re.findall(r"map\.tif, windows: (\d+) of (\d+)", capsys.readouterr().err)
    assert steps[-1][0] == steps[-1][1] != "0"
    with rasterio.open(out) as found, rasterio.open(file) as source:
        assert (found.shape, found.crs, found.transform) == (source.shape, source.crs, source.transform)
        assert found.count == 1  # QGIS shows files of several bands as composites, whatever their palette
        classes = found.read(1)
        tags = found.tags()
        assert [found.colormap(1)[i][:3] for i in range(3)] == legend.colors("abc")
    assert tags["classes"] == "0=a;1=b;2=c"
    assert (tags["TERRAFM_TUNED"], tags["TERRAFM_PROTOCOL"]) == ("run", "some-protocol/1")
    assert tags["TERRAFM_CONFIG"] == provenance.digest({"data.dir": "data", "seed": 0})
    assert str(tmp_path) not in str(tags)
    with rasterio.open(tmp_path / "map_probability.tif") as found:
        sure = found.read(1)
        assert found.descriptions == ("probability (%)",)
    np.testing.assert_array_equal(classes == 255, (scene == 0).all(-1))
    assert set(np.unique(classes)) == {0, 1, 2, 255}
    assert sure[32:, 32:].max() <= 100
    np.testing.assert_array_equal(sure == 255, classes == 255)
    # Without overlap a window's pixels are exactly what the network says of that window.
    mapping.predict_scene(tuned, [f"s2_l2a={file}"], out, window=32, overlap=0, overwrite=True)
    window = np.zeros((1, 32, 32, 12), np.float32)
    window[..., kept] = scene[32:64, :32][..., kept]
    with rasterio.open(out) as found:
        np.testing.assert_array_equal(found.read(1)[32:48, :16], tuned({"s2_l2a": window})[0].argmax(-1)[:16, :16])


@pytest.mark.slow
def test_image_level_maps_have_one_value_per_token(tmp_path):
    tuned = tuned_folder(tmp_path / "run", "linear", "regression", outputs=1)
    names = tuned.bands["s2_l2a"]
    kept = [S2_L2A.band_names.index(b) for b in names]
    scene = pixels(64, 1)[0][..., kept].clip(1, 20000).astype(np.uint16)
    file = fake.tiff(tmp_path / "scene.tif", scene, names=names)
    mapping.predict_scene(tuned, [f"s2_l2a={file}"], tmp_path / "map.tif", window=32, overlap=0)
    with rasterio.open(tmp_path / "map.tif") as found:
        values = found.read(1)
        assert values.shape == (4, 4)
        assert found.transform.a == 160
    full = np.zeros((1, 32, 32, 12), np.float32)
    full[..., kept] = scene[:32, :32]
    np.testing.assert_allclose(values[:2, :2], tuned({"s2_l2a": full})[0, 0], rtol=1e-4)
    # What files do not say themselves is declared as for embed; other units, other numbers.
    bare, out = fake.tiff(tmp_path / "bare.tif", scene + np.uint16(1000)), tmp_path / "declared.tif"
    flags = ["--workdir", str(tmp_path / "run"), "--sensor", f"s2_l2a={bare}", "--out", str(out), "--overlap", "0"]
    assert mapping.main([*flags, f"--bands=s2_l2a={','.join(names)}", "--offset=s2_l2a=1000"]) == 0
    with rasterio.open(out) as found:
        np.testing.assert_allclose(found.read(1), values, rtol=1e-4)
        assert found.tags()["TERRAFM_WEIGHTS"] == tuned.weights_hash


def test_windows_of_a_map_are_as_large_as_the_images_it_was_tuned_on(tmp_path):
    """They are stretched like those: windows of the network's own size would show the ground at another scale."""
    tuned = tuned_folder(tmp_path / "run", "linear", "regression", outputs=1, side=60)
    assert tuned.window == 64  # whole patches
    names = tuned.bands["s2_l2a"]
    scene = pixels(128, 1)[0][..., S2_L2A.indices(names)].clip(1, 20000).astype(np.uint16)
    file, out = fake.tiff(tmp_path / "scene.tif", scene, names=names), tmp_path / "map.tif"
    mapping.predict_scene(tuned, [f"s2_l2a={file}"], out, overlap=0)
    first = np.zeros((1, 64, 64, 12), np.float32)
    first[..., S2_L2A.indices(names)] = scene[:64, :64]
    with rasterio.open(out) as found:
        np.testing.assert_allclose(found.read(1)[:4, :4], tuned({"s2_l2a": first})[0, 0], rtol=1e-4)
    assert tuned_folder(tmp_path / "old", "linear", "regression", outputs=1).window == 32  # nothing recorded


@pytest.mark.parametrize("task", ["regression", "segmentation"])
def test_scenes_smaller_than_a_window_are_mirrored_and_not_stretched(tmp_path, task):
    dense = task == "segmentation"
    head, outputs = ("patch_linear", 3) if dense else ("linear", 1)
    tuned = tuned_folder(tmp_path / "run", head, task, outputs=outputs, side=64)
    names = tuned.bands["s2_l2a"]
    scene = pixels(48, 1)[0][:32][..., S2_L2A.indices(names)].clip(1, 20000).astype(np.uint16)
    file, out = fake.tiff(tmp_path / "scene.tif", scene, names=names), tmp_path / "map.tif"
    mapping.predict_scene(tuned, [f"s2_l2a={file}"], out)
    whole = np.zeros((1, 64, 64, 12), np.float32)
    whole[..., S2_L2A.indices(names)] = np.pad(scene, ((0, 32), (0, 16), (0, 0)), "symmetric")
    expected = tuned({"s2_l2a": whole})[0]
    with rasterio.open(out) as found:
        values = found.read(1)
    if dense:
        np.testing.assert_array_equal(values, expected[:32, :48].argmax(-1))
    else:
        np.testing.assert_allclose(values, np.full((2, 3), expected[0]), rtol=1e-4)


def test_maps_and_masks_have_a_byte_for_a_class(tmp_path):
    tuned = tuned_folder(tmp_path / "run", "linear", "classification", outputs=2, more={"classes": ["c"] * 256})
    with pytest.raises(ValueError, match="256 classes; a map holds a byte a pixel, at most 255"):
        mapping.predict_scene(tuned, ["s2_l2a=none.tif"], tmp_path / "map.tif")
    inputs = {"s1": Input("s1", ("VV", "VH"))}
    with pytest.raises(DatasetError, match="x: 256 classes of pixels, at most 255"):
        DatasetInfo("x", "segmentation", ("c",) * 256, inputs)
    assert DatasetInfo("x", "segmentation", ("c",) * 255, inputs).classes
    assert DatasetInfo("x", "classification", ("c",) * 300, inputs).classes


def test_a_map_at_another_sampling_warns(tmp_path):
    tuned = tuned_folder(tmp_path / "run", "linear", "regression", outputs=1, more={"gsd": 20.0, "unit": "t/ha"})
    scene = pixels(64, 1)[0].clip(1, 20000).astype(np.uint16)
    file, out = fake.tiff(tmp_path / "scene.tif", scene, names=S2_L2A.band_names), tmp_path / "map.tif"
    said = mapping.predict_scene(tuned, [f"s2_l2a={file}"], out)
    assert "made at 10 m a pixel, but the network was tuned on images of 20 m" in said
    with rasterio.open(out) as found:
        assert "pass --gsd 20" in found.tags()["TERRAFM_WARNINGS"]
        assert found.units == ("t/ha",)
    assert "warning" not in mapping.predict_scene(tuned, [f"s2_l2a={file}"], out, gsd=20.0, overwrite=True)
    assert tuned.other_sampling(20.4) == ""
    assert tuned_folder(tmp_path / "old", "linear", "regression", outputs=1).other_sampling(10.0) == ""


@pytest.mark.slow
def test_maps_of_other_weights_do_not_go_on(tmp_path, monkeypatch, capsys):
    tuned_folder(tmp_path / "run", "linear", "regression", outputs=1)
    scene = pixels(48, 1)[0].clip(1, 20000).astype(np.uint16)
    file = fake.tiff(tmp_path / "scene.tif", scene, names=S2_L2A.band_names)
    flags = ["--workdir", str(tmp_path / "run"), "--sensor", f"s2_l2a={file}", "--out", str(tmp_path / "map.tif")]
    with monkeypatch.context() as patch:
        patch.setattr(run.Job, "run", functools.partialmethod(run.Job.run, stop_after=1))
        assert mapping.main([*flags, "--batch=1"]) == 1
    assert "the same command goes on" in capsys.readouterr().err
    tuned_folder(tmp_path / "run", "linear", "regression", outputs=1, seed=1)
    assert mapping.main([*flags, "--batch=1"]) == 1
    assert "belongs to other inputs or settings" in capsys.readouterr().err


def test_forward_of_fused_inputs(tmp_path):
    tuned = tuned_folder(tmp_path, "linear", "classification", inputs=("s1", "s2_l2a"))
    radar = np.random.default_rng(1).normal(-12, 3, (2, 32, 32, 2)).astype(np.float32)
    both = tuned({"s1": radar, "s2_l2a": pixels(32)})
    other = tuned({"s1": radar - 6, "s2_l2a": pixels(32)})
    assert np.abs(both - other).max() > 1e-4
