"""One loader for every kind of weights, and ``Model.encode`` with everything users may hand it."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from weights_samples import TINY, images, sample

import terrafm_jax
from terrafm_jax import weights
from terrafm_jax.export import formats, torch_weights
from terrafm_jax.export.safetensors_file import write_safetensors
from terrafm_jax.inference import InputError, Model
from terrafm_jax.loader import Loaded, read
from terrafm_jax.models import ModelSpec, encode, patchify
from terrafm_jax.sensors import SENSORS, SensorError, Statistics, normalize
from terrafm_jax.units import UnitError
from terrafm_jax.weights import WeightsError

torch = pytest.importorskip("torch")


def meta_of(loaded: Loaded) -> dict:
    return {
        "step": 7,
        "model": dataclasses.asdict(loaded.spec),
        "statistics": json.loads(loaded.stats.to_json()),
        "config": {"seed": 3},
    }


def assert_same(found: Loaded, wanted: Loaded, *, head: bool = True) -> None:
    ours, theirs = weights.flatten(found.params), weights.flatten(wanted.params)
    kept = {k for k in theirs if head or not k.startswith("head/")}
    assert ours.keys() == kept
    for name in kept:
        assert ours[name].dtype == np.float32
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


# --- kinds of weights ---------------------------------------------------------------------------------------------


def test_workdir_opens_its_newest_teacher(tmp_path):
    old, new = sample(seed=1), sample(seed=2)
    weights.save_npz(tmp_path / "teacher" / "90", old.params, meta_of(old))
    weights.save_npz(tmp_path / "teacher" / "200", new.params, meta_of(new))
    (tmp_path / "teacher" / "300").mkdir()  # a run killed while it wrote
    found = read(tmp_path)
    assert_same(found, new)
    assert found.spec == TINY
    assert found.stats.mean == new.stats.mean
    assert_same(read(tmp_path / "teacher" / "90"), old)


def test_checkpoint_gives_teacher_and_student(tmp_path):
    import orbax.checkpoint as ocp

    teacher, student = sample(seed=1), sample(seed=2)
    folder = tmp_path / "checkpoints"
    with ocp.CheckpointManager(folder, item_names=("state", "meta")) as manager:
        for step, params in ((5, teacher), (40, student)):
            state = {"step": step, "params": params.params, "teacher": teacher.params}
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta_of(teacher)))
            manager.save(step, args=args)
    assert_same(read(tmp_path), teacher)
    assert_same(read(tmp_path, which="student"), student)
    assert_same(read(folder / "5", which="student"), teacher)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("size", ["s", "b"])
def test_upstream_state_dict_infers_its_size(tmp_path, suffix, size):
    spec = ModelSpec.of_size(size, fusion=False, depth=1)
    loaded = sample(spec, head=False)
    state = torch_weights.to_torch(loaded.params)
    path = tmp_path / f"TerraFM{suffix}"
    if suffix == ".pth":
        torch.save({k: torch.from_numpy(v) for k, v in state.items()}, path)
    else:
        write_safetensors(path, state)
    found = read(path)
    assert_same(found, loaded)
    assert dataclasses.replace(found.spec, depth=1) == dataclasses.replace(spec, drop_path=0.1)
    assert found.stats == Statistics.published()


def test_half_precision_tensors_are_widened(tmp_path):
    state = torch_weights.to_torch(sample(head=False).params)
    path = tmp_path / "half.pth"
    torch.save({k: torch.from_numpy(v).bfloat16() for k, v in state.items()}, path)
    found = weights.flatten(read(path, heads=1).params)
    assert {v.dtype for v in found.values()} == {np.dtype("float32")}


def test_hub_folder_and_hub_address(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    loaded = sample()
    formats.write_folder(loaded, tmp_path / "hub")
    found = read(tmp_path / "hub")
    assert_same(found, loaded)
    assert found.spec == TINY
    assert found.stats.std == loaded.stats.std
    asked = {}

    def fake(name, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert_same(read("hf://someone/terrafm@v1"), loaded)
    assert asked == {"name": "someone/terrafm", "revision": "v1", "patterns": ["*.json", "*.safetensors", "*.md"]}


def test_read_params_serves_init_from(tmp_path):
    from terrafm_jax.loader import read_params

    loaded = sample()
    weights.save_npz(tmp_path / "teacher" / "1", loaded.params, meta_of(loaded))
    assert read_params(str(tmp_path)).keys() == {"backbone", "head"}


# --- bad files: one line, the file, the remedy --------------------------------------------------------------------


def refusal(path: Path, **options) -> str:
    with pytest.raises(WeightsError) as caught:
        read(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


class Hostile:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_hostile_pickle_is_refused_without_running_it(tmp_path, how):
    target, path = tmp_path / "it-ran", tmp_path / "hostile.pth"
    content = {"cls_token": Hostile(target)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    assert "nothing in it was run" in refusal(path)
    assert not target.exists()


def test_all_mismatches_are_reported_at_once(tmp_path):
    state = torch_weights.to_torch(sample(head=False).params)
    del state["blocks.2.attn.qkv.bias"], state["norm.weight"]
    state["decoder.weight"] = np.zeros((2, 2), np.float32)
    state["pos_embed"] = np.zeros((1, 197, 32), np.float32)
    write_safetensors(tmp_path / "odd.safetensors", state)
    text = refusal(tmp_path / "odd.safetensors", heads=1)
    assert "missing 2: blocks.2.attn.qkv.bias, norm.weight" in text
    assert "unexpected 1: decoder.weight" in text
    assert "pos_embed is [1, 197, 32], expected [1, 197, 64]" in text


def test_damaged_and_foreign_files(tmp_path):
    good = tmp_path / "good.safetensors"
    write_safetensors(good, torch_weights.to_torch(sample(head=False).params))
    content = good.read_bytes()
    for name, bad in {
        "short": content[: len(content) // 2],
        "empty": b"",
        "header": struct.pack("<Q", 1 << 40) + content[8:],
        "json": content[:8] + b"x" * 40,
        "long": content + b"123",
    }.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(bad)
        assert "truncated safetensors" in refusal(path)
    header = {"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (tmp_path / "bomb.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"1234")
    assert "truncated safetensors" in refusal(tmp_path / "bomb.safetensors")

    (tmp_path / "noise.pth").write_bytes(b"noise" * 10)
    assert "not a plain PyTorch state dict" in refusal(tmp_path / "noise.pth")
    torch.save({"epoch": 3, "model": {"cls_token": torch.zeros(1)}}, tmp_path / "nested.pth")
    assert "save model.state_dict()" in refusal(tmp_path / "nested.pth")
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    assert "cls_token" in refusal(tmp_path / "other.pth")
    torch.save({k: torch.zeros(1, 1, 131) for k in ("cls_token",)}, tmp_path / "width.pth")
    assert "heads=" in refusal(tmp_path / "width.pth")


def test_paths_without_weights(tmp_path):
    assert "not found" in refusal(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    assert "holds notes.txt" in refusal(tmp_path)
    assert "unknown kind of file" in refusal(tmp_path / "notes.txt")
    loaded = sample()
    weights.save_npz(tmp_path / "7", loaded.params, meta_of(loaded))
    assert "teacher only" in refusal(tmp_path / "7", which="student")
    (tmp_path / "7" / weights.PARAMS_FILE).write_bytes(b"PK\x03\x04 cut short")
    assert "cannot be read" in refusal(tmp_path / "7")
    formats.write_folder(loaded, tmp_path / "hub")
    (tmp_path / "hub" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config.json: not JSON"):
        read(tmp_path / "hub")


def test_load_refuses_to_change_the_network(tmp_path):
    loaded = sample()
    weights.save_npz(tmp_path / "teacher" / "1", loaded.params, meta_of(loaded))
    with pytest.raises(WeightsError, match="width"):
        terrafm_jax.load(tmp_path, width=3)
    assert terrafm_jax.load(tmp_path, dtype="bfloat16").spec.dtype == "bfloat16"


# --- encode -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(sample())


@pytest.fixture(scope="module")
def plain() -> Model:
    spec = dataclasses.replace(TINY, fusion=False)
    return Model(sample(spec))


SMALL = (32, 32)


def close(a, b, atol: float = 1e-5) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol * max(1.0, float(np.abs(y).max())))


def test_encode_equals_the_network_on_normalised_patches(model):
    x = images((32, 48))
    patches = {
        k: patchify(normalize(v.astype(np.float32), *(a[None, None, None] for a in model.stats[k])), 16)
        for k, v in x.items()
    }
    wanted = jax.jit(encode, static_argnums=0, static_argnames="layers")(
        model.spec, model.backbone, patches, layers=(1, 3)
    )
    found = model.encode(**x, layers=(1, -1))
    assert found.cls.dtype == np.float32
    assert found.patches.shape == (2, 2, 3, 64)
    close(found, wanted)


def test_batches_are_split_over_devices_and_put_together_again(model):
    x = images(SMALL, batch=19)
    whole = model.encode(**x, batch_size=64)
    assert whole.cls.shape == (19, 64)
    close(model.encode(**x, batch_size=1), whole)
    close(model.encode(**{k: v[3:4] for k, v in x.items()}).cls, whole.cls[3:4])
    assert len(jax.local_devices()) == 8


def test_one_image_is_a_batch_of_one(model):
    x = images(SMALL, batch=1, sensors=("s1",))["s1"]
    close(model.encode(s1=x[0]), model.encode(s1=x))


def test_units_and_offset_reach_the_same_values(model):
    x = images(SMALL, sensors=("s1", "s2_l2a"))
    wanted = model.encode(**x)
    reflectance = (x["s2_l2a"] / 10_000.0).astype(np.float32)
    linear = (10.0 ** (x["s1"] / 10.0)).astype(np.float32)
    units = {"s2_l2a": "reflectance", "s1": "linear"}
    close(model.encode(s2_l2a=reflectance, s1=linear, units=units), wanted, 1e-4)
    late = x["s2_l2a"] + np.uint16(1000)
    close(model.encode(s2_l2a=late, s1=x["s1"], offset=1000), wanted)
    close(model.encode(s2_l2a=late, s1=x["s1"], offset={"s2_l2a": [1000, 1000]}), wanted)
    assert np.abs(model.encode(s2_l2a=late, s1=x["s1"]).cls - wanted.cls).max() > 1e-3


def test_bands_by_name_in_any_order_slice_the_stem(model, caplog):
    x = images(SMALL, sensors=("s2_l2a",))["s2_l2a"]
    order = [3, 2, 1, 7]
    names = ["red", "B3", "blue", "B08"]
    with caplog.at_level(logging.INFO):
        found = model.encode(s2_l2a=x[..., order], bands={"s2_l2a": names})
        model.encode(s2_l2a=x[..., order], bands={"s2_l2a": names})
    assert [r.message for r in caplog.records if "stem sliced" in r.message] == [
        "s2_l2a: stem sliced to B04, B03, B02, B08; without B01, B05, B06, B07, B09, B11, B12, B8A"
    ]
    mean, std = model.stats["s2_l2a"]
    zeroed = normalize(x.astype(np.float32), mean, std)
    zeroed[..., [i for i in range(12) if i not in order]] = 0.0
    close(found, jax.jit(encode, static_argnums=0)(model.spec, model.backbone, {"s2_l2a": patchify(zeroed, 16)}))


def test_thirteen_l1c_bands_lose_b10_when_named(model):
    x = images(SMALL, sensors=("s2_l1c",))["s2_l1c"]
    names = [*SENSORS["s2_l1c"].band_names]
    names.insert(10, "B10")
    thirteen = np.insert(x, 10, 999, axis=-1)
    close(model.encode(s2_l1c=thirteen, bands={"s2_l1c": names}), model.encode(s2_l1c=x))
    with pytest.raises(InputError, match="13 bands without names"):
        model.encode(s2_l1c=thirteen)


def test_masked_pixels_do_not_matter(model):
    x = images(SMALL, sensors=("s1", "s2_l2a"))
    mask = np.zeros((2, *SMALL), bool)
    mask[:, 3:9, 20:] = True
    wanted = model.encode(**x, mask=mask)
    spoiled = {k: v.astype(np.float32) for k, v in x.items()}
    spoiled["s1"][mask] = -9999
    spoiled["s2_l2a"][mask] = 60_000
    close(model.encode(**spoiled, mask=mask), wanted)
    spoiled["s1"][mask] = np.nan
    spoiled["s2_l2a"][mask] = 0
    close(model.encode(**spoiled), wanted)
    close(model.encode(**spoiled, mask={"s1": mask}), wanted)
    assert np.abs(model.encode(**x).cls - wanted.cls).max() > 1e-4


def test_a_sensor_without_any_measurement_takes_no_part(model):
    x = images(SMALL, sensors=("s1", "s2_l2a"))
    x["s1"][1] = np.nan
    found = model.encode(**x)
    close(found.cls[1:], model.encode(s2_l2a=x["s2_l2a"][1:]).cls)
    nothing = {k: np.full(v.shape, np.nan, np.float32) for k, v in x.items()}
    assert np.isfinite(model.encode(**nothing).cls).all()


def test_any_size_continues_the_edge(model):
    x = images((35, 50), sensors=("s1",))["s1"]
    found = model.encode(s1=x)
    assert found.patches.shape == (2, 3, 4, 64)
    close(found, model.encode(s1=np.pad(x, ((0, 0), (0, 13), (0, 14), (0, 0)), mode="edge")))
    assert model.encode(s1=x[:, :16, :16]).patches.shape == (2, 1, 1, 64)


def test_bfloat16_is_close():
    loaded = sample()
    low = Model(dataclasses.replace(loaded, spec=dataclasses.replace(loaded.spec, dtype="bfloat16")))
    x = images(SMALL)
    a, b = low.encode(**x).cls, Model(loaded).encode(**x).cls
    assert a.dtype == np.float32
    assert ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min() > 0.999


def test_upstream_fault_is_selectable(plain):
    x = images(SMALL, sensors=("s2_l2a",))["s2_l2a"]
    right = plain.encode(s2_l2a=x)
    plain.upstream_l2a_stem = True
    wrong = plain.encode(s2_l2a=x)
    plain.upstream_l2a_stem = False
    patches = patchify(normalize(x.astype(np.float32), *plain.stats["s2_l2a"]), 16)
    close(wrong, jax.jit(encode, static_argnums=0)(plain.spec, plain.backbone, {"s2_l1c": patches}))
    assert np.abs(wrong.cls - right.cls).max() > 1e-3
    close(plain.encode(s2_l2a=x), right)


def test_values_that_cannot_be_what_they_are_called(model):
    x = images(SMALL, sensors=("s1", "s2_l2a"))
    s1, dn = x["s1"], x["s2_l2a"]
    cases = [
        ({"s2_l2a": dn / 10_000.0}, "look like reflectance.*units="),
        ({"s2_l2a": dn * 2.8e-4 / 2.8}, "look like reflectance"),
        ({"s2_l2a": dn.astype(np.float64) * 100}, "cannot be DN"),
        ({"s2_l2a": dn, "units": {"s2_l2a": "reflectance"}}, "cannot be reflectance.*look like DN"),
        ({"s2_l2a": dn, "units": {"s2_l2a": "dB"}}, "expected one of .*reflectance"),
        ({"s1": 10 ** (s1 / 10)}, "look like linear"),
        ({"s1": s1, "units": {"s1": "linear"}}, "cannot be linear.*look like dB"),
        ({"s1": s1 - 9999}, "cannot be dB.*mask"),
    ]
    for arguments, message in cases:
        with pytest.raises(UnitError, match=message) as caught:
            model.encode(**arguments)
        assert "\n" not in str(caught.value)


def test_doubtful_values_pass_and_declared_units_win(model, caplog):
    dark = np.ones((1, *SMALL, 12), np.uint16)
    dark[..., :3, :3, :] = 2
    with caplog.at_level(logging.WARNING):
        model.encode(s2_l2a=dark)  # dark water, median 1
        assert not caplog.records
        model.encode(s2_l2a=dark * 0.7, units={"s2_l2a": "DN"})
        assert "declared DN but look like reflectance" in caplog.text
        model.encode(s2_l2a=dark * np.uint16(25_000))
        assert "very bright" in caplog.text
        model.encode(s1=np.full((1, *SMALL, 2), -99.0))
        assert "is nodata masked?" in caplog.text


def test_arguments_that_do_not_fit(model, plain):
    x = images(SMALL)
    mask = np.zeros((2, *SMALL), bool)
    cases = [
        (model, {}, "no sensor given"),
        (plain, x, "have no fusion"),
        (model, {**x, "s1": x["s1"][:, :16]}, r"differ in \[B, H, W\]"),
        (model, {"s1": x["s1"][:, :8]}, "at least 16"),
        (model, {"s1": x["s2_l2a"]}, "12 bands without names"),
        (model, {"s1": x["s1"], "mask": mask.astype(int)}, "expected bool"),
        (model, {"s1": x["s1"], "units": {"s2_l2a": "DN"}}, "names s2_l2a, which was not given"),
        (model, {"s1": x["s1"], "offset": {"s1": 3}}, "only Sentinel-2"),
        (model, {"s2_l2a": x["s2_l2a"], "offset": [1, 2, 3]}, r"a number or \[2\]"),
        (model, {"s1": x["s1"], "layers": (4,)}, "depth is 4"),
        (model, {"s1": x["s1"].astype(str)}, "integers or floats"),
        (model, {"s1": x["s1"], "bands": {"s1": ["VV"]}}, "2 bands but 1 names"),
    ]
    for which, arguments, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            which.encode(**arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(SensorError, match="unknown bands"):
        model.encode(s1=x["s1"], bands={"s1": ["VV", "HH"]})
    with pytest.raises(SensorError, match="given twice"):
        model.encode(s1=x["s1"], bands={"s1": ["VV", "vv"]})
    only_s1 = Model(sample(dataclasses.replace(TINY, sensors=("s1",))))
    with pytest.raises(InputError, match="no stem for s2_l2a"):
        only_s1.encode(s2_l2a=x["s2_l2a"])


def test_weights_hash_depends_on_the_backbone_alone():
    loaded = sample()
    assert Model(loaded).weights_hash == Model(sample(head=False)).weights_hash
    assert Model(loaded).weights_hash != Model(sample(seed=5)).weights_hash


def test_real_tiles_are_neither_refused_nor_misread(real_data):
    """Every stacked real tile, in the unit its manifest states, passes the checks and comes out unchanged."""
    import csv

    rasterio = pytest.importorskip("rasterio")
    from terrafm_jax.units import to_sensor_unit

    rows = list(csv.DictReader((real_data / "tile_index.csv").open()))
    seen = 0
    for row in rows:
        for column, key in (("S1", "s1"), ("S2L1C", "s2_l1c"), ("S2L2A", "s2_l2a")):
            if not row[column]:
                continue
            with rasterio.open(real_data / row[column]) as source:
                image = source.read().transpose(1, 2, 0)[None]
            ignore = ~np.isfinite(image).all(-1)
            if key == "s1":
                ignore |= (image <= -99).all(-1)
            found = to_sensor_unit(image, SENSORS[key], None, ignore)
            np.testing.assert_array_equal(found[~ignore], image.astype(np.float32)[~ignore], err_msg=row[column])
            seen += 1
    assert seen > 90
