"""Weights of other code bases, in and out.

One file per format holds its name table as data (`rules.py` says how to read one): hf_gemma,
gemma_package, hf_siglip, big_vision_siglip, hf_paligemma, big_vision_paligemma, diffusers_vae,
ldm_vae, mar_head, unifluid. `files.py` finds out what a path holds; safetensors, npz, torch_zip and
orbax read and write by parts; `transfer.py` compares and copies. `read_part` does all of it in
memory, for parts that are small:

    params = interop.read_part("gemma", "tests/golden/gemma2", abstract)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from unifluid_jax import trees
from unifluid_jax.interop import (
    big_vision_paligemma,
    big_vision_siglip,
    diffusers_vae,
    files,
    gemma_package,
    hf_gemma,
    hf_paligemma,
    hf_siglip,
    ldm_vae,
    mar_head,
    transfer,
)
from unifluid_jax.interop.rules import Leaf, Table
from unifluid_jax.interop.tensors import Memory, leaves_of

# The formats in which a part may come.
TABLES: dict[str, tuple[Table, ...]] = {
    "gemma": hf_gemma.TABLES + gemma_package.TABLES,
    "siglip": hf_siglip.TABLES + big_vision_siglip.TABLES,
    "paligemma": hf_paligemma.TABLES + big_vision_paligemma.TABLES,
    "vae": diffusers_vae.TABLES + ldm_vae.TABLES,
    "head": mar_head.TABLES,
}


def patch_sizes(patch: int) -> dict[str, int]:
    """The sizes that SigLIP's tables need: height, width and channels of a patch."""
    return {"p": patch, "q": patch, "C": 3}


def read_part(
    part: str,
    path: str | Path,
    abstract: Any,
    *,
    patch: int = 0,
    allow: Sequence[str] = (),
) -> Any:
    """A part's parameters from files of any known format, as numpy arrays of the files' types.

    Args:
        part: a key of `TABLES`.
        path: file or folder.
        abstract: the tree wanted: `jax.eval_shape` of `Functional.init`; for "paligemma" a dict of
            "backbone", "vision" and "vision_proj".
        patch: side of SigLIP's patches, where it is a part.
        allow: regexes of what may be missing (zeros then) or left aside.

    Raises:
        UserError: the files are damaged, or are of another model.
    """
    leaves = leaves_of(abstract)
    fitted = transfer.fit(
        TABLES[part], files.open_source(path), leaves, sizes=patch_sizes(patch), allow=allow
    )
    types = fitted.dtypes()
    memory = Memory.empty(
        {name: Leaf(leaf.shape, types.get(name, leaf.dtype)) for name, leaf in leaves.items()}
    )
    transfer.bring_in(fitted, memory)
    return jax.tree.unflatten(
        jax.tree.structure(abstract), [memory.arrays[name] for name in trees.flatten(abstract)]
    )
