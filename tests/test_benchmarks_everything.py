"""One call on a machine that is lent once: it ends in time, keeps what it has, and no entry costs another one."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import child_environment

from benchmarks import compare, end_to_end, everything, kernels, timing, train_step
from benchmarks.everything import Entry

# Stands for a benchmark: ends, fails, runs out of memory or hangs with a child of its own, as its last word says.
FAKE = """
import json, pathlib, subprocess, sys, time
batch, folder, what = int(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4]
result = {"benchmark": "train_step", "batch": batch, "images_per_second": 7.0, "peak_memory_bytes": None, "mfu": None}
if what == "trace":
    (folder / "trace").mkdir()
    (folder / "trace/x.trace.json.gz").write_bytes(pathlib.Path(sys.argv[5]).read_bytes())
if what == "fail" or what == "memory" and batch > 2:
    sys.exit("RESOURCE_EXHAUSTED: no room for that" if what == "memory" else "broken")
if what == "hang":
    child = subprocess.Popen(["sleep", "120"])
    (folder / "pids").write_text(str(child.pid))
    (folder / "hang.json").write_text(json.dumps({"benchmark": "compare", "batch": 4, "left_out": {"peer": "ill"},
                                                  "images_per_second": {"ours": 3.0}, "ours_over_peer": 2.0}))
    (folder / "hangs").touch()
    time.sleep(120)
print(json.dumps(result))
"""

STREAM, MODULES = {"name": "Stream #13(Compute)"}, {"name": "XLA Modules"}
EVENTS = [
    {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0"}},
    {"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "/host:CPU"}},
    {"ph": "M", "pid": 1, "tid": 5, "name": "thread_name", "args": STREAM},
    {"ph": "M", "pid": 1, "tid": 6, "name": "thread_name", "args": MODULES},
    {"ph": "M", "pid": 2, "tid": 5, "name": "thread_name", "args": STREAM},
    *[{"ph": "X", "pid": 1, "tid": 5, "name": "gemm", "dur": 2000, "args": {"hlo_op": "dot.1"}} for _ in range(6)],
    {"ph": "X", "pid": 1, "tid": 5, "name": "copy", "ts": 9, "dur": 4000},
    {"ph": "X", "pid": 1, "tid": 6, "name": "jit_step", "ts": 0, "dur": 90000},
    {"ph": "X", "pid": 2, "tid": 5, "name": "host", "ts": 0, "dur": 90000},
]  # fmt: skip


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """As jax.profiler writes it of a GPU; the whole step and the host are in it, too."""
    path = tmp_path / "traced" / "x.trace.json.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": EVENTS}).encode()))
    return path


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[everything.Results]:
    """Results whose entries come from :func:`entry`."""
    (tmp_path / "fake_bench.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(everything, "SHORTEST", 0)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return everything.Results(tmp_path / "out", scratch)


def entry(fake: everything.Results, what: str, *more: object, batch: int = 4, limit: int = 60) -> Entry:
    return Entry(what, "fake_bench", batch, (str(fake.scratch), what, *map(str, more)), limit)


def written(fake: everything.Results) -> dict:
    return json.loads((fake.out / "everything.json").read_text())


def test_no_entry_costs_another_one(fake, trace, capsys):
    plan = [entry(fake, "fail"), entry(fake, "memory"), entry(fake, "trace", trace), entry(fake, "ok")]
    everything.measure(plan, fake, time.monotonic() + 300)
    found = written(fake)
    assert list(found["entries"]) == ["fail", "memory_before", "memory", "trace", "ok"]
    assert "broken" in found["entries"]["fail"]["tail"]
    assert found["entries"]["memory_before"]["no_memory"]
    assert (found["entries"]["memory"]["batch"], found["entries"]["memory"]["images_per_second"]) == (2, 7.0)
    assert found["date"]
    assert "failed (exit code 1)" in capsys.readouterr().out
    assert {p.name for p in fake.out.iterdir()} == {"everything.json", "kernels.md", "logs.tar.gz", "trace.tar.gz"}
    with tarfile.open(fake.out / "logs.tar.gz") as logs:
        assert {Path(name).name for name in logs.getnames()} == {"fail.log", "memory.log", "trace.log", "ok.log"}
    assert "| 4.000 | 75.0% | 2.0 | gemm | dot.1 |" in (fake.out / "kernels.md").read_text()


def test_what_an_entry_found_is_written_before_it_is_told(fake, monkeypatch):
    def broken(name: str, result: dict) -> str:
        raise KeyError(name)

    monkeypatch.setattr(everything, "headline", broken)
    with pytest.raises(KeyError):
        everything.measure([entry(fake, "ok")], fake, time.monotonic() + 300)
    assert written(fake)["entries"]["ok"]["images_per_second"] == 7.0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before it is opened, or before it is read
        return False


def assert_ends(pid: int) -> None:
    """A killed process is there until it gets a core again; by itself this one would end after two minutes."""
    limit = time.monotonic() + 60
    while alive(pid):
        assert time.monotonic() < limit, pid
        time.sleep(0.02)


def test_an_entry_that_hangs_ends_with_its_children_and_keeps_its_rounds(fake, capsys, monkeypatch):
    class Begun(subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            """The limit counts from when the entry hangs: on a crowded machine it may not get so far in 3 s."""
            limit = time.monotonic() + 300
            while timeout == 3 and not (fake.scratch / "hangs").exists():
                assert time.monotonic() < limit
                time.sleep(0.02)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Begun)
    everything.measure([entry(fake, "hang", limit=3), entry(fake, "ok")], fake, time.monotonic() + 300)
    found = written(fake)["entries"]
    assert found["hang"]["error"] == "given up after 3 s"
    assert found["hang"]["images_per_second"] == {"ours": 3.0}
    assert found["ok"]["images_per_second"] == 7.0
    said = "hang: failed (given up after 3 s), ours_over_peer 2.00, peer left out, ours 3.00 images/s, batch 4"
    assert said in capsys.readouterr().out
    assert_ends(int((fake.scratch / "pids").read_text()))


def test_a_call_that_is_ended_takes_the_running_entry_with_it(root, tmp_path):
    """SIGTERM to the call itself: what time limits send."""
    (tmp_path / "fake_bench.py").write_text(FAKE)
    call = f"""
