"""Every score on models whose right answers are known; which scores run, when, on what."""

import dataclasses
import itertools
import re
import sys
import types

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from tests import worlds
from unifluid_jax import evals, image_tokenizer
from unifluid_jax.contrastive import Contrastive
from unifluid_jax.errors import UserError
from unifluid_jax.evals import base, caption, grid, judged
from unifluid_jax.evals.base import Tile
from unifluid_jax.image_tokenizer import ImageTokenizer
from unifluid_jax.inference import Model

EVERY = {
    "vqa": {"type": "vqa"},
    "caption": {"type": "caption"},
    "generate": {"type": "generate", "judge": True},
    "edit": {"type": "edit", "judge": True},
    "reconstruction": {"type": "reconstruction"},
    "match": {"type": "match"},
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    worlds.build_drawings(folder)
    return folder


@pytest.fixture
def config(data_dir, monkeypatch):
    """All evaluations, named by their types; CIDEr counts as installed."""
    monkeypatch.setattr(caption, "_scorer", Scorer)
    shared = {"dataset": "drawings", "split": "test", "limit": 0, "every": 0, "pictures": 3}
    return ConfigDict(
        {
            "data_dir": str(data_dir),
            "input": {"edit_vision": True, "edit_latents": True},
            "evals": {name: {**shared, **fields} for name, fields in EVERY.items()},
        }
    )


class Scorer:
    """In the place of pycocoevalcap's: how many captions it was given."""

    def __init__(self):
        self.given = []

    def __iadd__(self, pair):
        self.given.append(pair)
        return self

    def compute_score(self):
        return len(self.given), None


class Fake(Model):
    """Says and draws what the functions given here make of a request."""

    def __init__(self, say=None, paint=None, noise=0):
        self.say, self.paint = say, paint
        size = types.SimpleNamespace(image_size=32)
        self.parts = types.SimpleNamespace(
            images=types.SimpleNamespace(
                config=size, encode=lambda x: (x, x), decode=lambda x: x ^ noise
            )
        )

    def answer(self, images, questions):
        return [self.say(i, image, q) for i, (image, q) in enumerate(zip(images, questions))]  # noqa: B905

    def caption(self, images):
        return [self.say(i, image, None) for i, image in enumerate(images)]

    def generate(self, prompts):
        return [Image.fromarray(self.paint(i, prompt)) for i, prompt in enumerate(prompts)]

    def edit(self, images, instructions):
        return self.generate(instructions)


class FakeSiglip(Contrastive):
    """Its best caption of a picture is what the function given here makes of it."""

    image_size = 32

    def __init__(self, say):
        object.__setattr__(self, "say", say)

    def logits(self, images, captions):
        said = [self.say(image) for image in images]
        return np.array([[float(s == caption) for caption in captions] for s in said])


def outcome(config, name, model, **fields):
    config.evals[name].update(fields)
    return evals.run_one(config, model, evals.check(config)[name])


def truth(image, question=None):
    """What the judge sees: drawings are as easily told apart as this."""
    seen = judged.shapes.judge(image)
    if question is None:
        return f"a {seen.color} {seen.shape}"
    return seen.color if "color" in question else seen.shape


# --- captions to choose from ---


def test_a_siglip_is_scored_by_the_captions_it_chooses(config):
    # Every drawing has two captions, so it comes twice; all 18 are there to choose from.
    found = outcome(config, "match", FakeSiglip(truth))
    assert found.scores == {"accuracy": 0.5, "captions": 18.0} and found.count == 18
    assert found.tiles[0].text == "a red circle"
    forms = itertools.cycle((truth, lambda image: "{2} in {1}".format(*truth(image).split())))
    found = outcome(config, "match", FakeSiglip(lambda image: next(forms)(image)))
    assert found.scores == {"accuracy": 1.0, "captions": 18.0}
    found = outcome(config, "match", FakeSiglip(lambda image: "a red circle"))
    assert found.scores == {"accuracy": pytest.approx(1 / 18), "captions": 18.0}
    assert re.fullmatch(r"a red circle \(not .+\)", found.tiles[-1].text)


@pytest.mark.parametrize(
    ("subject", "name", "message"),
    [
        (FakeSiglip(truth), "vqa", "a SigLIP cannot be scored by the type vqa: use match"),
        (Fake(), "match", "a UniFluid cannot be scored by the type match: use caption or edit or"),
    ],
)
def test_a_subject_that_cannot_do_it_is_named(config, subject, name, message):
    with pytest.raises(UserError, match=message):
        outcome(config, name, subject)


# --- answers ---


@pytest.mark.parametrize(
    ("say", "accuracy"),
    [
        (lambda i, image, question: truth(image, question), 1.0),
        (lambda i, image, question: f" {truth(image, question).upper()} ", 1.0),
        (lambda i, image, question: truth(image, question) + "s", 0.0),
        (lambda i, image, question: "", 0.0),
        (lambda i, image, question: truth(image, "color"), 0.5),
    ],
)
def test_vqa_is_the_share_of_right_answers(config, say, accuracy):
    found = outcome(config, "vqa", Fake(say))
    assert found.scores == {"accuracy": accuracy}
    assert found.count == 18 and found.seconds > 0


def test_vqa_shows_the_truth_beside_a_wrong_answer(config):
    found = outcome(config, "vqa", Fake(lambda i, image, question: truth(image, "color")))
    assert len(found.tiles) == 3
    assert found.tiles[0].text == "what color is it? red"
    assert found.tiles[-1].text == "what shape is it? green (not triangle)"
    np.testing.assert_array_equal(found.tiles[0].picture, worlds.drawing("red", "circle"))


# --- captions ---


@pytest.mark.parametrize(
    ("say", "exact"),
    [
        (lambda i, image, _: truth(image), 1.0),
        (lambda i, image, _: "{2} IN {1}!".format(*truth(image).split()), 1.0),
        (lambda i, image, _: truth(image) + " there", 0.0),
        (lambda i, image, _: truth(image) if i < 3 else "", 1 / 3),
    ],
)
def test_a_caption_is_right_when_it_is_one_of_the_references(config, say, exact):
    found = outcome(config, "caption", Fake(say))
    # Nine pictures of two captions each: every picture is asked for once.
    assert found.scores == {"exact": pytest.approx(exact), "cider": 9}
    assert found.count == 9
    last = found.tiles[-1].text
    assert last == say(8, worlds.drawing("green", "triangle"), None) + (
        "" if exact == 1 else " (not a green triangle)"
    )


def test_cider_gets_lower_case_words_and_all_references(config, monkeypatch):
    scorer = Scorer()
    monkeypatch.setattr(caption, "_scorer", lambda: scorer)
    outcome(config, "caption", Fake(lambda i, image, _: "A red, red Circle."))
    assert scorer.given[0] == ("a red red circle", ["a red circle", "circle in red"])
    assert len(scorer.given) == 9


def test_cider_of_the_library():
    pytest.importorskip("pycocoevalcap.cider.cider_scorer")
    references = [["a red circle"], ["a blue square of wood"], ["two green dots"]]
    right = [texts[0] for texts in references]
    best = caption.cider(right, references)
    half = caption.cider(["a red circle", "a blue square", ""], references)
    assert 5 < best <= 10 and 0 < half < best
    assert caption.cider([text.upper() + "!" for text in right], references) == best
    assert caption.cider(["nothing", "of", "it"], references) < 0.5
    more = [[*texts, "something else"] for texts in references]
    assert 0 < caption.cider(right, more) < best


@pytest.mark.parametrize(
    ("text", "words"),
    [("A red  circle.", "a red circle"), ("it's 5_6", "it s 5 6"), ("Ä-b", "ä b"), ("!", "")],
)
def test_words_are_what_letters_and_digits_make(text, words):
    assert caption.words(text) == words


def test_without_the_package_captions_are_refused_before_training(config, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider_scorer", None)
    with pytest.raises(UserError, match="CIDEr needs the package pycocoevalcap: pip install"):
        evals.check(config)


# --- pictures ---


def drawn(prompt, **changes):
    color, shape = prompt.split()[-2:] if prompt.startswith("a ") else prompt.split(" in ")[::-1]
    return worlds.drawing(**{"color": color, "shape": shape, **changes})


@pytest.mark.parametrize(
    ("paint", "color", "shape", "both"),
    [
        (lambda i, prompt: drawn(prompt), 1, 1, 1),
        (lambda i, prompt: drawn(prompt, color="yellow"), 0, 1, 0),
        (lambda i, prompt: drawn(prompt, shape="circle"), 1, 1 / 3, 1 / 3),
        (
            lambda i, prompt: drawn(prompt, **({"color": "teal"} if i % 2 else {})),
            1 / 2,
            1,
            1 / 2,
        ),
        (lambda i, prompt: np.full((32, 32, 3), 240, np.uint8), 0, 0, 0),
    ],
)
def test_generated_pictures_are_judged_by_what_they_show(config, paint, color, shape, both):
    found = outcome(config, "generate", Fake(paint=paint))
    assert found.scores == pytest.approx({"color": color, "shape": shape, "both": both})
    assert found.count == 18
    assert found.tiles[0].text == "a red circle"
    assert found.tiles[-1].text == "triangle in green"
    np.testing.assert_array_equal(found.tiles[0].picture, paint(0, "a red circle"))


def test_without_judge_pictures_are_only_shown(config):
    gray = lambda i, prompt: np.full((32, 32, 3), 240, np.uint8)  # noqa: E731
    found = outcome(config, "generate", Fake(paint=gray), judge=False)
    assert found.scores == {} and len(found.tiles) == 3


def test_a_truth_that_shows_nothing_cannot_be_judged():
    right, empty = worlds.drawing("red", "circle"), np.full((32, 32, 3), 240, np.uint8)
    assert judged.agreement([empty], [right]) == {"color": 0, "shape": 0, "both": 0}
    with pytest.raises(UserError, match="in a true picture: set judge=False"):
        judged.agreement([right], [empty])


def recolored(i, instruction, **changes):
    shape = worlds.combination(i)[1]
    return drawn(f"a {instruction.split()[-1]} {shape}", **changes)


def test_right_edits_reach_the_limit_and_wrong_ones_do_not(config):
    right = outcome(config, "edit", Fake(paint=recolored))
    assert right.scores == {"color": 1, "shape": 1, "both": 1, "psnr": 100, "psnr_limit": 100}
    assert right.count == 9
    assert right.tiles[0].text == "make it blue (source, edited, true)"
    source, target = worlds.drawing("red", "circle"), worlds.drawing("blue", "circle")
    np.testing.assert_array_equal(right.tiles[0].picture, base.beside(source, target, target))
    wrong = outcome(config, "edit", Fake(paint=lambda i, text: recolored(i, text, color="black")))
    assert wrong.scores["color"] == wrong.scores["both"] == 0 and wrong.scores["shape"] == 1
    assert wrong.scores["psnr"] < 20 < wrong.scores["psnr_limit"]


def test_the_limit_of_edits_is_the_image_tokenizers(config):
    # The lowest bit flipped everywhere: an error of 1.
    found = outcome(config, "edit", Fake(paint=recolored, noise=1), judge=False)
    assert found.scores == {"psnr": 100, "psnr_limit": pytest.approx(20 * np.log10(255))}


def test_reconstruction_is_the_image_tokenizers_psnr(config):
    exact = outcome(config, "reconstruction", Fake())
    assert exact.scores == {"psnr": 100} and exact.count == 9
    found = outcome(config, "reconstruction", Fake(noise=1))
    assert found.scores == {"psnr": pytest.approx(20 * np.log10(255))}
    assert [tile.text for tile in found.tiles] == ["48.1 dB"] * 3
    first = worlds.drawing("red", "circle")
    np.testing.assert_array_equal(found.tiles[0].picture, base.beside(first, first ^ 1))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    worlds.save_image_tokenizer(folder)
    return image_tokenizer.load(folder)


def test_an_image_tokenizer_is_scored_by_reconstruction_alone(config, tokenizer):
    assert isinstance(tokenizer, ImageTokenizer)
    found = outcome(config, "reconstruction", tokenizer, limit=4)
    assert found.count == 4 and 0 < found.scores["psnr"] < 30
    assert found.tiles[0].picture.shape == (16, 33, 3)  # 32 pixels resized to 16
    with pytest.raises(UserError, match="cannot be scored by the type vqa: use reconstruction"):
        outcome(config, "vqa", tokenizer)


# --- which examples ---


@pytest.mark.parametrize("name", EVERY)
def test_a_limit_takes_some_and_always_the_same(config, name):
    def read(limit):
        config.evals[name].limit = limit
        c = evals.check(config)[name]
        examples = evals.TYPES[name].read(config, c)
        return [e.tobytes() if name == "reconstruction" else (e.prompt, e.answer) for e in examples]

    everything, some = read(0), read(4)
    assert len(everything) == (9 if name in ("edit", "reconstruction") else 18)
    assert len(some) == 4 and some == read(4)
    assert read(1000) == everything
    rest = iter(everything)
    assert all(example in rest for example in some), "in the order of the split"
    assert some != everything[:4]


@pytest.mark.parametrize(
    ("count", "pictures", "indices"),
    [(10, 3, [0, 4, 9]), (3, 10, [0, 1, 2]), (5, 0, []), (1, 1, [0]), (9, 2, [0, 8])],
)
def test_shown_examples_are_spread_over_all(count, pictures, indices):
    assert base.shown(count, pictures) == indices


def test_beside_leaves_a_white_gap():
    black = np.zeros((32, 8, 3), np.uint8)
    joined = base.beside(black, black + 9, black)
    assert joined.shape == (32, 28, 3)
    np.testing.assert_array_equal(
        joined[0, :, 0], [0] * 8 + [255] * 2 + [9] * 8 + [255] * 2 + [0] * 8
    )


def test_nothing_to_evaluate_is_named(config):
    with pytest.raises(UserError, match="nothing to evaluate in drawings/bare for the type edit"):
        outcome(config, "edit", Fake(paint=recolored), split="bare")


# --- which evaluations ---


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("vqa", {"type": "vqs"}, 'evals.vqa is of unknown type "vqs" .did you mean "vqa"'),
        ("vqa", {"limits": 3}, 'evals.vqa has no field "limits" .did you mean "limit"'),
        ("vqa", {"judge": True}, 'evals.vqa has no field "judge"'),
        ("vqa", {"dataset": "drawing"}, "data set drawing is not built in .*: run `unifluid data"),
        ("vqa", {"limit": -1}, "config.evals.vqa.limit is -1: set it to 0 or more"),
        ("edit", {"every": -5}, "config.evals.edit.every is -5: set it to 0 or more"),
    ],
)
def test_mistakes_in_evals_are_found_before_a_run(config, name, fields, message):
    config.evals[name].update(fields)
    with pytest.raises(UserError, match=message):
        evals.check(config)


