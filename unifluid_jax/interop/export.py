"""Writes a trained model in formats of others, for finetuning elsewhere, and in one of its own.

LoRA's adapters are merged into what they adapt.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from unifluid_jax import config as configs
from unifluid_jax import lora
from unifluid_jax.checkpoint import parameter_folders
from unifluid_jax.config import make_part
from unifluid_jax.errors import UserError
from unifluid_jax.interop import (
    card,
    gemma_package,
    hf_config,
    hf_gemma,
    hf_paligemma,
    hf_siglip,
    orbax,
    patch_sizes,
    safetensors,
    transfer,
    unifluid,
)
from unifluid_jax.interop.initial import finished
from unifluid_jax.interop.rules import Leaf, Span, Table
from unifluid_jax.interop.tensors import Source
from unifluid_jax.models.gemma import GemmaConfig
from unifluid_jax.models.siglip import SiglipConfig

# The subtrees of ours that a format holds.
_HELD = {
    "paligemma": ("backbone/", "vision/", "vision_proj/"),
    "hf_gemma": ("backbone/",),
    "gemma": ("backbone/",),
    "siglip": ("vision/",),
}
FORMATS = ("unifluid", *_HELD)


class Stored:
    """The parameters of a saved step as a `Source`: trained and frozen ones, adapters merged.

    Args:
        folder: of the step.
        which: "ema" or "params".
        alpha: LoRA's, if there are adapters.

    Attributes:
        weights: "ema" or "params": what those that were trained are in truth.
    """

    def __init__(self, folder: epath.Path, which: str, alpha: float | None = None):
        self.path, self._alpha = folder, alpha
        parts = parameter_folders(folder, which)
        self.weights = parts[0][1]
        self._sources = [
            (orbax.OrbaxSource(Path(part), key), leaves) for part, key, leaves in parts
        ]
        self._source = {name: source for source, _ in self._sources for name in source.leaves}
        self._adapters = {
            name: source.leaves[name]
            for name, source in self._source.items()
            if name.startswith(f"{lora.BRANCH}/")
        }
        self.leaves = {
            name: source.leaves[name]
            for name, source in self._source.items()
            if name not in self._adapters
        }
        if self._adapters and alpha is None:
            raise UserError(f"checkpoint {folder} has LoRA's adapters, its config has no lora")

    def check(self) -> None:
        """Reads everything once, and compares it with what was saved.

        Raises:
            UserError: something differs.
        """
        for source, leaves in self._sources:
            source.check(leaves)

    def where(self, name: str) -> str:
        return str(self.path)

    def read(self, span: Span) -> np.ndarray:
        w = self._source[span.name].read(span)
        a, b = (f"{lora.BRANCH}/{span.name}/{side}" for side in "ab")
        if a not in self._adapters:
            return w
        rank = self._adapters[a].shape[-1]
        # Dims that both have are stacked layers: a span is of one layer, and rows are A's.
        stacked = len(self._adapters[a].shape) + len(self._adapters[b].shape) - 2
        stacked -= len(self.leaves[span.name].shape)
        if len(span.at) < stacked:
            raise ValueError(f"{span} is read whole, and its layers have adapters of their own")
        rows = self._source[a].read(Span(a, span.at, span.rows)).astype(np.float32)
        columns = self._source[b].read(Span(b, span.at[:stacked])).astype(np.float32)
        product = np.tensordot(rows, columns, axes=1)
        return w + (np.float32(self._alpha / rank) * product).astype(w.dtype)


def convert(
    folder: epath.Path,
    config: ConfigDict,
    to: str,
    out: Path,
    *,
    which: str = "ema",
    dtype: np.dtype | None = None,
    vocabulary: int | None = None,
    advance: Callable[..., None] = lambda done, total=None: None,
) -> dict[str, Leaf]:
    """Writes the model of a saved step in another format.

    Args:
        folder: of the step.
        config: of the run.
        to: one of `FORMATS`.
        out: does not exist; it appears when all is written.
        which: "ema" or "params".
        dtype: of all tensors; by default they keep their own.
        vocabulary: rows of the embedding table; ours by default.
        advance: (bytes done, bytes in all) of progress.

    Returns:
        The tensors written.

    Raises:
        UserError: the format has no place for the model, or the checkpoint is damaged.
    """
    tasks = ("unifluid", "siglip") if to == "siglip" else ("unifluid",)
    if config.task not in tasks:
        raise UserError(
            f'{folder} is of the task "{config.task}": --to={to} takes {" or ".join(tasks)}'
        )
    alpha = config.lora.alpha if "lora" in config else None
    source = Stored(folder, which, alpha)
    source.check()
    with finished(out) as partial:
        if to == "unifluid":
            if vocabulary is not None:
                raise UserError("--vocab_rows goes with other formats than unifluid")
            about = {"step": int(folder.name), "weights": source.weights}
            scores = card.scores_of(folder, source.weights)
            text = card.card(out.name, config, source.leaves, about["step"], scores)
            (partial / unifluid.CARD).write_text(text)
            _copy_tokenizers(config, partial)
            return write_unifluid(source, config, partial, about, dtype=dtype, advance=advance)
        text = None
        if to != "siglip":
            rows = vocabulary or source.leaves["backbone/embedding"].shape[0]
            text = make_part(
                GemmaConfig, "config.model.backbone", config.model.backbone, vocab_size=rows
            )
        vision = make_part(SiglipConfig, "config.model.vision", config.model.vision)
        return write(
            source, text, vision, to, partial, dtype=dtype, vocabulary=vocabulary, advance=advance
        )


def write(
    source: Source,
    text: GemmaConfig | None,
    vision: SiglipConfig | None,
    to: str,
    out: Path,
    *,
    dtype: np.dtype | None = None,
    vocabulary: int | None = None,
    advance: Callable[..., None] = lambda done, total=None: None,
) -> dict[str, Leaf]:
    """Writes a backbone, a vision tower, or both with their projection (PaliGemma), to a folder.

    Args:
        source: has the leaves of a UniFluid.
        text: of the backbone as it is written: `vocab_size` is that of the files.

    Other arguments and errors as for `convert`.
    """
    below = _HELD[to]
    prefix = below[0] if len(below) == 1 else ""
    leaves = {
        name.removeprefix(prefix): leaf
        for name, leaf in source.leaves.items()
        if name.startswith(below)
    }
    total = sum(leaf.nbytes for leaf in leaves.values())
    table, spell, description = _format(to, text, vision, leaves, dtype)
    if to == "gemma":
        make_sink = lambda written: orbax.OrbaxSink(out / "checkpoint", written)  # noqa: E731
    else:
        make_sink = lambda written: safetensors.Writer(out, written)  # noqa: E731
    written = transfer.take_out(
        table,
        source,
        leaves,
        make_sink,
        prefix=prefix,
        sizes=patch_sizes(vision.patch_size if vision else 0),
        vocabulary=vocabulary,
        dtype=dtype,
        spell=spell,
        advance=lambda done: advance(done, total),
    )
    if to == "gemma":
        # Orbax wants a folder of its own; the format has no config.
        for path in (out / "checkpoint").iterdir():
            path.rename(out / path.name)
        (out / "checkpoint").rmdir()
    else:
        _write_json(out / "config.json", description)
    return written


def _format(
    to: str,
    text: GemmaConfig | None,
    vision: SiglipConfig | None,
    leaves: Mapping[str, Leaf],
    dtype: np.dtype | None,
) -> tuple[Table, tuple[tuple[str, str], ...], dict[str, Any]]:
    """The table, the spelling of its names and config.json of a format."""
    if to == "gemma":
        return gemma_package.written(leaves), (), {}
    if to == "siglip":
        return hf_siglip.TABLE, hf_siglip.HUB_SPELLINGS, hf_config.siglip_vision(vision)
    prefix = "backbone/" if to == "paligemma" else ""
    kind = dtype or leaves[f"{prefix}embedding"].dtype
    which = int(text.post_norms)
    if to == "hf_gemma":
        return hf_gemma.TABLES[which], (), hf_config.gemma(text, kind)
    return (
        hf_paligemma.TABLES[which],
        hf_paligemma.HUB_SPELLINGS,
        hf_config.paligemma(text, vision, kind),
    )


def write_unifluid(
    source: Source,
    config: ConfigDict,
    out: Path,
    about: Mapping[str, Any],
    *,
    dtype: np.dtype | None = None,
    advance: Callable[..., None] = lambda done, total=None: None,
) -> dict[str, Leaf]:
    """Writes all leaves under their own names, and the config.

    Args:
        about: what else config.json is to say.

    Other arguments as for `convert`.
    """
    total = sum(leaf.nbytes for leaf in source.leaves.values())
    written = transfer.take_out(
        unifluid.table(source.leaves),
        source,
        source.leaves,
        lambda written: safetensors.Writer(out, written),
        dtype=dtype,
        advance=lambda done: advance(done, total),
    )
    values = configs.to_json(config)
    values.pop("lora", None)  # merged
    values["tokenizer"]["path"] = unifluid.TEXT_TOKENIZER
    values["image_tokenizer"]["path"] = unifluid.IMAGE_TOKENIZER
    types = sorted({leaf.dtype.name for leaf in written.values()})
    described = {"format": unifluid.FORMAT, "config": values, **about, "dtype": "|".join(types)}
    _write_json(out / unifluid.CONFIG, described)
    return written


def _copy_tokenizers(config: ConfigDict, out: Path) -> None:
    """So that the folder needs nothing else; `unifluid.read_config` points to them."""
    try:
        shutil.copytree(config.image_tokenizer.path, out / unifluid.IMAGE_TOKENIZER)
        shutil.copyfile(config.tokenizer.path, out / unifluid.TEXT_TOKENIZER)
    except OSError as error:
        raise UserError(
            f"a tokenizer of the run cannot be copied: {error.filename}: {error.strerror}"
        ) from error


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
