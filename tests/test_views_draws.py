"""The random part of views: boxes, validity, modality draws, flips."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as scipy_stats
from views_fake import fake_batch, views_of

from terrafm_jax.sensors import SENSOR_KEYS
from terrafm_jax.ssl.boxes import covered_range, draw_boxes, propose_boxes, valid_share
from terrafm_jax.ssl.modalities import RULES, draw_modalities, most_drawn, subset_probabilities, subsets
from terrafm_jax.ssl.views import ViewSpec, draw_views

DRAWS = 30_000
SMALL = ViewSpec(globals=2, locals=2, global_size=16, local_size=8, patch=8, box_tries=2)
BOX = {"aspect": (0.75, 4 / 3), "min_valid": 0.5}
ALPHA = 1e-4  # seeds are fixed: a test either always passes or never


@functools.partial(jax.jit, static_argnames=("views", "tries", "scale"))
def _boxes(key: jax.Array, batch: dict, *, views: int, tries: int, scale: tuple[float, float]) -> tuple:
    return draw_boxes(key, batch, SENSOR_KEYS, batch["present"], views=views, tries=tries, scale=scale, **BOX)


def drawn_boxes(seed: int, batch: dict, **kwargs) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [B, V, 4] and valid shares [B, V, S]."""
    return jax.device_get(_boxes(jax.random.key(seed), batch, **kwargs))


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """p-value of counts against expected counts; impossible cells must be empty."""
    assert np.all(observed[expected == 0] == 0)
    observed, expected = observed[expected > 0], np.asarray(expected, np.float64)[expected > 0]
    return scipy_stats.chisquare(observed, expected / expected.sum() * observed.sum()).pvalue


def codes(masks: np.ndarray) -> np.ndarray:
    """Subset number 1 .. 2**S - 1 of bool [..., S]."""
    return (np.asarray(masks) << np.arange(masks.shape[-1])).sum(-1)


