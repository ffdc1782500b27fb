"""A tiny world for the trainer: a data set, an image tokenizer, configs, a batch, programs."""

import types

import jax
import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from tests.worlds import VAE, encoded
from unifluid_jax import image_tokenizer, sequence
from unifluid_jax.input import latents
from unifluid_jax.input.records import canonical_features

SIZE = VAE.image_size  # 16 pixels; 8 x 8 patches: 4 vision tokens
COLORS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220)}


def picture(i):
    """Halves of two colours, unlike for every i."""
    pixels = np.empty((SIZE, SIZE, 3), np.uint8)
    colors = list(COLORS.values())
    pixels[: 4 + i % 8], pixels[4 + i % 8 :] = colors[i % 3], colors[(i + 1) % 3]
    return pixels


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Records with something for every task, their texts of unlike lengths."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=canonical_features((SIZE, SIZE, 3)))

    def _split_generators(self, dl_manager):
        return {"train": map(self._record, range(16)), "test": map(self._record, range(16, 20))}

    def _record(self, i):
        upper, lower = list(COLORS)[i % 3], list(COLORS)[(i + 1) % 3]
        return i, {
            "id": f"tiny {i}",
            "images": [encoded(picture(i)), encoded(picture(i + 1))],
            "captions": [{"image": j, "text": "a " * (i % 3) + upper} for j in range(2)],
            "questions": [{"image": 0, "question": "what color is it?", "answer": upper}],
            "edits": [{"source": 0, "target": 1, "instruction": f"make it {lower}"}],
        }

    def _generate_examples(self):
        raise NotImplementedError


def build(folder):
    """The data set "tiny" with latents, and the image tokenizer that they were made with."""
    tfds.disable_progress_bar()
    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
    mean = np.linspace(-1, 1, VAE.token_dim).astype(np.float32)
    image_tokenizer.save(folder / "image_tokenizer", VAE, vae_params(), mean, mean + 2, {})
    loaded = image_tokenizer.load(folder / "image_tokenizer")
    # The trainer does not care what latents mean: these need no compilation.
    stand_in = types.SimpleNamespace(
        fingerprint=loaded.fingerprint, config=loaded.config, encode=_latents
    )
    latents.build_cache("tiny", folder, stand_in)


def _latents(images):
    means = images.reshape(-1, VAE.image_tokens, 192)[:, :, : VAE.token_dim] / 100.0
    return means.astype(np.float32), np.full(means.shape, 0.2, np.float32)


def vae_params(seed=0):
    """Random weights of the image tokenizer, of a variance that lets pictures through."""
    rng = np.random.default_rng(seed)
    abstract = jax.eval_shape(image_tokenizer.module(VAE).init, jax.random.key(0))

    def draw(leaf):
        values = rng.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        return values.astype(leaf.dtype)

    return jax.tree.map(draw, abstract)


def _shared(folder):
    config = ConfigDict()
    config.seed = 0
    config.data_dir = str(folder)
    config.init_from = ""
    config.optim = {
        "lr": 0.01,
        "warmup_steps": 2,
        "decay": "none",  # so that a longer run begins as a shorter one does
        "decay_steps": -1,
        "end_scale": 0.01,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-4,  # the sign of a gradient that is all rounding moves nothing
        "clip": 1.0,
        "weight_decay": 0.02,
        "mu_dtype": "float32",
        "nu_dtype": "float32",
        "rules": ((".*", {}),),
    }
    config.train = {
        "steps": 8,
        "accumulate": 1,
        "ema_decay": 0.9,
        "ema_warmup": False,
        "log_every": 1,
        "checkpoint_every": 4,
        "keep": 5,
        "keep_every": 0,
        "keep_best": "",
        "max_skipped": 0,
        "hang_seconds": 0,
        "hang_exit_seconds": 0,
    }
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1}
    config.evals = {}
    return config


def _finished(config, changes):
    for key, value in changes.items():
        *groups, field = key.split(".")
        node = config
        for group in groups:
            node = node[group]
        assert field in node, key
        node[field] = value
    return config.lock()


