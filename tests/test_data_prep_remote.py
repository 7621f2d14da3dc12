"""Remote sources: only footers, rows and columns that are needed travel; an outage stops, never quarantines."""

from __future__ import annotations

import json
import random
import re
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from data_prep_cells import make_cells, make_source, write_majortom

from data_prep import majortom, parquet

pytest.importorskip("aiohttp", reason="fsspec reads http through aiohttp")


def _listing(root: Path, folder: str) -> bytes:
    """What the Hub answers for one folder of a repository."""
    found = [
        {
            "type": "directory" if path.is_dir() else "file",
            "path": path.relative_to(root).as_posix(),
            "size": 0 if path.is_dir() else path.stat().st_size,
            "oid": "0",
        }
        for path in sorted((root / folder).iterdir())
    ]
    return json.dumps(found).encode()


HUB = "Major-TOM"  # account under which the same folder is served as dataset repositories


class Server(ThreadingHTTPServer):
    """Serves a folder with range requests and remembers what it sent; ``broken`` answers 503.

    Speaks as much of the Hugging Face Hub's protocol as reading a dataset repository takes.
    """

    def __init__(self, root: Path):
        self.root, self.sent, self.broken = root, [], 0
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def do_POST(self) -> None:
        """``paths-info`` of the Hub: which of the paths exist, and their sizes."""
        form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        repo = re.fullmatch(f"/api/datasets/{HUB}/([^/]+)/paths-info/main", self.path)
        found = [(name, self.server.root / repo.group(1) / name) for name in form["paths"]] if repo else []
        known = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": "0"} for n, p in found if p.is_file()]
        self._send(200, json.dumps(known).encode(), {"Content-Type": "application/json"})

    def _answer(self, head: bool) -> None:
        repo = re.fullmatch(f"/api/datasets/{HUB}/([^/]+)(/revision/main)?", self.path)
        if repo and (self.server.root / repo.group(1)).is_dir():
            answer = json.dumps({"id": f"{HUB}/{repo.group(1)}", "sha": "0" * 40}).encode()
            self._send(200, answer, {"Content-Type": "application/json"}, head)
            return
        tree = re.match(f"/api/datasets/{HUB}/([^/]+)/tree/main/?([^?]*)", self.path)
        if tree and (self.server.root / tree.group(1) / tree.group(2)).is_dir():
            folder = self.server.root / tree.group(1)
            self._send(200, _listing(folder, tree.group(2)), {"Content-Type": "application/json"}, head)
            return
        if repo:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        self.path = re.sub(f"^/datasets/{HUB}/([^/]+)/resolve/main/", r"/\1/", self.path)
        path = self.server.root / self.path.lstrip("/")
        if self.server.broken > 0 and not head and "images" in self.path:
            self.server.broken -= 1
            self._send(503, b"", {})
            return
        if not path.is_file():
            self._send(404, b"", {})
            return
        data = path.read_bytes()
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"Accept-Ranges": "bytes"}
        if wanted:
            first, last = int(wanted.group(1)), min(int(wanted.group(2) or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
        if not head:
            self.server.sent.append((self.path, len(data)))
        self._send(206 if wanted else 200, data, headers, head)

    def _send(self, status: int, data: bytes, headers: dict[str, str], head: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        return


IDLE = 300_000  # bytes of a column that nobody needs


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    make_source(tmp_path / "in", 6)
    rows, metadata = make_cells(6)
    for cells in rows.values():
        for number, row in enumerate(cells):
            row["thumbnail"] = random.Random(number).randbytes(IDLE)
    write_majortom(tmp_path / "in", rows, metadata)
    found = Server(tmp_path / "in")
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    parquet._open.cache_clear()


def command(server: Server, tmp_path: Path, out: str, *flags: str) -> list[str]:
    return ["--source", server.url, "--worldcover", str(tmp_path / "in" / "worldcover"), "--out", str(tmp_path / out),
            "--tile-size", "24", "--split-shares", "1,0,0", *flags]  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_http_ranges_give_the_same_data_and_read_only_what_is_needed(server: Server, tmp_path: Path):
    flags = ("--limit", "1")
    assert majortom.main(command(server, tmp_path, "remote", *flags)) == 0
    local = command(server, tmp_path, "local", *flags)
    local[1] = str(tmp_path / "in")
    assert majortom.main(local) == 0
    assert files(tmp_path / "remote") == files(tmp_path / "local")
    _check_sent(server, tmp_path / "in", cells=1)


def _check_sent(server: Server, source: Path, cells: int) -> None:
    """Of the images only footers, and of ``cells`` rows only the columns that are needed."""
    images = sum(size for path, size in server.sent if "images" in path)
    whole = sum(p.stat().st_size for p in source.rglob("part_*.parquet"))
    needed = (whole - 6 * 3 * IDLE) * cells / 6
    footers = 3 * 66_000  # pyarrow reads the last 64 kB of a file to find its footer
    assert images < footers + 1.3 * needed < whole / 4, f"{cells} of six cells took {images} of {whole} bytes"


def test_a_hub_repository_is_read_by_ranges(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``--source hf://datasets/...`` through Hugging Face's own client, against a hub of two routes."""
    from huggingface_hub import HfFileSystem, constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    HfFileSystem.clear_instance_cache()
    remote = command(server, tmp_path, "remote", "--limit", "1")
    remote[1] = f"hf://datasets/{HUB}"
    try:
        assert majortom.main(remote) == 0
    finally:
        HfFileSystem.clear_instance_cache()
    local = command(server, tmp_path, "local", "--limit", "1")
    local[1] = str(tmp_path / "in")
    assert majortom.main(local) == 0
    assert files(tmp_path / "remote") == files(tmp_path / "local")
    _check_sent(server, tmp_path / "in", cells=1)


def test_a_short_outage_is_waited_for(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parquet, "_PAUSES", (0.01, 0.01, 0.01))
    server.broken = 2
    assert majortom.main(command(server, tmp_path, "out", "--limit", "2")) == 0


def test_a_long_outage_stops_the_job_and_rejects_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(parquet, "_PAUSES", (0.01,))
    server.broken = 10_000
    assert majortom.main(command(server, tmp_path, "out")) == 5
    message = capsys.readouterr().err
    assert "does not answer" in message
    assert "start the same command again" in message
    server.broken = 0
    assert majortom.main(command(server, tmp_path, "out")) == 0
    assert (tmp_path / "out" / "rejected.csv").read_text() == "unit,products,reason\n"


def test_a_missing_part_is_the_fault_of_its_cells(server: Server, tmp_path: Path):
    (tmp_path / "in/Core-S1RTC/images/part_00000.parquet").unlink()
    out = tmp_path / "out"
    assert majortom.main(command(server, tmp_path, "out")) == 1
    assert not (out / "dataset_info.json").exists()
