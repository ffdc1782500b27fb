"""The model that comes with the package: how large it is, what its card says, and that it works."""

from pathlib import Path

import numpy as np
import pytest

import unifluid_jax
from tests.worlds import drawing
from unifluid_jax import pretrained
from unifluid_jax.evals import shapes

NAME = "unifluid-small"
MIB = 2**20


def test_it_is_small_and_its_card_has_scores():
    assert pretrained.names() == [NAME]
    folder = Path(pretrained.find(NAME))
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 16 * MIB
    card = (folder / "README.md").read_text()
    assert f'load("{NAME}")' in card
    for score in ("vqa/accuracy", "caption/exact", "generate/both", "compositional/both"):
        (line,) = (line for line in card.splitlines() if line.startswith(f"| {score} |"))
        assert 0 < float(line.split("|")[2]) <= 1


@pytest.fixture(scope="module")
def model():
    return unifluid_jax.load(NAME)


def test_it_reads(model):
    pictures = [drawing("red", "circle", 64), drawing("blue", "rectangle", 64)]
    assert model.caption(pictures) == ["a red circle", "a blue rectangle"]
    questions = ["what color is the shape?", "what shape is in the image?"]
    assert model.answer(pictures[0], questions) == ["red", "circle"]


def test_it_draws(model):
    drawn = model.generate(["a red circle", "a blue rectangle"], n=4, seed=0)
    judged = [shapes.judge(np.asarray(picture)) for picture in drawn]
    wanted = [("red", "circle")] * 4 + [("blue", "rectangle")] * 4
    right = [(seen.color, seen.shape) == pair for seen, pair in zip(judged, wanted, strict=True)]
    assert sum(right) >= 6, judged
