"""The train step compiled for a TPU that is not there: two layers, one small topology."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from terrafm_jax import aot
from terrafm_jax.tpu import client, step
from terrafm_jax.tpu.chips import Topology


def small_config():
    from configs import vitb

    config = vitb.get_config("runlocal")
    config.batch_size = 16
    config.model.sensors = ("s1", "s2_l2a")  # compiling takes time in proportion to bands and resolution groups
    return config


@pytest.fixture(scope="module", params=[1, 0], ids=["whole state", "split state"])
def report(request):
    if not client.available():
        pytest.skip("libtpu is not installed")
    topology, config = Topology.parse("v5e:2x2"), small_config()
    config.mesh.fsdp = request.param
    spec, mesh = step.build(config, topology)
    assert spec.model.platform == "tpu"
    assert mesh.shape["fsdp"] == (request.param or 4)
    return step.compile_step(spec, mesh, topology, meters=960)


@pytest.mark.slow
def test_report_of_the_real_step(report):
    assert report["chips"] == 4
    assert report["images_per_chip"] == 4
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


def test_options_are_parsed_and_faults_named():
    assert aot.parse_options(None) is None
    assert aot.parse_options(["a=1", "b=x=y"]) == {"a": "1", "b": "x=y"}
    with pytest.raises(ValueError, match=r"--option.*'c'"):
        aot.parse_options(["a=1", "c"])


def test_wrong_topology_is_one_line(root):
    command = [sys.executable, "-m", "terrafm_jax.aot", "--config=configs/vitb.py", "--topology=v5e"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    assert found.stderr.strip().splitlines()[-1].startswith("error: --topology=v5e")
