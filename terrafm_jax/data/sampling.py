"""Which records a step trains on: a pure function of (index, settings, seed, step), without any state.

An order is an endless stream of record numbers per canvas bucket. Records are grouped into strata
(by land cover, latitude band, ... as far as the mode needs them). Every stratum is traversed in a keyed
pseudo-random permutation that is computed, not stored, and the strata are mixed at fixed rates. So step
n costs the same at n = 0 and n = 10 million, resuming is starting at n, and the order does not depend on
the number of processes: each takes the rows of the global batch that its devices hold.

Permutation: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002): a small Feistel
network on the next power of four, walked until it lands inside the domain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from terrafm_jax import landcover
from terrafm_jax.sensors import SENSOR_KEYS

MODES = ("uniform", "paper", "balanced")
_ROUNDS = 6
_ROUNDS_A_BATCH = 64  # each takes some 0.1 ms, so only batches of many tiny epochs mix these
# Where a stratum, an int64, holds what its records share; the zone is latitude band and climate zone together.
_BUCKET, _SEA, _CLASS, _BAND = 40, 32, 24, 16
_SHIFT = 20  # fractional bits of rates, which are fixed-point integers so that rounding never depends on the step


class SamplingError(ValueError):
    """Sampling settings are wrong or leave no record."""


@dataclasses.dataclass(frozen=True)
class SamplingSpec:
    """How often each record is drawn.

    Attributes:
      mode: ``uniform``: every record once an epoch. ``paper``: the same, but of the records of open sea
        only the share ``sea_keep``, different ones in every epoch. ``balanced``: classes are drawn in
        proportion to (their records) ** (1 - power).
      power: 0 = uniform over records, 1 = uniform over classes (and over zones where those are balanced).
      sea_keep: TerraFM keeps 2 % of the ocean tiles. Set 1 if preparation has dropped them already.
      balance_latitude: balance latitude bands (inside each class, when classes are balanced) by ``power``.
      latitude_band: height of a band in degrees.
      balance_climate: the same for climate zones; needs a column ``climate`` in the index.
      max_repeats: no record is drawn more often than this an epoch, on average; 0 = no limit. Keeps a
        class of few records from being memorized.
      max_nodata: records whose worst sensor lacks more than this share are left out.
      complete: leave out records that lack any of the configured sensors (the paper keeps cells with all).
    """

    mode: str = "paper"
    power: float = 0.5
    sea_keep: float = 0.02
    balance_latitude: bool = False
    latitude_band: float = 15.0
    balance_climate: bool = False
    max_repeats: float = 0.0
    max_nodata: float = 1.0
    complete: bool = False

    def check(self) -> None:
        """Raises SamplingError naming every field that is out of range."""
        faults = [
            f"{name} = {getattr(self, name)!r}, expected {expected}"
            for name, good, expected in (
                ("mode", self.mode in MODES, f"one of {list(MODES)}"),
                ("power", 0 <= self.power <= 1, "0..1"),
                ("sea_keep", 0 <= self.sea_keep <= 1, "0..1"),
                ("latitude_band", 1 <= self.latitude_band <= 180, "1..180 degrees"),
                ("max_repeats", self.max_repeats >= 0, "0 (no limit) or more"),
                ("max_nodata", 0 <= self.max_nodata <= 1, "0..1"),
            )
            if not good
        ]
        if faults:
            raise SamplingError("sampling: " + "; ".join(faults))


# --- keyed permutations --------------------------------------------------------------------------


def mix(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def derive_key(*parts: int | np.ndarray) -> np.ndarray:
    """One uint64 key from several integers (arrays broadcast)."""
    key = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for part in parts:
            key = mix(key + np.asarray(part).astype(np.uint64) * np.uint64(0xD1342543DE82EF95))
    return np.asarray(key)


def permute(position: np.ndarray, size: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """Image of ``position`` under the permutation of range(``size``) that ``key`` selects; int64 [n].

    All arguments broadcast: every element may have its own domain and key. Nothing is stored.
    """
    x, n, k = np.broadcast_arrays(
        np.asarray(position, np.uint64), np.asarray(size, np.uint64), np.asarray(key, np.uint64)
    )
    if np.any(x >= n):
        raise ValueError("permute: a position lies outside its domain")
    x, n, k = x.ravel().copy(), n.ravel(), k.ravel()
    bits = np.ceil(np.log2(np.maximum(n, 2).astype(np.float64) + 0.5)).astype(np.uint64)
    half = np.maximum((bits + np.uint64(1)) // np.uint64(2), np.uint64(1))
    todo = np.flatnonzero(n > 1)
    while todo.size:
        x[todo] = _feistel(x[todo], half[todo], k[todo])
        todo = todo[x[todo] >= n[todo]]
    return x.astype(np.int64)


def _feistel(x: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for r in range(_ROUNDS):
        noise = derive_key(key, r, right)
        left, right = right, left ^ ((noise >> np.uint64(32)) & mask)
    return (left << half) | right


# --- mixing streams ------------------------------------------------------------------------------


class Mixture:
    """An endless stream of components at given rates.

    The stream is divided into rounds. Round e draws component g floor((e + 1) r_g) - floor(e r_g) times,
    in a keyed random order: rates are exact in the long run and within one draw in any round.

    Attributes:
      rates: float64 [G], draws per round.
    """

    def __init__(self, rates: np.ndarray, key: np.ndarray | int, min_round: int = 1):
        rates = np.asarray(rates, np.float64)
        total = float(rates.sum())
        self.rates = rates * max(1, int(np.ceil(min_round / total)))
        self._fixed = np.maximum(np.round(self.rates * (1 << _SHIFT)), 1).astype(np.int64)
        self._sum = int(self._fixed.sum())
        self._key = key

    def _counts(self, e: int) -> np.ndarray:
        """Draws of every component before round ``e``; int64 [G]."""
        return (e * self._fixed) >> _SHIFT

    def _round_of(self, position: int) -> int:
        low = (position << _SHIFT) // self._sum
        high = low + 2 + ((len(self._fixed) + 1) << _SHIFT) // self._sum
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if int(self._counts(middle).sum()) <= position else (low, middle)
        return low

    def locate(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Component and its running number for the positions start .. start + count; int64 [count] each."""
        if len(self._fixed) == 1:
            return np.zeros(count, np.int64), np.arange(start, start + count, dtype=np.int64)
        component, ordinal = np.empty(count, np.int64), np.empty(count, np.int64)
        done, e = 0, self._round_of(start)
        while done < count:
            before, after = self._counts(e), self._counts(e + 1)
            first, last = int(before.sum()), int(after.sum())
            n = min(start + count, last) - (start + done)
            if n > 0:
                at = np.arange(start + done - first, start + done - first + n)
                rank = permute(at, last - first, derive_key(self._key, e))
                edges = np.cumsum(after - before)
                g = np.searchsorted(edges, rank, side="right")
                component[done : done + n] = g
                ordinal[done : done + n] = before[g] + rank - (edges - (after - before))[g]
                done += n
            e += 1
        return component, ordinal


