"""Many cells: chunks over worker processes, resumable, with progress; then the data set is completed."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.cell import prepare
from data_prep.chunks import WORK, Job, Unit, chunk_path, job_of_chunk, read, telling_full_disk, write_chunk
from data_prep.identity import differences, parts_of
from data_prep.progress import Progress
from data_prep.survey import Verdicts, look, survey
from data_prep.write import SUMMARY, finalize, remove_work, write_text
from terrafm_jax.data.source import read_json
from terrafm_jax.data.tiles import SPLITS

_AHEAD = 4  # chunks a worker has in line; waiting for all 100,000 of a planet takes a third of a second each time
_TRIES = 3  # deaths of workers without a cell to blame before the job gives up
_ORDER = (*SPLITS, "mixed", "unknown")


class PrepareError(RuntimeError):
    """The job cannot start or go on; the message says what to do."""


def make_chunks(units: Sequence[Unit], size: int) -> list[list[Unit]]:
    """A fixed partition: sorted by expected split, then cell; chunks never mix expected splits."""
    ordered = sorted(units, key=lambda u: (_ORDER.index(u.outlook), u.cell, u.number))
    double = [key for key, n in Counter(u.key for u in ordered).items() if n > 1]
    if double:
        raise PrepareError(f"cells planned twice: {double[:10]}")
    chunks: list[list[Unit]] = []
    for unit in ordered:
        if not chunks or len(chunks[-1]) >= size or chunks[-1][0].outlook != unit.outlook:
            chunks.append([])
        chunks[-1].append(unit)
    return chunks


def prepare_all(
    job: Job, units: Sequence[Unit], *, workers: int, chunk_size: int, plan: dict[str, Any], runner: str = "local",
    beam_options: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Prepares all units into ``job.directory`` and returns the summary.

    Started again with the same arguments it continues where it stopped, and the result has the same
    bytes. ``runner`` is ``local`` or the name of an Apache Beam runner.

    Raises:
      PrepareError: the folder belongs to another job or another process works in it.
      chunks.DiskFull, chunks.SourceUnavailable: stopped; what is finished stays.
    """
    directory = Path(job.directory)
    digest = parts_of(job, units, chunk_size)
    finished = _finished(directory, digest)
    if finished is not None:
        remove_work(directory)
        print(f"{directory} is complete already; delete it to prepare the same again", file=sys.stderr)
        return finished
    _make_folder(job)
    with telling_full_disk(job), _locked(job.work / "lock"):
        _check_same_job(job.work / "plan.json", digest, directory)
        chunks = make_chunks(units, chunk_size)
        for leftover in job.work.glob("*.tmp-*"):
            leftover.unlink(missing_ok=True)
        offsets = survey(units, lambda those: _look_all(job, those, workers), job.work / "offsets.json")
        job = dataclasses.replace(job, offsets=offsets)
        todo = [i for i in range(len(chunks)) if not chunk_path(job, i).exists()]
        if runner != "local":
            from data_prep.beam_pipeline import run_chunks

            run_chunks(job, {i: chunks[i] for i in todo}, runner, beam_options)
        else:
            with Progress(len(units), len(units) - sum(len(chunks[i]) for i in todo)) as bar:
                if workers <= 1:

                    def count(key: str) -> None:
                        if not key:  # done with a cell
                            bar.step()

                    for i in todo:
                        write_chunk(job, i, chunks[i], (), count)
                else:
                    _Pool(job, chunks, workers, bar).run(todo)
        told = {"sea_keep": job.options.sea_keep, "digest": digest["digest"], "job": digest}
        summary = finalize(job, len(chunks), {**plan, **told})
    return summary


def _make_folder(job: Job) -> None:
    try:
        with telling_full_disk(job):
            job.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrepareError(f"--out {job.directory}: cannot be written to ({error.strerror})") from error


def _finished(directory: Path, digest: dict[str, str]) -> dict[str, Any] | None:
    """The summary of a complete data set of the same job, None if there is none. Raises PrepareError."""
    if (directory / WORK).exists() or not (directory / "dataset_info.json").exists():
        return None
    path = directory / SUMMARY
    summary = read_json(path, dict) if path.exists() else {}
    if summary.get("digest") != digest["digest"]:
        different = differences(summary["job"], digest) if "job" in summary else []
        what = "; ".join(different) or "other cells or options"
        raise PrepareError(f"{directory} holds another data set: {what}; choose another --out or delete it")
    return summary


