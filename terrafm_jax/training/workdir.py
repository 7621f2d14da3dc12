"""The run's folder: which run owns it, the config it records, the marker of its completion."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from typing import IO, Any

import jax
import numpy as np
from etils import epath

from terrafm_jax import processes
from terrafm_jax.config import ConfigError, base, flatten
from terrafm_jax.paths import is_remote, write_atomically
from terrafm_jax.training.report import read_rows

# Config fields that may differ between two starts of one run: they change how it runs, not what it computes.
_FREE = (
    "stop_at_step", "allow_config_change", "exit_code_preempted", "max_nonfinite", "init_from", "data.dir",
    "data.workers", "data.cache", "data.max_skipped", "compute.scan", "compute.remat", "compute.attention",
    "compute.fusion_kernel", "compute.view_kernel", "compute.stems", "compute.folded", "compute.overlap", "mesh.",
    "checkpoint.", "log.", "knn.", "profile.",
)  # fmt: skip


log = logging.getLogger(__name__)

# Locks of this process, by folder; the system releases them when the process ends, however it ends.
_held: dict[str, IO[str]] = {}
PATIENCE = 100.0  # seconds: a network file system gives up the lock of a host that died after 90, and shows files late


def claim(workdir: str, config: Mapping[str, Any], write: bool) -> None:
    """Claims the folder for this run.

    Args:
      workdir: local or gs:// folder.
      config: the checked config.
      write: True on the first process only, which checks and writes. The others wait for its verdict, as they
        might otherwise read a file that is half written.

    Raises:
      ConfigError: another recipe owns the folder, another process works in it, or not all processes of the job see it.
    """
    fault = None
    if write:
        try:
            _claim(workdir, config)
        except ConfigError as e:
            fault = e
        except OSError as e:  # not raised yet, as the other processes wait for the verdict
            fault = ConfigError(f"workdir {workdir}: {e}")
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        refused = multihost_utils.broadcast_one_to_all(np.int32(fault is not None))
        if refused and fault is None:
            fault = ConfigError(f"workdir {workdir}: refused by the first process; its log says why")
        fault = fault or _unseen(workdir)
    if fault is not None:
        raise fault


def _unseen(workdir: str) -> ConfigError | None:
    """What is wrong where some processes do not see what the first has written (a collective on several processes).

    The first checkpoint would wait for their parts of it in vain.
    """
    record, begun = epath.Path(workdir) / "config.json", time.monotonic()
    while not (seen := record.exists()) and time.monotonic() - begun < PATIENCE:  # network disks show it late
        time.sleep(0.5)
    blind = [process for process, (sees,) in enumerate(processes.rows_of_all(np.array([seen], np.int32))) if not sees]
    if not blind:
        return None
    return ConfigError(
        f"workdir {workdir}: processes {blind} do not see the config.json that process 0 wrote there; give a folder "
        "that all hosts share, or a gs:// path"
    )


def _claim(workdir: str, config: Mapping[str, Any]) -> None:
    folder = epath.Path(workdir)
    record = folder / "config.json"
    mine = json.loads(json.dumps(flatten(config)))
    if record.exists():
        _same_recipe(folder, record, mine, bool(config["allow_config_change"]))
    elif folder.exists():
        foreign = sorted(p.name for p in folder.iterdir() if not (p.name.startswith(".") or p.suffix == ".log"))
        if foreign:
            raise ConfigError(
                f"workdir {folder} is not empty ({', '.join(foreign[:5])}) and holds no config.json of a run: "
                "give an empty folder, or the workdir of a run to resume"
            )
    folder.mkdir(parents=True, exist_ok=True)
    if not is_remote(workdir):
        _lock(folder)
        if record.exists():  # again: whoever held the lock may have taken the first step meanwhile
            _same_recipe(folder, record, mine, bool(config["allow_config_change"]))
    write_atomically(record, json.dumps(mine, indent=2).encode())


def _lock(folder: epath.Path) -> None:
    """Keeps two processes from writing into one folder, which would mix their records and checkpoints.

    POSIX locks, since data workers do not inherit them: workers that outlive a killed run hold none.
    """
    file = _held.get(str(folder)) or open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
    begun, told = time.monotonic(), False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read().strip() or "another process"
            if time.monotonic() - begun > PATIENCE:
                file.close()
                raise ConfigError(
                    f"workdir {folder} is in use by {owner}: wait for its end, stop it, or give another --workdir"
                ) from None
            if not told:
                log.warning("workdir %s is in use by %s; waiting up to %.0f s for its end", folder, owner, PATIENCE)
            told = True
            time.sleep(0.5)
        except OSError:  # a file system without locks
            file.close()
            return
    _held[str(folder)] = file
    file.truncate(0)
    with contextlib.suppress(OSError):  # a full disk must not keep a run from ending
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


def _recorded(path: epath.Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}): give another --workdir, or the file as it was") from error


def _begun(folder: epath.Path) -> bool:
    """Whether any step was taken here, by pretraining or by one of the rates of fine-tuning (``lr_*``)."""
    for run in (folder, *folder.glob("lr_*")):
        checkpoints = run / "checkpoints"
        if checkpoints.exists() and any(p.name.isdigit() for p in checkpoints.iterdir()):
            return True
        if any(row["step"] > 0 for row in read_rows(run)):
            return True
    return False


def _same_recipe(folder: epath.Path, record: epath.Path, mine: dict[str, Any], allowed: bool) -> None:
    """Refuses a run of another config. A start that failed before its first step binds nobody: fix the flag, go on."""
    theirs = _recorded(record)
    defaults = json.loads(json.dumps(flatten(base())))
    if mine.keys() == defaults.keys():  # a pretraining config: fields that an older version lacked had today's defaults
        theirs = defaults | theirs
    different = differences(theirs, mine)
    if different and not allowed and _begun(folder):
        raise ConfigError(
            f"workdir {folder} belongs to a run with another config:\n  " + "\n  ".join(different)
            + "\ngive another --workdir, or --config.allow_config_change=True to resume it with this one"
        )  # fmt: skip


def differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """Lines on what differs between two flat configs as JSON holds them, but for what may differ between starts."""
    return [
        f"config.{k}: {theirs.get(k, 'absent')!r} there, {mine.get(k, 'absent')!r} here"
        for k in sorted(theirs.keys() | mine.keys())
        if not _is_free(k) and theirs.get(k, "absent") != mine.get(k, "absent")
    ]


def _is_free(key: str) -> bool:
    return any(key == f or (f.endswith(".") and key.startswith(f)) for f in _FREE)


def mark_done(workdir: str, step: int) -> None:
    """Writes the DONE marker: the run is complete, a launcher need not start it again."""
    (epath.Path(workdir) / "DONE").write_text(f"step {step}\n")


def is_done(workdir: str) -> bool:
    """Whether the run was complete when its last start ended."""
    return (epath.Path(workdir) / "DONE").exists()


def mark_open(workdir: str) -> None:
    """Takes the DONE marker away: a run that was complete goes on, its ``total_steps`` having been raised."""
    marker = epath.Path(workdir) / "DONE"
    if marker.exists():
        marker.unlink()
