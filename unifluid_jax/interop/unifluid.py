"""A whole UniFluid as safetensors + config.json: our own leaves under their own names.

config.json             {"format": "unifluid", "config": the experiment's config, ...}
model.safetensors       parameters by path ("backbone/layers/q", all layers stacked), one file
                        or several with an index
image_tokenizer/        copies of the two tokenizers, so that the folder needs nothing else
tokenizer.model
"""

import re
from collections.abc import Iterable

from unifluid_jax.interop.rules import Rule, Table

FORMAT = "unifluid"
CONFIG, IMAGE_TOKENIZER, TEXT_TOKENIZER = "config.json", "image_tokenizer", "tokenizer.model"

# Of parameters that hold all layers along their first axis: of backbone, vision tower and head.
_STACKED = r"(.*/)?(layers|blocks)/.*"


def is_stacked(path: str) -> bool:
    """Whether the first axis of a leaf is one of layers."""
    return re.fullmatch(_STACKED, path) is not None


def table(paths: Iterable[str]) -> Table:
    """The table of these leaves: each is itself, read and written a layer at a time."""
    return Table("UniFluid", tuple(Rule(path, path, stacked=is_stacked(path)) for path in paths))
