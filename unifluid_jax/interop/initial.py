"""Makes one initial checkpoint of the pretrained parts that are given.

    OUT/checkpoints/0/state      parameters alone: no average yet, no moments
    OUT/image_tokenizer          the converted autoencoder, if one was given
    OUT/conversion.json          every leaf: where it came from

The parts are compared first, all of them; then each is copied a layer at a time into arrays on
disk, from where any mesh of devices reads its own shares (`checkpoint.restore_params`).
"""

import copy
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from unifluid_jax import checkpoint, checksums, image_tokenizer, interop, trees
from unifluid_jax import config as configs
from unifluid_jax.errors import UserError
from unifluid_jax.interop import files, safetensors, transfer, vae_sizes
from unifluid_jax.interop.orbax import OrbaxSink
from unifluid_jax.interop.rules import Leaf, Span
from unifluid_jax.interop.tensors import BFLOAT16, leaves_of, portions
from unifluid_jax.models.functional import Functional
from unifluid_jax.models.siglip import resize_positions
from unifluid_jax.models.vae import VaeConfig
from unifluid_jax.parts import assemble

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": BFLOAT16,
    "float16": np.dtype(np.float16),
}

# The subtrees of a UniFluid that a part holds.
PARTS = {
    "gemma": ("backbone",),
    "siglip": ("vision",),
    "paligemma": ("backbone", "vision", "vision_proj"),
}

