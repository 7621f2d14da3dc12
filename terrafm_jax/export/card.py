"""The model card of an exported folder: what the weights are, what they saw, and what they cannot do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from terrafm_jax.loader import Loaded
from terrafm_jax.models import parameter_count
from terrafm_jax.sensors import SENSORS

# Data sets the preparation reads, with the attribution each asks for.
DATA_NOTICES = (
    ("Sentinel-1, Sentinel-2", "free, full and open", "Contains modified Copernicus Sentinel data."),
    ("Major-TOM Core (S2L2A, S2L1C, S1RTC)", "CC-BY-SA-4.0", "Major TOM, ESA Phi-lab; arXiv 2402.12095."),
    (
        "ESA WorldCover 2020, 2021",
        "CC-BY-4.0",
        "© ESA WorldCover project / Contains modified Copernicus Sentinel data processed by the ESA WorldCover "
        "consortium. Used to balance sampling and centering, never as a label.",
    ),
)
_RECIPE = (
    ("total_steps", "length"),
    ("batch_size", "batch size"),
    ("seed", "seed"),
    ("optim.base_lr", "learning rate for a batch of 256"),
    ("optim.warmup", "warm-up"),
    ("optim.decay_start", "weight decay, first"),
    ("optim.decay_end", "weight decay, last"),
    ("objective.ema_start", "teacher momentum, first"),
    ("objective.alpha", "share of the overall center"),
    ("views.globals", "global crops"),
    ("views.locals", "local crops"),
    ("views.modality_rule", "sensors of a view"),
    ("data.sampling", "order of the tiles"),
)


def model_card(loaded: Loaded, weights_hash: str, license: str) -> str:
    """Markdown with the YAML head that the Hugging Face hub reads."""
    spec = loaded.spec
    count = parameter_count(loaded.params["backbone"])
    titles = ", ".join(SENSORS[k].title for k in spec.sensors)
    fusion = (
        f"fused by cross-attention ({spec.queries} learned queries) over any subset of sensors"
        if spec.fusion
        else "one sensor at a time: these weights have no fusion"
    )
    sections = [
        _head(license),
        f"# TerraFM, width {spec.width}, depth {spec.depth}\n\n"
        f"An encoder of Sentinel-1 and Sentinel-2 images after TerraFM (arXiv 2506.06281), made with terrafm_jax.\n"
        f"{count:,} parameters. Sensors: {titles}; {fusion}.\n\n"
        f"Weights (SHA-256 of names, shapes and values): `{weights_hash}`",
        _USE,
        "## Input\n\n" + _inputs(loaded),
        "## Training\n\n" + _training(loaded.meta),
        "## Data, licences, attribution\n\n" + _data(loaded.meta),
        _LIMITS,
    ]
    return "\n\n".join(sections) + "\n"


def _head(license: str) -> str:
    lines = ["library_name: pytorch", f"license: {license}", "pipeline_tag: image-feature-extraction", "tags:"]
    tags = [f"- {tag}" for tag in ("remote-sensing", "earth-observation", "sentinel-1", "sentinel-2", "terrafm")]
    return "\n".join(["---", *lines, *tags, "---"])


_USE = """## Use

With PyTorch alone (`modeling_terrafm.py` in this folder):

```python
from modeling_terrafm import TerraFM
model = TerraFM.from_pretrained(".")
out = model({"s2_l2a": dn})      # float tensor [B, 12, H, W], harmonized DN
out.cls, out.patches             # [B, d], [B, h, w, d]
```

With JAX: `terrafm_jax.load("FOLDER").encode(s2_l2a=dn)`, images [B, H, W, bands]."""


def _inputs(loaded: Loaded) -> str:
    lines = [
        "Values are normalized inside: `(x - (mean - 2 std)) / (4 std)`, without clipping. Sentinel-2 DN are",
        "reflectance x 10000 with the processing-baseline offset (1000 since baseline 04.00) subtracted; Sentinel-1 is",
        "backscatter in dB. NaN, and zero in all bands of Sentinel-2, say that a pixel was not measured.",
        f"Statistics: {loaded.stats.source}.",
        "",
        "| sensor | unit | bands in order | mean | std |",
        "|---|---|---|---|---|",
    ]
    for key in loaded.spec.sensors:
        s = SENSORS[key]
        mean, std = (" ".join(f"{v:.6g}" for v in table[key]) for table in (loaded.stats.mean, loaded.stats.std))
        lines.append(f"| {key} ({s.title}) | {s.unit} | {' '.join(s.band_names)} | {mean} | {std} |")
    return "\n".join(lines)


def _training(meta: Mapping[str, Any]) -> str:
    config = meta.get("config")
    if not config:
        return "Not recorded in these weights (a bare state dict); see their origin."
    rows = [f"- {title} (`{name}`): {config[name]}" for name, title in _RECIPE if name in config]
    rows.append(f"- step of this export: {meta.get('step', 'unknown')}")
    metrics = meta.get("metrics")
    shown = json.dumps(metrics) if metrics else "none recorded with these weights"
    return (
        "DINO self-distillation with dual centering and random choice of sensors, without labels.\n\n"
        + "\n".join(rows)
        + f"\n- metrics: {shown}\n\nThe whole configuration is in `config.json`."
    )


def _data(meta: Mapping[str, Any]) -> str:
    folder = meta.get("config", {}).get("data.dir")
    first = f"Prepared data set of the run: `{str(folder).rstrip('/').rsplit('/', 1)[-1]}`. " if folder else ""
    lines = [
        first + "terrafm_jax prepares these sources; name in your own card those you trained on.",
        "",
        "| data | licence | attribution |",
        "|---|---|---|",
        *(f"| {name} | {licence} | {text} |" for name, licence, text in DATA_NOTICES),
    ]
    return "\n".join(lines)


_LIMITS = """## Limits

- Single-date: the encoder sees one acquisition per sensor and has no notion of time or season.
- Pretraining crops had a ground sampling of about 12 to 28 m; features at 10 m are an extrapolation.
- Sentinel-1 RTC gamma0 was seen in training; GRD sigma0 differs on slopes.
- Clouds and shadows are encoded like any other surface; mask them.
- Numbers of one benchmark do not carry over to another place or year; validate on your own."""
