"""Pretrained weights in, formats for finetuning elsewhere out.

    unifluid convert --vae=sd-vae-ft-mse --out=pretrained/sd_vae
    unifluid convert --config=CONFIG.py --paligemma=paligemma2-3b-pt-224 --out=pretrained/initial
    unifluid convert --checkpoint=runs/mine --to=paligemma --out=exported

In: one initial checkpoint, whose sizes are those of --config, of the parts that are given: --gemma
(Hugging Face, or the `gemma` package's), --siglip (Hugging Face, big_vision), --paligemma (both of
these and the projection between them) and --vae (diffusers, latent diffusion, MAR's KL-16). Formats
are found out from the files. What none of them holds is initialised from the config's seed, and
listed. `unifluid train --config.init_from=pretrained/initial` starts from it. --vae alone, without
--config, makes a folder that `config.image_tokenizer.path` can name.

Out: --to=unifluid, the whole model as safetensors and config.json, which `unifluid_jax.load` reads;
--to=paligemma, its understanding half for Hugging Face's transformers; --to=siglip, the vision
tower for transformers, also of a run of the task "siglip"; --to=hf_gemma and --to=gemma, the text
backbone for transformers and for the `gemma` package.

Everything is compared leaf by leaf before anything is read, and copied a layer at a time: see
docs/conversion.md.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import rich.console
import rich.progress
from absl import flags

from unifluid_jax import checkpoint, cli
from unifluid_jax.errors import UserError
from unifluid_jax.interop import export, initial
from unifluid_jax.interop.transfer import Advance

_CONFIG = cli.config_flag()
_OUT = flags.DEFINE_string("out", None, "folder to write; must not exist", required=True)
_GEMMA = flags.DEFINE_string("gemma", None, "in: weights of the text backbone")
_SIGLIP = flags.DEFINE_string("siglip", None, "in: weights of the vision tower")
_PALIGEMMA = flags.DEFINE_string(
    "paligemma", None, "in: weights of backbone, vision tower and the projection between them"
)
_VAE = flags.DEFINE_string("vae", None, "in: weights of the image tokenizer")
_VAE_SIZE = flags.DEFINE_integer("vae_size", 256, "side of the pictures that --vae is to make")
_VAE_PATCH = flags.DEFINE_integer(
    "vae_patch", None, "side of the square of latents in a token (2 for SD, 1 for MAR's KL-16)"
)
_VAE_SCALE = flags.DEFINE_float(
    "vae_scale", None, "what latents are multiplied with (0.18215 for SD, 0.2325 for MAR's KL-16)"
)
_VAE_GROUPS = flags.DEFINE_integer("vae_groups", None, "groups of the GroupNorms (32)")
_ALLOW = flags.DEFINE_multi_string(
    "allow", [], "in: regex of parameters that may be missing, or of foreign tensors left aside"
)
_RESIZE = flags.DEFINE_bool(
    "resize_positions", False, "in: fit the vision tower's positions to another picture size"
)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "out: workdir of a run, or a checkpoint")
_STEP = flags.DEFINE_integer("step", None, "out: which checkpoint, by default the latest")
_TO = flags.DEFINE_enum("to", None, list(export.FORMATS), "out: the format")
_EMA = flags.DEFINE_bool("ema", True, "out: averaged weights, or raw ones")
_VOCABULARY = flags.DEFINE_integer(
    "vocab_rows", None, "out: rows of the embedding table, cut or filled with zeros (ours)"
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "keep",
    ["keep", *initial.DTYPES],
    "type of what is written; keep: that of what is read",
)


def main(argv: list[str]) -> None:
    cli.positional(argv)
    out = Path(_OUT.value)
    if out.exists():
        raise UserError(f"{out} exists already: remove it or take another --out")
    given = {
        name: flag.value
        for name, flag in (
            ("gemma", _GEMMA),
            ("siglip", _SIGLIP),
            ("paligemma", _PALIGEMMA),
            ("vae", _VAE),
        )
        if flag.value is not None
    }
    if bool(_CHECKPOINT.value) == bool(given):
        raise UserError(
            "give either --checkpoint and --to, to convert out, or some of --gemma, --siglip, "
            "--paligemma and --vae, to convert in"
        )
    console = rich.console.Console(soft_wrap=True, highlight=False)
    dtype = None if _DTYPE.value == "keep" else initial.DTYPES[_DTYPE.value]
    if given:
        _convert_in(given, out, dtype, console)
        return
    if _TO.value is None:
        raise UserError(f"--to is missing: one of {', '.join(export.FORMATS)}")
    folder, step = checkpoint.locate(_CHECKPOINT.value, _STEP.value)
    with _progress("converting out") as advance:
        written = export.convert(
            folder,
            checkpoint.stored_config(folder),
            _TO.value,
            out,
            which="ema" if _EMA.value else "params",
            dtype=dtype,
            vocabulary=_VOCABULARY.value,
            advance=advance,
        )
    size = sum(leaf.nbytes for leaf in written.values())
    console.print(f"step {step}: {len(written):,} tensors, {size / 1e9:.2f} GB in {out}")


def _convert_in(
    given: Mapping[str, str], out: Path, dtype: np.dtype | None, console: rich.console.Console
) -> None:
    vae = {"image_size": _VAE_SIZE.value, "patch": _VAE_PATCH.value, "groups": _VAE_GROUPS.value}
    vae = {name: value for name, value in vae.items() if value is not None}
    if set(given) == {"vae"} and not _CONFIG.given:
        part = initial.convert_vae(given["vae"], out, vae, _VAE_SCALE.value, _ALLOW.value)
        _show(initial.Report((part,), (), {}, {}), console)
        console.print(f"image tokenizer in {out}")
        return
    with _progress("converting in") as advance:
        report = initial.convert(
            _CONFIG.value,
            given,
            out,
            vae=vae,
            vae_scale=_VAE_SCALE.value,
            dtype=dtype,
            allow=_ALLOW.value,
            resize=_RESIZE.value,
            advance=advance,
        )
    _show(report, console)
    console.print(f"initial checkpoint in {out}")


@contextmanager
def _progress(what: str) -> Iterator[Advance]:
    """A bar of the bytes that are done, on the terminal alone."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    console = rich.console.Console(file=sys.stderr)
    silent = not console.is_terminal  # a log wants no bar
    with rich.progress.Progress(*columns, console=console, transient=True, disable=silent) as bar:
        task = bar.add_task(what, total=None)

        def advance(done: int, total: int | None = None) -> None:
            bar.update(task, advance=done, total=total)

        yield advance


def _show(report: initial.Report, console: rich.console.Console) -> None:
    """What came from where, and what is fresh."""
    for part in report.parts:
        text = f"{part.name}: {part.tensors:,} tensors, {part.nbytes / 1e9:.3f} GB of {part.path}"
        console.print(f"{text} ({part.format})", markup=False)
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    for name, why in report.fresh.items():
        console.print(f"fresh from config.seed: {name} ({why})", markup=False)


if __name__ == "__main__":
    cli.run(main)
