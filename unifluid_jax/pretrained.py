"""A trained model as a folder of its own, for use without the run that made it.

    config.json          {"format": "unifluid", "config": the config of the run, "step": ..., ...}
    model.safetensors    parameters by path, "backbone/embedding"
    tokenizer.model      the text tokenizer
    image_tokenizer/     the image tokenizer
    README.md            the model card

The package ships such folders in `assets/`, which are known by their names.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from unifluid_jax import config as configs
from unifluid_jax import trees
from unifluid_jax.errors import UserError, nearest

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_FORMAT, _TOKENIZER, _IMAGE_TOKENIZER = "unifluid", "tokenizer.model", "image_tokenizer"
_ASSETS = Path(__file__).parent / "assets"
DTYPES: Mapping[str, Any] = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
}


def names() -> list[str]:
    """The models that the package ships."""
    return sorted(path.parent.name for path in _ASSETS.glob(f"*/{WEIGHTS}"))


def find(path: str | os.PathLike) -> Path | None:
    """The folder that a path or a name stands for; None for the workdir of a run.

    A path that exists goes before a name.

    Raises:
        UserError: a name that is neither.
    """
    folder = Path(path)
    if folder.exists():
        return folder if (folder / WEIGHTS).is_file() else None
    if os.fspath(path) in names():
        return _ASSETS / path
    raise UserError(
        f'no model "{path}": no such folder, and no model of this name is shipped'
        f"{nearest(os.fspath(path), names())}"
    )


def read_config(folder: Path) -> ConfigDict:
    """The config of a folder; its tokenizers are those in the folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        config = configs.from_json(_described(folder)["config"])
        with config.unlocked():
            config.tokenizer.path = str(folder / _TOKENIZER)
            config.image_tokenizer.path = str(folder / _IMAGE_TOKENIZER)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} describes no UniFluid ({error})") from None
    return config.lock()


def read_about(folder: Path) -> dict[str, Any]:
    """What else config.json says: `step`, `weights` ("ema" or "params"), `dtype`."""
    return {name: x for name, x in _described(folder).items() if name not in ("format", "config")}


def _described(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} has no {CONFIG}: export or fetch it anew") from None
    except ValueError as error:  # neither JSON nor even text
        raise UserError(f"{folder / CONFIG} is damaged ({error}): fetch it anew") from None
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise UserError(f'{folder / CONFIG} describes no UniFluid (no "format": "{_FORMAT}")')
    return values


def read_params(folder: Path, abstract: Any) -> Any:
    """The parameters, each read and put in its place before the next.

    Args:
        abstract: tree of `jax.ShapeDtypeStruct`, with shardings where devices matter.

    Raises:
        UserError: a tensor is missing, unknown or of another shape, or the file is damaged.
    """
    wanted = trees.flatten(abstract)
    with _opened(folder) as file:
        for name in sorted(wanted.keys() ^ set(file.keys())):
            state = "missing from" if name in wanted else "unknown in"
            raise UserError(
                f"tensor {name} is {state} {folder / WEIGHTS}: it does not fit its {CONFIG}"
            )
        leaves = []
        for name, leaf in wanted.items():
            shape = tuple(file.get_slice(name).get_shape())
            if shape != leaf.shape:
                raise UserError(
                    f"tensor {name} of {folder / WEIGHTS} has shape {list(shape)}, the config says"
                    f" {list(leaf.shape)}"
                )
            leaves.append(jax.device_put(file.get_tensor(name).astype(leaf.dtype), leaf.sharding))
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _opened(folder: Path) -> Any:
    try:
        return safe_open(folder / WEIGHTS, "numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{folder / WEIGHTS} is damaged ({error}): export or fetch it anew"
        ) from None


def save(
    out: str | os.PathLike,
    config: ConfigDict,
    params: Any,
    *,
    dtype: str,
    about: Mapping[str, Any],
    card: str,
) -> None:
    """Writes the folder, whole or not at all.

    Args:
        out: must not exist.
        config: of the run; its tokenizers are copied.
        params: the parameters.
        dtype: a key of `DTYPES`, in which weights are kept.
        about: `step` and `weights`, for config.json.
        card: text of the model card.

    Raises:
        UserError: `out` exists, it cannot be written, or a weight is too large for the dtype.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already: remove it or take another --out")
    flat = trees.flatten(jax.device_get(params))
    with np.errstate(over="ignore"):  # looked for below
        tensors = {name: np.ascontiguousarray(x.astype(DTYPES[dtype])) for name, x in flat.items()}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise UserError(
                f"{name} holds values that {dtype} does not: take --dtype=float32, or look at them"
            )
    portable = configs.from_json(configs.to_json(config))
    with portable.unlocked():
        portable.tokenizer.path = _TOKENIZER
        portable.image_tokenizer.path = _IMAGE_TOKENIZER
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        described = {"format": _FORMAT, "config": configs.to_json(portable)}
        text = json.dumps({**described, **about, "dtype": dtype}, indent=2)
        (partial / CONFIG).write_text(text + "\n")
        save_file(tensors, partial / WEIGHTS)
        shutil.copyfile(config.tokenizer.path, partial / _TOKENIZER)
        shutil.copytree(config.image_tokenizer.path, partial / _IMAGE_TOKENIZER)
        (partial / CARD).write_text(card)
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
