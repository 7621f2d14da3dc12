"""Writers: state dicts, hub folder, StableHLO, ONNX. The command line is ``terrafm_jax.export.__main__``."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from terrafm_jax import weights
from terrafm_jax.export import torch_weights
from terrafm_jax.export.safetensors_file import write_safetensors
from terrafm_jax.inference import FILL, sensors_present
from terrafm_jax.loader import CONFIG_FILE, SAFETENSORS_FILE, Loaded
from terrafm_jax.models import encode, patchify
from terrafm_jax.paths import write_atomically
from terrafm_jax.provenance import portable
from terrafm_jax.sensors import SENSOR_KEYS, SENSORS, normalize

MODELING_FILE, CARD_FILE = "modeling_terrafm.py", "README.md"
TUNED_FILES = "finetuned_terrafm.py", "task.json", "head.safetensors"  # that the export of a fine-tuned network adds
_MODEL_TYPE = "terrafm"
SERVING_PLATFORMS = ("cpu", "cuda", "tpu")


class ExportError(ValueError):
    """These weights cannot be written in the form asked for; says why and what to do."""


# --- state dicts --------------------------------------------------------------------------------------------------


def upstream_state(loaded: Loaded) -> dict[str, np.ndarray]:
    """The flat headless dict that upstream's class loads strictly: released path only. Raises ExportError."""
    lacking = [key for key in SENSOR_KEYS if key not in loaded.spec.sensors]
    if lacking:
        raise ExportError(
            f"{loaded.source}: trained without {', '.join(lacking)}, whose stems upstream's class demands; "
            "write the full dict (--full) or a hub folder"
        )
    return torch_weights.to_torch(loaded.params, head=False, fusion=False)


def write_state(loaded: Loaded, path: Path, *, full: bool = False) -> None:
    """Writes ``.pth`` or ``.safetensors``, with fusion and head if ``full``. Raises ExportError."""
    state = torch_weights.to_torch(loaded.params) if full else upstream_state(loaded)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        # Metadata tells our loader size and statistics; others ignore it.
        write_safetensors(path, state, {"terrafm": json.dumps(description(loaded, full=full))})
        return
    import torch

    tensors = OrderedDict((name, torch.from_numpy(value.copy())) for name, value in state.items())
    # PyTorch keeps what a state dict says beside its tensors, and a module looks up nothing there but its own parts.
    tensors._metadata = {"terrafm": {"description": json.dumps(description(loaded, full=full))}}
    buffer = io.BytesIO()  # PyTorch itself leaves half a file on a full disk, and words its end as a bug
    torch.save(tensors, buffer)
    write_atomically(path, buffer.getvalue())


def description(loaded: Loaded, *, full: bool = True) -> dict[str, Any]:
    """What ``config.json`` says: the network, statistics, how it was trained, and the PyTorch module's settings."""
    spec = loaded.spec if full else dataclasses.replace(loaded.spec, fusion=False)
    kept = {k: portable(loaded.meta[k]) for k in ("step", "config", "metrics") if k in loaded.meta}
    return {
        "model_type": _MODEL_TYPE,
        "model": dataclasses.asdict(spec),
        "statistics": json.loads(loaded.stats.to_json()),
        "torch": torch_config(loaded, full=full),
        **kept,
    }


def torch_config(loaded: Loaded, *, full: bool = True) -> dict[str, Any]:
    """Settings of ``torch_model.TerraFM``."""
    spec, stats = loaded.spec, loaded.stats
    names = ("width", "depth", "heads", "hidden", "patch", "grid", "queries", "fusion_heads", "prototypes")
    found: dict[str, Any] = {name: getattr(spec, name) for name in (*names, "head_hidden", "head_bottleneck")}
    found["sensors"] = list(spec.sensors)
    found["fusion"] = spec.fusion and full
    found["head"] = full and "head" in loaded.params
    found["bands"] = {k: list(SENSORS[k].band_names) for k in spec.sensors}
    found["units"] = {k: SENSORS[k].unit for k in spec.sensors}
    found["mean"] = {k: list(stats.mean[k]) for k in spec.sensors}
    found["std"] = {k: list(stats.std[k]) for k in spec.sensors}
    return found


def torch_module(loaded: Loaded) -> Any:
    """The PyTorch module with these weights, in evaluation mode."""
    import torch

    from terrafm_jax.export.torch_model import TerraFM

    module = TerraFM(torch_config(loaded))
    state = torch_weights.to_torch(loaded.params)
    module.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()}, strict=True)
    return module.eval()


# --- hub folder ---------------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Raises ExportError where a folder holds anything but a former export: its README and config are not ours."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ExportError(f"--out {folder}: is a file; expected a folder, or a suffix that says what to write")
    found = sorted(path.name for path in folder.iterdir())
    try:
        ours = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["model_type"] == _MODEL_TYPE
    except (OSError, ValueError, LookupError, TypeError):
        ours = False
    if found and not ours:
        shown = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        raise ExportError(
            f"--out {folder}: holds {shown} and is no former export ({CONFIG_FILE} with model_type {_MODEL_TYPE}); "
            "give an empty or a new folder"
        )


