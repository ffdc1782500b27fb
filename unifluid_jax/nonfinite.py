"""Steps whose loss or gradients are not finite: passed over up to a limit, kept to be replayed.

The step itself leaves parameters, moments and average as they were when it finds such a one; here
it is counted, and its batch written to

    WORKDIR/nonfinite/0000123_0.npz    what process 0 had of the batch of step 123

`unifluid train --replay=123` computes it again and says where the first such number arises.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging

from unifluid_jax.errors import UserError

_FOLDER = "nonfinite"
# A run that passes over many steps must not fill the disk.
_DUMPS = 10


class Guard:
    """Counts the steps in a row that were passed over.

    Args:
        workdir: of the run.
        limit: so many in a row are borne.
        rows: of the global batch, those of this process.
    """

    def __init__(self, workdir: Path, limit: int, rows: Sequence[int]):
        self._workdir, self._limit, self._rows = workdir, limit, rows
        self._count = self._dumped = 0

    def check(self, step: int, skipped: bool, batch: Mapping[str, np.ndarray]) -> None:
        """Takes note of a step.

        Raises:
            UserError: that was one too many.
        """
        self._count = self._count + 1 if skipped else 0
        if not skipped:
            return
        over = self._count > self._limit
        if over or self._dumped < _DUMPS:
            self._dumped += 1
            _dump(self._workdir, step, batch, self._rows)
        config = self._workdir / "config.json"
        command = f"unifluid train --config={config} --workdir={self._workdir} --replay={step}"
        if over:
            raise UserError(
                f"loss or gradients of step {step} are not finite, the {self._count}. in a row "
                f"(config.train.max_skipped={self._limit}); to see where they arise: {command}"
            )
        logging.warning("passed over step %d: loss or gradients not finite; %s", step, command)


def _dump(workdir: Path, step: int, batch: Mapping[str, np.ndarray], rows: Sequence[int]) -> None:
    path = workdir / _FOLDER / f"{step:07d}_{jax.process_index()}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, rows=np.asarray(rows), **batch)


def load(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """The whole batch of a step, put together from what all processes had of it.

    Raises:
        UserError: it was not kept, or rows of it are missing.
    """
    files = sorted((workdir / _FOLDER).glob(f"{step:07d}_*.npz"))
    if not files:
        kept = sorted({int(f.name.split("_")[0]) for f in (workdir / _FOLDER).glob("*.npz")})
        raise UserError(f"no batch of step {step} in {workdir / _FOLDER}: it has {kept or 'none'}")
    parts = [dict(np.load(file)) for file in files]
    rows = np.concatenate([part.pop("rows") for part in parts])
    wanted, first = np.unique(rows, return_index=True)
    if not np.array_equal(wanted, np.arange(len(wanted))):
        raise UserError(f"rows of step {step} are missing in {workdir / _FOLDER}: {files[0]} ...")
    return {name: np.concatenate([part[name] for part in parts])[first] for name in parts[0]}
