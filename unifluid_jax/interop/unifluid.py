"""A whole UniFluid as safetensors + config.json: our own leaves under their own names.

config.json             {"format": "unifluid", "config": the config of the run, "step": ...,
                        "weights": "ema" or "params", "dtype": ...}
model.safetensors       parameters by path ("backbone/layers/q", all layers stacked), one file
                        or several with an index
image_tokenizer/        copies of the two tokenizers, so that the folder needs nothing else
tokenizer.model
README.md               the model card
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from unifluid_jax import config as configs
from unifluid_jax import trees
from unifluid_jax.errors import UserError
from unifluid_jax.interop import files, transfer
from unifluid_jax.interop.rules import Rule, Span, Table
from unifluid_jax.interop.tensors import leaves_of, part

FORMAT = "unifluid"
CONFIG, CARD = "config.json", "README.md"
IMAGE_TOKENIZER, TEXT_TOKENIZER = "image_tokenizer", "tokenizer.model"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")

# Of parameters that hold all layers along their first axis: of backbone, vision tower and head.
_STACKED = r"(.*/)?(layers|blocks)/.*"


def is_stacked(path: str) -> bool:
    """Whether the first axis of a leaf is one of layers."""
    return re.fullmatch(_STACKED, path) is not None


def table(paths: Iterable[str]) -> Table:
    """The table of these leaves: each is itself, read and written a layer at a time."""
    return Table("UniFluid", tuple(Rule(path, path, stacked=is_stacked(path)) for path in paths))


def read_config(folder: Path) -> ConfigDict:
    """The config of an exported model, locked; its tokenizers are those in the folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        values = _described(folder)["config"]
        values["tokenizer"]["path"] = str(folder / TEXT_TOKENIZER)
        values["image_tokenizer"]["path"] = str(folder / IMAGE_TOKENIZER)
        return configs.from_json(values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG} describes no UniFluid ({error})") from None


def read_about(folder: Path) -> dict[str, Any]:
    """What else config.json says: `step`, `weights` ("ema" or "params"), `dtype`.

    Raises:
        UserError: there is no config.json, or it is damaged.
    """
    return {name: x for name, x in _described(folder).items() if name not in ("format", "config")}


def _described(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / CONFIG).read_text())
    except OSError as error:
        raise UserError(
            f"{folder} has no {CONFIG} ({error.strerror}): export or fetch it anew"
        ) from None
    except ValueError as error:  # neither JSON nor even text
        raise UserError(f"{folder / CONFIG} is damaged ({error}): fetch it anew") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(f'{folder / CONFIG} describes no UniFluid (no "format": "{FORMAT}")')
    return values


def read_params(folder: Path, abstract: Any) -> Any:
    """The parameters of an exported model.

    Args:
        abstract: the tree wanted: `jax.ShapeDtypeStruct`s, which say where leaves go and in which
            type; those without a sharding go to the first device.

    Raises:
        UserError: the files are damaged, or of another model.
    """
    leaves = leaves_of(abstract)
    fitted = transfer.fit((table(leaves),), files.open_source(folder), leaves)
    placing = _Placing(abstract)
    types = {name: leaf.dtype for name, leaf in leaves.items()}
    transfer.bring_in(fitted, placing, dtypes=types)
    return jax.tree.unflatten(
        jax.tree.structure(abstract), [placing.arrays[name] for name in leaves]
    )


class _Placing:
    """A sink that puts each leaf in its place as soon as it is whole: the host holds one at most.

    Args:
        abstract: see `read_params`.
    """

    def __init__(self, abstract: Any):
        self._abstract = trees.flatten(abstract)
        self._first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        self._filling: dict[str, np.ndarray] = {}
        self._left = {name: x.size * x.dtype.itemsize for name, x in self._abstract.items()}
        self.arrays: dict[str, jax.Array] = {}

    def write(self, span: Span, x: np.ndarray) -> None:
        wanted = self._abstract[span.name]
        filling = self._filling.setdefault(span.name, np.empty(wanted.shape, wanted.dtype))
        part(filling, span)[...] = x
        self._left[span.name] -= x.nbytes
        if not self._left[span.name]:
            where = wanted.sharding or self._first
            self.arrays[span.name] = jax.device_put(self._filling.pop(span.name), where)
