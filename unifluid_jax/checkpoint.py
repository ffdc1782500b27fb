"""Checkpoints: the train state, the input iterator's state and the config, saved as one step.

    WORKDIR/checkpoints/300/state          parameters, EMA, moments, step: sharded arrays
    WORKDIR/checkpoints/300/iterator       where the input stands, JSON
    WORKDIR/checkpoints/300/meta           JSON of the trainer, with the config and the checksums
    WORKDIR/checkpoints/300/scores.json    what an evaluation found, when there was one
    WORKDIR/checkpoints/frozen             parameters that the run does not train, for all steps
    WORKDIR/damaged/400                    a checkpoint that turned out not to be what was saved

Nothing else of this code knows Orbax but `interop/orbax.py`, which opens such folders leaf by leaf.
A step appears under its own name only when all of it is written; what a killed process leaves
behind is never taken for a checkpoint.

Every array has a checksum of its values, computed on the devices before it is saved and after it is
restored; JSON has one of its text. So whatever goes wrong between the two, on any mesh, is noticed.
Every step has those of the frozen parameters too.
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
from ml_collections import ConfigDict

from unifluid_jax import checksums, distributed, trees
from unifluid_jax import config as configs
from unifluid_jax.errors import UserError, listed

Tree = Any
PathLike = epath.PathLike

_FOLDER = "checkpoints"
# The part of the state that no step changes: written with the first step, read with each.
_FROZEN = "frozen"
_SCORES = "scores.json"
_DAMAGED = "damaged"
_PIECE = 16 << 20  # bytes

# What Orbax and TensorStore raise for files that are gone, cut short or nonsense.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError)


class Damaged(UserError):
    """A checkpoint is not what was saved; the one before it may be."""


class Lost(Damaged):
    """The frozen parameters are not what was saved; all steps of a run have the same."""


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
        # Not by Orbax, which does it in a thread of its own and takes new ones along.
        for path in self._root.iterdir() if jax.process_index() == 0 else ():
            if ocp.utils.is_tmp_checkpoint(path):
                logging.warning("removing the unfinished checkpoint %s", path)
                path.rmtree()
        self._manager = ocp.CheckpointManager(
            self._root,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self,
                lightweight_initialize=True,  # a damaged step must not end the run here
            ),
            item_names=("state", "iterator", "meta"),
        )
        found = {step: _read_scores(self._root / str(step)) for step in _steps(self._root)}
        self._scores = {step: scores for step, scores in found.items() if scores is not None}
        # Without a step, those of a run that was killed before it had one: not to be relied on.
        self._has_frozen = bool(found) and (self._root / _FROZEN).is_dir()

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
            state: arrays; no PRNG keys. Its part "frozen" must be the same at every step.
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
        trained = {name: part for name, part in state.items() if name != _FROZEN}
        # Transfers to the host are meant, also inside a loop that forbids them.
        with self._writing(), jax.transfer_guard("allow"):
            # Waited for: a step that is there is complete.
            if state.get(_FROZEN) and not self._has_frozen:
                with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
                    arguments = ocp.args.PyTreeSave(
                        state[_FROZEN], save_args=_pieces(state[_FROZEN])
                    )
                    writer.save(self._root / _FROZEN, args=arguments, force=True)
                self._has_frozen = True
            self._save(step, trained, joined, {**meta, "leaves": checksums.leaves(state)})

    def _save(self, step: int, state: Tree, iterator: Any, meta: Any) -> None:
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state, save_args=_pieces(state)),
                iterator=ocp.args.JsonSave(_signed(iterator)),
                meta=ocp.args.JsonSave(_signed(meta)),
            ),
        )

    def adopt(
        self,
        step: int,
        arrays: PathLike,
        leaves: Mapping[str, Sequence[Any]],
        meta: Mapping[str, Any],
    ) -> None:
        """Makes a step of arrays that lie on the disk already.

        Args:
            arrays: a folder that Orbax can read; it is moved.
            leaves: [kind, checksum] of every array, by name, as `checksums.leaves` has them.
            meta: as for `save`.
        """
        with self._writing():
            # Orbax will not write a state of nothing.
            self._save(step, {"step": np.zeros((), np.int32)}, {}, {**meta, "leaves": dict(leaves)})
            self._manager.wait_until_finished()
            state = self._root / str(step) / "state"
            state.rmtree()
            epath.Path(arrays).rename(state)

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
            Lost: the frozen parameters are not.
        """
        self.wait()
        if step is not None:
            return self._restore(locate(self._root, step)[0], abstract_state)
        damaged: dict[int, Damaged] = {}
        for candidate in reversed(_steps(self._root)):
            try:
                restored = self._restore(self._root / str(candidate), abstract_state)
            except Lost:
                raise
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
            leaves = meta["leaves"]
            trained = {name: part for name, part in abstract_state.items() if name != _FROZEN}
            state = _read_arrays(folder / "state", trained, _below(leaves, None), whole=True)
            if _FROZEN in abstract_state:
                frozen, leaves = abstract_state[_FROZEN], _below(leaves, _FROZEN)
                state[_FROZEN] = (frozen or leaves) and _read_arrays(
                    folder.parent / _FROZEN, frozen, leaves, whole=True
                )
        except Damaged as found:
            error = found
        # A process may fail to read what is whole for the others: all take it, or none.
        reasons = distributed.gather([isinstance(error, Lost), str(error)] if error else [])
        if any(reasons):
            lost, reason = max(reasons)
            raise (Lost if lost else Damaged)(reason) from error
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


