"""Scaling on paper: what bounds a training step from one chip to thousands, in closed form.

Every term is a few lines of arithmetic with stated inputs, so that a disagreement with the compiler's
numbers (``python -m terrafm_jax.aot``) or with a measurement points at one of them.
``python -m terrafm_jax.ahead.scaling`` prints the tables; docs/scaling.md has some of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import math

import numpy as np

from terrafm_jax.ahead.chips import CHIPS, Chip, Topology
from terrafm_jax.ahead.network import Network
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.sensors import SENSOR_KEYS
from terrafm_jax.ssl.views import ViewSpec
from terrafm_jax.training.batches import batch_shapes
from terrafm_jax.training.flops import image_flops
from terrafm_jax.training.sharding import SPLIT

TILES = 1_530_000  # multimodal samples of the paper's data set
STATE_COPIES = 4  # fp32 parameters, teacher and two moments
UPDATE_PASSES = 9  # fp32 arrays the update reads (gradient and the four copies) and writes (the four)

# From compiling B for v4:4x4x4, v5e:4x4, v5p:2x2x2 and v6e:8x8 (benchmarks/results/tpu_matrix.json): the share of peak
# reached outside the update and exposed collectives, and the share of the collectives' time that compute hides.
EFFICIENCY = {"v4": 0.40, "v5e": 0.55, "v5p": 0.49, "v6e": 0.21}
HIDDEN = {"v4": 0.39, "v5e": 0.82, "v5p": 0.75, "v6e": 0.64}

_SLICES_2D = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_SLICES_3D = {
    1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8),
    256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 8, 16), 2048: (8, 16, 16), 4096: (16, 16, 16),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model, its views and the length of its training."""

    name: str
    model: ModelSpec
    views: ViewSpec
    batch: int
    epochs: int
    tiles: int = TILES

    @property
    def images(self) -> float:
        """Samples of the whole run."""
        return float(self.epochs) * self.tiles

    @property
    def flops(self) -> float:
        """FLOPs per image by formula."""
        return image_flops(self.model, self.views).total

    @property
    def parameters(self) -> int:
        """Parameters of backbone and head."""
        import jax

        from terrafm_jax.models.terrafm import init_params

        tree = jax.eval_shape(lambda: init_params(self.model, jax.random.key(0)))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def paper_recipes() -> tuple[Recipe, Recipe]:
    """TerraFM-B and TerraFM-L as published (batch, epochs), with 2 + 8 views."""
    b, large = (ModelSpec.of_size(size, dtype="bfloat16") for size in ("b", "l"))
    views = ViewSpec(dtype="bfloat16")
    return Recipe("B", b, views, 1024, 150), Recipe("L", large, views, 2048, 200)


