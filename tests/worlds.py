"""Small worlds for tests: image tokenizer, config, model, checkpoint, data set, program."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from unifluid_jax import checkpoint, image_tokenizer, inference
from unifluid_jax import config as configs
from unifluid_jax.evals import shapes
from unifluid_jax.input.records import canonical_features
from unifluid_jax.interop import export
from unifluid_jax.models.vae import VaeConfig
from unifluid_jax.parts import assemble

TOKENIZER = str(Path(__file__).parents[1] / "unifluid_jax" / "assets" / "spm_small.model")
# 4 image tokens of 32 dims.
VAE = VaeConfig(
    image_size=16, channels=8, multipliers=(1, 2), blocks=1, latent_channels=2, groups=4, patch=4
)


def make_params(model, seed=0, size=0.3):
    """Random parameters of a `Functional`, none of them zero; nothing is compiled for them."""
    rng = np.random.default_rng(seed)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, size, x.shape).astype(np.float32)), abstract
    )


def save_image_tokenizer(path):
    """Random weights; channel statistics that cannot be overlooked."""
    params = make_params(image_tokenizer.module(VAE))
    mean = np.linspace(-1, 1, VAE.token_dim).astype(np.float32)
    image_tokenizer.save(path, VAE, params, mean, mean + 2, {"note": "random"})


def make_config(folder, evals=None):
    """A config of the task "unifluid" whose image tokenizer is written to `folder`."""
    save_image_tokenizer(folder / "image_tokenizer")
    config = ConfigDict()
    config.task = "unifluid"
    config.init_from = ""
    config.seed = 0
    config.data_dir = str(folder)
    config.tokenizer = {"path": TOKENIZER}
    config.image_tokenizer = {"path": str(folder / "image_tokenizer")}
    config.model = {
        "backbone": {
            "width": 16, "depth": 1, "mlp_dim": 16, "heads": 2, "kv_heads": 1, "head_dim": 8,
            "scan_layers": False,
        },
        "vision": {
            "image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2, "mlp_dim": 16,
        },
        "head": {"width": 16, "depth": 1},
        "position_init": 0.02,
        "target_in_head": True,
        "bidirectional_prefix": False,
    }  # fmt: skip
    config.diffusion = {"process": "flow"}
    config.input = {
        "max_prompt_tokens": 16,
        "order": "random",
        "parallel": (1,),
        "text_drop": 0.1,
        "source_drop": 0.0,
        "edit_vision": True,
        "edit_latents": True,
        "batch_size": 2,
        "seq_len": 32,
        "mixture": ({"dataset": "drawings", "split": "test", "task": "vqa", "weight": 1.0},),
    }
    config.sampling = {
        "batch_size": 2,
        "seed": 0,
        "guidance": 2.0,
        "temperature": 1.0,
        "order": "random",
        "schedule": "linear",
        "sampler": {"steps": 2},
        "text": {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "max_tokens": 4},
    }
    config.evals = evals or {}
    return config.lock()


def make_model(folder):
    parts = assemble(make_config(folder))
    return inference.Model(parts, make_params(parts.model))


def save_checkpoint(workdir, config, step=3):
    """A checkpoint with unlike parameters and averages; returns both."""
    parts = assemble(config)
    params, ema = make_params(parts.model, 1), make_params(parts.model, 2)
    state = {"step": jnp.asarray(step), "params": params, "ema": ema, "opt_state": {}}
    with checkpoint.Checkpointer(workdir, keep=1) as checkpoints:
        checkpoints.save(step, state, {}, {"config": configs.to_json(config)})
    return params, ema


def export_checkpoint(workdir, out, step=None, **options):
    """The folder that `unifluid convert --to=unifluid` makes of a checkpoint."""
    folder, _ = checkpoint.locate(workdir, step)
    export.convert(folder, checkpoint.stored_config(folder), "unifluid", out, **options)


# --- data ---

COLORS = ("red", "blue", "green")
BACKGROUND = (240, 246, 235)


def drawing(color, shape, size=32):
    """A picture as easy-vqa draws them, one shape of one colour in the middle."""
    alpha = shapes.draw(shape, (size / 2, size / 2), (size / 2, size / 2), (size, size))[..., None]
    pixels = (1 - alpha) * BACKGROUND + alpha * shapes.PALETTE[color]
    return np.rint(pixels).astype(np.uint8)


def encoded(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    file.seek(0)
    return file


def combination(i):
    """Colour and shape of record i: nine of them, all different."""
    return COLORS[i % 3], shapes.SHAPES[i // 3 % 3]


class Drawings(tfds.core.GeneratorBasedBuilder):
    """Split "test": nine pictures, each twice captioned, asked and recoloured; "bare": nothing."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=canonical_features((32, 32, 3)), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {
            "test": ((i, self._record(i)) for i in range(9)),
            "bare": ((i, {**self._record(i), "captions": [], "edits": []}) for i in range(2)),
        }

    def _record(self, i):
        color, shape = combination(i)
        other = COLORS[(i + 1) % 3]
        texts = (f"a {color} {shape}", f"{shape} in {color}")
        asked = {"what color is it?": color, "what shape is it?": shape}
        return {
            "id": f"drawing {i}",
            "images": [encoded(drawing(color, shape)), encoded(drawing(other, shape))],
            "captions": [{"image": 0, "text": text} for text in texts],
            "questions": [{"image": 0, "question": q, "answer": a} for q, a in asked.items()],
            "edits": [{"source": 0, "target": 1, "instruction": f"make it {other}"}],
        }

    def _generate_examples(self):
        raise NotImplementedError


def build_drawings(data_dir):
    tfds.disable_progress_bar()
    Drawings(data_dir=data_dir, file_format="array_record").download_and_prepare()


# --- programs ---

# Answers lines of arguments with exit code and output, so that Python and JAX start only once.
_SERVER = """
import contextlib, io, json, sys, traceback
import jax
jax.config.update("jax_disable_most_optimizations", True)
from absl import flags
from unifluid_jax import __main__, cli

command, replies = sys.argv[1], sys.stdout
for line in sys.stdin:
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    vars(cli._config_flag or cli).pop("value", None)
    sys.argv = ["unifluid", command, *json.loads(line)]
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            __main__.main()
        except SystemExit as end:
            code = end.code or 0
        except Exception:
            code = 1
            traceback.print_exc()
    print(json.dumps([code, out.getvalue(), err.getvalue()]), file=replies, flush=True)
"""


class Program:
    """`unifluid COMMAND ...`, many calls in one process of its own, none knowing of the others."""

    def __init__(self, command):
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "JAX_ENABLE_COMPILATION_CACHE": "false",
            },
        )

    def __call__(self, *arguments):
        """Exit code, standard output and standard error."""
        self._process.stdin.write(json.dumps([str(a) for a in arguments]) + "\n")
        self._process.stdin.flush()
        return tuple(json.loads(self._process.stdout.readline()))

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