import pathlib
from benchmarks import everything
here = pathlib.Path({str(tmp_path)!r})
everything.plan = lambda *_: [everything.Entry("hang", "fake_bench", 4, (str(here), "hang"))]
everything.main(["--out", str(here / "out")])
"""
    env = child_environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{root}")
    job = subprocess.Popen([sys.executable, "-c", call], env=env)
    limit = time.monotonic() + 300
    while not (pids := tmp_path / "pids").exists() or not pids.read_text():
        assert job.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=300) == 143
    assert_ends(int(pids.read_text()))


def test_time_that_is_used_up_leaves_out_the_rest(fake):
    everything.measure([entry(fake, "ok")], fake, time.monotonic() - 1)
    assert written(fake)["entries"]["ok"] == {"error": "no time left"}


def test_archives_stay_small_enough_to_be_carried(fake, monkeypatch):
    monkeypatch.setattr(everything, "LARGEST", 100_000)
    logs = fake.scratch / "logs"
    logs.mkdir()
    (logs / "small.log").write_bytes(os.urandom(1000))
    (logs / "large.log").write_bytes(os.urandom(200_000))
    fake.add("x", {"error": "no time left"})
    with tarfile.open(fake.out / "logs_in_part.tar.gz") as found:
        assert found.getnames() == ["logs/small.log"]
    assert not (fake.out / "logs.tar.gz").exists()


def test_all_that_one_call_measures_is_understood(tmp_path: Path) -> None:
    """``everything`` meets its device only once: a wrong option would cost the figure."""
    parsers = {"train_step": train_step, "compare": compare, "end_to_end": end_to_end}
    names = []
    for planned in everything.plan(64, tmp_path):
        for each in (planned, everything.rehearsed(planned)):
            module = parsers[each.module.removeprefix("benchmarks.")]
            args = module.parse(each.command()[2:])
            assert args.batch == each.batch
            if module is not compare:
                assert train_step.make_spec(args).optim.batch_size == each.batch
        names.append(planned.name)
    assert len(set(names)) == len(names)
    assert names[:4] == ["b", "compare_b", "b_profile", "l"]
    assert "b_end_to_end" in names


@pytest.mark.slow
def test_a_rehearsal_runs_real_entries(root: Path, tmp_path: Path) -> None:
    names = ["b_profile", "b_end_to_end"]
    command = [sys.executable, "-m", "benchmarks.everything", "--out", str(tmp_path / "out"), "--rehearse"]
    done = subprocess.run(
        [*command, "--only", *names], cwd=root, env=child_environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/everything.json").read_text())["entries"]
    assert {name: "error" in found[name] for name in names} == dict.fromkeys(names, False), found
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == names
    assert "No kernel of a device" in (tmp_path / "out/kernels.md").read_text()
    with tarfile.open(tmp_path / "out/trace.tar.gz") as archive:
        assert any(name.endswith(".trace.json.gz") for name in archive.getnames())


# --- kernels, circumstances ---


def test_kernels_are_those_of_the_devices_streams(trace):
    found = kernels.read(trace.parent)
    assert [(k.name, k.count, k.milliseconds) for k in found] == [("gemm", 6, 12.0), ("copy", 1, 4.0)]
    with pytest.raises(FileNotFoundError, match=r"trace\.json\.gz"):
        kernels.read(trace.parent / "none")


def test_a_gpu_is_described_as_nvidia_smi_does(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert timing.gpu() is None
    assert not everything.roomy(None)
    row = "NVIDIA H200, 570.1, 143771 MiB, 4 MiB, 1980 MHz, 1980 MHz, 700.00 W, 31, 0 %, Disabled"
    table = "| NVIDIA-SMI 570.1   Driver Version: 570.1   CUDA Version: 12.8  |"
    (tmp_path / "nvidia-smi").write_text(f'#!/bin/sh\n[ $# = 0 ] && echo "{table}" || echo "{row}"\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    found = timing.gpu()
    assert found["driver_cuda"] == "12.8"
    assert found["devices"][0]["name"] == "NVIDIA H200"
    assert found["devices"][0]["driver_version"] == "570.1"
    assert everything.roomy(found)
    found["devices"][0]["memory.total"] = "81559 MiB"
    assert not everything.roomy(found)


# --- a comparison some of whose contenders fail ---

CONTENDER = """
import pathlib, sys, time
from benchmarks import timing
import json
name, here = sys.argv[1], pathlib.Path(__file__).parent
(here / f"{name}.started").touch()
for other in sys.argv[2].split(",") if sys.argv[2] else ():
    limit = time.monotonic() + 120
    while not (here / f"{other}.started").exists():
        if time.monotonic() > limit:
            sys.exit(f"{other} was not started beside {name}")
        time.sleep(0.02)
