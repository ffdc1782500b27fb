"""Whose run a workdir holds: it is continued with the config that it was begun with, or not at all.

WORKDIR/config.json    the config of the run, from its very beginning
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from unifluid_jax import checkpoint
from unifluid_jax import config as configs
from unifluid_jax.errors import UserError, listed

_CONFIG = "config.json"

# What may change between the runs that share a workdir: how long, how often, how it is watched, on
# which devices. Everything else decides which model comes out.
RESUMABLE = (
    "data_dir",
    "evals",
    "input.max_corrupt",
    "input.workers",
    "mesh",
    "sampling",
    "train.checkpoint_every",
    "train.hang_exit_seconds",
    "train.hang_seconds",
    "train.keep",
    "train.keep_best",
    "train.keep_every",
    "train.log_every",
    "train.max_skipped",
    "train.steps",
)


def folder(workdir: str) -> Path:
    """The workdir of a command line.

    Raises:
        UserError: it is in a bucket. Logs are appended to, which buckets do not allow.
    """
    if "://" in workdir:
        raise UserError(
            f"--workdir={workdir} is in a bucket, and a run appends to its logs: give a folder that"
            " all hosts see; GCS Fuse makes one of a bucket (docs/launch.md)"
        )
    return Path(workdir)


def check_workdir(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Makes sure that a workdir is new, or was begun with this config; and can be written to.

    Raises:
        UserError: it holds another run, or is read-only.
    """
    _check_writable(workdir)
    file = epath.Path(workdir) / _CONFIG
    if file.exists():
        try:
            saved = json.loads(file.read_text())
            if not isinstance(saved, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}): delete it to go on") from error
    elif checkpoint.saved_steps(workdir):
        saved = checkpoint.stored_meta(workdir)["config"]
    else:
        return
    check_same_run(saved, config)


def _check_writable(workdir: epath.PathLike) -> None:
    there = os.path.abspath(workdir)
    while not os.path.exists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        raise UserError(f"cannot write to the workdir {workdir}: {there} is a file")
    # Asks the kernel: nothing is left behind by a run that is refused.
    if not os.access(
        there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids
    ):
        raise UserError(f"cannot write to the workdir {workdir}: {there} is read-only")


def claim(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Leaves the config of the run in its workdir, where `check_workdir` finds it."""
    if jax.process_index() == 0:
        text = json.dumps(configs.to_json(config), indent=2)
        (epath.Path(workdir) / _CONFIG).write_text(text + "\n")


def check_same_run(
    saved: Mapping[str, Any], config: ConfigDict, allowed: Sequence[str] = RESUMABLE
) -> None:
    """Makes sure that a workdir is continued with the config that it was begun with.

    Args:
        saved: `meta["config"]` of a checkpoint.
        config: the config of this run.
        allowed: dotted keys that may differ, with all below them.

    Raises:
        UserError: names the first keys that differ, with both values.
    """
    changed = [
        f"{key} was {old!r}, now {new!r}"
        for key, (old, new) in configs.differences(saved, configs.to_json(config)).items()
        if not any(key == name or key.startswith(f"{name}.") for name in allowed)
    ]
    if changed:
        raise UserError(
            f"the workdir holds another run: {listed(changed, '; ')}; take another --workdir"
        )
