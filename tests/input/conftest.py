"""A tiny TFDS data set in canonical form, a foreign one, and a stand-in for the image tokenizer."""

import dataclasses
import hashlib
import io
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from unifluid_jax.input import examples, latents
from unifluid_jax.input.records import canonical_features

SIZE = 16  # pixels; 8 x 8 patches: 4 vision tokens
IMAGE_TOKENS, TOKEN_DIM = 4, 3
TEXT = tfds.features.Text()
COLORS = ("red", "green", "blue", "teal", "brown")


def png(color, size=SIZE):
    file = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), color, np.uint8)).save(file, "PNG")
    return file.getvalue()


def toy(i):
    """Record i: pictures of grey values i and i + 100; not all have something for every task."""
    word = COLORS[i % len(COLORS)]
    return {
        "id": f"toy {i}",
        "images": [io.BytesIO(png(i)), io.BytesIO(png(i + 100))],
        "captions": [{"image": j, "text": f"a {word} shape {i} {j}"} for j in range(1 + i % 2)],
        "questions": [{"image": 1, "question": f"what color is {i}?", "answer": word}] * (i % 3),
        "edits": [{"source": 0, "target": 1, "instruction": f"make it {word}"}] * (i % 4 > 0),
        "color": word,
    }


class Toys(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=canonical_features((SIZE, SIZE, 3), color=TEXT)
        )

    def _split_generators(self, dl_manager):
        return {
            "train": ((f"{i:02}", toy(i)) for i in range(24)),
            "test": ((f"{i:02}", toy(i)) for i in range(24, 29)),
        }

    def _generate_examples(self):
        raise NotImplementedError


class Foreign(tfds.core.GeneratorBasedBuilder):
    """Nothing is named as in ours; pictures are larger."""

    VERSION = tfds.core.Version("2.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
        features = {
            "key": TEXT,
            "before": image,
            "after": {"image": image},
            "texts": tfds.features.Sequence({"raw": TEXT, "score": np.float32}),
            "qa": tfds.features.Sequence({"q": TEXT, "a": TEXT}),
            "instruction": TEXT,
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        def records():
            for i in range(6):
                yield (
                    i,
                    {
                        "key": f"f{i}",
                        "before": io.BytesIO(png(i, 40)),
                        "after": {"image": io.BytesIO(png(i + 50, 40))},
                        "texts": [{"raw": f"picture {i} {j}", "score": 0.5} for j in range(2)],
                        "qa": [{"q": f"which is {i}?", "a": "this"}],
                        "instruction": "make it bright",
                        "label": i % 2,
                    },
                )

        return {"train": records()}

    def _generate_examples(self):
        raise NotImplementedError


class StandIn:
    """Encodes pictures as the means of their quarters; decodes to flat quarters."""

    def __init__(self, name="stand-in"):
        self.fingerprint = hashlib.sha256(name.encode()).hexdigest()
        self.config = types.SimpleNamespace(
            image_size=SIZE, image_tokens=IMAGE_TOKENS, token_dim=TOKEN_DIM
        )
        self.channel_mean = np.array([1.0, 2.0, 3.0], np.float32)
        self.channel_std = np.array([2.0, 4.0, 8.0], np.float32)

    def encode(self, images):
        quarters = images.reshape(-1, 2, 8, 2, 8, 3).mean((2, 4)).reshape(-1, 4, 3)
        return quarters.astype(np.float32), np.full(quarters.shape, 0.5, np.float32)

    def pictures(self, tokens):
        raw = tokens * self.channel_std + self.channel_mean
        quarters = np.clip(np.rint(raw), 0, 255).astype(np.uint8).reshape(-1, 2, 2, 3)
        return quarters.repeat(8, 1).repeat(8, 2)


def build(builder, data_dir):
    tfds.disable_progress_bar()
    builder(data_dir=data_dir, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """A folder with the data sets and the latents of "toys". Not to be changed."""
    data_dir = tmp_path_factory.mktemp("data")
    build(Toys, data_dir)
    build(Foreign, data_dir)
    latents.build_cache("toys", data_dir, StandIn())
    return data_dir


@pytest.fixture
def own_toys(tmp_path):
    """A copy that a test may damage, without latents; several in one test are independent."""
    build(Toys, tmp_path)
    return tmp_path


@pytest.fixture
def stand_in():
    return StandIn


@dataclasses.dataclass
class World:
    """Config and sequencer of one test."""

    config: ConfigDict
    sequencer: examples.Sequencer


@pytest.fixture
def world():
    """Makes a World of a data folder and fields of `config.input`."""

    def make(data_dir, **fields):
        tasks = {"caption": 1.0, "vqa": 2.0, "generate": 2.0, "edit": 1.0}
        config = ConfigDict()
        config.seed = 0
        config.task = "unifluid"
        config.data_dir = str(data_dir)
        config.tokenizer = ConfigDict({"path": "unifluid_jax/assets/spm_small.model"})
        config.image_tokenizer = ConfigDict({"path": "nowhere"})
        config.model = ConfigDict(
            {
                "vision": {
                    "image_size": SIZE,
                    "patch_size": 8,
                    "width": 8,
                    "depth": 1,
                    "heads": 2,
                    "mlp_dim": 8,
                },
                "bidirectional_prefix": False,
            }  # fmt: skip
        )
        config.input = ConfigDict(
            {
                "batch_size": 3,
                "seq_len": 128,
                "max_images": 16,
                "max_text_targets": 64,
                "max_image_targets": 64,
                "max_encoded_images": 0,
                "max_prompt_tokens": 16,
                "text_drop": 0.3,
                "order": "random",
                "parallel": (1,),
                "edit_vision": True,
                "edit_latents": True,
                "max_corrupt": 0,
                "streams": 1,
                "workers": 0,
                "mixture": tuple(
                    {"dataset": "toys", "split": "train", "task": task, "weight": weight}
                    for task, weight in tasks.items()
                ),
                **fields,
            }
        )
        return World(config, examples.make_sequencer(config, StandIn()))

    return make
