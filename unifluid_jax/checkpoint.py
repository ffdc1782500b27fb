"""Checkpoints: the train state, the input iterator's state and the config, saved as one step.

    WORKDIR/checkpoints/300/state       parameters, EMA, moments, step: sharded arrays
    WORKDIR/checkpoints/300/iterator    where the input stands, JSON
    WORKDIR/checkpoints/300/meta        JSON of the trainer, with the config in it
    WORKDIR/checkpoints/frozen          parameters that the run does not train, once for all steps
    WORKDIR/config.json                 the config of the run, from its very beginning

Nothing else of this code knows Orbax but `interop/orbax.py`, which opens such folders leaf by leaf.
A step appears under its own name only when all of it is written; what a killed process leaves
behind is never taken for a checkpoint.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from unifluid_jax import config as configs
from unifluid_jax import trees
from unifluid_jax.errors import UserError

Tree = Any
PathLike = epath.PathLike

_FOLDER = "checkpoints"
# The part of the state that no step changes: written with the first step, read with each.
_FROZEN = "frozen"
_CONFIG = "config.json"
_PIECE = 16 << 20  # bytes

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
    "train.keep",
    "train.log_every",
    "train.steps",
)


@dataclasses.dataclass(frozen=True)
class Restored:
    """One step, read back.

    Attributes:
        step: the training step after which it was saved.
        state: the train state, on the shardings that were asked for.
        iterator: what this process's input iterator gave for its state.
        meta: the trainer's JSON.
    """

    step: int
    state: Tree
    iterator: Any
    meta: dict[str, Any]


class Checkpointer:
    """Saves and restores the steps of one workdir. Use it as a context manager: leaving it waits.

    Args:
        workdir: checkpoints go to its folder "checkpoints", made when missing.
        keep: the last so many steps stay, older ones are deleted.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, workdir: PathLike, keep: int):
        self._root = epath.Path(workdir).resolve() / _FOLDER
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
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
            item_names=("state", "iterator", "meta"),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *unused: Any) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """The last step that is completely written, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Tree, iterator: Any, meta: Mapping[str, Any]) -> None:
        """Copies the state and writes it in the background; the caller may donate it at once.

        A step that is already saved is left alone.

        Args:
            step: training steps done.
            state: arrays; no PRNG keys. Its part "frozen" must be the same at every step.
            iterator: the state of this process's input iterator, JSON values.
            meta: JSON values; `meta["config"]` is `config.to_json` of the run's config.
        """
        if step in self._manager.all_steps():
            return
        frozen = state.get(_FROZEN)
        state = {name: part for name, part in state.items() if name != _FROZEN}
        # The copy to the host is meant, also inside a loop that forbids transfers.
        with jax.transfer_guard("allow"):
            # Waited for: a step that is there is complete.
            if frozen and not (self._root / _FROZEN).exists():
                with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
                    arguments = ocp.args.PyTreeSave(frozen, save_args=_pieces(frozen))
                    writer.save(self._root / _FROZEN, args=arguments)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state, save_args=_pieces(state)),
                    iterator=ocp.args.JsonSave({"processes": _gather(iterator)}),
                    meta=ocp.args.JsonSave(dict(meta)),
                ),
            )

    def restore(self, abstract_state: Tree, step: int | None = None) -> Restored:
        """Reads a step, straight onto the devices where `abstract_state` wants it.

        Args:
            abstract_state: `jax.ShapeDtypeStruct`s with shardings; any mesh, not only that of the
                saving run.
            step: the latest one by default.

        Raises:
            UserError: there is no such step; a leaf is missing, extra, or of another shape or
                dtype; a file is damaged; another number of processes saved the step.
        """
        self.wait()
        folder, step = locate(self._root, step)
        state = {name: part for name, part in abstract_state.items() if name != _FROZEN}
        state = _read_arrays(folder / "state", state, whole=True)
        if _FROZEN in abstract_state:
            state[_FROZEN] = abstract_state[_FROZEN] and _read_arrays(
                _frozen_folder(folder), abstract_state[_FROZEN], whole=True
            )
        iterators = _read_json(folder, "iterator")["processes"]
        if len(iterators) != jax.process_count():
            raise UserError(
                f"checkpoint {folder} holds the input state of {len(iterators)} processes, this "
                f"run has {jax.process_count()}: resume with as many"
            )
        meta = _read_json(folder, "meta")
        return Restored(step, state, iterators[jax.process_index()], meta)

    def wait(self) -> None:
        """Returns when what `save` began is on disk; raises what went wrong there."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the background threads."""
        self._manager.close()


def _pieces(state: Tree) -> Tree:
    """How Orbax is to store arrays: in pieces, so that a layer can be read without all the others.

    Stacked layers are one array, which without this may be one piece of gigabytes.
    """
    return jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PIECE), state)