def unifluid(folder, **changes):
    """A config of the task "unifluid"; `changes` by dotted keys."""
    config = _shared(folder)
    config.task = "unifluid"
    config.tokenizer = {"path": "unifluid_jax/assets/spm_small.model"}
    config.image_tokenizer = {"path": str(folder / "image_tokenizer")}
    config.model = {
        "backbone": {
            "width": 16,
            "depth": 1,  # most of a test's time is compilation
            "mlp_dim": 32,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 4,
            "attention": ("local",),
            "window": 16,
            "scan_layers": False,
            "dtype": "float32",
        },
        "vision": {
            "image_size": SIZE,
            "patch_size": 8,
            "width": 16,
            "depth": 1,
            "heads": 2,
            "mlp_dim": 32,
            "dtype": "float32",
        },
        "head": {"width": 16, "depth": 1, "dtype": "float32"},
        "position_init": 1.0,
        "target_in_head": True,
        "bidirectional_prefix": False,
    }
    config.diffusion = {"process": "ddpm", "learned_variance": False}
    config.loss = {"text_weight": 0.2, "draws": 2, "text_chunk": 0, "latent_noise": 1.0}
    config.input = {
        "batch_size": 8,
        "seq_len": 48,
        "max_images": 4,
        "max_text_targets": 13,
        "max_image_targets": 12,
        "max_encoded_images": 0,
        "max_prompt_tokens": 12,
        "order": "random",
        "parallel": (1,),
        "text_drop": 0.1,
        "source_drop": 0.0,
        "edit_vision": True,
        "edit_latents": True,
        "streams": 1,
        "workers": 0,
        "max_corrupt": 0,
        "mixture": tuple(
            {"dataset": "tiny", "split": "train", "task": task, "weight": 1.0}
            for task in ("caption", "vqa", "generate", "edit")
        ),
    }
    config.sampling = {
        "batch_size": 4,
        "seed": 0,
        "guidance": 2.0,
        "temperature": 1.0,
        "order": "random",
        "schedule": "constant",
        "sampler": {"name": "ddpm", "steps": 2},
        "text": {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "max_tokens": 2},
    }
    return _finished(config, changes)


def tokenizer(folder, **changes):
    """A config of the task "tokenizer"; `changes` by dotted keys."""
    config = _shared(folder)
    config.task = "tokenizer"
    config.model = {
        "image_size": SIZE,
        "channels": 8,
        "multipliers": (1, 2),
        "blocks": 1,
        "latent_channels": 2,
        "groups": 4,
        "patch": 4,
        "dtype": "float32",
    }
    config.loss = {"kl_weight": 1e-3}
    config.input = {
        "batch_size": 8,
        "image_size": SIZE,
        "flip": True,
        "shift": 2,
        "streams": 1,
        "workers": 0,
        "max_corrupt": 0,
        "mixture": ({"dataset": "tiny", "split": "train", "weight": 1.0},),
    }
    return _finished(config, changes)


def siglip(folder, **changes):
    """A config of the task "siglip", its tower that of `unifluid`; `changes` by dotted keys."""
    config = _shared(folder)
    config.task = "siglip"
    config.tokenizer = {"path": "unifluid_jax/assets/spm_small.model"}
    config.model = {
        "vision": unifluid(folder).model.vision.to_dict(),
        "text": {"tokens": 8, "depth": 1, "heads": 2, "mlp_dim": 32},
    }
    config.input = {
        "batch_size": 8,
        "image_size": SIZE,
        "flip": False,
        "shift": 2,
        "streams": 1,
        "workers": 0,
        "max_corrupt": 0,
        "mixture": ({"dataset": "tiny", "split": "train", "weight": 1.0},),
    }
    return _finished(config, changes)


def score(kind, **fields):
    """An entry of `config.evals`, over two examples."""
    return {
        "type": kind,
        "dataset": "tiny",
        "split": "test",
        "limit": 2,
        "every": 0,
        "pictures": 2,
        **fields,
    }


def batch(layout, rows=8, length=48, pictures=4):
    """A packed batch of the four tasks that depends on no pipeline; rows have unlike targets."""
    rng = np.random.default_rng(0)

    def moments():
        shape = (layout.image_tokens, layout.token_dim)
        mean, std = rng.normal(size=shape), rng.uniform(0.1, 0.3, shape)
        return sequence.Latents(mean.astype(np.float32), std.astype(np.float32))

    def example(kind):
        words = rng.integers(10, 200, 4).tolist()
        image = rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
        order = rng.permutation(layout.image_tokens).astype(np.int32)
        if kind == "understand":
            return sequence.understanding(layout, image, words[:2], words[2:])
        if kind == "generate":
            return sequence.generation(layout, words, moments(), order)
        return sequence.editing(layout, image, moments(), words, moments(), order)

    kinds = ("understand", "generate", "edit")
    packed = [[example(kind) for kind in kinds[: 1 + row % 3]] for row in range(rows)]
    result = {"segment": np.zeros((rows, length), np.int32)}
    for name in vars(packed[0][0]).keys() - {"pictures"}:
        shape = (rows, pictures, SIZE, SIZE, 3)
        if name != "images":
            shape = (rows, length, *getattr(packed[0][0], name).shape[1:])
        fill = -1 if name in ("content_position", "target_position") else 0
        result[name] = np.full(shape, fill, getattr(packed[0][0], name).dtype)
    for row, parts in enumerate(packed):
        at = seen = 0
        for number, part in enumerate(parts, start=1):
            for name in result.keys() - {"segment"}:
                array = getattr(part, name)
                start = seen if name == "images" else at
                result[name][row, start : start + len(array)] = array if len(array) else 0
            result["segment"][row, at : at + len(part)] = number
            at, seen = at + len(part), seen + len(part.images)
    return result
