"""Start-up of the commands with absl flags: shipped configs, wrong flags in one line, quiet logs, errors in one line.

What has to be set before JAX computes stands in ``xla.py``, which needs no flags.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from terrafm_jax.config import ConfigError, flatten
from terrafm_jax.xla import cache_compilations

flags.disclaim_key_flags()  # --help shows the flags defined below as those of the command that asks for them

SHIPPED = Path(__file__).resolve().parents[1]  # holds configs/, in a checkout and in site-packages alike
_NOT_GIVEN = re.compile(r"flag (--\w+)=None: Flag --\w+ must have a value other than None\.")  # absl's words
_HOME = re.compile(r"^(--?[\w.]+=)~(?=/|$)")  # no shell expands it behind an equals sign; it would name a folder here
# What other projects call a field, where spelling alone does not lead to ours.
_ELSEWHERE = {
    "lr": ("optim.base_lr", "rates"),
    "learning_rate": ("optim.base_lr", "rates"),
    "steps": ("total_steps", "epochs"),
    "checkpoint": ("init_from",),
}


# --- flags ---


def config_flag(folder: str, text: str) -> Any:
    """Defines ``--config=PATH[:ARGUMENT]``; ``folder`` below the package's root holds the configs of this command."""
    holder = config_flags.DEFINE_config_file("config", None, text)
    flags.FLAGS["config"].parser = _ConfigParser(folder)
    return holder


def list_flag(name: str, default: list[str] | None, text: str) -> Any:
    """Defines a flag of names between commas; given twice, it holds the names of both."""
    return flags.DEFINE_flag(_ListFlag(flags.ListParser(), flags.ListSerializer(","), name, default, text))


class _ListFlag(flags.Flag):
    def parse(self, argument: Any) -> None:
        before = list(self.value) if self.present else []  # otherwise it is the default, which a value replaces
        super().parse(argument)
        self.value = before + self.value


class _ConfigParser(flags.ArgumentParser):
    """Loads a config file; what is wrong with the path or the argument is a ValueError of one line.

    Attributes:
      config: the one loaded last, of which wrong keys are told apart.
    """

    def __init__(self, folder: str):
        self.folder, self.config = folder, ConfigDict()

    def flag_type(self) -> str:
        return "config file"

    def parse(self, path: str) -> Any:
        name, _, argument = path.partition(":")
        file = self._find(name)
        get_config = getattr(_run_file(file), "get_config", None)
        if get_config is None:
            raise ValueError(f"{file} defines no get_config()")
        if argument and not inspect.signature(get_config).parameters:
            raise ValueError(f"{file} takes no argument, found {argument!r} after the colon")
        self.config = _own_code(file, get_config, *([argument] if argument else []))
        if isinstance(self.config, ConfigDict):
            self.config.lock()
        return self.config

    def _find(self, name: str) -> Path:
        """The file as named from here, else the one that came with the package."""
        places = [Path(name)]
        if places[0].parts[:1] == ("configs",) and places[0].resolve() != SHIPPED / name:
            places.append(SHIPPED / name)
        for place in places:
            if name and place.is_file():
                return place
        shipped = sorted(p.name for p in (SHIPPED / self.folder).glob("*.py") if p.name != "__init__.py")
        there = ", ".join(f"{self.folder}/{n}" for n in shipped) or f"nothing below {SHIPPED / self.folder}"
        looked = " and ".join(str(place.absolute()) for place in places)
        raise ValueError(f"file not found, looked for {looked}; shipped are {there}")


