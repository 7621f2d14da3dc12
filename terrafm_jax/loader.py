"""One loader for every kind of weights: workdir, checkpoint, hub folder, released ``.pth`` or ``.safetensors``.

``inference.load`` makes a model of what is read here. (No file is called ``load.py``: a module of that name would
shadow the function ``terrafm_jax.load``.) Nothing here unpickles code: ``.pth`` is read with ``weights_only=True``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from terrafm_jax import weights
from terrafm_jax.export import torch_weights
from terrafm_jax.models import ModelSpec, init_params
from terrafm_jax.models.spec import SIZES
from terrafm_jax.sensors import SENSOR_KEYS, Statistics
from terrafm_jax.weights import WeightsError

log = logging.getLogger(__name__)

CONFIG_FILE, SAFETENSORS_FILE = "config.json", "model.safetensors"  # of a hub folder
HUB_PREFIX = "hf://"
# Fields of ModelSpec that say how training computed: not ours to inherit, and the caller's to choose.
COMPUTE_FIELDS = ("dtype", "scan", "remat", "attention", "fusion_kernel", "stems", "folded", "platform", "sum_whole")
_TORCH_SUFFIXES = (".pth", ".pt", ".bin")
_NO_STUDENT = "{}: holds the teacher only; give the workdir or checkpoints/STEP for the student"
_HEAD_SIZE = 64  # of every published size; heads of an unknown width follow from it


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a path holds.

    params: {"backbone": ..., "head": ... or absent}, float32 NumPy arrays.
    spec: the network. stats: its normalization. meta: whatever else the writer recorded. source: the path read.
    """

    params: dict[str, Any]
    spec: ModelSpec
    stats: Statistics
    meta: dict[str, Any]
    source: str


def read(path: Any, *, which: str = "teacher", heads: int = 0, fusion_heads: int = 0) -> Loaded:
    """Reads and checks weights of any kind.

    Args:
      path: a workdir, ``WORKDIR/teacher/STEP``, ``WORKDIR/checkpoints/STEP``, a hub folder, a ``.pth`` or
        ``.safetensors`` state dict, or ``hf://OWNER/NAME`` on the Hugging Face hub.
      which: "teacher" or "student"; the student is only in checkpoints.
      heads, fusion_heads: for a state dict of an unpublished width (default: 64 channels a head; 16).

    Raises:
      WeightsError: the path is missing, damaged or hostile, or its tensors do not fit; all mismatches at once.
    """
    from etils import epath

    if which not in ("teacher", "student"):
        raise WeightsError(f"which={which!r}; expected 'teacher' or 'student'")
    if str(path).startswith(HUB_PREFIX):
        from terrafm_jax.export.hub import download

        return read(download(str(path).removeprefix(HUB_PREFIX)), which=which)
    path = epath.Path(path).expanduser()
    if not path.exists():
        raise WeightsError(f"{path}: not found; expected a workdir, a checkpoint or hub folder, .pth or .safetensors")
    if path.is_dir():
        found = _read_folder(path, which)
    else:
        if which == "student":
            raise WeightsError(_NO_STUDENT.format(path))
        state, config = _read_file(path)
        found = _from_state(state, config, str(path), heads, fusion_heads)
    check(found.params, found.spec, found.source)
    return found


# --- folders ------------------------------------------------------------------------------------------------------


def _read_folder(path: Any, which: str) -> Loaded:
    if (path / SAFETENSORS_FILE).exists():
        if which == "student":
            raise WeightsError(_NO_STUDENT.format(path))
        return _read_hub(path)
    if (path / weights.PARAMS_FILE).exists():
        return _read_export(path, which)
    if which == "teacher":
        newest = weights.newest_teacher(path)
        if newest is not None:
            _tell_of_newer(path, int(newest.name))
            return _read_export(newest, which)
    from terrafm_jax.export.checkpoint_weights import find_checkpoint, read_checkpoint

    step = find_checkpoint(path)
    if step is not None:
        params, meta = read_checkpoint(step, which)
        if "model" not in meta:  # written before checkpoints recorded it; the teacher beside them always did
            newest = weights.newest_teacher(step.parent.parent)
            meta = {**(weights.load_npz(newest)[1] if newest is not None else {}), **meta}
        return _from_meta(params, meta, str(step))
    inside = sorted(child.name for child in path.iterdir())[:8]
    if (path / "best" / weights.PARAMS_FILE).exists():
        raise WeightsError(f"{path}: is a workdir of terrafm_jax.finetune, its weights are {path / 'best'}: give it")
    raise WeightsError(
        f"{path}: no weights found (it holds {', '.join(inside) or 'nothing'}); expected a workdir with teacher/ or "
        f"checkpoints/, one of their steps, or a hub folder with {CONFIG_FILE} and {SAFETENSORS_FILE}"
    )