turns = 0
def run(steps):
    global turns
    turns += 1
    if name == "peer" and turns == 2:
        raise MemoryError("RESOURCE_EXHAUSTED: out of memory\\nmore")
    time.sleep(0.01 * steps)
with timing.failure_reported(True):
    if name == "peer_folded":
        raise RuntimeError("no compiler here")
    timing.take_turns(run)
print(json.dumps({"benchmark": "x", "name": name}))
"""


@pytest.mark.parametrize("cores", [1, 64])
def test_contenders_that_fail_are_left_out_and_said(tmp_path, monkeypatch, cores):
    """Of many cores all are started before the first is waited for."""
    (tmp_path / "fake_contender.py").write_text(CONTENDER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)

    def starters(args, names):
        beside = "peer,peer_folded" if cores > 1 else ""
        return {n: lambda n=n: timing.Contender(n, "fake_contender", [n, beside if n == "ours" else ""]) for n in names}

    rounds = []
    monkeypatch.setattr(compare, "starters", starters)
    keep = compare.write
    monkeypatch.setattr(compare, "write", lambda path, found: (rounds.append(found), keep(path, found)))
    out = tmp_path / "compare.json"
    words = ["--batch", "4", "--steps", "1", "--rounds", "3", "--peers", "peer", "peer_folded", "--out", str(out)]
    found = compare.main(words)
    assert found["left_out"] == {
        "peer_folded": "peer_folded: RuntimeError: no compiler here",
        "peer": "peer: MemoryError: RESOURCE_EXHAUSTED: out of memory",
    }
    assert found["results"].keys() == found["images_per_second"].keys() == {"ours", "peer_folded_eager"}
    assert found["ours_over_peer_folded"] > 0
    assert "ours_over_peer" not in found
    assert json.loads(out.read_text()) == found
    assert [(r["rounds_done"], "peer" in r["images_per_second"]) for r in rounds] == [
        (1, True), (2, False), (3, False), (3, False),
    ]  # fmt: skip
