"""A fine-tuned network for PyTorch: ``python -m terrafm_jax.finetuning.export --workdir RUN --out FOLDER``.

The folder holds the encoder as every export does, the head, and two files of code; torch alone runs it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax import weights
from terrafm_jax.export.formats import CARD_FILE, TUNED_FILES, write_folder
from terrafm_jax.export.safetensors_file import write_safetensors
from terrafm_jax.finetuning.tuned import Tuned

MODULE_FILE, TASK_FILE, HEAD_FILE = TUNED_FILES


def head_state(tuned: Tuned) -> dict[str, np.ndarray]:
    """The head's tensors under the names of ``torch_task``; kernels [in, out] and [h, w, in, out] are turned."""
    head, norms = tuned.head, tuned.state
    if tuned.spec.head != "upernet":
        found = _dense("linear", head["linear"])
        if "norm" in norms:
            found |= _norm("norm", head["norm"], norms["norm"])
        return found
    found: dict[str, np.ndarray] = {}
    for name, params in head.items():
        if name.startswith("aux") or name.endswith("_norm"):
            continue
        own = {"pools": "pools_block"}.get(name, name)
        if name.startswith("neck"):
            found |= _double(own, params)
        elif name == "classes":
            kernel = np.asarray(params["kernel"])
            found |= {f"{own}.weight": kernel.T[:, :, None, None].copy(), f"{own}.bias": np.asarray(params["bias"])}
        else:
            kernel = np.asarray(params["kernel"]).transpose(3, 2, 0, 1)
            found[f"{own}.conv.weight"] = np.ascontiguousarray(kernel)
            found |= _norm(f"{own}.norm", head[f"{name}_norm"], norms[f"{name}_norm"])
    return found | _norm("neck0_norm", head["neck0_norm"], norms["neck0_norm"])


def _dense(name: str, p: dict[str, Any]) -> dict[str, np.ndarray]:
    return {f"{name}.weight": np.asarray(p["kernel"]).T.copy(), f"{name}.bias": np.asarray(p["bias"])}


def _norm(name: str, p: dict[str, Any], s: dict[str, Any]) -> dict[str, np.ndarray]:
    values = {"weight": p["scale"], "bias": p["bias"], "running_mean": s["mean"], "running_var": s["var"]}
    found = {f"{name}.{k}": np.asarray(v, np.float32) for k, v in values.items()}
    return found | {f"{name}.num_batches_tracked": np.zeros((), np.float32)}


def _double(name: str, p: dict[str, Any]) -> dict[str, np.ndarray]:
    """Ours: linear to (row, column, channel); torch's transposed convolution: [in, out, row, column]."""
    kernel = np.asarray(p["kernel"])
    weight = kernel.reshape(kernel.shape[0], 2, 2, -1).transpose(0, 3, 1, 2)
    return {f"{name}.weight": np.ascontiguousarray(weight), f"{name}.bias": np.asarray(p["bias"])}


def export(workdir: str | Path, out: Path) -> None:
    """Writes the folder. Raises WeightsError when ``workdir`` holds no fine-tuned network."""
    tuned = Tuned(workdir)
    write_folder(tuned.loaded, out)
    write_safetensors(out / HEAD_FILE, head_state(tuned))
    _, recorded = weights.load_npz(tuned.folder / "head")
    (out / TASK_FILE).write_text(json.dumps({**recorded, "layers": list(tuned.spec.layers)}, indent=2) + "\n")
    shutil.copyfile(Path(__file__).with_name("torch_task.py"), out / MODULE_FILE)
    card = out / CARD_FILE
    card.write_text(card.read_text(encoding="utf-8").replace("\n## Use\n", _card(tuned, recorded) + "\n## Use\n", 1))


def _card(tuned: Tuned, recorded: Mapping[str, Any]) -> str:
    """The section of the model card on the task: what goes in, what comes out."""
    task = recorded["task"]
    comes = {
        "classification": "probabilities [B, classes] that add up to one",
        "multilabel": "a probability of each class [B, classes]",
        "segmentation": "probabilities [B, classes, H, W]",
        "regression": "values [B, 1]",
    }[task]
    size = f"at {recorded['image_size']} px, to which images are resized" if recorded["image_size"] else "at any size"
    sampling = f" of {tuned.gsd:g} m" if tuned.gsd else ""
    size += f" (the images it was tuned on had {tuned.image_px} px{sampling}: give such)" if tuned.image_px else ""
    given = ", ".join(f'"{k}": {k}' for k in tuned.spec.inputs)
    bands = "\n".join(f"* `{k}`: {', '.join(names)}" for k, names in tuned.bands.items())
    classes = f"\nClasses, in this order: {', '.join(tuned.classes)}.\n" if tuned.classes else ""
    return (
        f"\n## Fine-tuned for {task}\n\n"
        "The encoder of this folder was tuned for a task, whose head is in `head.safetensors`. With PyTorch alone:\n\n"
        "```python\nfrom finetuned_terrafm import FineTuned\n\n"
        f'model = FineTuned.from_pretrained(".")\nout = model({{{given}}})  # {comes}\n```\n\n'
        f"Images are float tensors [B, bands, H, W] in harmonized DN and dB, {size}, with NaN, or zero in all "
        f"bands of Sentinel-2, where nothing was measured. Bands:\n\n{bands}\n{classes}\n"
        "The following is about the encoder alone.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; bad input ends in one line and exit code 1."""
    parser = argparse.ArgumentParser("python -m terrafm_jax.finetuning.export", description=__doc__)
    parser.add_argument("--workdir", required=True, help="of terrafm_jax.finetune")
    parser.add_argument("--out", required=True, type=Path, help="folder")
    args = parser.parse_args(argv)
    try:
        export(args.workdir, args.out)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(f"written {args.out}: {', '.join(sorted(p.name for p in args.out.iterdir()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
