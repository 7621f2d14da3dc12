"""Memory stays flat over time: neither reading nor preparing keeps what it has handed on."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_prep_cells import make_cells, worldcover, write_majortom
from tiles_fake import fake_record, write_dataset

from terrafm_jax.data.pipeline import make_loader, make_order
from terrafm_jax.data.sampling import SamplingSpec

STATM = Path("/proc/self/statm")
pytestmark = pytest.mark.skipif(not STATM.exists(), reason="reads the resident memory from /proc")


def growth(step: Callable[[int], int], warm: int, steps: int) -> tuple[float, float]:
    """MB by which resident memory grows over ``steps`` calls after ``warm`` ones, and MB that these handled."""
    for i in range(warm):
        step(i)
    gc.collect()
    before = int(STATM.read_text().split()[1])
    handled = sum(step(warm + i) for i in range(steps))
    gc.collect()
    return (int(STATM.read_text().split()[1]) - before) * 4096 / 1e6, handled / 1e6


@pytest.mark.parametrize("options", [{"prefetch": 2}, {"prefetch": 0, "threads": 2}])
def test_reading(tmp_path: Path, options: dict[str, int]):
    folder = write_dataset(tmp_path, [fake_record(i, 120) for i in range(8)])
    order = make_order(folder, "train", SamplingSpec("uniform"), batch_size=8, seed=0)
    batches = make_loader(folder, "train", order, **options)

    def step(number: int) -> int:
        batch = next(batches)
        return batch["s2_l2a"]["10m"]["dn"].nbytes

    grown, handled = growth(step, 20, 200)
    batches.close()
    assert handled > 150
    assert grown < 30, f"{grown:.0f} MB kept of {handled:.0f} MB"


def test_preparing(tmp_path: Path):
    from data_prep import majortom
    from data_prep.cell import Options
    from data_prep.chunks import Job, Unit, write_chunk
    from data_prep.worldcover import WorldCover

    write_majortom(tmp_path, *make_cells(2, 240))
    for west in (9, 12):
        worldcover(tmp_path / "worldcover", west, 48, np.full((30, 30), 10))
    source = majortom.MajorTom(str(tmp_path))
    joined, _ = majortom.join({key: source.rows(key) for key in majortom.FOLDERS}, [])
    units = [Unit(next(iter(u.values())).cell, 0, u, split="train") for u in joined]
    cover = WorldCover.open(tmp_path / "worldcover")
    job = Job(source, cover, Options(120, 120), str(tmp_path / "out"))
    job.work.mkdir(parents=True)

    def step(number: int) -> int:
        write_chunk(job, number, units, (), lambda key: None)
        size = 0
        for path in job.work.iterdir():
            size += path.stat().st_size
            path.unlink()
        return size

    grown, handled = growth(step, 4, 20)
    assert handled > 50
    assert grown < 20, f"{grown:.0f} MB kept of {handled:.0f} MB"


HELD = """
import time
from grain.multiprocessing import SharedMemoryArray as Shared
from terrafm_jax.data.memory import free_batches

def slowly(memory, unlink, really=Shared.close_shm_async):
    time.sleep(0.02)
    really(memory, unlink)

Shared.enable_async_del(1)
Shared.close_shm_async = slowly
held = [Shared((1000,)) for _ in range(20)]
for array in held:
    array.unlink_on_del()
del array
held.clear()
if {free}:
    free_batches()
"""


@pytest.mark.parametrize("free", [False, True])
def test_no_shared_memory_is_left_at_the_end(root: Path, free: bool):
    """However late the thread runs on which Grain frees it."""
    command = [sys.executable, "-c", HELD.format(free=free)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=True)
    assert ("leaked shared_memory" in done.stderr) != free, done.stderr
