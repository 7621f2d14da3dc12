"""Start-up shared by the commands with a ``--config`` flag: flags without tracebacks, JAX before any device."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
from typing import NoReturn

from absl import flags

from terrafm_jax import config

_CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "pretend to have so many CPU devices (tests, dry runs)")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "join the other processes of the job (jax.distributed)")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where the launcher does not tell")
_PROCESSES = flags.DEFINE_integer("processes", None, "number of processes, where the launcher does not tell")
# Seconds without a sign of life after which a process counts as dead and the others end, too. JAX waits for 100.
_HEARTBEAT = 30

_PROCESS = flags.DEFINE_integer("process", None, "index of this process, where the launcher does not tell")


def parse_flags(arguments: list[str]) -> list[str]:
    """For ``app.run(main, flags_parser=parse_flags)``: a wrong flag or config key is one line and exit code 2."""
    try:
        return flags.FLAGS(arguments)
    except (KeyError, AttributeError) as e:  # ml_collections: a key that the config does not have
        found = re.search(r"[A-Za-z_]\w*", str(e))
        name = found.group() if found else str(e)
        wrong = [a.lstrip("-").split("=")[0] for a in arguments if name in a.split("=")[0]]
        print(f"error: {', '.join(wrong) or name}: no such config key{_similar(wrong)}", file=sys.stderr)
        raise SystemExit(2) from None
    except (flags.Error, TypeError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None


def _similar(wrong: list[str]) -> str:
    known = [f"config.{key}" for key in config.flatten(config.base())]
    found = [match for name in wrong for match in difflib.get_close_matches(name, known, 1, 0.6)]
    return f"; did you mean {', '.join(found)}?" if found else ""


def start_logging() -> None:
    """Plain lines with the time; libraries speak up from warnings on."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    for noisy in ("absl", "orbax", "jax", "grain"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def start_jax() -> None:
    """Fake devices, the compile cache and the other processes: all that must precede the first use of a device."""
    import jax

    if _CPU_DEVICES.value:
        jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.path.join(os.path.expanduser("~"), ".cache", "terrafm_jax")
        jax.config.update("jax_compilation_cache_dir", cache)
    if _DISTRIBUTED.value:
        jax.distributed.initialize(
            _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, heartbeat_timeout_seconds=_HEARTBEAT
        )


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
