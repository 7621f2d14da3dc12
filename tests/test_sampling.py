"""Order of records: coverage, rates, sharding and the arithmetic at 20 million records."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from terrafm_jax import landcover
from terrafm_jax.data import sampling
from terrafm_jax.data.sampling import MODES, Mixture, Order, SamplingError, SamplingSpec, permute
from terrafm_jax.data.tiles import INDEX_DTYPE

SHARES = np.array([30, 4, 20, 14, 2, 9, 3, 2, 1, 0.5, 1, 12, 1.5])


def fake_index(n: int, layouts: int = 1, seed: int = 0, dtype: np.dtype = INDEX_DTYPE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    index = np.zeros(n, dtype)
    index["landcover"] = rng.choice(landcover.NUM_CATEGORIES, n, p=SHARES / SHARES.sum())
    index["layout"] = rng.integers(0, layouts, n)
    index["present"] = 7
    index["sea"] = index["landcover"] == landcover.SEA
    index["lat"] = rng.uniform(-60, 80, n)
    return index


def drawn(order: Order, epochs: int) -> np.ndarray:
    return np.concatenate([order.batch(s) for s in range(order.steps_per_epoch * epochs)])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1023, 4097])
def test_permutation_hits_every_number_once(size: int) -> None:
    for key in range(4):
        assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_permutation_depends_on_key_and_mixes() -> None:
    first, second = (permute(np.arange(10_000), 10_000, key) for key in (1, 2))
    assert np.mean(first == second) < 0.01
    for image in (first, second):
        assert abs(np.corrcoef(np.arange(10_000), image)[0, 1]) < 0.05
        assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.05


def test_permutation_takes_domains_and_keys_per_element() -> None:
    sizes = np.array([1, 5, 1000, 20_000_000])
    keys = np.array([3, 3, 4, 5], np.uint64)
    together = permute(np.array([0, 4, 999, 19_999_999]), sizes, keys)
    alone = [int(permute(np.array([s - 1]), s, k)[0]) for s, k in zip(sizes, keys, strict=True)]
    assert together.tolist() == alone
    with pytest.raises(ValueError, match="outside its domain"):
        permute(np.array([5]), 5, 0)


def test_mixture_numbers_every_component_without_gaps() -> None:
    mixture = Mixture(np.array([0.3, 5.0, 2.5]), key=7, min_round=8)
    component, ordinal = mixture.locate(0, 5000)
    for g, rate in enumerate(mixture.rates / mixture.rates.sum()):
        mine = ordinal[component == g]
        assert len(mine) == pytest.approx(5000 * rate, abs=3 + 16)
        # Rounds are shuffled inside: all numbers but those of the last, unfinished round are there.
        assert set(range(len(mine) - 16)) <= set(mine.tolist())
        assert len(set(mine.tolist())) == len(mine)
    parts = [mixture.locate(at, 500) for at in range(0, 5000, 500)]
    assert np.array_equal(np.concatenate([p[0] for p in parts]), component)
    assert np.array_equal(np.concatenate([p[1] for p in parts]), ordinal)


def test_uniform_epoch_holds_every_record_once() -> None:
    order = Order(fake_index(640), SamplingSpec("uniform"), 32, seed=1)
    assert order.steps_per_epoch == 20
    epochs = [np.concatenate([order.batch(e * 20 + s) for s in range(20)]) for e in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(640))
    assert not np.array_equal(epochs[0], epochs[1])
    other = Order(fake_index(640), SamplingSpec("uniform"), 32, seed=2)
    assert not np.array_equal(other.batch(0), order.batch(0))


def test_a_small_epoch_of_several_strata_or_buckets_holds_every_record_once() -> None:
    """Rounds of at least 1024 records or 64 batches mixed the epochs of small data sets: a third of one was missing."""
    index = fake_index(600)
    index["sea"] = np.arange(600) % 3 == 0
    order = Order(index, SamplingSpec("paper", sea_keep=0.5), 10, seed=0)  # 400 + 100
    index["layout"] = np.arange(600) % 2
    buckets = Order(index, SamplingSpec("uniform"), 10, seed=0, buckets=[0, 1])
    for epoch in range(3):
        seen = np.bincount(np.concatenate([order.batch(epoch * 50 + s) for s in range(50)]), minlength=600)
        assert (seen[~index["sea"]] == 1).all()
        assert (seen[index["sea"]].sum(), seen.max()) == (100, 1)
        every = np.concatenate([buckets.batch(epoch * 60 + s) for s in range(60)])
        assert np.array_equal(np.sort(every), np.arange(600))


def test_records_left_over_by_one_epoch_open_the_next() -> None:
    order = Order(fake_index(1000), SamplingSpec("uniform"), 64, seed=0)
    stream = np.concatenate([order.batch(s) for s in range(125)])  # 8000 = 8 epochs
    for e in range(8):
        assert np.array_equal(np.sort(stream[e * 1000 : (e + 1) * 1000]), np.arange(1000))


def test_batches_come_from_one_bucket_and_buckets_in_proportion() -> None:
    index = fake_index(3000, layouts=5)
    table = [0, 1, 1, 2, 0]
    order = Order(index, SamplingSpec("uniform"), 30, seed=0, buckets=table)
    steps = order.steps_per_epoch * 4
    seen = np.zeros(3000, int)
    for step in range(steps):
        batch = order.batch(step)
        assert set(np.take(table, index["layout"][batch])) == {order.bucket(step)}
        np.add.at(seen, batch, 1)
    assert seen.min() >= 3
    assert seen.max() <= 5
    assert np.mean(seen == 4) > 0.9


def test_bucket_smaller_than_a_batch_keeps_its_share() -> None:
    index = fake_index(1000)
    index["layout"][:5] = 1
    order = Order(index, SamplingSpec("uniform"), 64, seed=0)
    counts = np.bincount(np.concatenate([order.batch(s) for s in range(1000)]), minlength=1000)
    assert counts[:5].sum() / counts.sum() == pytest.approx(0.005, rel=0.25)
    assert counts[:5].min() > 0


def test_paper_thins_open_sea_and_visits_all_of_it_in_time() -> None:
    index = fake_index(2000)
    order = Order(index, SamplingSpec("paper", sea_keep=0.1), 200, seed=0)
    sea = index["sea"]
    assert order.epoch_size == pytest.approx((~sea).sum() + 0.1 * sea.sum())
    counts = np.bincount(drawn(order, 40), minlength=2000)
    assert counts[~sea].min() >= 38
    assert counts[~sea].max() <= 42
    assert counts[sea].mean() == pytest.approx(4, abs=0.3)
    assert counts[sea].min() >= 3, "another part of the sea every epoch"
    none = Order(index, SamplingSpec("paper", sea_keep=0.0), 200, seed=0)
    assert not sea[drawn(none, 3)].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layouts", [1, 3])
def test_observed_histogram_is_the_expected_one(mode: str, layouts: int) -> None:
    index = fake_index(1500, layouts)
    order = Order(index, SamplingSpec(mode), 100, seed=3)
    found = np.bincount(index["landcover"][drawn(order, 20)], minlength=13)
    assert np.abs(found / found.sum() - order.expected_histogram()).max() < 0.003
    assert order.natural_histogram() == pytest.approx(np.bincount(index["landcover"], minlength=13) / 1500)


def test_power_runs_from_records_to_classes() -> None:
    index = fake_index(4000)
    known = np.arange(13) != landcover.UNKNOWN
    at = {p: Order(index, SamplingSpec("balanced", power=p), 16, 0).expected_histogram() for p in (0, 0.5, 1)}
    assert at[0] == pytest.approx(np.bincount(index["landcover"], minlength=13) / 4000)
    assert np.ptp(at[1][known]) < 1e-9
    assert at[0.5][known] == pytest.approx(np.sqrt(at[0][known]) / np.sqrt(at[0][known]).sum() * at[0][known].sum())
    assert at[1][landcover.UNKNOWN] == pytest.approx(at[0][landcover.UNKNOWN]), "unknown is not drawn up"


def test_max_repeats_limits_rare_classes() -> None:
    index = fake_index(4000)
    order = Order(index, SamplingSpec("balanced", power=1.0, max_repeats=3), 16, seed=0)
    counts = np.bincount(drawn(order, 5), minlength=4000)
    assert counts.max() <= 5 * 3 + 1
    assert Order(index, SamplingSpec("balanced", power=1.0), 16, seed=0).rates.max() > 0


def test_latitude_bands_are_balanced() -> None:
    index = fake_index(6000)
    index["lat"][:5000] = 50  # nearly everything in one band
    spec = SamplingSpec("uniform", power=1.0, balance_latitude=True, latitude_band=20)
    order = Order(index, spec, 200, seed=0)
    band = np.floor((index["lat"][drawn(order, 4)] + 90) / 20)
    shares = np.unique(band, return_counts=True)[1] / len(band)
    assert np.ptp(shares) < 0.01
    inside = Order(index, SamplingSpec("balanced", power=1.0, balance_latitude=True), 25, seed=0)
    known = np.arange(13) != landcover.UNKNOWN
    assert np.ptp(inside.expected_histogram()[known]) < 1e-9, "balance of classes survives that of bands"


def test_climate_zones_need_their_column() -> None:
    spec = SamplingSpec("uniform", power=1.0, balance_climate=True)
    with pytest.raises(SamplingError, match="no column 'climate'"):
        Order(fake_index(100), spec, 4, seed=0)
    index = fake_index(900, dtype=np.dtype([*INDEX_DTYPE.descr, ("climate", "u1")]))
    index["climate"][:30] = 4
    share = np.mean(index["climate"][drawn(Order(index, spec, 10, seed=0), 4)] == 4)
    assert share == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("kind", "value"), [("i2", -1), ("i4", 1 << 16), ("f4", 2.0)])
def test_climate_zones_are_small_integers(kind: str, value: float) -> None:
    """A -1 for unknown set the bit of the open sea, so that such records were thinned, and named another canvas."""
    index = fake_index(900, dtype=np.dtype([*INDEX_DTYPE.descr, ("climate", kind)]))
    index["climate"][7] = value
    with pytest.raises(SamplingError, match=r"column 'climate' of the index is .*, expected integers from 0 to 65535"):
        Order(index, SamplingSpec("paper", balance_climate=True), 10, seed=0)


def test_records_that_cannot_be_used_are_never_drawn() -> None:
    index = fake_index(300)
    index["present"][:100] = 1  # S1 only
    index["nodata"][100:150] = 0.8
    order = Order(index, SamplingSpec("uniform", max_nodata=0.5), 10, seed=0, sensors=("s2_l1c", "s2_l2a"))
    assert order.num_eligible == 150
    assert drawn(order, 2).min() >= 150
    assert Order(index, SamplingSpec("uniform", complete=True), 10, seed=0).num_eligible == 200
    index["present"] = 1
    with pytest.raises(SamplingError, match="none of 300 records"):
        Order(index, SamplingSpec("uniform"), 10, seed=0, sensors=("s2_l2a",))


def test_faults_of_the_settings_are_named_together() -> None:
    spec = SamplingSpec(mode="fair", power=2, sea_keep=-1)
    with pytest.raises(SamplingError, match=r"mode.*power.*sea_keep"):
        spec.check()
    with pytest.raises(SamplingError, match="batch_size = 0"):
        Order(fake_index(10), SamplingSpec(), 0, seed=0)
    index = fake_index(10)
    index["layout"] = 3
    with pytest.raises(SamplingError, match="layout 3"):
        Order(index, SamplingSpec(), 2, seed=0, buckets=[0, 0])


def test_description_names_classes_and_numbers() -> None:
    text = Order(fake_index(1000), SamplingSpec("paper"), 16, seed=0).describe()
    assert "Tree cover" in text
    assert "Open sea" in text
    assert "0.02" in text


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_twenty_million_records(mode: str) -> None:
    n, size = 20_000_000, 1024
    index = np.zeros(n, INDEX_DTYPE)
    index["present"] = 7
    index["landcover"] = np.arange(n) % 11
    index["layout"][n // 2 :] = 1
    index["sea"][::50] = True
    order = Order(index, SamplingSpec(mode, sea_keep=0.02), size, seed=0)
    steps = [0, 1, order.steps_per_epoch - 1, order.steps_per_epoch, 10**6, 10**9]
    tracemalloc.start()
    batches = [order.batch(s) for s in steps]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6, "a step must not touch memory in proportion to the records"
    for step, batch in zip(steps, batches, strict=True):
        assert batch.shape == (size,)
        assert batch.min() >= 0
        assert batch.max() < n
        assert set(index["layout"][batch]) == {order.bucket(step)}
        assert np.array_equal(batch, order.batch(step))
    if mode == "uniform":
        last = int(order.epoch_size) // size - 1  # the batch at the border belongs to two epochs
        early = np.concatenate([order.batch(s) for s in range(300)])
        late = np.concatenate([order.batch(s) for s in range(last - 300, last)])
        together = np.concatenate([early, late])
        assert len(np.unique(together)) == len(together), "a record came twice within one epoch"


def test_full_domain_of_a_large_permutation() -> None:
    n = 2**20 + 3
    assert np.array_equal(np.sort(permute(np.arange(n), n, 11)), np.arange(n))


def test_eligible_is_what_order_draws_from() -> None:
    index = fake_index(100)
    index["present"][::2] = 0
    keep = sampling.eligible(index, SamplingSpec(), ("s1", "s2_l1c", "s2_l2a"))
    assert keep.sum() == 50
    assert set(drawn(Order(index, SamplingSpec("uniform"), 10, 0), 1)) == set(np.flatnonzero(keep))
