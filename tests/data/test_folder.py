"""A folder of one's own pictures: what comes out, and every way to write one wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data import folder
from unifluid_jax.errors import UserError
from unifluid_jax.input.records import Records


def picture(seed, size=(20, 12), channels=3):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels))
    return Image.fromarray(values.astype(np.uint8))


@pytest.fixture
def mine(tmp_path):
    """Pictures of several kinds, and a function that writes lines."""
    tfds.disable_progress_bar()
    path = tmp_path / "mine"
    (path / "photos").mkdir(parents=True)
    picture(0).save(path / "photos" / "a.jpg")
    picture(1).save(path / "b.png")
    picture(2, channels=4).save(path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    picture(3).save(path / "turned.jpg", exif=exif)

    def write(*lines, split="train"):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (path / f"{split}.jsonl").write_text("\n".join(texts) + "\n")

    return path, write


def test_lines_become_records(mine, tmp_path):
    path, write = mine
    write(
        {"image": "photos/a.jpg", "caption": ["a dog", "ein Hund 🐕"], "id": "rex"},
        "",
        {"image": "b.png", "question": "what is it?", "answer": "noise"},
        {
            "image": "b.png", "question": ["one?", "two?"], "answer": ["yes", "no"],
            "edited": "photos/a.jpg", "instruction": "make it a dog",
        },
    )  # fmt: skip
    write({"image": "turned.jpg", "caption": "upright"}, split="test")
    target = folder.build(path, "mine", tmp_path / "data")
    assert target == tmp_path / "data" / "mine"
    records = Records("mine", "train", tmp_path / "data")
    first, second, third = (records[i] for i in range(len(records)))
    assert (first.id, second.id) == ("rex", "train/3")
    assert first.captions == [(0, "a dog"), (0, "ein Hund 🐕")] and not first.questions
    assert first.images == [(path / "photos" / "a.jpg").read_bytes()]
    assert second.questions == [(0, "what is it?", "noise")] and not second.captions
    assert third.questions == [(0, "one?", "yes"), (0, "two?", "no")]
    assert third.edits == [(0, 1, "make it a dog")]
    np.testing.assert_array_equal(third.image(0), np.asarray(picture(1)))
    assert len(Records("mine", "test", tmp_path / "data")) == 1
    assert not list((tmp_path / "data").glob(".*")), "nothing is left of the work"


def test_pictures_are_stored_as_inference_sees_them(mine, tmp_path):
    path, write = mine
    write({"image": "turned.jpg", "caption": "a"}, {"image": "clear.png", "caption": "b"})
    folder.build(path, "mine", tmp_path / "data")
    records = Records("mine", "train", tmp_path / "data")
    turned, clear = records[0], records[1]
    assert turned.image(0).shape == (20, 12, 3)
    values = np.asarray(picture(2, channels=4)).astype(np.float32)
    alpha = values[..., 3:] / 255
    white = alpha * values[..., :3] + (1 - alpha) * 255
    np.testing.assert_allclose(clear.image(0), white, atol=1.5)


GOOD = {"image": "b.png", "caption": "a"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "b.png", "caption"', r"train.jsonl:2 is not JSON"),
        ('["b.png"]', "train.jsonl:2 is no object"),
        ({**GOOD, "captoin": "b"}, '"captoin".*did you mean "caption"'),
        ({"caption": "a"}, 'has no "image"'),
        ({"image": ["b.png", "b.png"], "caption": "a"}, '"image" is a list: give one'),
        ({"image": "b.png"}, "has no text: give a caption"),
        ({"image": "b.png", "caption": ""}, "\"caption\" must be text.*got ''"),
        ({"image": "b.png", "caption": ["a", 3]}, '"caption" must be text.*got 3'),
        ({"image": "nowhere.png", "caption": "a"}, 'no picture ".*nowhere.png"'),
        ({"image": "photos", "caption": "a"}, 'no picture ".*photos"'),
        ({"image": "b.png", "question": "a?"}, '1 "question" and 0 "answer": give as many'),
        ({"image": "b.png", "question": ["a?", "b?"], "answer": "a"}, '2 "question" and 1 "an'),
        ({"image": "b.png", "edited": "b.png"}, '1 "edited" and 0 "instruction"'),
        ({"image": "b.png", "edited": "x.png", "instruction": "a"}, 'no picture ".*x.png"'),
        ({"image": "train.jsonl", "caption": "a"}, "train.jsonl:2: .*cannot be read as a pict"),
        ({"image": "cut.jpg", "caption": "a"}, "train.jsonl:2: .*cut.jpg.*cannot be read"),
        ({"image": "turned.jpg", "edited": "cut.png", "instruction": "a"}, "cut.png.*cannot be"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_written(mine, tmp_path, line, message):
    path, write = mine
    for name in ("photos/a.jpg", "b.png"):
        content = (path / name).read_bytes()
        (path / f"cut{Path(name).suffix}").write_bytes(content[: len(content) // 2])
    write(GOOD, line)
    with pytest.raises(UserError, match=message) as error:
        folder.build(path, "mine", tmp_path / "data")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "data").glob("*"))


def test_a_folder_without_lines_is_named(mine, tmp_path):
    path, write = mine
    for where in (path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="no .jsonl file in"):
            folder.build(where, "mine", tmp_path / "data")
    write()
    with pytest.raises(UserError, match="train.jsonl has no line"):
        folder.build(path, "mine", tmp_path / "data")
    write(GOOD)
    write(GOOD, split="my-test")
    with pytest.raises(UserError, match="my-test.jsonl cannot name a split"):
        folder.build(path, "mine", tmp_path / "data")
    (path / "my-test.jsonl").unlink()
    (path / "test.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match="test.jsonl cannot be read as UTF-8"):
        folder.build(path, "mine", tmp_path / "data")
    with pytest.raises(UserError, match='"My Pictures" cannot name a data set: give --name'):
        folder.build(path, "My Pictures", tmp_path / "data")


def test_importing_again_replaces_what_was_there_when_all_is_well(mine, tmp_path):
    path, write = mine
    write(GOOD, GOOD)
    folder.build(path, "mine", tmp_path / "data")
    write(GOOD, {"image": "b.png"})
    with pytest.raises(UserError, match="has no text"):
        folder.build(path, "mine", tmp_path / "data")
    assert len(Records("mine", "train", tmp_path / "data")) == 2
    write(GOOD)
    folder.build(path, "mine", tmp_path / "data")
    assert len(Records("mine", "train", tmp_path / "data")) == 1


def test_no_other_data_set_is_replaced(mine, tmp_path):
    path, write = mine
    write(GOOD)
    target = folder.build(path, "mine", tmp_path / "data")
    shutil.move(target, tmp_path / "data" / "other")
    (tmp_path / "data" / "other" / "1.0.0" / "imported_from.txt").unlink()
    with pytest.raises(UserError, match="other is a data set of another origin: give --name"):
        folder.build(path, "other", tmp_path / "data")
