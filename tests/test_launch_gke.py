"""The JobSet manifest: what it says, and that it fits our excerpt of the schema."""

from __future__ import annotations

import json

import jsonschema
import pytest
import yaml
from launch_fake import FLAGS, GKE, call


def rendered(root, **settings):
    found = call(root, "launch/gke.sh", "render", *FLAGS, env={**GKE, **settings})
    assert found.returncode == 0, found.stderr
    assert "@" not in found.stdout.replace("@FIELDS@", "")
    return yaml.safe_load(found.stdout)


@pytest.mark.parametrize(
    ("settings", "slices", "hosts", "chips"),
    [
        ({}, 2, 4, 4),
        ({"CHIP": "v5p", "TOPOLOGY": "4x4x8", "SLICES": "1"}, 1, 32, 4),
        ({"CHIP": "v6e", "TOPOLOGY": "1x1", "SLICES": "1"}, 1, 1, 1),
    ],
)
def test_jobset_fits_its_schema(root, settings, slices, hosts, chips):
    manifest = rendered(root, **settings)
    schema = json.loads((root / "launch/gke/jobset.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(manifest, schema)
    (job,) = manifest["spec"]["replicatedJobs"]
    inner = job["template"]["spec"]
    container = inner["template"]["spec"]["containers"][0]
    assert job["replicas"] == slices
    assert inner["parallelism"] == inner["completions"] == hosts
    assert container["resources"]["limits"]["google.com/tpu"] == chips
    assert container["args"] == [*FLAGS, "--distributed"]


@pytest.mark.parametrize(
    ("chip", "topology", "expected"),
    [
        ("v5e", "8x9", "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"), ("v6e", "16x8", "8x16"), ("v5e", "4x4x4", "16x16"),
        ("v5p", "8x8", "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4, or AxBxC of multiples of 4 with A <= B <= C, up to 6144 chips"),
        ("v5p", "8x4x4", "A <= B <= C"), ("v5p", "4x4x6", "multiples of 4"), ("v4", "16x16x24", "up to 4096 chips"),
        ("v5p", "08x8x8", "multiples of 4"), ("v4", "all", "expected one of"),
    ],
)  # fmt: skip
def test_shapes_that_are_not_sold_are_refused(root, chip, topology, expected):
    """8x9 was rendered and applied; its pods would have waited forever."""
    found = call(root, "launch/gke.sh", "render", *FLAGS, env={**GKE, "CHIP": chip, "TOPOLOGY": topology})
    assert found.returncode == 2
    assert found.stderr.startswith(f"error: TOPOLOGY={topology}: no slice of {chip}")
    assert expected in found.stderr


@pytest.mark.parametrize(("chip", "topology"), [("v4", "2x2x4"), ("v5p", "8x12x16"), ("v5p", "16x16x24")])
def test_shapes_that_are_sold_are_rendered(root, chip, topology):
    assert rendered(root, CHIP=chip, TOPOLOGY=topology)


def test_jobset_restarts_on_the_preemption_exit_code(root):
    from terrafm_jax.config import base

    spec = rendered(root)["spec"]
    rules = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["values"] == [base().exit_code_preempted]
    assert spec["failurePolicy"]["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    schema = json.loads((root / "launch/gke/jobset.schema.json").read_text())
    wrong = rendered(root)
    wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][0]["action"] = "Restart"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("metadata", "name"), "7b"),  # the names of Jobs and Pods begin with it, and with a letter
        (("spec", "failurePolicy", "rules", 0, "name"), None),
        (("spec", "failurePolicy", "rules", 0, "name"), "pre-empted"),
        (("spec", "failurePolicy", "rules", 0, "onJobFailureReasons"), ["Preempted"]),
        (("spec", "failurePolicy", "maxRestarts"), "3"),
    ],
    ids=str,
)
def test_what_the_api_refuses_the_schema_refuses(root, path, value):
    schema = json.loads((root / "launch/gke/jobset.schema.json").read_text())
    manifest = rendered(root)
    *way, last = path
    inner = manifest
    for key in way:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, schema)