@pytest.mark.parametrize("field", ["dataset", "limit", "every", "judge", "type"])
def test_a_missing_field_is_named(config, field):
    del config.evals.generate[field]
    with pytest.raises(
        UserError,
        match="unknown type" if field == "type" else f'generate lacks the field "{field}"',
    ):
        evals.check(config)


def test_an_unknown_split_is_named(config):
    with pytest.raises(UserError, match='data set drawings has no split "tset"'):
        outcome(config, "vqa", Fake(), split="tset")


def test_due_is_every_so_many_steps_and_at_the_end(config):
    config.evals.vqa.every, config.evals.edit.every = 10, 15
    made = evals.check(config)
    due = {step: sorted(evals.due(made, step, 35)) for step in range(1, 36)}
    assert {step: names for step, names in due.items() if names} == {
        10: ["vqa"], 15: ["edit"], 20: ["vqa"], 30: ["edit", "vqa"], 35: ["edit", "vqa"],
    }  # fmt: skip
    assert evals.due(made, 10, 35)["vqa"] == made["vqa"]


def test_run_names_scores_and_makes_a_sheet_of_each_with_pictures(config):
    config.evals.vqa.pictures = 0
    checked = evals.check(config)
    chosen = {"vqa": checked["vqa"], "mine": checked["reconstruction"]}
    scores, sheets = evals.run(config, Fake(lambda *asked: "red"), chosen)
    assert scores == {"vqa/accuracy": pytest.approx(1 / 6), "mine/psnr": 100}
    assert list(sheets) == ["mine"] and sheets["mine"].ndim == 3


