"""Trained models as folders of their own, which `unifluid convert --to=unifluid` writes.

The package ships such folders in `assets/`, which are known by their names. What is in them:
`interop/unifluid.py`.
"""

import json
import os
from pathlib import Path

from etils import epath

from unifluid_jax.errors import UserError, nearest
from unifluid_jax.interop.unifluid import CONFIG, FORMAT, WEIGHTS

_ASSETS = Path(__file__).parent / "assets"


def names() -> list[str]:
    """The models that the package ships."""
    folders = filter(_has_weights, _ASSETS.iterdir())
    return sorted(  # the small SigLIP's folder looks alike
        folder.name
        for folder in folders
        if json.loads((folder / CONFIG).read_text()).get("format") == FORMAT
    )


def find(path: str | os.PathLike) -> Path | None:
    """The folder that a path or a name stands for; None for the workdir of a run.

    A path that exists goes before a name.

    Raises:
        UserError: a name that is neither.
    """
    if epath.Path(path).exists():  # a run may lie in a bucket
        return Path(path) if _has_weights(Path(path)) else None
    if os.fspath(path) in names():
        return _ASSETS / path
    raise UserError(
        f'no model "{path}": no such folder, and no model of this name is shipped'
        f"{nearest(os.fspath(path), names())}"
    )


def is_shipped(folder: Path) -> bool:
    """Whether it is the package's own, where nothing is to be written."""
    return folder.resolve().parent == _ASSETS.resolve()


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in WEIGHTS)
