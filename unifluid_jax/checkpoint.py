"""Checkpoints: the train state, the input iterator's state and the config, saved as one step.

    WORKDIR/checkpoints/300/state          parameters, EMA, moments, step: sharded arrays
    WORKDIR/checkpoints/300/iterator       where the input stands, JSON
    WORKDIR/checkpoints/300/meta           JSON of the trainer, with the config and the checksums
    WORKDIR/checkpoints/300/scores.json    what an evaluation found, when there was one
    WORKDIR/damaged/400                    a checkpoint that turned out not to be what was saved
    WORKDIR/config.json                    the config of the run, from its very beginning

Nothing else of this code knows Orbax. A step appears under its own name only when all of it is
written; what a killed process leaves behind is never taken for a checkpoint.

Every array has a checksum of its values, computed on the devices before it is saved and after it is
restored; JSON has one of its text. So whatever goes wrong between the two, on any mesh, is noticed.
"""

import contextlib
import dataclasses
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jaxtyping import Array, UInt32
from ml_collections import ConfigDict

from unifluid_jax import config as configs
from unifluid_jax import distributed, trees
from unifluid_jax.errors import UserError

Tree = Any
PathLike = epath.PathLike

_FOLDER = "checkpoints"
_CONFIG = "config.json"
_SCORES = "scores.json"
_DAMAGED = "damaged"

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


# What Orbax and TensorStore raise for files that are gone, cut short or nonsense.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError)