def redrawn_bernoulli(threshold: float, available: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The rule as the paper's reading states it: independent coins, redrawn while empty."""
    taken = (rng.random(available.shape) < threshold) & available
    while (empty := ~taken.any(-1)).any():
        taken[empty] = (rng.random((empty.sum(), available.shape[-1])) < threshold) & available[empty]
    return taken


def draws(seed: int, rule: str, threshold: float, available: tuple[int, ...], group: int = 0) -> np.ndarray:
    """DRAWS independent draws [DRAWS, S]: single views, or the second view of one sample of each group."""
    count, views = DRAWS * max(group, 1), 2 if group else 1
    mask = jnp.tile(jnp.asarray(available, bool)[None, None], (count, views, 1))
    drawn = draw_modalities(jax.random.key(seed), rule, threshold, mask, group)
    return np.asarray(drawn)[:: max(group, 1), -1]


@pytest.mark.parametrize("available", [(1, 1, 1), (1, 0, 1), (0, 1, 1), (0, 0, 1)])
@pytest.mark.parametrize(("threshold", "group"), [(0.5, 0), (0.3, 0), (0.3, 1), (0.5, 5), (0.3, 8), (1.0, 0), (1.0, 5)])
def test_bernoulli_equals_coins_redrawn_when_empty(available: tuple[int, ...], threshold: float, group: int) -> None:
    """However many views are stratified together, each follows the rule by itself."""
    mask = np.tile(np.array(available, bool), (DRAWS, 1))
    drawn = draws(1, "bernoulli", threshold, available, group)
    coins = redrawn_bernoulli(threshold, mask, np.random.default_rng(2))
    one, two = (np.bincount(codes(x), minlength=8)[1:] for x in (drawn, coins))
    both = (one + two) > 0
    assert np.array_equal(one > 0, two > 0)
    if both.sum() > 1:
        assert scipy_stats.chi2_contingency(np.stack([one, two])[:, both]).pvalue > ALPHA
        exact = np.asarray(subset_probabilities("bernoulli", threshold, jnp.asarray(mask[:1])))[0]
        assert chi_square(one, exact * DRAWS) > ALPHA


def test_bernoulli_half_gives_three_three_one_sevenths() -> None:
    sizes = draws(3, "bernoulli", 0.5, (1, 1, 1)).sum(-1)
    assert chi_square(np.bincount(sizes, minlength=4)[1:], DRAWS * np.array([3, 3, 1]) / 7) > ALPHA


@pytest.mark.parametrize(
    ("rule", "available", "want"),
    [
        ("fuse_or_one", (1, 1, 1), {7: 0.6, 1: 0.4 / 3, 2: 0.4 / 3, 4: 0.4 / 3}),
        ("fuse_or_one", (1, 0, 1), {5: 0.6, 1: 0.2, 4: 0.2}),
        ("fuse_or_one", (0, 1, 0), {2: 1.0}),
        ("one", (1, 1, 0), {1: 0.5, 2: 0.5}),
        ("all", (1, 1, 0), {3: 1.0}),
        ("all", (1, 1, 1), {7: 1.0}),
    ],
)
def test_other_rules(rule: str, available: tuple[int, ...], want: dict[int, float]) -> None:
    drawn = np.bincount(codes(draws(4, rule, 0.6, available)), minlength=8)
    expected = np.array([want.get(c, 0.0) for c in range(8)]) * DRAWS
    if (expected > 0).sum() == 1:
        assert np.array_equal(drawn, expected)
    else:
        assert chi_square(drawn, expected) > ALPHA


def test_unknown_rule_is_named() -> None:
    with pytest.raises(ValueError, match="modality_rule: found 'sometimes'"):
        subset_probabilities("sometimes", 0.5, jnp.ones((1, 3), bool))


def test_subsets_are_all_and_distinct() -> None:
    table = subsets(3)
    assert table.shape == (7, 3)
    assert table.any(1).all()
    assert len({tuple(r) for r in table}) == 7


@pytest.mark.parametrize("views", [1, 2, 8])
@pytest.mark.parametrize("rule", RULES)
def test_no_group_draws_a_sensor_more_often_than_foretold(rule: str, views: int) -> None:
    """And some group as often; every place in a group draws it equally often."""
    group, groups = 4, 3_000
    available = jnp.ones((group * groups, views, 3), bool)
    drawn = np.asarray(draw_modalities(jax.random.key(5), rule, 0.5, available, group))
    drawn = drawn.reshape(groups, group * views, 3)
    assert np.array_equal(drawn.sum(1).max(0), most_drawn(rule, 0.5, 3, group * views))
    for sensor in range(3):
        places = drawn[..., sensor].sum(0)
        assert chi_square(places, np.full(group * views, places.mean())) > ALPHA


def test_stratified_draws_differ_from_group_to_group_as_chance_has_it() -> None:
    """Within a group a subset gives way to others; the first views of two groups next to each other do not."""
    drawn = np.asarray(draw_modalities(jax.random.key(6), "bernoulli", 0.5, jnp.ones((80_000, 1, 3), bool), 8))
    first, second = codes(drawn[::8, 0]), codes(drawn[1::8, 0])
    apart = np.histogram2d(first[:-1:2], first[1::2], bins=(7, 7))[0]
    together = np.histogram2d(first, second, bins=(7, 7))[0]
    assert scipy_stats.chi2_contingency(apart).pvalue > ALPHA
    assert np.trace(together) / together.sum() < 0.06  # a seventh by chance


@pytest.mark.parametrize("group", [0, 8])
def test_marginals_pairs_and_networks_are_independent_in_the_views_made(group: int) -> None:
    spec = ViewSpec(globals=2, locals=1, global_size=8, local_size=8, patch=8, modality_group=group)
    batch = jax.tree.map(jnp.asarray, fake_batch(2_000, 12))
    draw = jax.jit(lambda k: draw_views(spec, batch, k, 2, (0.25, 1.0)))
    rounds = [jax.device_get(draw(jax.random.key(s))) for s in range(5)]
    _, flips, student, teacher = (np.concatenate([r[i] for r in rounds]) for i in range(4))
    marginal = np.full(3, 4 / 7)
    for drawn in (student, teacher):
        counts = drawn.reshape(-1, 3).sum(0)
        n = drawn.reshape(-1, 3).shape[0]
        assert np.all(np.abs(counts / n - marginal) < 4.5 * np.sqrt(marginal * (1 - marginal) / n))
        pairs = np.einsum("nia,nib->ab", drawn, drawn, dtype=np.int64)[np.triu_indices(3, 1)] / n
        assert np.all(np.abs(pairs - 2 / 7) < 4.5 * np.sqrt(2 / 7 * 5 / 7 / n))
    columns = {
        "student view 0": codes(student[:, 0]),
        "student view 1": codes(student[:, 1]),
        "teacher view 0": codes(teacher[:, 0]),
        "teacher view 1": codes(teacher[:, 1]),
        "flips": flips[:, 0, 0] + 2 * flips[:, 0, 1],
    }
    names = list(columns)
    for i, one in enumerate(names):
        for two in names[:i]:
            if group and one.split()[0] == two.split()[0]:
                continue  # stratified together, and no term of the loss compares two views of one network
            table = np.histogram2d(columns[one], columns[two], bins=(8, 8))[0]
            table = table[table.sum(1) > 0][:, table.sum(0) > 0]
            assert scipy_stats.chi2_contingency(table).pvalue > ALPHA, f"{one} depends on {two}"
    assert abs(flips.mean() - 0.5) < 0.02


def test_boxes_have_the_area_aspect_and_place_they_should() -> None:
    covered = jnp.tile(jnp.asarray([[0.0, 0.0, 1.0, 1.0]]), (2_000, 1))
    box = np.asarray(propose_boxes(jax.random.key(0), covered, jnp.ones(2_000), 5, (0.25, 1.0), (0.75, 4 / 3))).reshape(
        -1, 4
    )
    height, width = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
    area = height * width
    assert box.min() >= 0
    assert box.max() <= 1 + 1e-6
    assert scipy_stats.kstest((area - 0.25) / 0.75, "uniform").pvalue > ALPHA
    assert (width / height).min() >= 0.75 - 1e-4
    assert (width / height).max() <= 4 / 3 + 1e-3
    small = area < 0.5  # here every aspect fits
    log = (np.log(width / height)[small] - np.log(0.75)) / (np.log(4 / 3) - np.log(0.75))
    assert scipy_stats.kstest(log, "uniform").pvalue > ALPHA
    assert scipy_stats.kstest((box[:, 0] / (1 - height))[small], "uniform").pvalue > ALPHA
    assert scipy_stats.kstest((box[:, 1] / (1 - width))[small], "uniform").pvalue > ALPHA


def test_aspect_is_measured_on_the_ground_of_an_elongated_tile() -> None:
    covered = jnp.tile(jnp.asarray([[0.0, 0.0, 1.0, 1.0]]), (500, 1))
    box = np.asarray(
        propose_boxes(jax.random.key(0), covered, jnp.full(500, 2.0), 4, (0.05, 0.25), (0.75, 4 / 3))
    ).reshape(-1, 4)
    ground = 2.0 * (box[:, 3] - box[:, 1]) / (box[:, 2] - box[:, 0])
    assert ground.min() > 0.74
    assert ground.max() < 1.34


def test_boxes_stay_inside_a_window_that_keeps_the_tiles_geometry() -> None:
    batch = fake_batch(64, 60)
    for key in SENSOR_KEYS:
        for group in batch[key].values():
            side = group["extent"][0, 0]
            group["geometry"] = np.tile(np.array([-side, 2 * side, -side / 2, 2 * side], np.float32), (64, 1))
    batch = jax.tree.map(jnp.asarray, batch)
    covered, ratio = covered_range(batch, SENSOR_KEYS, batch["present"])
    np.testing.assert_allclose(covered[0], [0.5, 0.25, 1.0, 0.75], atol=1e-6)
    np.testing.assert_allclose(ratio, 1.0)
    box, share = drawn_boxes(0, batch, views=4, tries=2, scale=(0.1, 0.9))
    assert np.all(box[..., :2] >= covered[:, None, :2] - 1e-6)
    assert np.all(box[..., 2:] <= covered[:, None, 2:] + 1e-6)
    area = np.prod(box[..., 2:] - box[..., :2], axis=-1)
    assert area.max() <= 0.25 + 1e-5  # no more than the window holds
    assert share.min() > 0.99


def test_valid_share_is_what_counting_pixels_gives() -> None:
    batch = fake_batch(4, 96, hole=0.4, canvas=120)
    box = np.asarray(
        propose_boxes(jax.random.key(0), jnp.tile(jnp.asarray([[0.0, 0.0, 1.0, 1.0]]), (4, 1)), jnp.ones(4), 20,
                      (0.1, 1.0), (0.75, 4 / 3))
    )  # fmt: skip
    got = np.asarray(valid_share(jax.tree.map(jnp.asarray, batch), SENSOR_KEYS, jnp.asarray(box)))
    for s, key in enumerate(SENSOR_KEYS):
        group = batch[key]["10m"]
        fine = np.linspace(0, 1, 400, endpoint=False) + 1 / 800
        for i in range(4):
            valid = np.unpackbits(group["valid"][i], axis=1)[:96, :96]
            for n in range(20):
                u0, v0, u1, v1 = box[i, n]
                rows = ((u0 + (u1 - u0) * fine) * 96).astype(int).clip(0, 95)
                cols = ((v0 + (v1 - v0) * fine) * 96).astype(int).clip(0, 95)
                assert abs(got[i, n, s] - valid[np.ix_(rows, cols)].mean()) < 0.06


def test_outside_the_array_counts_as_invalid() -> None:
    batch = fake_batch(1, 60)
    batch["s1"]["10m"]["geometry"] = np.array([[0, 120, 0, 60]], np.float32)  # S1 holds the upper half only
    box = jnp.asarray([[[0.0, 0.0, 1.0, 1.0], [0.6, 0.0, 0.9, 1.0]]], jnp.float32)
    share = valid_share(jax.tree.map(jnp.asarray, batch), SENSOR_KEYS, box)
    np.testing.assert_allclose(share[0], [[0.5, 1, 1], [0, 1, 1]], atol=1e-5)


def half_invalid(size: int) -> dict:
    """Tiles whose left half is nodata in every sensor."""
    batch = fake_batch(size, 96)
    for key in SENSOR_KEYS:
        for group in batch[key].values():
            width = group["dn"].shape[2]
            valid = np.ones((size, width, width), bool)
            valid[:, :, : width // 2] = False
            group["valid"] = np.packbits(valid, axis=2)
    return jax.tree.map(jnp.asarray, batch)


def drawn_share(batch: dict, tries: int, scale: tuple[float, float]) -> np.ndarray:
    _, share = drawn_boxes(5, batch, views=4, tries=tries, scale=scale)
    return np.asarray(share).min(-1)


def test_boxes_below_half_valid_are_redrawn() -> None:
    batch = half_invalid(500)
    once, often = drawn_share(batch, 1, (0.05, 0.2)), drawn_share(batch, 8, (0.05, 0.2))
    assert (once < 0.5).mean() > 0.4
    assert (often < 0.5).mean() < 0.02


def test_the_first_valid_candidate_is_taken_else_the_best() -> None:
    batch = half_invalid(200)
    taken, _ = drawn_boxes(5, batch, views=2, tries=3, scale=(0.05, 0.2))
    covered, ratio = covered_range(batch, SENSOR_KEYS, batch["present"])
    candidates = propose_boxes(jax.random.key(5), covered, ratio, 6, (0.05, 0.2), BOX["aspect"])
    share = np.asarray(valid_share(batch, SENSOR_KEYS, candidates)).min(-1).reshape(200, 2, 3)
    candidates = np.asarray(candidates).reshape(200, 2, 3, 4)
    fallbacks = 0
    for i in range(200):
        for v in range(2):
            good = np.flatnonzero(share[i, v] >= 0.5)
            fallbacks += not len(good)
            want = good[0] if len(good) else np.argmax(share[i, v])
            np.testing.assert_allclose(taken[i, v], candidates[i, v, want], atol=1e-6)
    assert 5 < fallbacks < 200


def test_absent_sensors_neither_spoil_boxes_nor_are_drawn() -> None:
    batch = fake_batch(16, 60)
    for group in batch["s2_l1c"].values():
        group["dn"][:], group["valid"][:], group["geometry"][:], group["extent"][:] = 0, 0, 0, 0
    batch["present"][:, 1] = False
    for views in views_of(SMALL, batch):
        assert not views.student[..., 1].any()
        assert not views.teacher[..., 1].any()
        assert views.student.any(-1).all()
        assert all(np.isfinite(p).all() for p in views.patches.values())
        np.testing.assert_array_equal(views.patches["s2_l1c"], 0.5)


def test_a_sensor_that_is_nodata_in_the_box_is_not_drawn() -> None:
    batch = fake_batch(16, 60)
    batch["s1"]["10m"]["valid"][:] = 0  # present in the record, but not a single measurement
    views, _ = views_of(SMALL, batch)
    assert not views.student[..., 0].any()
    assert views.student[..., 1:].any(-1).all()


def test_a_record_without_anything_does_not_break_the_batch() -> None:
    batch = fake_batch(16, 60)
    batch["present"][0] = False
    for key in SENSOR_KEYS:
        for group in batch[key].values():
            for name in ("dn", "valid", "geometry", "extent"):
                group[name][0] = 0
    for views in views_of(SMALL, batch):
        assert views.student.any(-1).all()
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(views))
