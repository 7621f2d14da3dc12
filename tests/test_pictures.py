"""The pictures of a run: views of the first batch, land cover before and after sampling, learning curves."""

from __future__ import annotations

import json

import numpy as np
from etils import epath
from PIL import Image
from views_fake import fake_batch, views_of

from terrafm_jax import figures, landcover
from terrafm_jax.models.terrafm import patchify
from terrafm_jax.sensors import SENSORS
from terrafm_jax.ssl.views import ViewSpec
from terrafm_jax.training import pictures

SPEC = ViewSpec(globals=2, locals=3, global_size=32, local_size=16, patch=8)


def test_unpatchify_inverts_patchify() -> None:
    image = np.random.default_rng(0).normal(size=(1, 24, 16, 12)).astype(np.float32)
    np.testing.assert_array_equal(pictures.unpatchify(np.asarray(patchify(image, 8))[0], 8), image[0])


def test_colors_are_those_of_the_bands() -> None:
    image = np.zeros((2, 2, 12), np.float32)
    image[0, :, SENSORS["s2_l2a"].band_names.index("B04")] = 1.0  # red
    image[1, :, SENSORS["s2_l2a"].band_names.index("B02")] = 2.0  # blue, beyond the scale
    rgb = pictures.as_rgb("s2_l2a", image)
    assert rgb.dtype == np.uint8
    np.testing.assert_array_equal(rgb[:, 0], [[255, 0, 0], [0, 0, 255]])
    radar = pictures.as_rgb("s1", np.full((1, 1, 2), [1.0, 0.25], np.float32))
    np.testing.assert_array_equal(radar[0, 0], [255, 63, 255])


def test_ground_is_seen_beside_clouds_and_views_stay_comparable() -> None:
    rng = np.random.default_rng(0)
    land = rng.uniform(0.30, 0.38, (32, 32, 12)).astype(np.float32)  # normalized: the darkest tenth of the scale
    cloudy = land.copy()
    cloudy[:16] = 1.2
    lifted = land + 0.03
    low, span = pictures.stretch("s2_l2a", [land, cloudy, lifted])
    plain, clouds, bright = (pictures.as_rgb("s2_l2a", x, low, span).astype(int) for x in (land, cloudy, lifted))
    assert np.median(plain) > 50, "ground is not black"
    assert (clouds[:16] == 255).all()
    assert plain.std() > 15, "nor is it one gray"
    np.testing.assert_array_equal(clouds[16:], plain[16:])  # the same values look the same in all views of a row
    assert bright.mean() > plain.mean() + 15, "a brighter view looks brighter"


def test_noise_of_a_uniform_tile_is_not_stretched() -> None:
    water = 0.3 + np.random.default_rng(0).normal(0, 0.0005, (16, 16, 12)).astype(np.float32)
    assert pictures.as_rgb("s2_l2a", water, *pictures.stretch("s2_l2a", [water])).std() < 15
    for nothing in ([], [np.zeros((4, 4, 12))]):  # no network saw it, or all of it was filled
        low, span = pictures.stretch("s2_l2a", nothing)
        assert (low.tolist(), span) == ([0, 0, 0], 1)


def test_sheet_shows_every_view_and_grays_what_no_network_saw(tmp_path) -> None:
    sets = views_of(SPEC, fake_batch(6, 60))
    path = epath.Path(tmp_path) / "views.png"
    pictures.save_views(path, sets, SPEC)
    sheet = np.asarray(Image.open(path))
    cell, gap, text = pictures._CELL, pictures._GAP, pictures._TEXT
    assert sheet.shape[1] == 5 * (cell + gap) + gap
    block = 3 * (cell + text) + 2 * gap
    assert sheet.shape[0] == 4 * block
    for row in range(4):
        for column in range(5):
            views, v = (sets[0], column) if column < 2 else (sets[1], column - 2)
            for i in range(3):
                top, left = row * block + i * (cell + text) + text, gap + column * (cell + gap)
                tile = sheet[top : top + cell, left : left + cell]
                seen = views.student[row, v, i] or (column < 2 and views.teacher[row, v, i])
                assert (np.unique(tile).tolist() == [0xD8]) != bool(seen)


def test_class_chart_draws_shares_before_and_after() -> None:
    before, after = np.zeros((2, landcover.NUM_CATEGORIES))
    tree, snow = landcover.category("tree"), landcover.category("snow")
    before[[tree, snow]], after[[tree, snow]] = (0.9, 0.1), (0.6, 0.4)
    chart = np.asarray(pictures.class_chart(before, after))
    for i, row in ((tree, 1), (snow, 2)):
        color = np.array(list(bytes.fromhex(landcover.CATEGORIES[i].color[1:])))
        length = (chart[32 * row + 16] == color).all(axis=-1).sum()  # within the lower bar, which is what is drawn
        assert abs(length - 420 * after[i] / 0.9) <= 2
    assert chart.shape[0] == 3 * 32, "a title, and the two categories that occur"


def test_curves_show_the_last_value_of_a_step_and_say_what_was_not_measured(tmp_path, monkeypatch) -> None:
    rows = [{"step": 0, "loss": 6.0}, {"step": 10, "loss": 5.0}, {"step": 10, "loss": 4.0, "teacher_entropy": 2.0}]
    lines = [json.dumps({"time": 1.0, **row}) for row in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 20, "lo']))  # the last one cut short by a kill
    kept = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: kept.append(figure))
    figures.learning_curves(tmp_path / "curves.png", tmp_path)
    axes = {axis.get_title(): axis for axis in kept[0].axes}
    curve, entropy = axes["loss"].get_lines()
    np.testing.assert_array_equal(curve.get_xydata(), [[0, 6], [10, 4]])
    np.testing.assert_array_equal(entropy.get_xydata(), [[10, 2]])
    assert axes["teacher entropy"].get_ylim()[0] == 0  # a monitor of collapse: how far above zero has to be seen
    assert axes["teacher entropy"].get_ylabel() == "nats"
    assert [t.get_text() for t in axes["kNN top-1"].texts] == ["not measured"]
    assert not axes["kNN top-1"].get_lines()
    assert not axes["loss"].texts
