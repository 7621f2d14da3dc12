"""The train step compiled for a TPU that is not there: two layers, one small topology."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import pytest

from terrafm_jax import aot
from terrafm_jax import config as config_lib
from terrafm_jax.ahead import client, step
from terrafm_jax.ahead.chips import Topology
from terrafm_jax.ahead.reckon import Item
from terrafm_jax.models.terrafm import init_params


def small_config():
    from configs import vitb

    config = vitb.get_config("runlocal")
    config.batch_size = 16
    config.model.sensors = ("s1", "s2_l2a")  # compiling takes time in proportion to bands and resolution groups
    return config


CASES = {
    "whole state": ("v5e:2x2", 1, 1),
    "split state": ("v5e:2x2", 0, 4),
    "one host": ("v5e:2x4", 0, 8),
    "two slices": ("2*v5e:2x2", 2, 2),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def report(request):
    if not client.available():
        pytest.skip("libtpu is not installed")
    name, fsdp, found = request.param
    topology, config = Topology.parse(name), small_config()
    config.mesh.fsdp = fsdp
    spec, mesh = step.build(config, topology)
    assert spec.model.platform == "tpu"
    assert mesh.shape["fsdp"] == found
    return step.compile_step(spec, mesh, topology, meters=960)


@pytest.mark.slow
def test_report_of_the_real_step(report):
    assert report["images_per_chip"] * report["chips"] == 16
    assert report["fits"]
    memory = report["memory"]
    assert memory["state"] + memory["batch"] <= memory["arguments"] * 1.01
    assert 0 < memory["peak"] < memory["hbm"]
    assert 0 < report["mfu"] < 0.85
    assert report["floor_seconds"] <= report["step_seconds"]
    assert sum(report["seconds_by_kind"].values()) == pytest.approx(report["step_seconds"])
    assert sum(report["seconds_by_scope"].values()) == pytest.approx(report["step_seconds"])
    assert len(report["costliest"]) == 10


@pytest.mark.slow
def test_every_part_of_the_step_is_in_it(report):
    """Views from raw tiles, both networks, loss and update: none was dropped as dead code."""
    for part in ("views", "teacher", "student forward", "student backward", "loss", "update"):
        assert report["seconds_by_scope"][part] > 0, part
    assert report["flops"]["program"] > report["flops"]["formula"]
    assert "u16" in report["hlo"]


@pytest.mark.slow
def test_gradients_are_summed_in_float32_and_nothing_else_is_gathered(report):
    assert report["foreign_all_gathers"] == []
    sums = [row for row in report["collectives"] if row["opcode"] in ("all-reduce", "reduce-scatter")]
    assert {row["dtype"] for row in sums if row["bytes"] > 1e-3 * report["gradient_bytes"]} == {"f32"}
    assert report["reduced_bytes"] == pytest.approx(report["gradient_bytes"], rel=0.2)


@pytest.mark.slow
def test_text_names_what_matters(report):
    text = step.render(report)
    for word in ("memory per chip", "estimated step", "MFU", "all-reduce", "costliest", "of 16 GiB"):
        assert word in text
    json.dumps({k: v for k, v in report.items() if k != "hlo"})


def test_gathered_activations_are_foreign():
    """A kernel, a stack of folded columns and a part of a kernel are weights; tokens of 16 images are none."""
    config = small_config()
    spec = config_lib.model_spec(config)
    params = jax.eval_shape(lambda: init_params(spec, jax.random.key(0)))
    width, heads = spec.width, spec.queries * spec.fusion_heads

    def gather(numbers: int, dtype: str = "bf16") -> Item:
        wire = numbers * (2 if dtype == "bf16" else 4)
        return Item(f"gather{numbers}", "all-gather", "", "collective", 0.0, wire=3 * wire, count=3, dtype=dtype)

    weights = [gather(width * spec.hidden), gather(512 * (spec.stem_width + heads), "f32"), gather(width * width // 4)]
    tokens = [gather(16 * 17 * width), gather(16 * 4 * 5 * width + width)]
    assert step.gathers_of_activations(weights, params, spec, 4) == []
    assert len(step.gathers_of_activations([*weights, *tokens], params, spec, 4)) == 2


def test_options_are_parsed_and_faults_named():
    assert aot.parse_options(None) is None
    assert aot.parse_options(["a=1", "b=x=y"]) == {"a": "1", "b": "x=y"}
    with pytest.raises(ValueError, match=r"--option.*'c'"):
        aot.parse_options(["a=1", "c"])


def test_wrong_topology_is_one_line(root):
    command = [sys.executable, "-m", "terrafm_jax.aot", "--config=configs/vitb.py", "--topology=v5e"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert found.returncode == 1
    assert found.stderr.strip().splitlines()[-1].startswith("error: --topology=v5e")