def _gather(value: Any) -> list[Any]:
    """The JSON value of every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(len(text)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(t[:n].tobytes()) for t, n in zip(texts, lengths, strict=True)]


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
        abstract_params: all parameters as `jax.ShapeDtypeStruct`s; those without a sharding go to
            the first device.
        which: the part of the train state, "ema" or "params", that those which were trained are
            read from. A checkpoint without an average, as `unifluid convert` makes it, has only
            "params".

    Parameters that are stored in fewer bits than wanted are widened, which changes none.

    Raises:
        UserError: there is no such checkpoint or part; a leaf is missing, extra, or of another
            shape or dtype; a file is damaged.
    """
    folder, _ = locate(path, step)
    which = _stored_part(folder, which)
    if not (folder.parent / _FROZEN).is_dir():
        return _read_arrays(folder / "state", {which: abstract_params}, whole=False)[which]
    kept = trees.flatten(_saved(folder.parent / _FROZEN))
    is_frozen = jax.tree.map(lambda name: name in kept, trees.paths(abstract_params))
    frozen, trained = trees.split(abstract_params, is_frozen)
    trained = _read_arrays(folder / "state", {which: trained}, whole=False)[which]
    return trees.join(trained, _read_arrays(folder.parent / _FROZEN, frozen, whole=True))


def parameter_folders(folder: epath.Path, which: str) -> list[tuple[epath.Path, str | None]]:
    """Where the parameters of a step lie, trained and frozen ones: pairs of a folder and a key.

    Args:
        folder: of the step, from `locate`.
        which: "ema" or "params".

    Returns:
        Folders that Orbax wrote, and the key of its tree that they are below (None: the top).
    """
    found = [(folder / "state", _stored_part(folder, which))]
    if (folder.parent / _FROZEN).is_dir():
        found.append((folder.parent / _FROZEN, None))
    return found


def _stored_part(folder: epath.Path, which: str) -> str:
    """The part of the state of a step that is meant by "ema": "params" where none is averaged."""
    return "params" if which == "ema" and "ema" not in _saved(folder / "state") else which


def _frozen_folder(folder: epath.Path) -> epath.Path:
    """Where the frozen parameters of this step's run lie.

    Raises:
        UserError: they are not there.
    """
    frozen = folder.parent / _FROZEN
    if not frozen.is_dir():
        raise UserError(
            f"checkpoint {folder} needs the parameters its run did not train: {frozen} is missing"
        )
    return frozen


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


def _steps(root: epath.Path) -> list[int]:
    return sorted(ocp.utils.checkpoint_steps(root))


def _read_json(folder: epath.Path, item: str) -> Any:
    try:
        return json.loads((folder / item / "metadata").read_text())
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _read_arrays(folder: epath.Path, abstract: Tree, whole: bool) -> Tree:
    """Reads `abstract`, a part (top-level keys) or the whole of a saved tree, after a check."""
    saved = _saved(folder)
    parts = set(saved) if whole else set(abstract)
    if missing := sorted(set(abstract) - set(saved)):
        raise UserError(
            f'checkpoint {_shown(folder)} has no "{missing[0]}": it has {_some(sorted(saved))}'
        )
    _check_leaves(folder, {key: saved[key] for key in parts}, abstract, exact=whole)

    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or first), abstract
    )
    arguments = ocp.args.PyTreeRestore(
        abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=not whole,
    )
    # Orbax would read everything at once; it refuses to read less at once than it needs for a part
    # of one array, which is at most all of it and what its last pieces are filled up with.
    sizes = (x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(abstract))
    largest = max(sizes, default=0)
    gigabytes = math.ceil(0.5 + 1.05 * largest / 1e9)
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=gigabytes)
    try:
        return handler.restore(folder, args=arguments)
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _saved(folder: epath.Path) -> Tree:
    """Shapes and dtypes of a saved tree."""
    try:
        return ocp.PyTreeCheckpointHandler().metadata(folder).tree
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _check_leaves(folder: epath.Path, saved: Tree, wanted: Tree, exact: bool) -> None:
    """Compares the two trees leaf by leaf before anything is read.

    Args:
        exact: numbers may not even be widened: what is continued must be what was saved.

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
        elif _describe(there[name]) != _describe(here[name]) and (
            exact or not _is_narrower(there[name], here[name])
        ):
            problems.append(f"{name} is {_describe(there[name])}, wanted {_describe(here[name])}")
    if problems:
        raise UserError(f"checkpoint {_shown(folder)} does not fit: {_some(problems, '; ')}")


def _is_narrower(there: Any, here: Any) -> bool:
    """Whether the numbers of one leaf fit into the other's type, and the shapes are the same."""
    return there.shape == here.shape and jnp.promote_types(there.dtype, here.dtype) == here.dtype


def _describe(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _some(items: Sequence[Any], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - 5} more" if len(items) > 5 else ""
    return separator.join(map(str, items[:5])) + more


def _damaged(folder: epath.Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    advice = "delete it to go on from the one before"
    if folder.name == _FROZEN:
        advice = "put it back, or begin the run anew in another workdir"
    return UserError(
        f"checkpoint {_shown(folder)} is damaged ({type(error).__name__}: {reason}): {advice}"
    )


def _shown(folder: epath.Path) -> epath.Path:
    """What to call the folder of a saved tree: the step that it belongs to, or itself."""
    return folder.parent if folder.name == "state" else folder


def check_workdir(workdir: PathLike, config: ConfigDict) -> None:
    """Makes sure that a workdir is new, or was begun with this config.

    Raises:
        UserError: it holds another run.
    """
    file = epath.Path(workdir) / _CONFIG
    if file.exists():
        try:
            saved = json.loads(file.read_text())
            if not isinstance(saved, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}): delete it to go on") from error
    elif (epath.Path(workdir) / _FOLDER).is_dir() and _steps(epath.Path(workdir) / _FOLDER):
        saved = stored_meta(workdir)["config"]
    else:
        return
    check_same_run(saved, config)


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
