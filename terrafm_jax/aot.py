"""Compiles the train step for a TPU pod or GPU hosts without having them, and says what it would cost.

    python -m terrafm_jax.aot --config=configs/vitb.py --topology=v5e:16x16
    python -m terrafm_jax.aot --config=configs/vitl.py --topology=2*v5p:4x4x4 --config.batch_size=2048
    python -m terrafm_jax.aot --config=configs/vitb.py --topology=h200:8 --images_per_chip=64

Needs the libtpu wheel (``pip install terrafm_jax[tpu]``) or JAX's CUDA plugin (``[cuda]``), no TPU and no GPU. Of a
TPU, step times are estimates from the compiler's own schedule; of a GPU, what no run can beat (docs/scaling.md). Exit
code 1: the step does not fit into the chip's memory, or the estimate cannot be true.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from absl import app, flags

from terrafm_jax.startup import config_flag, parse_flags

_CONFIG = config_flag("configs", "configs/X.py[:argument], your file or one of the package's")
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "[SLICES*]TPU:AxB[xC] with TPU v4, v5e, v5p or v6e, or [HOSTS*]GPU:N with GPU a100, h100 or h200"
)
_PER_CHIP = flags.DEFINE_integer("images_per_chip", 0, "sets config.batch_size to so many times the chips")
_METERS = flags.DEFINE_integer("tile_meters", 5340, "side of the tiles; 5340 is a quarter of a Major-TOM cell")
_OPTIONS = flags.DEFINE_multi_string("option", None, "XLA option KEY=VALUE, on top of those training uses")
_JSON = flags.DEFINE_string("json", None, "file for the report")
_HLO = flags.DEFINE_string("hlo", None, "file for the optimized HLO")


def parse_options(texts: list[str] | None) -> dict[str, str] | None:
    """``["a=1", "b=true"]`` -> dict; None where no option was given. Raises ValueError naming all malformed ones."""
    if not texts:
        return None
    wrong = [t for t in texts if "=" not in t]
    if wrong:
        raise ValueError(f"--option: found {wrong}, expected KEY=VALUE")
    return dict(t.split("=", 1) for t in texts)


def main(_argv: list[str]) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs: the only devices that are needed are imagined ones
    from terrafm_jax.ahead import step
    from terrafm_jax.ahead.reckon import ReckoningError

    try:
        topology = step.parse_topology(_TOPOLOGY.value)
        config = _CONFIG.value
        if _PER_CHIP.value:
            config.batch_size = _PER_CHIP.value * topology.chips
        spec, mesh = step.build(config, topology)
        options = parse_options(_OPTIONS.value)
        report = step.compile_step(spec, mesh, topology, meters=_METERS.value, options=options)
    except (ValueError, RuntimeError) as e:
        if os.environ.get("TERRAFM_TRACEBACK") and not isinstance(e, ReckoningError):
            raise
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(1) from None
    text = report.pop("hlo")
    if _HLO.value:
        Path(_HLO.value).write_text(text, encoding="utf-8")
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(step.render(report))
    raise SystemExit(0 if report["fits"] else 1)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=parse_flags)