# --- the order -----------------------------------------------------------------------------------


class Order:
    """The records of every global batch. ``holding``: how many of those that may be drawn have each sensor.

    Args:
      index: rows of :data:`terrafm_jax.data.tiles.INDEX_DTYPE`, one per record of the split.
      spec: how often each record is drawn.
      batch_size: records in a global batch.
      seed: names the permutations.
      sensors: configured sensors; records that hold none of them are left out.
      buckets: canvas bucket of every layout, ``[number of layouts]``; None makes every layout its own.
      sea_left_out: number of tiles of open sea that preparation dropped: counted in the natural histogram only.

    Raises:
      SamplingError: settings out of range, or no record is left.
    """

    def __init__(
        self,
        index: np.ndarray,
        spec: SamplingSpec,
        batch_size: int,
        seed: int,
        *,
        sensors: Sequence[str] = SENSOR_KEYS,
        buckets: Sequence[int] | None = None,
        sea_left_out: int = 0,
    ):
        spec.check()
        if batch_size < 1:
            raise SamplingError(f"batch_size = {batch_size}, expected at least 1")
        self.spec, self.batch_size, self.seed, self.num_records = spec, int(batch_size), int(seed), len(index)
        self._sea_left_out = sea_left_out
        keep = eligible(index, spec, sensors)
        if not keep.any():
            raise SamplingError(
                f"sampling: none of {len(index)} records is left with sensors {list(sensors)}, "
                f"complete = {spec.complete}, max_nodata = {spec.max_nodata}"
            )
        self.num_eligible = int(keep.sum())
        self.sensors = tuple(sensors)
        present = index["present"][keep]
        self.holding = {key: int(np.count_nonzero(present >> SENSOR_KEYS.index(key) & 1)) for key in sensors}
        self.bucket_of_layout = np.arange(256) if buckets is None else np.asarray(buckets, np.int64)
        strata = _strata(index, spec, self.bucket_of_layout)
        self._group(strata, keep)
        self._mix(index)

    def _group(self, strata: np.ndarray, keep: np.ndarray) -> None:
        """Sorts the records by stratum: ``_members[_offset[g] : _offset[g] + _size[g]]`` are those of g."""
        used, inverse = np.unique(strata[keep], return_inverse=True)
        numbers = np.flatnonzero(keep).astype(np.uint32 if len(keep) < 2**32 else np.int64)
        if len(used) < 2**16:  # small integers sort by radix, ten times faster
            inverse = inverse.astype(np.uint16)
        self._members = numbers[np.argsort(inverse, kind="stable")]
        self._size = np.bincount(inverse, minlength=len(used)).astype(np.int64)
        self._offset = np.concatenate([[0], np.cumsum(self._size)[:-1]]).astype(np.int64)
        self._strata = used

    def _mix(self, index: np.ndarray) -> None:
        """Rates of strata and buckets, and the streams that mix them."""
        bucket = self._strata >> _BUCKET
        rates = _rates(self.spec, self._size, self._strata)
        self.rates = rates
        alive = rates > 0
        if not alive.any():
            raise SamplingError(f"sampling: sea_keep = {self.spec.sea_keep} and every record is open sea")
        self.buckets = np.unique(bucket[alive])
        self._groups = [np.flatnonzero(alive & (bucket == b)) for b in self.buckets]
        self._streams = [
            Mixture(rates[g], derive_key(self.seed, 1, int(b)), -(-self.batch_size // _ROUNDS_A_BATCH))
            for b, g in zip(self.buckets, self._groups, strict=True)
        ]
        shares = np.array([rates[g].sum() for g in self._groups]) / self.batch_size
        self._schedule = Mixture(shares, derive_key(self.seed, 2))
        self._histograms(index)

    def _histograms(self, index: np.ndarray) -> None:
        """Class histograms before and after sampling, record by record, as a stratum may hold several classes."""
        k = landcover.NUM_CATEGORIES
        self._natural = np.bincount(index["landcover"], minlength=k)[:k].astype(np.float64)
        self._natural[landcover.SEA] += self._sea_left_out
        group = np.repeat(np.arange(len(self._size)), self._size)
        classes = index["landcover"][self._members]
        joint = np.bincount(group * k + classes, minlength=len(self._size) * k).reshape(-1, k)
        self._expected = (self.rates / self._size) @ joint

    @property
    def epoch_size(self) -> float:
        """Records drawn in one epoch."""
        return float(self.rates.sum())

    @property
    def examples_per_epoch(self) -> int:
        """``epoch_size`` as a whole number, at least 1."""
        return max(1, round(self.epoch_size))

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps closest to one epoch, at least 1."""
        return max(1, round(self.epoch_size / self.batch_size))

    def bucket(self, step: int) -> int:
        """Canvas bucket of global batch ``step``."""
        component, _ = self._schedule.locate(int(step), 1)
        return int(self.buckets[component[0]])

    def batch(self, step: int) -> np.ndarray:
        """Record numbers of global batch ``step``, all from one canvas bucket; int64 [batch_size]."""
        component, ordinal = self._schedule.locate(int(step), 1)
        return self._draw(int(component[0]), int(ordinal[0]))

    def spares(self, step: int, limit: int = 64) -> list[np.ndarray]:
        """The ``limit`` batches that follow ``step`` in its bucket: the last resort for replacements."""
        component, ordinal = self._schedule.locate(int(step), 1)
        return [self._draw(int(component[0]), int(ordinal[0]) + i) for i in range(1, limit + 1)]

    def _draw(self, which: int, ordinal: int) -> np.ndarray:
        group, at = self._streams[which].locate(ordinal * self.batch_size, self.batch_size)
        group = self._groups[which][group]
        epoch, position = np.divmod(at, self._size[group])
        place = permute(position, self._size[group], derive_key(self.seed, 3, group, epoch))
        return self._members[self._offset[group] + place].astype(np.int64)

    def natural_histogram(self) -> np.ndarray:
        """Share of every land-cover category before sampling, with the sea that preparation dropped; float64 [13]."""
        return self._natural / self._natural.sum()

    def expected_histogram(self) -> np.ndarray:
        """Expected share of every land-cover category among the records drawn; float64 [13]."""
        return self._expected / self._expected.sum()

    def describe(self) -> str:
        """The histogram before and after sampling, as a table to print before training."""
        lines = [
            f"sampling: {self.spec.mode}, {self.num_eligible} of {self.num_records} records, "
            f"{self.epoch_size:.0f} drawn an epoch, {self.steps_per_epoch} steps of {self.batch_size}, "
            f"{len(self.buckets)} canvas bucket(s)",
            f"{'land cover':<26}{'tiles':>10}{'share':>9}{'drawn':>9}  times an epoch",
        ]
        if self._sea_left_out:
            rest = ", so all of the rest is drawn" if (self.spec.mode, self.spec.sea_keep) == ("paper", 1) else ""
            lines.insert(1, f"tiles count {self._sea_left_out} of open sea that preparation has left out already{rest}")
        before, after = self.natural_histogram(), self.expected_histogram()
        for i in np.flatnonzero(self._natural):
            times = self._expected[i] / self._natural[i]
            lines.append(
                f"{landcover.CATEGORIES[i].title:<26}{int(self._natural[i]):>10}"
                f"{before[i]:>9.2%}{after[i]:>9.2%}  {times:.3g}"
            )
        return "\n".join(lines)


def eligible(index: np.ndarray, spec: SamplingSpec, sensors: Sequence[str]) -> np.ndarray:
    """bool [N]: records that sampling may draw at all."""
    wanted = np.uint8(sum(1 << SENSOR_KEYS.index(key) for key in sensors))
    found = index["present"] & wanted
    keep = (found == wanted) if spec.complete else (found != 0)
    return keep & (index["nodata"] <= spec.max_nodata)


def _strata(index: np.ndarray, spec: SamplingSpec, buckets: np.ndarray) -> np.ndarray:
    """int64 [N]: the stratum of every record, of what ``spec`` tells apart (``_BUCKET``, ...); the rest is 0."""
    if len(index) and int(index["layout"].max()) >= len(buckets):
        raise SamplingError(f"index: layout {int(index['layout'].max())} occurs, but only {len(buckets)} are listed")
    strata = buckets[index["layout"]].astype(np.int64) << _BUCKET
    if spec.mode == "paper":
        strata |= index["sea"].astype(np.int64) << _SEA
    if spec.mode == "balanced":
        strata |= index["landcover"].astype(np.int64) << _CLASS
    if spec.balance_latitude:
        strata |= np.floor((index["lat"].astype(np.float64) + 90) / spec.latitude_band).astype(np.int64) << _BAND
    if spec.balance_climate:
        if "climate" not in (index.dtype.names or ()):
            raise SamplingError(
                f"sampling.balance_climate: the index has no column 'climate', only {list(index.dtype.names or ())}"
            )
        climate = index["climate"]
        if climate.dtype.kind not in "ui" or climate.min(initial=0) < 0 or climate.max(initial=0) >= 1 << _BAND:
            raise SamplingError(  # a -1 for unknown would set every bit, sea and bucket among them
                f"sampling.balance_climate: column 'climate' of the index is {climate.dtype} from {climate.min()} to "
                f"{climate.max()}, expected integers from 0 to {(1 << _BAND) - 1}"
            )
        strata |= climate.astype(np.int64)
    return strata


def _rates(spec: SamplingSpec, size: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Draws per epoch of every stratum; float64 [G]."""
    sea, category, zone = (strata >> _SEA) & 1, (strata >> _CLASS) & 0xFF, strata & ((1 << _CLASS) - 1)
    rates = size * np.where(sea == 1, spec.sea_keep, 1.0)
    if spec.mode == "balanced":
        # "Unknown" is not a class: it keeps its natural share instead of being upsampled like a rare class.
        known = category != landcover.UNKNOWN
        rates[known] = _rebalance(rates[known], np.zeros(known.sum()), category[known], spec.power)
    if spec.balance_latitude or spec.balance_climate:
        rates = _rebalance(rates, category, zone, spec.power)
    if spec.max_repeats:
        rates = np.minimum(rates, spec.max_repeats * size)
    return rates


def _rebalance(mass: np.ndarray, parent: np.ndarray, child: np.ndarray, power: float) -> np.ndarray:
    """Redistributes the mass of each parent over its children in proportion to their mass ** (1 - power)."""
    out = mass.astype(np.float64).copy()
    for p in np.unique(parent):
        here = parent == p
        names, which = np.unique(child[here], return_inverse=True)
        sums = np.bincount(which, weights=mass[here], minlength=len(names))
        wanted = np.where(sums > 0, np.maximum(sums, 1e-300) ** (1.0 - power), 0.0)
        if wanted.sum() == 0:
            continue
        factor = np.divide(wanted / wanted.sum() * sums.sum(), sums, out=np.zeros_like(sums), where=sums > 0)
        out[here] = mass[here] * factor[which]
    return out