def _tell_of_newer(path: Any, step: int) -> None:
    """Warns where a workdir's checkpoints went on after its last export, as those of a run under way or stopped do."""
    from terrafm_jax.export.checkpoint_weights import find_checkpoint

    with contextlib.suppress(WeightsError):  # none in a bucket is known to be complete
        newer = find_checkpoint(path)
        if newer is not None and newer.name.isdigit() and int(newer.name) > step:
            log.warning(
                "%s: these are the weights of step %d, the last that were exported; for those of step %s give %s",
                path, step, newer.name, newer,
            )  # fmt: skip


def _read_export(path: Any, which: str) -> Loaded:
    if which == "student":
        raise WeightsError(_NO_STUDENT.format(path))
    params, meta = weights.load_npz(path)
    return _from_meta(params, meta, str(path))


def _from_meta(params: dict[str, Any], meta: dict[str, Any], source: str) -> Loaded:
    try:
        spec = spec_from_dict(meta["model"])
        stats = Statistics.from_json(json.dumps(meta["statistics"]), source)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{source}: its meta.json does not describe a model ({error!r}); was it edited?") from error
    return Loaded(params, spec, stats, meta, source)


def spec_from_dict(fields: Mapping[str, Any]) -> ModelSpec:
    """A ModelSpec from JSON; how training computed is left behind, fields of other versions are ignored."""
    known = {f.name for f in dataclasses.fields(ModelSpec)} - set(COMPUTE_FIELDS)
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k in known}
    return ModelSpec(**fields)


def _read_hub(path: Any) -> Loaded:
    if not (path / CONFIG_FILE).exists():
        raise WeightsError(f"{path}: {CONFIG_FILE} not found beside {SAFETENSORS_FILE}; copy the whole folder")
    try:
        config = json.loads((path / CONFIG_FILE).read_text())
    except ValueError as error:
        raise WeightsError(f"{path / CONFIG_FILE}: not JSON ({error}); copy it again from its origin") from error
    state, _ = _read_safetensors(path / SAFETENSORS_FILE)
    return _from_meta(torch_weights.from_torch(state), config, str(path))


# --- files --------------------------------------------------------------------------------------------------------


