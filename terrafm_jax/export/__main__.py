"""``python -m terrafm_jax.export --checkpoint PATH --out FILE.pth|FILE.safetensors|FILE.stablehlo|FILE.onnx|DIR``.

Exit codes: 0 done, 1 an error, with one line that says what to do, 2 wrong flags.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from terrafm_jax.weights import WeightsError

_SUFFIXES = (".pth", ".safetensors", ".stablehlo", ".onnx")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m terrafm_jax.export", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="workdir, checkpoint or hub folder, .pth, .safetensors")
    parser.add_argument("--out", required=True, type=Path, help="the suffix says what to write; none: a hub folder")
    parser.add_argument("--student", action="store_true", help="the student's weights (from a checkpoint)")
    parser.add_argument("--full", action="store_true", help="state dict with fusion and head, under our own keys")
    parser.add_argument("--size", default="224", help="of programs: 224, or 224x320 (rows x columns)")
    parser.add_argument("--sensors", default="", help="of programs: comma-separated; default all that can be fused")
    parser.add_argument("--license", default="apache-2.0", help="of the weights, for the model card")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the hub folder to the Hugging Face hub")
    parser.add_argument("--public", action="store_true", help="make the hub repository public")
    args = parser.parse_args(argv)
    if args.out.suffix and args.out.suffix not in _SUFFIXES:
        parser.error(f"--out {args.out}: unknown suffix; expected one of {', '.join(_SUFFIXES)} or a folder")
    if args.push and args.out.suffix:
        parser.error("--push uploads a hub folder: give --out a folder")
    return args


def _size(text: str, patch: int) -> tuple[int, int]:
    from terrafm_jax.export.formats import ExportError

    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isdigit() and int(p) >= patch and int(p) % patch == 0 for p in parts):
        raise ExportError(f"--size {text}: expected 224 or 224x320, multiples of {patch}")
    return int(parts[0]), int(parts[-1])


def run(args: argparse.Namespace) -> str:
    """Writes what was asked for and returns a sentence about it."""
    from terrafm_jax import loader
    from terrafm_jax.export import formats, hub

    if not args.out.suffix:
        formats.check_folder(args.out)  # before the weights are read
    loaded = loader.read(args.checkpoint, which="student" if args.student else "teacher")
    sensors = [key for key in args.sensors.split(",") if key]
    kind = args.out.suffix
    if kind == ".stablehlo":
        formats.write_stablehlo(loaded, args.out, _size(args.size, loaded.spec.patch), sensors)
    elif kind == ".onnx":
        formats.write_onnx(loaded, args.out, _size(args.size, loaded.spec.patch), sensors)
    elif kind:
        formats.write_state(loaded, args.out, full=args.full)
        if loaded.spec.fusion and not args.full:
            note = "without fusion and head, as the released class has it; --full keeps them"
            return f"{loaded.source} -> {args.out} ({note})"
    else:
        formats.write_folder(loaded, args.out, license=args.license)
        if args.push:
            return f"{loaded.source} -> {args.out} -> {hub.push(args.out, args.push, private=not args.public)}"
    return f"{loaded.source} -> {args.out}"


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        print(run(args))
    except ModuleNotFoundError as error:
        print(f"{args.out}: needs the package {error.name}; pip install 'terrafm_jax[export]'", file=sys.stderr)
        return 1
    except (WeightsError, ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