def _run_file(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location("terrafm_jax_config_file", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    _own_code(file, spec.loader.exec_module, module)
    return module


def _own_code(file: Path, function: Any, *arguments: Any) -> Any:
    """Calls what a config file defines: a ConfigError says all, others are bugs there and keep their traceback."""
    try:
        return function(*arguments)
    except ConfigError:
        raise
    except Exception as e:  # absl would make one line of ValueError and TypeError
        raise RuntimeError(f"{file} failed: {type(e).__name__}: {e}") from e


def parse_flags(arguments: list[str]) -> list[str]:
    """For ``app.run(main, flags_parser=parse_flags)``: what is wrong is one line and exit code 2, --help is code 0."""
    arguments = [_HOME.sub(lambda m: m[1] + os.path.expanduser("~"), argument) for argument in arguments]
    try:
        rest = flags.FLAGS(arguments)
    except SystemExit:  # --help and its relatives, which absl ends with code 1
        raise SystemExit(0) from None
    except (KeyError, AttributeError) as e:  # ml_collections: a key that the config does not have
        refuse(_wrong_keys(arguments) or str(e))
    except (flags.Error, TypeError, ValueError) as e:
        refuse(_NOT_GIVEN.sub(r"\1 is missing", str(e)))
    if len(rest) > 1:
        refuse(f"unknown arguments {rest[1:]}")
    return rest


def refuse(message: str) -> NoReturn:
    """Wrong flags: the message, and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2) from None


def _wrong_keys(arguments: Sequence[str]) -> str:
    """Names every ``--config.KEY`` that the loaded config lacks, each with what it may have meant."""
    known = flatten(flags.FLAGS["config"].parser.config)
    sections = {key.rpartition(".")[0] for key in known}
    given = [a.lstrip("-").partition("=")[0] for a in arguments if a.lstrip("-").startswith("config.")]
    wrong = [name for name in given if (key := name.removeprefix("config.")) not in known and key not in sections]
    return "; ".join(f"{name}: no such config key{_similar(name.removeprefix('config.'), known)}" for name in wrong)


def _similar(key: str, known: dict[str, Any]) -> str:
    section, dot, last = key.rpartition(".")
    start = section + dot
    beside = sorted({name.removeprefix(start).split(".")[0] for name in known if name.startswith(start)})
    found = [name for name in _ELSEWHERE.get(last, ()) if name in known]
    found = found or [start + name for name in difflib.get_close_matches(last, beside, 1, 0.6)]
    if not found and (not beside or not section):  # the section is wrong, or left out
        found = [n for n in known if n.endswith(f".{last}")][:1] or difflib.get_close_matches(key, known, 1, 0.6)
    return f"; did you mean config.{found[0]}?" if found else f"; config{dot}{section} has {', '.join(beside)}"


# --- logs and errors ---


def start_logging(level: int = logging.INFO) -> None:
    """Plain lines with the time; libraries speak up from warnings on."""
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    for noisy in ("absl", "orbax", "jax", "grain"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def begin() -> None:
    """A command of evaluation or fine-tuning: logs from warnings on, compiled programs are kept."""
    start_logging(logging.WARNING)
    logging.getLogger("absl").setLevel(logging.ERROR)
    cache_compilations()


@contextmanager
def one_line(*known: type[Exception]) -> Iterator[None]:
    """Errors that say what to do end in that line and exit code 1, Ctrl-C in one with code 130.

    OSErrors name the file. All others keep their traceback; TERRAFM_TRACEBACK=1 keeps it for all. Ctrl-C is for work
    that the same command continues.
    """
    try:
        yield
    except (*known, OSError) as error:
        if os.environ.get("TERRAFM_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        interrupted()


def interrupted() -> NoReturn:
    """Ctrl-C: one line, and out at once; an orderly exit crashes where a thread still compiles."""
    print("interrupted; the same command continues with what is on disk", file=sys.stderr, flush=True)
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(130)


def fail(message: str) -> NoReturn:
    """Prints the message and ends with code 1; in a job of several processes at once, so that the others notice.

    A regular exit would first wait for the others at a barrier, while they wait for this one in a step.
    """
    import jax

    if jax.process_count() == 1:
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"error: process {jax.process_index()} of {jax.process_count()}: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)
