"""Exports a trained image tokenizer from a checkpoint, with the PSNR it reaches.

    unifluid tokenizer --workdir=runs/tokenizer_small --out=unifluid_jax/assets/tokenizer_small

Writes config.json and weights.safetensors (averaged weights, float16) to --out, which is what
`config.image_tokenizer.path` of a UniFluid names. The mean and standard deviation of every channel
are taken over pictures of the training mixture; the scores are those of config.evals, computed
with what was written.
"""

import shutil
from pathlib import Path

import jax
import numpy as np
import rich.console
from absl import flags
from jaxtyping import Float
from ml_collections import ConfigDict

from unifluid_jax import checkpoint, cli, evals, image_tokenizer, tasks
from unifluid_jax.errors import UserError
from unifluid_jax.image_tokenizer import ImageTokenizer
from unifluid_jax.input import pipeline

_WORKDIR = flags.DEFINE_string("workdir", None, "Run to export from.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint, by default the latest.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist.", required=True)
_PICTURES = flags.DEFINE_integer("pictures", 4096, "Pictures to take channel statistics over.")
_CONFIG = cli.config_flag(stored=lambda: checkpoint.stored_config(_WORKDIR.value, _STEP.value))


def main(argv: list[str]) -> None:
    cli.positional(argv)
    config, out = _CONFIG.value, Path(_OUT.value)
    if config.task != "tokenizer":
        raise UserError(f'{_WORKDIR.value} is a run of the task "{config.task}", not "tokenizer"')
    if out.exists():
        raise UserError(f"{out} exists already: remove it or take another --out")
    if _PICTURES.value < 1:
        raise UserError(f"--pictures is {_PICTURES.value}: set it to 1 or more")
    wanted = evals.check(config)
    task = tasks.make(config)
    abstract = jax.eval_shape(task.model.init, jax.random.key(0))
    tokenizer = task.subject(
        checkpoint.restore_params(_WORKDIR.value, abstract, "ema", _STEP.value)
    )
    _, step = checkpoint.locate(_WORKDIR.value, _STEP.value)
    mean, std = channel_statistics(tokenizer, config, _PICTURES.value)
    data = sorted({entry["dataset"] for entry in pipeline.mixture(config)})
    info = {"step": step, "data": data}
    # Scored as it will be read, and put in place when all is done.
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)

    def write(info: dict) -> ImageTokenizer:
        image_tokenizer.save(partial, tokenizer.config, tokenizer.params, mean, std, info)
        return image_tokenizer.load(partial)

    written = write(info)
    scores = {}
    console = rich.console.Console(soft_wrap=True, highlight=False)
    for name, c in wanted.items():
        outcome = evals.run_one(config, written, c)
        scores |= {f"{name}/{score}": round(x, 2) for score, x in outcome.scores.items()}
        console.print(f"{name}: {outcome.scores['psnr']:.2f} dB over {outcome.count} pictures")
    write(info | {"scores": scores})
    partial.rename(out)
    console.print(f"image tokenizer of step {step} in {out}")


def channel_statistics(
    tokenizer: ImageTokenizer, config: ConfigDict, pictures: int
) -> tuple[Float[np.ndarray, "C"], Float[np.ndarray, "C"]]:
    """Mean and standard deviation of every dim of a token, of samples of the posterior.

    Args:
        pictures: number of random pictures of the training mixture, at least.
    """
    batches = pipeline.picture_batches(config)
    images = []
    while sum(map(len, images)) < pictures:
        images.append(next(batches)["images"])
    means, stds = tokenizer.encode(np.concatenate(images))
    mean = means.mean((0, 1))
    # The variance of a sample: that of the means, and the mean of the posterior's own.
    variance = np.square(means - mean).mean((0, 1)) + np.square(stds).mean((0, 1))
    return mean, np.sqrt(variance)


if __name__ == "__main__":
    cli.run(main)