class Damaged(UserError):
    """A checkpoint is not what was saved."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """One step, read back.

    Attributes:
        step: the training step after which it was saved.
        state: the train state, on the shardings that were asked for.
        iterator: the states of the input iterators of all processes, joined.
        meta: the trainer's JSON.
    """

    step: int
    state: Tree
    iterator: dict[str, Any]
    meta: dict[str, Any]


class Checkpointer:
    """Saves and restores the steps of one workdir. Use it as a context manager: leaving it waits.

    Args:
        workdir: checkpoints go to its folder "checkpoints", made when missing.
        keep: the last so many steps stay, older ones are deleted.
        keep_every: and those that this divides; 0 for none.
        keep_best: and the one with the best score of this name, like "vqa/accuracy", or with the
            lowest, like "-generate/fid"; empty for none.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, workdir: PathLike, keep: int, keep_every: int = 0, keep_best: str = ""):
        self._workdir = epath.Path(workdir).resolve()
        self._root = self._workdir / _FOLDER
        self._keep, self._keep_every, self._keep_best = keep, keep_every, keep_best
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write checkpoints to {self._root}: {error.strerror}"
            ) from error
        for path in self._root.iterdir():
            if ocp.utils.is_tmp_checkpoint(path):
                logging.warning("removing the unfinished checkpoint %s", path)
        self._manager = ocp.CheckpointManager(
            self._root,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self,
                cleanup_tmp_directories=True,
                lightweight_initialize=True,  # a damaged step must not end the run here
            ),
            item_names=("state", "iterator", "meta"),
        )
        found = {step: _read_scores(self._root / str(step)) for step in _steps(self._root)}
        self._scores = {step: scores for step, scores in found.items() if scores is not None}

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused: Any) -> None:
        # What went wrong first is what the user must hear of.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
            self.close()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax's question which of these steps, in their order, are to stay."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(steps[-self._keep :])
        if self._keep_every:
            kept |= {step for step in steps if step % self._keep_every == 0}
        name, sign = self._keep_best.removeprefix("-"), -1 if self._keep_best[:1] == "-" else 1
        scores = {step: self._scores.get(step, {}).get(name) for step in steps}
        if known := {step: sign * score for step, score in scores.items() if score is not None}:
            kept.add(max(known, key=known.get))
        return [step in kept for step in steps]

    def latest_step(self) -> int | None:
        """The last step that is completely written, or None."""
        return self._manager.latest_step()

    def save(
        self, step: int, state: Tree, iterator: Mapping[str, Any], meta: Mapping[str, Any]
    ) -> None:
        """Copies the state and writes it in the background; the caller may donate it at once.

        A step that is already saved is left alone.

        Args:
            step: training steps done.
            state: arrays; no PRNG keys.
            iterator: the state of this process's part of the input, JSON values by name. Those of
                all processes are joined.
            meta: JSON values; `meta["config"]` is `config.to_json` of the run's config.

        Raises:
            UserError: this step, or the one before it in the background, cannot be written.
        """
        if step in self._manager.all_steps():
            return
        joined: dict[str, Any] = {}
        for part in distributed.gather(dict(iterator)):
            joined |= part
        # Transfers to the host are meant, also inside a loop that forbids them.
        with self._writing(), jax.transfer_guard("allow"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    iterator=ocp.args.JsonSave(_signed(joined)),
                    meta=ocp.args.JsonSave(_signed({**meta, "leaves": _leaves(state)})),
                ),
            )

    def restore(self, abstract_state: Tree, step: int | None = None) -> Restored:
        """Reads a step, straight onto the devices where `abstract_state` wants it.

        Args:
            abstract_state: `jax.ShapeDtypeStruct`s with shardings; any mesh and any number of
                processes, not only those of the saving run.
            step: by default the latest one that is whole; later ones are moved to WORKDIR/damaged.

        Raises:
            UserError: there is no such step, or a leaf is missing, extra, or of another shape or
                dtype.
            Damaged: the step, or every step, is not what was saved.
        """
        self.wait()
        if step is not None:
            return self._restore(locate(self._root, step)[0], abstract_state)
        damaged: dict[int, Damaged] = {}
        for candidate in reversed(_steps(self._root)):
            try:
                restored = self._restore(self._root / str(candidate), abstract_state)
            except Damaged as error:
                damaged[candidate] = error
                logging.warning("%s", error)
                continue
            for number in damaged:
                self._set_aside(number)
            return restored
        if not damaged:
            raise UserError(f"no checkpoint in {self._root}")
        first = next(iter(damaged.values()))
        more = f"; and {len(damaged) - 1} older ones too" if len(damaged) > 1 else ""
        raise Damaged(f"{first}{more}: to begin the run anew, delete {self._workdir}") from first

    def _restore(self, folder: epath.Path, abstract_state: Tree) -> Restored:
        error: Damaged | None = None
        state = iterator = meta = None
        try:
            meta = _read_json(folder, "meta")
            iterator = _read_json(folder, "iterator")
            state = _read_arrays(folder, abstract_state, meta["leaves"], whole=True)
        except Damaged as found:
            error = found
        # A process may fail to read what is whole for the others: all take it, or none.
        if reasons := [r for r in distributed.gather(str(error) if error else "") if r]:
            raise Damaged(reasons[0]) from error
        _check_values(folder, state, meta["leaves"])
        return Restored(int(folder.name), state, iterator, meta)

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            target = self._workdir / _DAMAGED / str(step)
            target.parent.mkdir(exist_ok=True)
            if target.exists():
                target.rmtree()
            (self._root / str(step)).rename(target)
            logging.warning("moved the damaged checkpoint of step %d to %s", step, target)
        distributed.gather(step)  # all wait for the move
        self._manager.reload()

    def score(self, step: int, scores: Mapping[str, float]) -> None:
        """Notes what an evaluation found, beside the checkpoint of that step."""
        self.wait()
        self._scores[step] = dict(scores)
        if jax.process_index() == 0:
            path = self._root / str(step) / _SCORES
            partial = path.with_suffix(".partial")
            with self._writing():
                partial.write_text(json.dumps(dict(scores)) + "\n")
                partial.rename(path)

    def scored(self, step: int) -> bool:
        """Whether an evaluation was noted for this step."""
        return step in self._scores

    def check(self) -> None:
        """Raises what went wrong in the background, without waiting for what goes on there."""
        with self._writing():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when what `save` began is on disk; raises what went wrong there."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the background threads."""
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Makes errors of the disk the user's; what is saved already stays."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())
            full = [s for s in (os.strerror(28), "No space left", "File too large") if s in text]
            if not full and not isinstance(error, OSError):
                raise
            saved = _steps(self._root)
            last = f"step {saved[-1]} is the last one saved" if saved else "none is saved yet"
            reason = full[0] if full else text[:200]
            raise UserError(
                f"cannot write a checkpoint to {self._root}: {reason}; {last}: make room, and give "
                "the same command again"
            ) from error


