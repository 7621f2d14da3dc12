"""What outputs say of their origin holds on another machine."""

from __future__ import annotations

import pytest

from terrafm_jax import provenance


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("/home/someone/scene.tif", "scene.tif"),
        ("../scene.tif", "scene.tif"),
        ("/d/S2A_X.SAFE/GRANULE/L2A/B02.jp2", "S2A_X.SAFE/GRANULE/L2A/B02.jp2"),
        ("/vsizip//d/x.zip/a/b.tif", "x.zip/a/b.tif"),
        ("/home/someone/run/teacher/700", "run/teacher/700"),
        ("/home/someone/run/best", "run/best"),
        ("https://user:word@host/a/b.tif?sig=secret#x", "https://host/a/b.tif"),
        ("/vsicurl/https://host/a/b.tif?sig=secret", "https://host/a/b.tif"),
        ("gs://bucket/run", "gs://bucket/run"),
        ("file:///home/someone/b.tif", "b.tif"),
    ],
)
def test_places_are_names(given, named):
    assert provenance.place(given) == named


def test_configs_lose_their_paths_only():
    config = {
        "data.dir": "/home/someone/tiles", "init_from": "ours=/home/someone/run", "rates": (1e-3, "a/b"), "seed": 3,
        "name": "x=1", "box": "1.5,-2,3,4", "mask": ["scl=/home/someone/scl.tif:3,8"], "base": "random@/srv/run:1",
    }  # fmt: skip
    found = provenance.portable(config)
    assert found == {**config, "data.dir": "tiles", "init_from": "ours=run", "mask": ["scl=scl.tif:3,8"],
                     "base": "random@run:1"}  # fmt: skip


def test_the_digest_is_the_same_elsewhere():
    here, there = ({"data.dir": f"{root}/tiles", "rate": 0.1} for root in ("/home/a", "/srv/b"))
    assert provenance.digest(here) == provenance.digest(there)
    assert provenance.digest(here) != provenance.digest({**here, "rate": 0.2})
    assert provenance.digest({"rates": (1, 2)}) == provenance.digest({"rates": [1, 2]})  # as JSON gives it back