def _read_file(path: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _TORCH_SUFFIXES:
        return _read_pth(path)
    raise WeightsError(f"{path}: unknown kind of file; expected .safetensors or one of {', '.join(_TORCH_SUFFIXES)}")


def _read_safetensors(path: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    from terrafm_jax.export.safetensors_file import read_safetensors

    state, metadata = read_safetensors(path)
    return state, _described(metadata.get("terrafm", "{}"), path)


def _described(text: str, path: Any) -> dict[str, Any]:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path}: its metadata 'terrafm' is not JSON ({error}); write the file again") from error


def _read_pth(path: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A flat dict of tensors and what we say beside them; refuses, without running it, a pickle that asks for more."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise WeightsError(f"{path}: needs PyTorch; pip install 'terrafm_jax[export]', or use .safetensors") from error
    import io

    try:
        state = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes provoke
        reason = str(error).strip().split("\n")[0][:160] or type(error).__name__
        raise WeightsError(
            f"{path}: not a plain PyTorch state dict ({reason}); nothing in it was run. Get the file again from a "
            "trusted place, or ask for .safetensors"
        ) from error
    odd = [k for k, v in state.items() if not isinstance(v, torch.Tensor)] if isinstance(state, dict) else None
    if odd is None or odd:
        found = f"entries {odd[:5]} are no tensors" if odd else f"found a {type(state).__name__}"
        raise WeightsError(f"{path}: {found}; expected a flat dict of tensors (save model.state_dict())")
    beside = getattr(state, "_metadata", None)  # of a state dict; names of modules -> what they say
    ours = beside.get("terrafm") if isinstance(beside, dict) else None
    config = _described(ours.get("description", "{}"), path) if isinstance(ours, dict) else {}
    return {name: value.detach().float().contiguous().numpy() for name, value in state.items()}, config


def _from_state(
    state: dict[str, np.ndarray], config: dict[str, Any], source: str, heads: int, fusion_heads: int
) -> Loaded:
    """A bare state dict: spec from ``config`` if the file carries one, else inferred from names and shapes."""
    if config and not heads and not fusion_heads:
        return _from_meta(torch_weights.from_torch(state), config, source)
    spec = infer_spec(state, source, heads, fusion_heads)
    _check_names(state, spec, source)
    return Loaded(torch_weights.from_torch(state), spec, Statistics.published(), {}, source)


def infer_spec(state: Mapping[str, np.ndarray], source: str, heads: int = 0, fusion_heads: int = 0) -> ModelSpec:
    """Size, sensors, fusion and head of a state dict from its names and shapes. Raises WeightsError."""
    if "cls_token" not in state or state["cls_token"].ndim != 3:
        names = sorted(state)[:4]
        raise WeightsError(f"{source}: no TerraFM weights: cls_token [1, 1, d] is missing (it has {names} ...)")
    width = state["cls_token"].shape[-1]
    blocks = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    published = {w: h for w, _, h in SIZES.values()}
    heads = heads or published.get(width, width // _HEAD_SIZE)
    if not heads or width % heads:
        raise WeightsError(f"{source}: width {width} is no published size; say how many heads it has: heads=")

    def shape(name: str, axis: int, default: int) -> int:
        return state[name].shape[axis] if name in state and state[name].ndim > axis else default

    fields: dict[str, Any] = {
        "sensors": tuple(s for s in SENSOR_KEYS if f"patch_embed.conv2d_{s}.weight" in state) or SENSOR_KEYS,
        "fusion": any(name.startswith("patch_embed.fusion.") for name in state),
        "queries": shape("patch_embed.fusion.queries", 0, ModelSpec.queries),
        "mlp_ratio": shape("blocks.0.mlp.fc1.weight", 0, 4 * width) / width,
        "patch": shape("patch_embed.conv2d_s2_l2a.weight", -1, shape("patch_embed.conv2d_s1.weight", -1, 16)),
        "grid": max(1, round((shape("pos_embed", 1, 197) - 1) ** 0.5)),
        "prototypes": shape("head.last_layer.weight", 0, ModelSpec.prototypes),
        "head_hidden": shape("head.mlp.0.weight", 0, ModelSpec.head_hidden),
        "head_bottleneck": shape("head.last_layer.weight", 1, ModelSpec.head_bottleneck),
    }
    if fusion_heads:
        fields["fusion_heads"] = fusion_heads
    try:
        return ModelSpec(width=width, depth=len(blocks), heads=heads, **fields)
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from error


def expected_shapes(spec: ModelSpec, *, head: bool) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter that weights of ``spec`` hold."""
    tree = jax.eval_shape(lambda key: init_params(spec, key), jax.random.key(0))
    flat = weights.flatten(tree if head else {"backbone": tree["backbone"]})
    return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def _check_names(state: Mapping[str, np.ndarray], spec: ModelSpec, source: str) -> None:
    """Compares in the file's own names, so that the message names what the reader finds in it."""
    has_head = any(name.startswith("head.") for name in state)
    shapes = expected_shapes(spec, head=has_head)
    blank = weights.unflatten({p: np.broadcast_to(np.float32(0), s) for p, s in shapes.items()})
    wanted = {name: array.shape for name, array in torch_weights.to_torch(blank).items()}
    _report({k: tuple(v.shape) for k, v in state.items()}, wanted, source)


def check(params: Mapping[str, Any], spec: ModelSpec, source: str) -> None:
    """Raises WeightsError naming every missing, unexpected or misshapen parameter."""
    found = {path: tuple(value.shape) for path, value in weights.flatten(params).items()}
    _report(found, expected_shapes(spec, head="head" in params), source)


def _report(found: Mapping[str, tuple], wanted: Mapping[str, tuple], source: str) -> None:
    faults = []
    for title, names in (("missing", wanted.keys() - found.keys()), ("unexpected", found.keys() - wanted.keys())):
        if names:
            faults.append(f"{title} {len(names)}: {', '.join(sorted(names))}")
    for name in sorted(found.keys() & wanted.keys()):
        if found[name] != wanted[name]:
            faults.append(f"{name} is {list(found[name])}, expected {list(wanted[name])}")
    if faults:
        raise WeightsError(f"{source}: does not fit TerraFM of width {_width(wanted)}: {'; '.join(faults)}")


def _width(shapes: Mapping[str, tuple]) -> int:
    return next(shape[-1] for name, shape in shapes.items() if name.endswith("cls_token"))