def test_foreign_fields_reach_the_data_as_plain_values(config):
    fields = {"images": ("images",), "captions": "captions/text"}
    config.evals.caption.fields = ConfigDict(fields)
    c = evals.check(config)["caption"]
    assert dataclasses.asdict(c)["fields"] == fields and type(c.fields) is dict
    assert outcome(config, "caption", Fake(lambda i, image, _: truth(image))).scores["exact"] == 1


# --- sheets ---


def white(sheet):
    return (sheet == 255).all(axis=-1)


def test_a_sheet_has_tiles_in_rows_each_with_its_text():
    tiles = [Tile(np.full((16, 16, 3), 10 * i, np.uint8), f"tile {i}") for i in range(1, 6)]
    sheet = grid.sheet({"": tiles}, columns=3)
    height = 128 + 15 + 10
    assert sheet.shape == (10 + 2 * height, 10 + 3 * 138, 3)
    for i in range(5):
        y, x = 10 + i // 3 * height, 10 + i % 3 * 138
        np.testing.assert_array_equal(
            sheet[y : y + 128, x : x + 128], np.full((128, 128, 3), 10 * i + 10)
        )
        assert not white(sheet[y + 128 : y + height - 10, x : x + 128]).all(), "its text"
    assert white(sheet[:10]).all() and white(sheet[:, :8]).all()
    assert white(sheet[10 + height :, 10 + 2 * 138 :]).all(), "no sixth tile"


