"""What ``terrafm_jax.embed`` and its subcommands do with their flags."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from terrafm_jax.scenes import analyze, finish, masks, output, points, read, run, store
from terrafm_jax.scenes import tags as tags_lib
from terrafm_jax.scenes.area import read_aoi
from terrafm_jax.scenes.errors import SceneError
from terrafm_jax.scenes.flags import declared
from terrafm_jax.scenes.grid import PRETRAINING_GSD, Plan, target_grid
from terrafm_jax.scenes.inputs import resolve_all
from terrafm_jax.scenes.places import Places
from terrafm_jax.scenes.read import SceneReader
from terrafm_jax.scenes.readback import open_embedding

if TYPE_CHECKING:
    from terrafm_jax.inference import Model
    from terrafm_jax.scenes.encoder import WindowEncoder

_say = logging.getLogger("terrafm_jax.embed").info


def scene(args: argparse.Namespace) -> None:
    """Plans, loads the weights, embeds, writes."""
    kind = output.format_of(args.out)
    if not args.dry_run:
        _make_folder(args.out)
    if args.points and kind != "parquet":
        raise SceneError(f"--out {args.out}: --points writes Parquet; give OUT.parquet")
    acquisitions = resolve_all(args.sensor, declared(args))
    aoi = read_aoi(args.aoi) if args.aoi else None
    grid = target_grid(acquisitions, _gsd(args.gsd), args.crs, aoi)
    overlap = args.overlap if args.overlap is not None else 0 if kind == "parquet" else args.window // 32 * 16
    batch = _batch(args.batch)
    plan = Plan(grid, args.window, overlap, args.stride, batch=batch)
    left_out = [masks.read_mask(text) for text in args.mask]
    reader = SceneReader(acquisitions, grid, composite=args.composite, masks=left_out, use_classes=args.use_scl)
    model = _load(args)

    from terrafm_jax.scenes.encoder import WindowEncoder  # and with it JAX, which nothing before needs

    encoder = WindowEncoder(model, reader.bands, batch)
    tags = tags_lib.of_scene(model, reader, plan, args)
    inside = None if aoi is None else read.inside(aoi, plan.output)
    planned = _Planned(plan, reader, encoder, tags, inside)
    _say_plan(args, kind, planned)
    if args.points:
        _points(args, planned)
    elif args.dry_run:
        _dry_run(planned)
    else:
        _whole(args, kind, planned)


@dataclasses.dataclass(frozen=True)
class _Planned:
    """What is known before anything is encoded.

    Attributes:
      tags: of the output.
      inside: bool [rows, columns] of the output, tokens in the area of interest; None = all.
    """

    plan: Plan
    reader: SceneReader
    encoder: WindowEncoder
    tags: dict[str, str]
    inside: np.ndarray | None


def _make_folder(out: Path) -> None:
    """The folder of an output, before the work and not after it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SceneError(f"--out {out}: its folder cannot be made ({error.strerror}); choose another") from None


def _gsd(text: str) -> float | None:
    if not text:
        return None
    if text == "pretraining":
        return PRETRAINING_GSD
    try:
        return float(text)
    except ValueError:
        raise SceneError(f"--gsd {text}: expected meters per pixel or 'pretraining'") from None