def _check_same_job(path: Path, digest: dict[str, str], directory: Path) -> None:
    if not path.exists():
        write_text(path, json.dumps(digest))
        return
    found = read_json(path, dict)
    different = differences(found, digest)
    if different:
        raise PrepareError(
            f"{directory} holds an interrupted preparation with other options: {'; '.join(different)}; "
            "choose another --out or delete it"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One preparation at a time in a folder. Raises PrepareError."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PrepareError(f"another process prepares data in {path.parent.parent}") from error
        yield


def _look_all(job: Job, units: list[Unit], workers: int) -> list[Verdicts]:
    """``survey.look`` at all units; one that kills its process says nothing."""
    print(f"deciding baseline offsets: looking at {len(units)} cells", file=sys.stderr, flush=True)
    if workers <= 1:
        return [look(job, unit) for unit in units]
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context) as executor:
            return list(executor.map(partial(look, job), units, chunksize=4))
    except BrokenProcessPool:
        return [_look_alone(job, unit) for unit in units]


def _look_alone(job: Job, unit: Unit) -> Verdicts:
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            return executor.submit(look, job, unit).result()
    except BrokenProcessPool:
        return {}


class _Pool:
    """Chunks over worker processes; survives workers that die of their input."""

    def __init__(self, job: Job, chunks: list[list[Unit]], workers: int, bar: Progress):
        self.job, self.chunks, self.workers, self.bar = job, chunks, workers, bar
        self.crumbs = job.work / "crumbs"  # one file a worker: the cell it reads
        self.record = job.work / "deadly.json"  # survives an interruption, so that the result stays the same
        self.deadly: list[str] = read_json(self.record, list) if self.record.exists() else []
        self._fruitless = 0

    def run(self, todo: list[int]) -> None:
        """Runs all chunks; after the death of a worker, what is left in a new pool. Raises PrepareError."""
        while todo:
            if not self._round(todo):
                self._autopsy()
            todo = [i for i in todo if not chunk_path(self.job, i).exists()]

    def _round(self, todo: list[int]) -> bool:
        """False if a worker died."""
        self.crumbs.mkdir(exist_ok=True)
        for crumb in self.crumbs.iterdir():
            crumb.unlink()
        with self._executor(self.workers) as (executor, counter):
            waiting, futures = iter(todo), set[Future[int]]()
            base = self.bar.done
            try:
                while True:
                    for i in itertools.islice(waiting, _AHEAD * self.workers - len(futures)):
                        units = self.chunks[i]
                        futures.add(executor.submit(_work, job_of_chunk(self.job, units), i, units, self.deadly))
                    if not futures:
                        break
                    done, futures = wait(futures, timeout=0.5, return_when=FIRST_COMPLETED)
                    # Without the lock, which a worker that was killed while it counted holds for ever.
                    self.bar.set(base + counter.get_obj().value)
                    for future in done:
                        future.result()
            except BrokenProcessPool:
                return False
        return True

    def _autopsy(self) -> None:
        """Tries the cells that were being read when a worker died, each in a process of its own."""
        suspects = sorted({crumb.read_text() for crumb in self.crumbs.iterdir()} - {""})
        units = {unit.key: unit for chunk in self.chunks for unit in chunk}
        found = [key for key in suspects if not self._survives(units[key])]
        self._fruitless = 0 if found else self._fruitless + 1
        if self._fruitless >= _TRIES:
            raise PrepareError(
                f"worker processes died {_TRIES} times while reading {suspects or 'nothing'}, none of which is deadly "
                "alone: out of memory? Try fewer --workers"
            )
        self.deadly = sorted({*self.deadly, *found})
        write_text(self.record, json.dumps(self.deadly))
        self.bar.say(f"a worker process died; cells to blame: {found or 'none'}; going on")

    def _survives(self, unit: Unit) -> bool:
        with self._executor(1) as (executor, _):
            try:
                executor.submit(_probe, self.job, unit).result()
            except BrokenProcessPool:
                return False
        return True

    @contextmanager
    def _executor(self, workers: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
        context = multiprocessing.get_context("spawn")
        counter = context.Value("q", 0)
        executor = ProcessPoolExecutor(workers, context, _start_worker, (counter, str(self.crumbs), os.getpid()))
        try:
            yield executor, counter
        except BaseException:
            _kill(executor)
            raise
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _kill(executor: ProcessPoolExecutor) -> None:
    """Ends the workers now; their unfinished chunks leave nothing behind that counts."""
    for process in list((executor._processes or {}).values()):
        process.terminate()


_counter: Any = None
_crumb: Path | None = None


def _start_worker(counter: Any, crumbs: str, parent: int) -> None:
    global _counter, _crumb
    _counter, _crumb = counter, Path(crumbs) / str(os.getpid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    """Ends the worker when its parent was killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _work(job: Job, chunk: int, units: list[Unit], poisoned: list[str]) -> int:
    return write_chunk(job, chunk, units, poisoned, _report)


def _probe(job: Job, unit: Unit) -> None:
    """Reads and prepares one cell for the sake of surviving it."""
    with suppress(Exception):  # the real run reports it
        prepare(read(job, unit), job.cover, job.options)


def _report(key: str) -> None:
    if _crumb is not None:
        _crumb.write_text(key)
    if not key and _counter is not None:
        with _counter.get_lock():
            _counter.value += 1