def test_sections_stand_below_each_other_under_their_titles():
    tile = Tile(np.zeros((128, 128, 3), np.uint8), "x")
    first, second = grid.sheet({"first": [tile]}), grid.sheet({"": [tile, tile]})
    sheet = grid.sheet({"first": [tile], "empty": [], "": [tile, tile]})
    assert first.shape == (10 + 26 + 153, 148, 3)
    assert sheet.shape == (first.shape[0] + second.shape[0], second.shape[1], 3)
    np.testing.assert_array_equal(sheet[: len(first), : first.shape[1]], first)
    np.testing.assert_array_equal(sheet[len(first) :], second)
    assert not white(first[10:36]).all()


def test_a_long_title_and_a_long_text_are_not_cut():
    small, large = np.zeros((64, 64, 3), np.uint8), np.zeros((200, 300, 3), np.uint8)
    sheet = grid.sheet({"a title that is longer than one picture is wide": [Tile(small, "x")]})
    assert sheet.shape[1] > 300 and white(sheet[:, -10:]).all()
    one = grid.sheet({"": [Tile(small, "word")]})
    many = grid.sheet({"": [Tile(small, "word " * 20)]})
    assert many.shape[1] == one.shape[1] and many.shape[0] > one.shape[0] + 45
    # Large pictures stay as they are, and all columns are as wide as the widest.
    sheet = grid.sheet({"": [Tile(large, "x"), Tile(small, "y")]})
    assert sheet.shape == (10 + 200 + 25, 10 + 2 * 310, 3)
    assert not sheet[10:210, 10:310].any() and not sheet[10:138, 320:448].any()
