"""The config is a schema: unknown, mistyped and impossible keys are named, durations convert, rows differ as stated."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from terrafm_jax import config as config_lib
from terrafm_jax import landcover
from terrafm_jax.config import ABLATIONS, ConfigError, Duration, base, check, durations, flatten
from terrafm_jax.sensors import Statistics

CONFIGS = ("vits", "vitb", "vitl", "demo")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("argument", ["", "runlocal", *ABLATIONS, "fusion,runlocal"])
def test_every_config_and_argument_passes_the_check(name: str, argument: str) -> None:
    config = importlib.import_module(f"configs.{name}").get_config(argument)
    check(config)
    steps = durations(config, 1_000_000)
    assert steps["total_steps"] > 0
    assert steps["optim.warmup"] <= steps["total_steps"]


def test_unknown_mistyped_and_impossible_keys_are_all_named() -> None:
    config = base()
    config.objective.unlock()
    config.objective.alfa = 0.5
    config.views.locals = 4
    del config.optim["clip"]
    config.data.sampling = "random"
    config.total_steps = "ten epochs"
    config.model.sensors = ("s1", "landsat")
    config.objective.frequent = ("trees",)
    with pytest.raises(ConfigError) as caught:
        check(config)
    text = str(caught.value)
    for part in ("alfa: unknown; did you mean config.objective.alpha", "optim.clip: missing", "'random'",
                 "'ten epochs'", "'landsat'", "'trees'", "6 faults"):  # fmt: skip
        assert part in text, text


def test_wrong_type_names_the_expected_one() -> None:
    config = base()
    with config.ignore_type():
        config.batch_size = "large"
    with pytest.raises(ConfigError, match=r"config\.batch_size: found 'large' \(str\), expected int"):
        check(config)


def test_numbers_below_zero_and_broken_pairs_are_named() -> None:
    """Minus one stopped a run at once, as a step, or left one record out of a gallery, as a count; neither was said."""
    config = base()
    config.stop_at_step, config.knn.train_examples, config.data.max_skipped = -1, -5, -0.1
    config.views.aspect, config.views.local_scale = (0.75,), ("a", "b")
    config.mesh.data, config.seed = -1, -1  # these may be
    with pytest.raises(ConfigError) as caught:
        check(config)
    text = str(caught.value)
    assert "5 faults" in text
    assert "config.stop_at_step: found -1, expected 0 or more" in text
    assert "config.knn.train_examples: found -5" in text
    assert "config.data.max_skipped: found -0.1" in text
    assert "config.views.aspect: found (0.75,), expected two numbers, such as (0.75, 1.33" in text
    assert "config.views.local_scale: found ('a', 'b'), expected two numbers" in text


@pytest.mark.parametrize("found", [0, -3])
def test_sizes_of_nothing_are_named(found: int) -> None:
    """Without prototypes the first losses were not finite, and the message spoke of the learning rate."""
    config = base()
    config.model.prototypes = config.model.queries = config.batch_size = found
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert "3 faults" in str(caught.value)
    for key in ("model.prototypes", "model.queries", "batch_size"):
        assert f"config.{key}: found {found}, expected 1 or more" in str(caught.value)


def test_an_integer_serves_for_a_float() -> None:
    config = base()
    config.objective.alpha = 1
    check(config)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("300", 300),
        ("300 steps", 300),
        ("2 epochs", 20),
        ("0.5 epoch", 5),
        ("1e3 examples", 10),
        ("5%", 50),
        ("0", 0),
        ("0 epochs", 0),
        ("0.001 epochs", 1),
    ],
)
def test_durations(text: str, steps: int) -> None:
    assert Duration(batch_size=100, examples_per_epoch=1000, total_steps=1000).steps(text) == steps


def test_a_size_is_not_changed_in_silence() -> None:
    """vitb.py with --config.model.depth=6 trained twelve blocks."""
    config = base()
    config.model.depth, config.model.heads = 6, 8
    with pytest.raises(ConfigError, match=r"size 'b' sets width, depth and heads, found depth = 6, heads = 8 too"):
        config_lib.model_spec(config)
    config.model.size, config.model.width = "", 768
    spec = config_lib.model_spec(config)
    assert (spec.width, spec.depth, spec.heads) == (768, 6, 8)


@pytest.mark.parametrize("nothing", ["0", "0 epochs"])
def test_a_run_of_no_steps_is_refused_by_its_field(nothing: str) -> None:
    config = base()
    config.total_steps = nothing
    with pytest.raises(ConfigError, match=f"config.total_steps: found '{nothing}', expected more than nothing"):
        durations(config, 1000)


def test_total_steps_cannot_be_a_percentage() -> None:
    config = base()
    config.total_steps = "50%"
    with pytest.raises(ConfigError, match="percentage"):
        durations(config, 1000)


def test_ablation_rows_add_one_thing_each() -> None:
    rows = {name: flatten(config_lib.apply_argument(base(), name)) for name in ABLATIONS}

    def changed(a: str, b: str) -> set[str]:
        return {k for k in rows[a] if rows[a][k] != rows[b][k]}

    assert changed("single", "modality") == {"model.sensors"}
    assert changed("modality", "fusion") == {"model.fusion", "views.modality_rule"}
    assert changed("fusion", "full") == {"objective.alpha"}
    assert rows["full"] == flatten(base())


def test_an_unknown_argument_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"runlokal.*runlocal.*single"):
        config_lib.apply_argument(base(), "runlokal")


def test_without_a_frequent_class_there_is_one_center() -> None:
    """Tiles prepared without maps are all unknown: nothing would feed the second center."""
    config = importlib.import_module("configs.demo").get_config("runlocal")
    steps = durations(config, 100)
    unknown, mapped = np.zeros(landcover.NUM_CATEGORIES), np.zeros(landcover.NUM_CATEGORIES)
    unknown[landcover.UNKNOWN] = 1.0
    mapped[:3] = 0.8, 0.1, 0.1
    one, two = (config_lib.train_spec(config, steps, Statistics.published(), shares) for shares in (unknown, mapped))
    assert (one.objective.alpha, two.objective.alpha) == (1.0, config.objective.alpha)
    assert config.objective.alpha < 1


def test_the_specs_default_to_the_recipe() -> None:
    """They stand twice, so that tests and benchmarks need no config, and say the same but for types and durations."""
    config, shares = base(), np.arange(landcover.NUM_CATEGORIES)  # uneven, so that there are two centers
    spec = config_lib.train_spec(config, durations(config, 1_000_000), Statistics.published(), shares)
    for part in (spec, spec.model, spec.views, spec.optim, spec.objective, config_lib.sampling_spec(config)):
        for field in dataclasses.fields(part):
            if field.default is not dataclasses.MISSING and field.name != "dtype" and not field.name.endswith("_steps"):
                assert getattr(part, field.name) == field.default, f"{type(part).__name__}.{field.name}"


def test_every_field_of_sampling_can_be_configured() -> None:
    config, names = base(), {"mode": "sampling"}
    changed = {"mode": "balanced", "balance_latitude": True, "balance_climate": True, "complete": True}
    fields = dataclasses.fields(config_lib.sampling_spec(config))
    changed |= {field.name: field.default / 2 + 0.25 for field in fields if field.name not in changed}
    for name, value in changed.items():
        config.data[names.get(name, name)] = value
    check(config)
    assert dataclasses.asdict(config_lib.sampling_spec(config)) == changed


def test_the_recipe_page_names_every_hyperparameter(root: Path) -> None:
    """Fields that say how a run goes, not what it computes, are explained where they stand."""
    page = (root / "docs" / "recipe.md").read_text()
    named = set(re.findall(r"`(?:\w+\.)?(\w+)`", page))
    how = ("compute.", "mesh.", "checkpoint.", "log.", "knn.", "profile.")
    run = {"init_from", "stop_at_step", "allow_config_change", "exit_code_preempted", "max_nonfinite",
           "data.dir", "data.workers", "data.cache", "data.canvases", "data.max_skipped"}  # fmt: skip
    keys = [k for k in flatten(base()) if k not in run and not k.startswith(how)]
    assert [k for k in keys if k.split(".")[-1] not in named] == []