def standard_topology(chip: str, chips: int) -> Topology:
    """The usual topology of a number of chips: one slice, or several of the largest size.

    Raises ValueError where there is no such slice.
    """
    table = _SLICES_2D if CHIPS[chip].axes == 2 else _SLICES_3D
    if chips in table:
        return Topology(CHIPS[chip], table[chips])
    largest = max(table)
    if chips % largest == 0:
        return Topology(CHIPS[chip], table[largest], chips // largest)
    raise ValueError(f"{chip}: no slice of {chips} chips; expected one of {list(table)} or a multiple of {largest}")


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step by term.

    Attributes:
      compute: everything that the cores do except the update, at the given efficiency.
      update: optimizer, EMA and casts, bound by HBM.
      ici, dcn: traffic within and between slices, as if nothing overlapped with it.
      shown: the part of both that compute does not hide.
      images: per chip and step.
      bytes_in: input bytes per image.
    """

    topology: Topology
    compute: float
    update: float
    ici: float
    dcn: float
    shown: float
    images: int
    flops: float
    bytes_in: float
    state_bytes: float

    @property
    def total(self) -> float:
        return self.compute + self.update + self.shown

    @property
    def mfu(self) -> float:
        return self.images * self.flops / (self.total * self.topology.chip.flops)

    @property
    def images_per_second(self) -> float:
        """Of the whole job."""
        return self.images * self.topology.chips / self.total

    @property
    def host_bytes_per_second(self) -> float:
        """What one host has to read, decode and ship."""
        return self.images_per_second * self.bytes_in / self.topology.hosts

    def checkpoint_seconds(self, host_write: float = 0.5e9) -> float:
        """Time to write the state when every host writes its part at ``host_write`` bytes/s (asynchronous)."""
        return self.state_bytes / (self.topology.hosts * host_write)


def tile_bytes() -> int:
    """Bytes of one tile of all sensors at native sampling, as shipped to the device."""
    import jax

    shapes = jax.tree.leaves(batch_shapes(SENSOR_KEYS, 1))
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in shapes)


def step_time(
    recipe: Recipe,
    topology: Topology,
    images: int,
    *,
    efficiency: float | None = None,
    hidden: float | None = None,
    split: int = SPLIT,
    reduce_bytes: int = 4,
    view_sets: int = 1,
) -> StepTime:
    """The time of one step.

    Args:
      images: per chip and step.
      efficiency: share of the peak that the cores reach outside the update (None: EFFICIENCY of the chip).
      hidden: share of the traffic that compute hides, if it takes that long (None: HIDDEN of the chip).
      split: chips of a slice that share one state (``mesh.fsdp``): each updates its shard, and both networks are
        gathered over them in bfloat16. 1 replicates the state.
      reduce_bytes: bytes per gradient element on the wire, 4 or 2.
      view_sets: samples made of each tile that is read.
    """
    chip, count = topology.chip, recipe.parameters
    efficiency = EFFICIENCY[chip.name] if efficiency is None else efficiency
    hidden = HIDDEN[chip.name] if hidden is None else hidden
    grid = [(s, *c) for s in range(topology.slices) for c in np.ndindex(*topology.shape)]
    network = Network(topology, tuple(grid))
    inside = range(topology.chips // topology.slices)
    shards = math.gcd(len(inside), split)
    gradient = count * reduce_bytes
    gathers = 2 * network.seconds("all-gather", 2 * count, range(shards))
    ici = network.seconds("all-reduce", gradient, inside) + gathers
    dcn = network.exchange_seconds(gradient / len(inside))
    compute = images * recipe.flops / (chip.flops * efficiency)
    return StepTime(
        topology=topology,
        compute=compute,
        update=UPDATE_PASSES * 4 * count / shards / chip.bandwidth,
        ici=ici,
        dcn=dcn,
        shown=ici + dcn - min(hidden * (ici + dcn), compute),
        images=images,
        flops=recipe.flops,
        bytes_in=tile_bytes() / view_sets,
        state_bytes=STATE_COPIES * 4 * count,
    )


# --- tables -----------------------------------------------------------------------------------

SIZES = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def strong_scaling(recipe: Recipe, chip: str, **options: float) -> list[StepTime]:
    """The paper's batch over more and more chips (microbatches where one chip cannot hold its part)."""
    rows = []
    for chips in SIZES:
        if chips > recipe.batch:
            break
        images = recipe.batch // chips
        rows.append(step_time(recipe, standard_topology(chip, chips), images, **options))
    return rows


def weak_scaling(recipe: Recipe, chip: str, images: int, **options: float) -> list[StepTime]:
    """The same images per chip from 1 to 4096 chips; the global batch grows."""
    return [step_time(recipe, standard_topology(chip, chips), images, **options) for chips in SIZES]


HOST_BYTES = 0.5e9  # bytes/s that a host reads from a bucket and decodes beside its other work


def echo_needed(recipe: Recipe, chip: Chip, mfu: float = 0.55) -> tuple[float, float, int]:
    """Input of one host with four chips: (images/s, bytes/s of whole tiles, view sets per tile to stay in HOST_BYTES).

    The last is the smallest power of two: the value for ``config.data.echo``.
    """
    images = 4 * chip.flops * mfu / recipe.flops
    whole = images * tile_bytes()
    return images, whole, 2 ** max(0, math.ceil(math.log2(whole / HOST_BYTES)))


def input_table() -> str:
    """Markdown: what one host has to read for its chips, and the echo that limits it to HOST_BYTES."""
    lines = [
        "| model | chip | images/s a host | GB/s of whole tiles | `data.echo` | GB/s a host |",
        "|" + " ---: |" * 6,
    ]
    for recipe in paper_recipes():
        for name, chip in CHIPS.items():
            images, whole, echo = echo_needed(recipe, chip)
            cells = (recipe.name, name, f"{images:,.0f}", f"{whole / 1e9:.1f}", echo, f"{whole / echo / 1e9:.2f}")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def table(rows: list[StepTime]) -> str:
    """Markdown: one line per :class:`StepTime`."""
    lines = [
        "| chips | topology | images a chip | global batch | compute ms | update ms | ICI ms | DCN ms | shown ms |"
        " step ms | MFU | images/s | GB/s a host | checkpoint s |",
        "|" + " ---: |" * 14,
    ]
    for r in rows:
        cells = (
            r.topology.chips, r.topology.name, r.images, r.images * r.topology.chips, f"{r.compute * 1e3:.1f}",
            f"{r.update * 1e3:.1f}", f"{r.ici * 1e3:.1f}", f"{r.dcn * 1e3:.1f}", f"{r.shown * 1e3:.1f}",
            f"{r.total * 1e3:.1f}", f"{r.mfu:.0%}", f"{r.images_per_second:,.0f}",
            f"{r.host_bytes_per_second / 1e9:.2f}", f"{r.checkpoint_seconds():.1f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def hours_table(recipe: Recipe, images: int = 8) -> str:
    """Markdown: chip-hours and days of the whole recipe, on each type of chip, with ``images`` a chip."""
    lines = ["| step | chips | chip-hours | days |", "| --- | ---: | ---: | ---: |"]
    for name in CHIPS:
        row = step_time(recipe, standard_topology(name, recipe.batch // images), images)
        hours, chips = recipe.images / row.images_per_second / 3600, row.topology.chips
        lines.append(
            f"| {recipe.name}, {row.topology.name}, {images} | {chips} | {hours * chips:,.0f} | {hours / 24:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(prog="python -m terrafm_jax.ahead.scaling", description=__doc__).parse_args()
    print(input_table())
    for recipe in paper_recipes():
        print(f"\n### {recipe.name}: {recipe.epochs} epochs by this model\n")
        print(hours_table(recipe))
        for chip in CHIPS:
            print(f"\n### {recipe.name}, {chip}: the paper's batch of {recipe.batch}\n")
            print(table(strong_scaling(recipe, chip)))
            print(f"\n### {recipe.name}, {chip}: 16 images a chip\n")
            print(table(weak_scaling(recipe, chip, 16)))


if __name__ == "__main__":
    main()
