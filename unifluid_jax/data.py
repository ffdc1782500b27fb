"""Builds data sets, and shows what a model sees of them.

    unifluid data build easy_vqa openmoji
    unifluid data import my_pictures
    unifluid data latents --config=experiments/quickstart.py
    unifluid data show --config=experiments/quickstart.py

`build` fetches the source package, writes the records as TFDS ArrayRecord files with their
licence, and caches the latents of every picture under the image tokenizer. What is there already
is kept. NAME is a folder of `data/`, with a configuration where it has several
("openmoji/128px"). `import` makes a data set of a folder of your own, with pictures and one file of
JSON lines for each split (data/folder.py says how), and caches latents too. `latents` caches the
latents of all data that a config makes pictures of, under the config's image tokenizer. `show`
prints one batch of a config and writes its pictures.
"""

import contextlib
import importlib
import io
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import rich.console
import rich.progress
import tensorflow_datasets as tfds
from absl import flags
from ml_collections import ConfigDict

from data import folder as picture_folder
from unifluid_jax import cli, encoding, image_tokenizer
from unifluid_jax.errors import UserError, nearest
from unifluid_jax.input import latents, pipeline, show
from unifluid_jax.input.examples import make_sequencer
from unifluid_jax.input.records import Records, find_missing, open_builder

_DATA_DIR = flags.DEFINE_string("data_dir", "data_cache", "folder of the data sets")
_CONFIG = cli.config_flag()
_NAME = flags.DEFINE_string("name", None, "name of an imported data set, if not its folder's")
_LATENTS = flags.DEFINE_bool("latents", True, "cache the latents of the pictures too")
_IMAGE_TOKENIZER = flags.DEFINE_string(
    "image_tokenizer",
    str(Path(__file__).parent / "assets" / "tokenizer_small"),
    "folder of the image tokenizer that makes the latents",
)
_ROWS = flags.DEFINE_integer("rows", 2, "rows of the batch that `show` prints and draws")
_OUTPUT = flags.DEFINE_string("output", "batch.png", "file for the pictures of `show`")

DATASETS = ("easy_vqa", "easy_vqa_recolored", "openmoji")


def main(argv: list[str]) -> None:
    command, *names = cli.positional(argv, "build|import|latents|show", "[NAME]...")
    console = rich.console.Console(file=sys.stdout, soft_wrap=True, highlight=False)
    if command == "import":
        import_folders(names, console)
        return
    if command != "build":
        if names:
            raise UserError(f"`unifluid data {command}` takes no data set, only --config")
        {"latents": cache_config, "show": show_batch}[command](_CONFIG.value, console)
        return
    if not names:
        raise UserError(f"which data set? `unifluid data build {' '.join(DATASETS)}` builds all")
    # Everything that can be refused is refused before anything is fetched or written.
    builders = [make_builder(name, _DATA_DIR.value) for name in names]
    tokenizer = image_tokenizer.load(_IMAGE_TOKENIZER.value) if _LATENTS.value else None
    for name, builder in zip(names, builders, strict=True):
        written = build(builder, console)
        if tokenizer is not None:
            cache_latents(name, _DATA_DIR.value, tokenizer, console, anew=written)


def import_folders(folders: Sequence[str], console: rich.console.Console) -> None:
    """Makes data sets of folders, as `data.folder` describes them.

    Raises:
        UserError: none or too many folders, or what is in one is wrong.
    """
    if not folders:
        raise UserError("which folder? give one, with pictures and a train.jsonl")
    if _NAME.value and len(folders) > 1:
        raise UserError("--name is for one folder: import them one by one")
    tokenizer = image_tokenizer.load(_IMAGE_TOKENIZER.value) if _LATENTS.value else None
    tfds.disable_progress_bar()
    for path in folders:
        name = _NAME.value or Path(path).resolve().name
        with console.status(f"importing {path} ..."), contextlib.redirect_stdout(io.StringIO()):
            target = picture_folder.build(path, name, _DATA_DIR.value)
        info = open_builder(name, _DATA_DIR.value).info
        splits = ", ".join(f"{split} {i.num_examples:,}" for split, i in info.splits.items())
        console.print(f"{name} at {target}: {splits} records")
        if tokenizer is not None:
            cache_latents(name, _DATA_DIR.value, tokenizer, console, anew=True)


def make_builder(name: str, data_dir: str | Path) -> tfds.core.DatasetBuilder:
    """The builder of a data set of ours, by "name" or "name/configuration".

    Raises:
        UserError: there is no such data set or configuration, or a package it needs is missing.
    """
    dataset, _, config = name.partition("/")
    if dataset not in DATASETS:
        raise UserError(f'no data set "{dataset}" to build{nearest(dataset, DATASETS)}')
    try:
        module = importlib.import_module(f"data.{dataset}.{dataset}_dataset_builder")
    except ImportError as error:
        raise UserError(
            f"{dataset} needs the package {error.name}: pip install 'unifluid_jax[data]'"
        ) from error
    configs = [config.name for config in module.Builder.BUILDER_CONFIGS]
    if config and config not in configs:
        raise UserError(f'{dataset} has no configuration "{config}"{nearest(config, configs)}')
    return module.Builder(
        config=config or None, data_dir=Path(data_dir).absolute(), file_format="array_record"
    )