def _pieces(state: Tree) -> Tree:
    """How Orbax is to store arrays: in pieces, so that a layer can be read without all the others.

    Stacked layers are one array, which without this may be one piece of gigabytes.
    """
    return jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PIECE), state)


def _below(leaves: Mapping[str, list[Any]], part: str | None) -> dict[str, list[Any]]:
    """Those of one part of the state, named without it; None: all but the frozen ones."""
    if part is None:
        return {name: x for name, x in leaves.items() if not name.startswith(f"{_FROZEN}/")}
    prefix = f"{part}/"
    return {name.removeprefix(prefix): x for name, x in leaves.items() if name.startswith(prefix)}


def _check_values(folder: epath.Path, state: Tree, leaves: Mapping[str, list[Any]]) -> None:
    """Compares what was read, a part or the whole of the state, with what was saved.

    Raises:
        Damaged: names the first arrays that differ.
    """
    with jax.transfer_guard("allow"):
        wrong = checksums.differing(state, leaves)
    for place, names in (
        (folder.parent / _FROZEN, [name for name in wrong if name.startswith(f"{_FROZEN}/")]),
        (folder / "state", wrong),
    ):
        if names:
            raise _damaged(place, f"checksums differ: {listed(names)}")


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
        abstract_params: all parameters as `jax.ShapeDtypeStruct`s; those without a sharding go to
            the first device.
        which: the part of the train state, "ema" or "params", that those which were trained are
            read from. A checkpoint without an average, as `unifluid convert` makes it, has only
            "params".

    Parameters that are stored in fewer bits than wanted are widened, which changes none.

    Raises:
        UserError: there is no such checkpoint or part; a leaf is missing, extra, or of another
            shape or dtype.
        Damaged: a file is.
    """
    folder, _ = locate(path, step)
    leaves = _read_json(folder, "meta")["leaves"]
    which = _stored_part(leaves, which)
    frozen, trained, kept = {}, abstract_params, _below(leaves, _FROZEN)
    if kept:
        is_frozen = jax.tree.map(lambda name: name in kept, trees.paths(abstract_params))
        frozen, trained = trees.split(abstract_params, is_frozen)
    state = _read_arrays(folder / "state", {which: trained}, _below(leaves, None), whole=False)
    if kept:
        state[_FROZEN] = _read_arrays(folder.parent / _FROZEN, frozen, kept, whole=True)
    _check_values(folder, state, leaves)
    return trees.join(state[which], state[_FROZEN]) if kept else state[which]


def parameter_folders(
    folder: epath.Path, which: str
) -> list[tuple[epath.Path, str | None, dict[str, list[Any]]]]:
    """Where the parameters of a step lie, trained and frozen ones.

    Args:
        folder: of the step, from `locate`.
        which: "ema" or "params".

    Returns:
        Folders that Orbax wrote, the key of its tree that they are below (None: the top), and
        [kind, checksum] by their names there.
    """
    leaves = _read_json(folder, "meta")["leaves"]
    which = _stored_part(leaves, which)
    found = [(folder / "state", which, _below(leaves, which))]
    if frozen := _below(leaves, _FROZEN):
        found.append((folder.parent / _FROZEN, None, frozen))
    return found


def _stored_part(leaves: Mapping[str, Any], which: str) -> str:
    """The part of the state of a step that is meant by "ema": "params" where none is averaged."""
    return "params" if which == "ema" and not _below(leaves, "ema") else which


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
        raise UserError(f"no checkpoint of step {step} in {root}: it has {listed(steps)}")
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
    """Reads `abstract`, a part (top-level keys) or the whole of a saved tree, after a check.

    Args:
        folder: of the tree.
        leaves: what it was when it was saved.
    """
    handler = ocp.PyTreeCheckpointHandler()
    try:
        saved = handler.metadata(folder).tree
        kinds = {name: checksums.kind(leaf) for name, leaf in trees.flatten(saved).items()}
    except _UNREADABLE as error:
        raise _damaged(folder, error) from error
    if kinds != {name: kind for name, (kind, _) in leaves.items()}:
        raise _damaged(folder, "it lists other arrays than were saved")
    parts = set(saved) if whole else set(abstract)
    if missing := sorted(set(abstract) - set(saved)):
        raise UserError(
            f'checkpoint {_shown(folder)} has no "{missing[0]}": it has {listed(sorted(saved))}'
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
        return jax.block_until_ready(handler.restore(folder, args=arguments))
    except Exception as error:
        # Of values that it cannot read, Orbax raises an Exception made of the reason.
        reason = error if isinstance(error, _UNREADABLE) else error.__cause__
        if not isinstance(reason, _UNREADABLE):
            raise
        raise _damaged(folder, reason) from error


def _check_leaves(folder: epath.Path, saved: Tree, wanted: Tree, exact: bool) -> None:
    """Compares the two trees leaf by leaf before anything is read.

    Args:
        exact: numbers may not even be widened: what is continued must be what was saved.

    Raises:
        UserError: names the first leaves that differ, with both shapes and dtypes.
    """
    there, here = trees.flatten(saved), trees.flatten(wanted)
    kind, problems = checksums.kind, []
    for name in dict.fromkeys([*here, *there]):
        if name not in there:
            problems.append(f"{name} {kind(here[name])} is missing")
        elif name not in here:
            problems.append(f"{name} {kind(there[name])} is not part of this model")
        elif kind(there[name]) != kind(here[name]) and (
            exact or not _is_narrower(there[name], here[name])
        ):
            problems.append(f"{name} is {kind(there[name])}, wanted {kind(here[name])}")
    if problems:
        raise UserError(f"checkpoint {_shown(folder)} does not fit: {listed(problems, '; ')}")


def _is_narrower(there: Any, here: Any) -> bool:
    """Whether the numbers of one leaf fit into the other's type, and the shapes are the same."""
    return there.shape == here.shape and jnp.promote_types(there.dtype, here.dtype) == here.dtype


def _damaged(folder: epath.Path, error: Exception | str) -> Damaged:
    """To be raised; of a frozen folder, with what there is left to do."""
    reason = " ".join(str(error).split())[:200]
    if isinstance(error, Exception):
        reason = f"{type(error).__name__}: {reason}"
    if folder.name != _FROZEN:
        return Damaged(f"checkpoint {_shown(folder)} is damaged ({reason})")
    what = f"is damaged ({reason})" if folder.is_dir() else "is missing"
    return Lost(
        f"{folder}, the parameters that the run does not train, {what}; there is no older copy of "
        "it: put it back, or begin the run anew in another workdir"
    )


def _shown(folder: epath.Path) -> epath.Path:
    """What to call the folder of a saved tree: the step that it belongs to, or itself."""
    return folder.parent if folder.name == "state" else folder