def write_folder(loaded: Loaded, folder: Path, *, license: str = "apache-2.0") -> None:
    """safetensors, config.json, model card and the single-file PyTorch module, usable with torch alone.

    Raises ExportError where the folder holds something else.
    """
    from terrafm_jax.export.card import model_card

    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in TUNED_FILES:  # of a former export: its head would be taken for this encoder's
        (folder / name).unlink(missing_ok=True)
    write_safetensors(folder / SAFETENSORS_FILE, torch_weights.to_torch(loaded.params))
    (folder / CONFIG_FILE).write_text(json.dumps(description(loaded), indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("torch_model.py"), folder / MODELING_FILE)
    card = model_card(loaded, weights.content_hash(loaded.params["backbone"]), license)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


# --- programs -----------------------------------------------------------------------------------------------------


def _chosen(loaded: Loaded, sensors: Sequence[str]) -> tuple[str, ...]:
    chosen = tuple(k for k in loaded.spec.sensors if k in sensors) if sensors else loaded.spec.sensors
    unknown = [k for k in sensors if k not in loaded.spec.sensors]
    if unknown:
        raise ExportError(f"{loaded.source}: no stem for {', '.join(unknown)}; it has {', '.join(loaded.spec.sensors)}")
    if len(chosen) > 1 and not loaded.spec.fusion:
        if sensors:
            raise ExportError(f"{loaded.source}: no fusion weights for {', '.join(chosen)} together; choose one sensor")
        return chosen[-1:]
    return chosen


def stablehlo(loaded: Loaded, size: tuple[int, int], sensors: Sequence[str] = ()) -> bytes:
    """A serialized ``jax.export`` program: (images per sensor) -> {"cls": [b, d], "patches": [b, h, w, d]}.

    Images are float32 [b, H, W, bands] in DN (harmonized) or dB, any number b of them, H and W fixed; NaN, and zero in
    all bands of Sentinel-2, say that nothing was measured. Weights and statistics are inside. Runs on CPU, GPU, TPU by
    ``jax.export.deserialize(...).call(images)``.
    """
    # "gpu" stands for plain code: what the CPU gets by default is tuned for training there.
    spec = dataclasses.replace(loaded.spec, dtype="float32", attention="xla", platform="gpu")
    chosen = _chosen(loaded, sensors)
    backbone = jax.tree.map(jnp.asarray, loaded.params["backbone"])

    def serve(images: dict[str, jax.Array]) -> dict[str, jax.Array]:
        patches, measured = {}, {}
        for key, image in images.items():
            mean, std = (jnp.asarray(a)[None, None, None] for a in loaded.stats[key])
            there = jnp.isfinite(image).all(-1, keepdims=True)
            there &= (image != 0).any(-1, keepdims=True) | (SENSORS[key].unit != "DN")
            patches[key] = patchify(jnp.where(there, normalize(image, mean, std), FILL), spec.patch)
            measured[key] = there.any((1, 2, 3))
        found = encode(spec, backbone, patches, sensors_present(spec, measured))
        return {"cls": found.cls.astype(jnp.float32), "patches": found.patches.astype(jnp.float32)}

    (batch,) = jax.export.symbolic_shape("b")
    inputs = {k: jax.ShapeDtypeStruct((batch, *size, len(SENSORS[k].bands)), jnp.float32) for k in chosen}
    return bytes(jax.export.export(jax.jit(serve), platforms=SERVING_PLATFORMS)(inputs).serialize())


def write_stablehlo(loaded: Loaded, path: Path, size: tuple[int, int], sensors: Sequence[str] = ()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, stablehlo(loaded, size, sensors))


def write_onnx(loaded: Loaded, path: Path, size: tuple[int, int], sensors: Sequence[str] = ()) -> None:
    """ONNX of the PyTorch module at one size: one input [batch, bands, H, W] per sensor, outputs cls and patches."""
    import torch

    chosen = _chosen(loaded, sensors)
    module = _positional(torch_module(loaded), chosen, size).eval()
    images = tuple(torch.zeros(2, len(SENSORS[k].bands), *size) for k in chosen)
    path.parent.mkdir(parents=True, exist_ok=True)
    large = _gigabytes(module) > 1.5  # protobuf ends at 2 GB
    program = torch.onnx.export(
        module,
        images,
        input_names=list(chosen),
        output_names=["cls", "patches"],
        dynamic_shapes={"images": tuple({0: torch.export.Dim("batch")} for _ in chosen)},
        dynamo=True,
        verbose=False,
    )
    if large:  # a second file beside it, whose name stands in the first
        program.save(str(path), external_data=True)
    else:
        write_atomically(path, program.model_proto.SerializeToString())


def _gigabytes(module: Any) -> float:
    return sum(p.numel() for p in module.parameters()) * 4 / 1e9


def _positional(net: Any, sensors: tuple[str, ...], size: tuple[int, int]) -> Any:
    """The module for images by position, with positions interpolated beforehand: runtimes disagree on bicubic edges."""
    import torch

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            rows, columns = (n // net.config["patch"] for n in size)
            self.register_buffer("table", net.positions(rows, columns).detach().clone())
            net.positions = lambda *_: self.table

        def forward(self, *images: Any) -> tuple[Any, Any]:
            found = self.net(dict(zip(sensors, images, strict=True)))
            return found.cls, found.patches

    return Positional()