@jax.jit
def _checksum(x: Array) -> UInt32[Array, ""]:
    """A number that any changed bit changes, and any other damage but once in 2^32.

    A sum of the values' bits modulo 2^32, each times an odd number that depends on its place: the
    same for every placement on devices, for integers add up the same in every order.
    """
    size = x.dtype.itemsize
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        kind = {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for dim in range(bits.ndim):
        stride = jnp.uint32(math.prod(bits.shape[dim + 1 :]) % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim) * stride
    place *= jnp.uint32(2654435761)  # Knuth's multiplicative hash
    place ^= place >> 15
    return jnp.sum(bits * (place * jnp.uint32(2) + jnp.uint32(1)), dtype=jnp.uint32)


def _leaves(state: Tree) -> dict[str, list[Any]]:
    """Kind and checksum of every array, by name."""
    named = trees.flatten(state)
    sums = jax.device_get({name: _checksum(leaf) for name, leaf in named.items()})
    return {name: [_describe(leaf), int(sums[name])] for name, leaf in named.items()}


def _check_values(folder: epath.Path, state: Tree, leaves: Mapping[str, list[Any]]) -> None:
    """Compares what was read, a part or the whole of the state, with what was saved.

    Raises:
        Damaged: names the first arrays that differ.
    """
    with jax.transfer_guard("allow"):
        found = _leaves(state)
    if wrong := [name for name, leaf in found.items() if leaf[1] != leaves[name][1]]:
        raise _damaged(folder, f"checksums differ: {_some(wrong)}")


def _signed(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON value with a checksum of its text."""
    return {"crc32": zlib.crc32(_canonical(value)), "value": value}


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def stored_meta(path: PathLike, step: int | None = None) -> dict[str, Any]:
    """The trainer's JSON of a checkpoint.

    Args:
        path: a workdir, its folder "checkpoints", or the folder of one step.
        step: which one; by default the folder's own, or the latest.

    Raises:
        UserError: there is no such checkpoint.
    """
    folder, _ = locate(path, step)
    return _read_json(folder, "meta")


def stored_config(path: PathLike, step: int | None = None) -> ConfigDict:
    """The config that a checkpoint was trained with, locked; arguments as for `stored_meta`."""
    return configs.from_json(stored_meta(path, step)["config"])


def restore_params(
    path: PathLike, abstract_params: Tree, which: str = "ema", step: int | None = None
) -> Tree:
    """Reads the parameters of a checkpoint and nothing else of it.

    Args:
        path, step: as for `stored_meta`.
        abstract_params: `jax.ShapeDtypeStruct`s; those without a sharding go to the first device.
        which: the part of the train state: "ema" or "params".

    Raises:
        UserError: there is no such checkpoint or part; a leaf is missing, extra, or of another
            shape or dtype; a file is damaged.
    """
    folder, _ = locate(path, step)
    leaves = _read_json(folder, "meta")["leaves"]
    read = _read_arrays(folder, {which: abstract_params}, leaves, whole=False)
    _check_values(folder, read, leaves)
    return read[which]


def locate(path: PathLike, step: int | None) -> tuple[epath.Path, int]:
    """The folder of a finished step, and its number; arguments as for `stored_meta`.

    Raises:
        UserError: there is no such checkpoint.
    """
    path = epath.Path(path).resolve()
    root = path / _FOLDER if (path / _FOLDER).is_dir() else path
    if root.name.isdigit() and step in (None, int(root.name)):
        root, step = root.parent, int(root.name)
    steps = _steps(root) if root.is_dir() else []
    if not steps:
        raise UserError(f"no checkpoint in {path}: give the workdir of a training run")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"no checkpoint of step {step} in {root}: it has {_some(steps)}")
    return root / str(step), step


def saved_steps(workdir: PathLike) -> list[int]:
    """The steps of a workdir that are completely written, in order."""
    root = epath.Path(workdir) / _FOLDER
    return _steps(root) if root.is_dir() else []


def _steps(root: epath.Path) -> list[int]:
    return sorted(ocp.utils.checkpoint_steps(root))


def _read_scores(folder: epath.Path) -> dict[str, float] | None:
    try:
        return dict(json.loads((folder / _SCORES).read_text()))
    except (OSError, ValueError, TypeError):
        return None  # not evaluated, or not to the end


def _read_json(folder: epath.Path, item: str) -> dict[str, Any]:
    try:
        signed = json.loads((folder / item / "metadata").read_text())
        if zlib.crc32(_canonical(signed["value"])) != signed["crc32"]:
            raise ValueError(f"checksum of {item} differs")
        return signed["value"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, error) from error


def _read_arrays(
    folder: epath.Path, abstract: Tree, leaves: Mapping[str, list[Any]], whole: bool
) -> Tree:
    """Reads `abstract`, a part (top-level keys) or the whole of the saved state, after a check."""
    handler = ocp.PyTreeCheckpointHandler()
    try:
        saved = handler.metadata(folder / "state").tree
        kinds = {name: _describe(leaf) for name, leaf in trees.flatten(saved).items()}
    except _UNREADABLE as error:
        raise _damaged(folder, error) from error
    if kinds != {name: kind for name, (kind, _) in leaves.items()}:
        raise _damaged(folder, "it lists other arrays than were saved")
    parts = set(saved) if whole else set(abstract)
    if missing := sorted(set(abstract) - set(saved)):
        raise UserError(f'checkpoint {folder} has no "{missing[0]}": it has {_some(sorted(saved))}')
    _check_leaves(folder, {key: saved[key] for key in parts}, abstract)

    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first), abstract
    )
    arguments = ocp.args.PyTreeRestore(
        abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=not whole,
    )
    try:
        return jax.block_until_ready(handler.restore(folder / "state", args=arguments))
    except _UNREADABLE as error:
        raise _damaged(folder, error) from error


def _check_leaves(folder: epath.Path, saved: Tree, wanted: Tree) -> None:
    """Compares the two trees leaf by leaf before anything is read.

    Raises:
        UserError: names the first leaves that differ, with both shapes and dtypes.
    """
    there, here = trees.flatten(saved), trees.flatten(wanted)
    problems = []
    for name in dict.fromkeys([*here, *there]):
        if name not in there:
            problems.append(f"{name} {_describe(here[name])} is missing")
        elif name not in here:
            problems.append(f"{name} {_describe(there[name])} is not part of this model")
        elif _describe(there[name]) != _describe(here[name]):
            problems.append(f"{name} is {_describe(there[name])}, wanted {_describe(here[name])}")
    if problems:
        raise UserError(f"checkpoint {folder} does not fit: {_some(problems, '; ')}")


def _describe(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _some(items: Sequence[Any], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - 5} more" if len(items) > 5 else ""
    return separator.join(map(str, items[:5])) + more


def _damaged(folder: epath.Path, error: Exception | str) -> Damaged:
    reason = " ".join(str(error).split())[:200]
    if isinstance(error, Exception):
        reason = f"{type(error).__name__}: {reason}"
    return Damaged(f"checkpoint {folder} is damaged ({reason})")


def check_workdir(workdir: PathLike, config: ConfigDict) -> None:
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
    elif saved_steps(workdir):
        saved = stored_meta(workdir)["config"]
    else:
        return
    check_same_run(saved, config)


def _check_writable(workdir: PathLike) -> None:
    if "://" in str(workdir):
        return  # of a bucket, the first write will tell
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


def claim(workdir: PathLike, config: ConfigDict) -> None:
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
            f"the workdir holds another run: {_some(changed, '; ')}; take another --workdir"
        )