def _batch(wanted: int) -> int:
    """The next multiple of the devices."""
    import jax

    devices = jax.local_device_count()
    return -(-max(1, wanted) // devices) * devices


def _load(args: argparse.Namespace) -> Model:
    import terrafm_jax

    try:
        model = terrafm_jax.load(args.checkpoint, **({"dtype": args.compute} if args.compute else {}))
    except (ValueError, OSError) as error:
        raise SceneError(" ".join(str(error).split())) from None
    model.upstream_l2a_stem = args.upstream_l2a_stem
    return model


def _say_plan(args: argparse.Namespace, kind: str, planned: _Planned) -> None:
    plan, reader, encoder = planned.plan, planned.reader, planned.encoder
    (rows, columns), grid = plan.shape, plan.grid
    _say("scene %d x %d px of %g m (%.1f km2), %s",
        grid.height, grid.width, grid.gsd, run.area(grid), grid.crs.to_string())  # fmt: skip
    shown = (f"{k} ({len(b)} bands, {len(reader.dates[k])} date(s))" for k, b in reader.bands.items())
    _say("sensors %s", ", ".join(shown))
    if args.points:
        _say("a window of %d px around each of %s, %d features -> %s",
            plan.window, args.points, encoder.width, args.out)  # fmt: skip
    elif kind == "parquet":
        _say("%d windows of %d px, a vector of %d features each -> %s",
            plan.count(), plan.window, encoder.width, args.out)  # fmt: skip
    else:
        _say("%d windows of %d px, %d x %d tokens of %d features every %g m -> %s", plan.count(), plan.window,
            rows, columns, encoder.width, plan.output.gsd, args.out)  # fmt: skip
    if not 12 <= grid.gsd <= 28:
        _say("note: pretraining crops spanned 12 to 28 m a pixel, this is %g m; see --gsd pretraining", grid.gsd)


def _dry_run(planned: _Planned) -> None:
    """Times one batch from the middle of the scene and scales up."""
    plan, reader, encoder, inside = planned.plan, planned.reader, planned.encoder, planned.inside
    every = plan.chunks()
    chunks = [c for c in every if inside is None or any(inside[plan.tokens_of(c, x)].any() for x in c.columns)]
    began = time.perf_counter()
    tried = (run.prepare(reader, plan, c, inside=inside) for c in chunks[len(chunks) // 2 :] + chunks)
    work = next((w for w in tried if w.kept), None)
    reading = time.perf_counter() - began
    if work is None:
        raise SceneError("--dry-run: the scene holds no valid pixel; check --mask, --nodata and --aoi")
    encoding = _encoding_seconds(encoder, work.windows)
    blender = store.Blender(plan, encoder.width)
    pixels = sum(p.values.nbytes + p.valid.nbytes for p in work.windows.values())
    memory = blender.sums.nbytes + 8 * pixels + 64e6 * 3
    disk = plan.shape[0] * plan.shape[1] * encoder.width * 4
    _say("dry run: %d windows in %d batches, about %.1f s reading and %.1f s encoding on %d device(s)",
        sum(len(c.columns) for c in chunks), len(chunks), reading * len(chunks), encoding * len(chunks),
        encoder.devices)  # fmt: skip
    _say("memory about %.0f MB beside the weights; unfinished result %.1f MB on disk", memory / 1e6, disk / 1e6)


def _encoding_seconds(encoder: WindowEncoder, windows: run.Windows) -> float:
    encoder(windows).result()  # compiles
    began = time.perf_counter()
    encoder(windows).result()
    return time.perf_counter() - began


def _points(args: argparse.Namespace, planned: _Planned) -> None:
    plan, reader, encoder, inside = planned.plan, planned.reader, planned.encoder, planned.inside
    where, columns = points.read_points(args.points)
    job = Places(encoder, reader, plan, points.to_grid(where, plan.grid), encoder.width, inside)
    outside = points.outside(args.points, where, job.wanted, plan.grid)
    if args.dry_run:
        _dry_run_places(job, encoder)
        return
    mark = run.signature(plan, reader, inside, tags=planned.tags, places=zlib.crc32(where.tobytes()))
    this = finish.digest(mark, columns=columns)
    unfinished = store.UnfinishedPlaces(args.out, encoder.width, mark)
    if finish.done_already(args.out, this, args.overwrite):
        unfinished.remove_own()
        _say("done already -> %s", args.out)
        return
    with _Progress(len(where), "place") as progress:
        patches, cls = job.run(unfinished, progress=progress, threads=args.threads, save_seconds=args.save_seconds)
    finish.refuse_nothing(patches, unfinished, args.out)
    said = [*outside, *reader.warnings]
    points.write_points(args.out, where, columns, patches, cls, planned.tags | finish.closing_tags(this, said))
    unfinished.remove()
    empty = int(np.isnan(patches[:, 0]).sum())
    _say("%d places, %d without data -> %s%s", len(where), empty, args.out, finish.closing_words(said))


def _dry_run_places(job: Places, encoder: WindowEncoder) -> None:
    """Times the first batch and scales up."""
    began = time.perf_counter()
    with contextlib.closing(job.groups(0, 1)) as groups:
        group = next((group for _, group in groups if group), None)
    reading = time.perf_counter() - began
    if group is None:
        raise SceneError("--dry-run: no place has a valid pixel; check --points, --mask, --nodata and --aoi")
    windows = job.windows(group)
    encoding = _encoding_seconds(encoder, windows)
    batches = -(-len(job.chunks) // job.batch)
    _say("dry run: %d places in %d batches, about %.1f s reading and %.1f s encoding on %d device(s)",
        len(job.chunks), batches, reading * batches, encoding * batches, encoder.devices)  # fmt: skip


def _whole(args: argparse.Namespace, kind: str, planned: _Planned) -> None:
    plan, reader, encoder, inside = planned.plan, planned.reader, planned.encoder, planned.inside
    mark = run.signature(plan, reader, inside, tags=planned.tags)
    this = finish.digest(mark, kind=kind, dtype=args.dtype)
    unfinished = store.Unfinished(args.out, plan, encoder.width, mark)
    if finish.done_already(args.out, this, args.overwrite):
        unfinished.remove_own()
        _say("done already -> %s", args.out)
        return
    with _Progress(plan.count(), "window") as progress:
        job = run.Job(encoder, reader, plan, encoder.width, unfinished, inside=inside, progress=progress)
        summary = job.run(threads=args.threads, save_seconds=args.save_seconds)
    finish.refuse_nothing(unfinished.tokens(), unfinished, args.out)
    tags = planned.tags | finish.closing_tags(this, reader.warnings)
    meta = output.Meta(tuple(f"feature {i}" for i in range(encoder.width)), tags)
    if kind == "parquet":
        _write_windows(args.out, plan, reader, unfinished, meta)
    else:
        write = output.write_cog if kind == "cog" else output.write_zarr
        write(args.out, unfinished.tokens(), plan.output, meta, args.dtype)
    unfinished.remove()
    _say(
        "%d windows encoded, %d empty, %d done before, %.1f s (%.1f s of it waiting for pixels), %.2f km2/s -> %s%s",
        summary.encoded, summary.empty, summary.resumed, summary.seconds, summary.reading,
        summary.square_kilometers / max(summary.seconds, 1e-9), args.out, finish.closing_words(reader.warnings),
    )  # fmt: skip


def _write_windows(out: Path, plan: Plan, reader: SceneReader, unfinished: store.Unfinished, meta: output.Meta) -> None:
    cls = unfinished.class_tokens(plan.count())
    boxes = [(x, c.row, x + c.width, c.row + c.height) for c in plan.chunks() for x in c.columns]
    first = next(iter(reader.dates.values()))[0]
    rows = [
        output.window_row(plan.grid, box, np.asarray(vector), first.product, first.time, meta.tags[tags_lib.WEIGHTS])
        for box, vector in zip(boxes, cls, strict=True)
        if np.isfinite(vector).all()
    ]
    output.write_windows(out, rows, meta)


def change(args: argparse.Namespace) -> None:
    if output.format_of(args.out) != "cog":
        raise SceneError(f"--out {args.out}: change is written as GeoTIFF; give CHANGE.tif")
    _make_folder(args.out)
    shares, said = analyze.change(args.first, args.second, args.out)
    _say("change %s -> %s%s", {k: round(v, 4) for k, v in shares.items()}, args.out, finish.closing_words(said))


def search(args: argparse.Namespace) -> None:
    _make_folder(args.out)
    with open_embedding(args.query) as source:
        query = analyze.vector_at(source, *args.point)
        tags = dict(source.tags)
    said: list[str] = []
    hits = analyze.search(query, args.files, args.k, tags, said)
    analyze.write_hits(args.out, hits)
    for hit in hits[:5]:
        _say("%.4f  %.5f %.5f  %s", *(hit[k] for k in ("similarity", "lon", "lat", "file")))
    _say("%d hits -> %s%s", len(hits), args.out, finish.closing_words(said))


def picture(args: argparse.Namespace) -> None:
    _make_folder(args.out)
    if args.similar_to:
        black, white = analyze.similarity_picture(args.file, *args.similar_to, args.out)
        _say("cosine similarity, black: %.3g or less, white: %.3g -> %s", black, white, args.out)
    elif ends := analyze.change_picture(args.file, args.out):
        _say("change (1 - cosine), black: %.3g, white: %.3g or more -> %s", *ends, args.out)
    else:
        shares = analyze.pca_picture(args.file, args.out)
        _say("variance of the three components: %s -> %s", np.round(shares, 3).tolist(), args.out)


class _Progress:
    """A bar on a terminal, a line every tenth otherwise."""

    def __init__(self, total: int, unit: str):
        self._total, self._unit, self._done, self._said = total, unit, 0, 0
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, unit=self._unit)
        return self

    def __call__(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._done * 10 // max(self._total, 1) > self._said:
            self._said = self._done * 10 // max(self._total, 1)
            _say("%d of %d %ss", self._done, self._total, self._unit)

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.close()