# Fresh parameters are made together up to so many bytes.
_FRESH_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Part:
    """What came of one of the paths given."""

    name: str
    path: str
    format: str
    tensors: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What came from where.

    Attributes:
        notes: what was cut, filled up, resized or left aside.
        fresh: leaves that no file holds, with the reason.
        leaves: type and shape of every leaf written, and where it came from.
    """

    parts: tuple[Part, ...]
    notes: tuple[str, ...]
    fresh: Mapping[str, str]
    leaves: Mapping[str, str]


def convert(
    config: ConfigDict,
    given: Mapping[str, str],
    out: Path,
    *,
    vae: Mapping[str, int] | None = None,
    vae_scale: float | None = None,
    dtype: np.dtype | None = None,
    allow: Sequence[str] = (),
    resize: bool = False,
    advance: Callable[..., None] = lambda done, total=None: None,
) -> Report:
    """Writes the initial checkpoint of a config.

    Args:
        config: of the task "unifluid". Its image tokenizer is replaced by the converted one.
        given: paths by the names of `PARTS`, and "vae".
        out: does not exist; it appears when all is written.
        vae: fields of `VaeConfig` that files do not tell.
        vae_scale: of the latents, where the files do not tell.
        dtype: of the parameters; by default that of the files, float32 for fresh ones.
        allow: see `transfer.fit`.
        resize: whether the vision tower's positions may be resized.
        advance: (bytes done, bytes in all) of progress.

    Raises:
        UserError: a file is damaged, does not fit, or holds what is no number.
    """
    config = copy.deepcopy(config)
    sources = {name: files.open_source(path) for name, path in given.items()}
    with finished(out) as partial:
        parts = []
        if "vae" in sources:
            folder = partial / "image_tokenizer"
            folder.mkdir()
            part = _write_vae(sources["vae"], folder, vae or {}, vae_scale, allow)
            parts.append(dataclasses.replace(part, path=given["vae"]))
            config.image_tokenizer.path = str(folder)
        assembled = assemble(config)
        if "vae" in sources:
            config.image_tokenizer.path = str(out / "image_tokenizer")
        patch = config.model.vision.patch_size
        more, report = write(
            assembled.model,
            {name: source for name, source in sources.items() if name != "vae"},
            partial,
            seed=config.seed,
            patch=patch,
            meta={"config": configs.to_json(config)},
            dtype=dtype,
            allow=allow,
            resize=resize,
            advance=advance,
        )
        parts += [dataclasses.replace(part, path=given[part.name]) for part in more]
        report = dataclasses.replace(report, parts=tuple(parts))
        text = json.dumps(dataclasses.asdict(report), indent=2) + "\n"
        (partial / "conversion.json").write_text(text)
    return report


def write(
    model: Functional,
    sources: Mapping[str, Any],
    workdir: Path,
    *,
    seed: int,
    patch: int,
    meta: Mapping[str, Any],
    dtype: np.dtype | None = None,
    allow: Sequence[str] = (),
    resize: bool = False,
    advance: Callable[..., None] = lambda done, total=None: None,
) -> tuple[list[Part], Report]:
    """Writes the parameters of a model as the checkpoint of step 0 of a folder.

    Args:
        sources: by the names of `PARTS`.
        patch: side of the vision tower's patches.
        meta: what the trainer stores beside a checkpoint.

    Other arguments and errors as for `convert`.
    """
    leaves = leaves_of(jax.eval_shape(model.init, jax.random.key(0)))
    fits, origin = {}, {}
    for name, source in sources.items():
        below = tuple(f"{subtree}/" for subtree in PARTS[name])
        whole = name == "paligemma"
        prefix = "" if whole else below[0]
        part = {
            path.removeprefix(prefix): leaf
            for path, leaf in leaves.items()
            if path.startswith(below)
        }
        positions = "vision/positions".removeprefix(prefix)
        fitted = transfer.fit(
            interop.TABLES[name],
            source,
            part,
            sizes=interop.patch_sizes(patch),
            allow=allow,
            resizable=(positions,) if resize else (),
        )
        fits[name] = (prefix, fitted)
        for path in part:
            if prefix + path in origin:
                raise UserError(
                    f"--{origin[prefix + path]} and --{name} both hold {prefix + path}: give one"
                )
            origin[prefix + path] = name
    fresh = {path: "in no file given" for path in leaves if path not in origin}
    types: dict[str, np.dtype] = {}
    for prefix, fitted in fits.values():
        types |= {prefix + path: found for path, found in fitted.dtypes().items()}
        fresh |= {prefix + path: why for path, why in fitted.fresh.items()}
    written = {
        path: Leaf(leaf.shape, dtype or types.get(path, leaf.dtype))
        for path, leaf in leaves.items()
    }
    total = sum(fitted.nbytes for _, fitted in fits.values())

    stored = {f"params/{path}": leaf for path, leaf in written.items()}
    with OrbaxSink(workdir / "state", stored) as sink:
        for prefix, fitted in fits.values():
            transfer.bring_in(
                fitted,
                sink,
                prefix=f"params/{prefix}",
                dtypes={
                    path: written[prefix + path].dtype
                    for path in fitted.leaves
                    if path not in fitted.fresh
                },
                resize=lambda x, rows: resize_positions(x, math.isqrt(rows)),
                advance=lambda done: advance(done, total),
            )
        for path, x in _initialised(model, seed, {path: leaves[path] for path in fresh}):
            x = transfer.cast(x, written[path].dtype, path)
            sink.write(Span(f"params/{path}"), x)
    sums = {path: [checksums.kind(leaf), sink.sums[path]] for path, leaf in stored.items()}
    with checkpoint.Checkpointer(workdir, keep=1) as checkpoints:
        checkpoints.adopt(0, workdir / "state", sums, meta)
    parts = [
        Part(
            name,
            str(fitted.source.path),
            fitted.table.name,
            sum(name in fitted.names for name in fitted.plan.theirs),
            fitted.nbytes,
        )
        for name, (_, fitted) in fits.items()
    ]
    notes = tuple(prefix + note for prefix, fitted in fits.values() for note in fitted.notes)
    lines = {
        path: f"{leaf}, {'fresh' if path in fresh else origin[path]}"
        for path, leaf in written.items()
    }
    return parts, Report((), notes, fresh, lines)


def _initialised(
    model: Functional, seed: int, leaves: Mapping[str, Leaf]
) -> Iterator[tuple[str, np.ndarray]]:
    """The values that these leaves have in a fresh model of this seed; nothing else is made."""
    for group in filter(None, portions(leaves, _FRESH_BYTES)):

        def make(key: jax.Array, group: list[str] = group) -> dict[str, jax.Array]:
            flat = trees.flatten(model.init(key))
            return {path: flat[path] for path in group}

        for path, x in jax.jit(make)(jax.random.key(seed)).items():
            yield path, np.asarray(x)


def convert_vae(
    path: str,
    out: Path,
    vae: Mapping[str, int],
    scale: float | None = None,
    allow: Sequence[str] = (),
) -> Part:
    """Writes an autoencoder as the folder of an image tokenizer; arguments as for `convert`."""
    source = files.open_source(path)
    with finished(out) as partial:
        part = _write_vae(source, partial, vae, scale, allow)
    return dataclasses.replace(part, path=path)


def _write_vae(
    source: Any,
    folder: Path,
    fields: Mapping[str, int],
    scale: float | None,
    allow: Sequence[str],
) -> Part:
    """The autoencoder as a folder of an image tokenizer."""
    sizes = vae_sizes.read(source) | dict(fields)
    try:
        config = VaeConfig(**sizes)
        # Every level and patch must divide the picture.
        if config.image_size % (2 ** (len(config.multipliers) - 1) * config.patch):
            raise ValueError(f"pictures of {config.image_size} do not divide into its tokens")
        abstract = jax.eval_shape(image_tokenizer.module(config).init, jax.random.key(0))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{source.path} makes no autoencoder with {sizes}: {error}") from None
    leaves = leaves_of(abstract)
    fitted = transfer.fit(interop.TABLES["vae"], source, leaves, allow=allow)
    if fitted.fresh:
        raise UserError(f"{source.path}: an autoencoder must be whole, {next(iter(fitted.fresh))}")
    types = fitted.dtypes()
    stored = {path: Leaf(leaf.shape, types[path]) for path, leaf in leaves.items()}
    stem = image_tokenizer.WEIGHTS.removesuffix(".safetensors")
    with safetensors.Writer(folder, stored, stem=stem, file_bytes=1 << 62) as sink:
        transfer.bring_in(fitted, sink)
    if scale is None:
        scale, shift = vae_sizes.scale_and_shift(source, config.latent_channels)
    else:
        shift = 0.0
    ones = np.ones(config.token_dim)
    image_tokenizer.write_config(
        folder,
        config,
        shift * ones,
        ones / scale,
        {"converted_from": source.path.name, "format": fitted.table.name, "scale": scale},
    )
    return Part("vae", str(source.path), fitted.table.name, len(fitted.plan.theirs), fitted.nbytes)


@contextmanager
def finished(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write to, which becomes `out` when all went well.

    What a killed conversion leaves is begun anew by the next one.

    Raises:
        UserError: the folder cannot be made.
    """
    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; set --out") from error
    try:
        yield partial
        partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write to {out}: {error.strerror}") from error
        raise
