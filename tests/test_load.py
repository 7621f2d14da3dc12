"""One loader for every kind of weights; bad files are refused in one line that names file and remedy."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from weights_samples import TINY, sample

import terrafm_jax
from terrafm_jax import weights
from terrafm_jax.export import formats, torch_weights
from terrafm_jax.export.checkpoint_weights import COMMITTED, find_checkpoint
from terrafm_jax.export.safetensors_file import write_safetensors
from terrafm_jax.loader import Loaded, read
from terrafm_jax.models import ModelSpec
from terrafm_jax.sensors import Statistics
from terrafm_jax.training.init_from import doubts_about
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


def test_workdir_opens_its_newest_teacher(tmp_path, monkeypatch):
    old, new = sample(seed=1), sample(seed=2)
    weights.save_npz(tmp_path / "teacher" / "90", old.params, meta_of(old))
    weights.save_npz(tmp_path / "teacher" / "200", new.params, meta_of(new))
    (tmp_path / "teacher" / "300").mkdir()  # a run killed while it wrote
    found = read(tmp_path)
    assert_same(found, new)
    assert found.spec == TINY
    assert found.stats.mean == new.stats.mean
    assert_same(read(tmp_path / "teacher" / "90"), old)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_same(read("~/teacher/90"), old)


def test_a_workdir_whose_checkpoints_went_on_says_so(tmp_path, caplog):
    """A run that is under way, or was preempted: its newest weights have not been exported yet."""
    loaded = sample(seed=1)
    weights.save_npz(tmp_path / "teacher" / "90", loaded.params, meta_of(loaded))
    for item in ("state", "meta"):
        (tmp_path / "checkpoints/90" / item).mkdir(parents=True)
    read(tmp_path)
    assert not caplog.messages
    for item in ("state", "meta"):
        (tmp_path / "checkpoints/130" / item).mkdir(parents=True)
    assert_same(read(tmp_path), loaded)
    assert re.search(r"weights of step 90, .* step 130 give .*checkpoints/130$", caplog.text.strip())


def test_checkpoint_gives_teacher_and_student(tmp_path, monkeypatch, caplog):
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
    monkeypatch.chdir(tmp_path)
    caplog.clear()
    assert_same(read("checkpoints/40"), teacher)
    assert not caplog.records


def test_a_step_in_a_bucket_counts_once_it_is_committed(tmp_path, monkeypatch):
    """Objects cannot be renamed: an unfinished step has its final name there."""
    steps = tmp_path / "checkpoints"
    for name in ("5", "40", "100"):
        for item in ("state", "meta"):
            (steps / name / item).mkdir(parents=True)
    assert find_checkpoint(tmp_path) == steps / "100", "on a disk the name is given last"
    monkeypatch.setattr("terrafm_jax.export.checkpoint_weights._marked", lambda step: True)
    with pytest.raises(WeightsError, match=r"checkpoints: found the steps 5, 40, 100, none with commit_success\.txt"):
        find_checkpoint(tmp_path)
    assert find_checkpoint(steps / "5") == steps / "5"
    for name in ("5", "40"):
        (steps / name / COMMITTED).write_text("")
    assert find_checkpoint(tmp_path) == find_checkpoint(steps) == steps / "40"


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


def test_weights_to_start_from_that_mean_something_else_here_are_told_of():
    """Their shapes fit: without a word a run from the released weights would meet inputs that these never saw."""
    theirs = sample()  # ten dB and ten DN off the published means
    assert doubts_about(theirs, TINY, theirs.stats) == []
    (told,) = doubts_about(theirs, TINY, Statistics.published())
    assert told.startswith("normalized with other statistics (s1 by up to 1.7 deviations), ")
    assert "its statistics.json" in told
    released = dataclasses.replace(theirs, stats=Statistics.published())
    (told,) = doubts_about(released, TINY, theirs.stats)
    assert told.endswith("--config.data.statistics=published has those")
    wide = dataclasses.replace(released.stats, std={k: tuple(2 * s for s in v) for k, v in released.stats.std.items()})
    (told,) = doubts_about(released, TINY, wide)
    assert "s1 by up to 2 deviations, s2_l1c by up to 2 deviations" in told
    assert doubts_about(released, dataclasses.replace(TINY, sensors=("s2_l2a",)), theirs.stats) == []


def test_weights_to_start_from_are_not_cut_into_other_heads_unnoticed():
    theirs = sample()
    model = dataclasses.replace(TINY, heads=2, fusion_heads=8)
    heads, fusion = doubts_about(theirs, model, theirs.stats)
    assert heads == "heads 1 there, 2 here (config.model.heads): the same shapes, but another network"
    assert fusion.startswith("fusion_heads 16 there, 8 here")
    del theirs.params["backbone"]["patch_embed"]["fusion"]  # as in the released file, which tells nothing of them
    assert len(doubts_about(theirs, model, theirs.stats)) == 1


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
    assert "teacher only" in refusal(tmp_path / "hub", which="student")
    assert "teacher only" in refusal(tmp_path / "hub" / "model.safetensors", which="student")
    (tmp_path / "hub" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"config.json: not JSON"):
        read(tmp_path / "hub")


def test_a_workdir_of_fine_tuning_says_where_its_weights_are(tmp_path):
    tuned = sample(seed=1)
    weights.save_npz(tmp_path / "best", tuned.params, meta_of(tuned))
    with pytest.raises(WeightsError, match=r"a workdir of terrafm_jax.finetune, its weights are .*/best: give it"):
        read(tmp_path)
    assert_same(read(tmp_path / "best"), tuned)


def test_load_refuses_to_change_the_network(tmp_path):
    loaded = sample()
    weights.save_npz(tmp_path / "teacher" / "1", loaded.params, meta_of(loaded))
    with pytest.raises(WeightsError, match="width"):
        terrafm_jax.load(tmp_path, width=3)
    assert terrafm_jax.load(tmp_path, dtype="bfloat16").spec.dtype == "bfloat16"
