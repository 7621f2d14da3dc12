"""Workdir and data in a bucket (an emulator of the store's HTTP interface) behave as on disk."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import child_environment, run_module
from tiny_training import FORTY, command

from terrafm_jax.data import shards
from terrafm_jax.export.checkpoint_weights import COMMITTED
from terrafm_jax.training import report

# The run of the fixture ``straight``; only what is written, and how often, differs.
FLAGS = (
    *FORTY, "--config.log.pictures=True", "--config.log.tensorboard=True", "--config.log.every=4",
    "--config.checkpoint.every=20",
)  # fmt: skip


def _with_generations(objects: Any) -> None:
    """The store names an object's generation when it is read, and tensorstore counts on it; the emulator does not."""
    original = objects.download

    def download(request: Any, response: Any, storage: Any, *rest: Any, **options: Any) -> None:
        with contextlib.suppress(objects.NotFound):
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = found["generation"]
        original(request, response, storage, *rest, **options)

    objects.download = download


@pytest.fixture(scope="module")
def bucket():
    """The environment that leads commands to the store."""
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    pytest.importorskip("gcsfs")
    _with_generations(pytest.importorskip("gcp_storage_emulator.handlers.objects"))
    # It takes a free port itself: one chosen before may be gone by then, and start() would wait for ever.
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    url = f"http://127.0.0.1:{server._api._httpd.server_address[1]}"
    yield child_environment(
        STORAGE_EMULATOR_HOST=url, TENSORSTORE_GCS_HTTP_URL=url, NO_GCE_CHECK="true",
        GCE_METADATA_IP="127.0.0.1:1", GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",
    )  # fmt: skip
    server.stop()


@pytest.mark.slow
def test_training_in_a_bucket_equals_training_on_disk(bucket, prepared: Path, straight: Path, tmp_path: Path) -> None:
    environment = bucket | {shards.FOLDER_VARIABLE: str(tmp_path / "copies")}
    copied = run_module("etils_copy", str(prepared), "gs://bucket/tiles", env=environment | {"PYTHONPATH": _here()})
    assert copied.returncode == 0, copied.stderr
    remote = command("gs://bucket/tiles", "gs://bucket/run", *FLAGS)
    for stop in (20, 0):
        done = run_module(*remote, f"--config.stop_at_step={stop}", env=environment)
        assert done.returncode == 0, done.stderr
    assert "resumed step 20" in done.stderr
    back = run_module(
        "etils_copy", "gs://bucket/run", str(tmp_path / "back"), env=environment | {"PYTHONPATH": _here()}
    )
    assert back.returncode == 0, back.stderr
    ours, theirs = (np.load(run / "teacher/40/params.npz") for run in (tmp_path / "back", straight))
    assert ours.files == theirs.files
    assert all(ours[k].tobytes() == theirs[k].tobytes() for k in ours.files)
    steps = [json.loads(line)["step"] for line in (tmp_path / "back/metrics.jsonl").read_text().splitlines()]
    assert {1, *range(4, 41, 4)} <= set(steps)
    assert report.goodput_line(tmp_path / "back") in done.stderr, "told of fewer rows than there are"
    assert (tmp_path / "back/DONE").exists()
    assert {p.name for p in (tmp_path / "back/checkpoints").iterdir()} >= {"40"}
    assert (tmp_path / "back/checkpoints/40" / COMMITTED).exists()
    assert {"views.png", "report.html", "config_resolved.json", "parameters.txt"} <= {
        p.name for p in (tmp_path / "back").iterdir()
    }
    assert list((tmp_path / "copies").glob("*/*.array_record*"))


def _here() -> str:
    return str(Path(__file__).parent)


class Store:
    """Stands in for etils' path of a remote file; fails as often as it is told to."""

    def __init__(self, content: bytes, failures: int, cut: int = 0):
        self.content, self.failures, self.cut, self.asked = content, failures, cut, 0
        self.parent, self.name = "gs://bucket/tiles", "a.array_record"

    def stat(self):
        return type("Stat", (), {"length": len(self.content)})

    def open(self, mode: str):
        import io

        self.asked += 1
        if self.failures:
            self.failures -= 1
            raise TimeoutError("503")
        cut, self.cut = self.cut, 0
        return io.BytesIO(self.content[: len(self.content) - cut])


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def make(**settings: int) -> Store:
        made = Store(b"0123456789" * 100, **settings)
        monkeypatch.setattr(shards.epath, "Path", lambda url: made)
        monkeypatch.setenv(shards.FOLDER_VARIABLE, str(tmp_path))
        return made

    return make


def test_a_shard_is_copied_once_after_failures_and_cut_transfers(store) -> None:
    made = store(failures=2, cut=3)
    path = shards.local_copy("gs://bucket/tiles/a.array_record", first_wait=0.001)
    assert path.read_bytes() == made.content
    assert made.asked == 4  # twice no answer, once too short
    assert shards.local_copy("gs://bucket/tiles/a.array_record") == path
    assert made.asked == 4
    made.content = b"another data set under the same name"
    assert shards.local_copy("gs://bucket/tiles/a.array_record").read_bytes() == made.content


def test_it_gives_up_by_name_and_leaves_no_half_copy(store, tmp_path: Path) -> None:
    store(failures=100)
    with pytest.raises(shards.FetchError, match=r"gs://bucket/tiles/a\.array_record: gave up after 3 tries.*503"):
        shards.local_copy("gs://bucket/tiles/a.array_record", tries=3, first_wait=0.001)
    assert not list(tmp_path.glob("*/*.array_record*[!k]"))


def test_a_folder_that_cannot_be_written_is_named(store, monkeypatch, tmp_path: Path) -> None:
    store(failures=0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(shards.FOLDER_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(shards.FetchError, match=shards.FOLDER_VARIABLE):
        shards.local_copy("gs://bucket/tiles/a.array_record", first_wait=0.001)