def build(builder: tfds.core.DatasetBuilder, console: rich.console.Console) -> bool:
    """Writes the data set unless it is there in full; a half-built one is made anew.

    Returns:
        Whether anything was written.
    """
    path = Path(builder.data_path)
    name = builder.info.full_name
    missing = find_missing(path)
    if missing is not None:
        if path.exists():
            console.print(f"{name} at {path} is half-built ({missing}): building it anew")
            shutil.rmtree(path)
        # TFDS renames its folder when all is written; what a killed run has left is in the way of
        # nobody.
        for rest in path.parent.glob(f"incomplete.*_{path.name}"):
            shutil.rmtree(rest)
        tfds.disable_progress_bar()
        # TFDS announces sizes that it does not know.
        with console.status(f"building {name} ..."), contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    splits = ", ".join(
        f"{split} {info.num_examples:,}" for split, info in builder.info.splits.items()
    )
    console.print(f"{name} at {path}: {splits} records; licence in {path / 'LICENSE'}")
    return missing is not None


def cache_latents(
    name: str,
    data_dir: str | Path,
    tokenizer: image_tokenizer.ImageTokenizer,
    console: rich.console.Console,
    anew: bool = False,
    fields: Mapping[str, str | Sequence[str]] | None = None,
) -> None:
    """Encodes every picture of a data set, unless that is done already.

    Args:
        anew: the records have just been written, older latents are of others.
        fields: of a foreign data set, as for `Records`.
    """
    if not anew:
        try:
            for split in open_builder(name, data_dir).info.splits:
                records = Records(name, split, data_dir, fields)
                latents.LatentCache(records, data_dir, tokenizer.fingerprint)
            console.print(f"{name}: latents in {latents.folder(name, data_dir)}")
            return
        except UserError as error:
            console.print(
                f"{name}: encoding the pictures, since {str(error).partition(': run ')[0]}"
            )
    columns = (
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("encoding {task.fields[name]}: {task.completed:,.0f} pictures"),
        rich.progress.TimeElapsedColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, name=name)
        folder = latents.build_cache(
            name, data_dir, tokenizer, lambda done: bar.advance(task, done), fields
        )
        done = bar.tasks[0].completed
    console.print(f"{name}: latents of {done:,.0f} pictures in {folder}")


def cache_config(config: ConfigDict, console: rich.console.Console) -> None:
    """Caches the latents of all data that a config makes pictures of."""
    tokenizer = image_tokenizer.load(config.image_tokenizer.path)
    wanted = {
        entry["dataset"]: entry.get("fields")
        for entry in pipeline.mixture(config)
        if entry["task"] in ("generate", "edit")
    }
    for name, fields in wanted.items():
        cache_latents(name, config.data_dir, tokenizer, console, fields=fields)


def show_batch(config: ConfigDict, console: rich.console.Console) -> None:
    """Prints a config's first batch and writes its pictures: what the model really sees."""
    rows, output = _ROWS.value, Path(_OUTPUT.value)
    if config.task == "tokenizer":
        (images,) = next(pipeline.picture_batches(config)).values()
        console.print(f"images: {images.dtype} {list(images.shape)}")
        show.grid(list(images[:60]), [("", "")] * len(images[:60]), output)
        console.print(f"pictures in {output}")
        return
    tokenizer = image_tokenizer.load(config.image_tokenizer.path)
    sequencer = make_sequencer(config, tokenizer)
    entries = pipeline.mixture(config)
    batch = next(pipeline.packed_batches(config, sequencer))
    if sequencer.encode_in_step:
        made = encoding.with_latents(tokenizer.config, encoding.constants(tokenizer), batch)
        batch |= jax.device_get(made)
    found = list(show.segments(batch, sequencer.layout))
    shown = [segment for segment in found if segment.row < rows]
    for segment in shown:
        entry = entries[segment.entry]
        console.print(
            f"row {segment.row} segment {segment.number} at {segment.start}: {entry['task']},"
            f" {entry['dataset']}/{entry['split']} record {segment.record}",
            style="bold",
        )
        for line in show.lines(segment, sequencer.text):
            console.print(line, markup=False)
    for name, array in sorted(batch.items()):
        console.print(f"{name}: {array.dtype} {list(array.shape)}", markup=False)
    console.print(show.fill(batch, config.input, sequencer.layout))
    console.print(show.proportions(found, entries))
    show.draw(shown, entries, sequencer.text, tokenizer, output)
    console.print(f"pictures of {len(shown)} examples in {output}")


if __name__ == "__main__":
    cli.run(main)
