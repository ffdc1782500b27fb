import json
import re
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import rich.console
from absl import flags
from absl.testing import flagsaver

from data import png
from data.easy_vqa import easy_vqa_dataset_builder as easy_vqa
from data.easy_vqa_recolored import easy_vqa_recolored_dataset_builder as easy_vqa_recolored
from unifluid_jax import data, image_tokenizer
from unifluid_jax.errors import UserError
from unifluid_jax.evals import shapes
from unifluid_jax.input import latents
from unifluid_jax.input.records import Records
from unifluid_jax.models.vae import VaeConfig


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A source package of 24 pictures, one of each combination, in place of the real one."""
    path = tmp_path / "wheel"
    with zipfile.ZipFile(path, "w") as f:
        pairs = [(color, shape) for color in easy_vqa.COLORS for shape in easy_vqa.SHAPES]
        for split in ("train", "test"):
            questions = []
            for number, (color, shape) in enumerate(pairs):
                alpha = shapes.draw(shape, (32.0, 32.0), (20.0, 20.0), (64, 64))[..., None]
                image = 240 + alpha * (np.asarray(shapes.PALETTE[color]) - 240)
                file = png.encode(np.rint(image).astype(np.uint8))
                f.writestr(f"easy_vqa/data/{split}/images/{number}.png", file)
                questions.append([f"what is the {color} shape?", shape, number])
            f.writestr(f"easy_vqa/data/{split}/questions.json", json.dumps(questions))
    for module in (easy_vqa, easy_vqa_recolored):
        monkeypatch.setattr(module, "fetch", lambda source, data_dir: path)


def build(data_dir, name="easy_vqa"):
    """Builds a data set; returns its folder and what was printed."""
    builder = data.make_builder(name, data_dir)
    console = rich.console.Console(record=True, soft_wrap=True)
    data.build(builder, console)
    return Path(builder.data_path), console.export_text()


def test_builds_once(wheel, tmp_path):
    path, text = build(tmp_path)
    assert "train 21, test 21, compositional 6 records" in text
    assert data.find_missing(path) is None
    written = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert "half-built" not in build(tmp_path)[1]
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == written


def test_recolored_copies_are_records_of_their_own(wheel, tmp_path):
    path, text = build(tmp_path, "easy_vqa_recolored")
    # Each of the 21 that are not held out, in each other colour that its shape may have.
    assert "train 294 records" in text
    assert "Copyright (c) 2019 Victor Zhou" in (path / "LICENSE").read_text()
    build(tmp_path)
    originals = Records("easy_vqa", "train", tmp_path)
    originals = {record.id: record for record in map(originals.__getitem__, range(21))}
    records = Records("easy_vqa_recolored", "train", tmp_path)
    seen = set()
    for record in map(records.__getitem__, range(len(records))):
        owner, color = record.id.rsplit("/", 1)
        original, shape = originals[owner], record.extra["shape"]
        assert record.extra["color"] == color and shape == original.extra["shape"]
        ((image, caption),) = record.captions
        assert image == 0 and re.fullmatch(f"an? {color} {shape}", caption)
        assert not record.questions and not record.edits
        picture = record.image(0)
        np.testing.assert_array_equal(picture[32, 32], easy_vqa_recolored.PALETTE[color])
        np.testing.assert_array_equal(picture[0], original.image(0)[0])
        if color in easy_vqa.COLORS:
            judged = shapes.judge(picture)
            assert (judged.color, judged.shape) == (color, shape)
        seen.add((owner, color))
    assert len(seen) == 294
    pairs = {(color, originals[owner].extra["shape"]) for owner, color in seen}
    assert len(pairs) == 45 and not pairs & easy_vqa.HELD_OUT


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zero(file):
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("dataset_info.json", Path.unlink),
        ("easy_vqa-test.array_record-00000-of-00001", Path.unlink),
        ("easy_vqa-train.array_record-00000-of-00001", truncate),
        ("easy_vqa-train.array_record-00000-of-00001", zero),
    ],
)
def test_a_half_built_data_set_is_named_and_made_anew(wheel, tmp_path, name, damage):
    path, _ = build(tmp_path)
    damage(path / name)
    assert name in data.find_missing(path)
    _, text = build(tmp_path)
    assert "half-built" in text and name in text
    assert data.find_missing(path) is None


def test_what_a_killed_run_left_is_removed(wheel, tmp_path):
    rest = tmp_path / "easy_vqa" / "incomplete.ABC123_1.0.0"
    rest.mkdir(parents=True)
    (rest / "easy_vqa-train.array_record-00000-of-00001").write_bytes(b"half")
    path, text = build(tmp_path)
    assert data.find_missing(path) is None
    assert not rest.exists()


def test_a_failed_build_leaves_no_data(wheel, tmp_path, monkeypatch):
    def fail(source, data_dir):
        raise UserError("cannot fetch")

    monkeypatch.setattr(easy_vqa, "fetch", fail)
    with pytest.raises(UserError, match="cannot fetch"):
        build(tmp_path)
    assert not list(tmp_path.glob("easy_vqa/**/*.array_record*"))


@pytest.fixture
def tokenizer(tmp_path):
    """Saves a random image tokenizer of a seed; returns it as it is loaded."""

    def save(seed):
        config = VaeConfig(
            image_size=64, channels=8, multipliers=(1, 1, 1), blocks=1, groups=4, patch=4
        )
        params = jax.jit(image_tokenizer.module(config).init)(jax.random.key(seed))
        folder = tmp_path / f"tokenizer_{seed}"
        one = np.ones(config.token_dim, np.float32)
        image_tokenizer.save(folder, config, params, 0 * one, one, {})
        return image_tokenizer.load(folder)

    return save


def cache(data_dir, tokenizer, anew=False):
    console = rich.console.Console(record=True, soft_wrap=True)
    data.cache_latents("easy_vqa", data_dir, tokenizer, console, anew=anew)
    return console.export_text()


def test_latents_are_made_once_for_a_tokenizer(wheel, tmp_path, tokenizer):
    build(tmp_path)
    first, second = tokenizer(0), tokenizer(1)
    text = cache(tmp_path, first)
    assert "no cached latents" in text
    assert f"{48 * 4} pictures" in text
    assert "pictures" not in cache(tmp_path, first)
    assert "another image tokenizer" in cache(tmp_path, second)
    assert f"{48 * 4} pictures" in cache(tmp_path, second, anew=True)
    records = Records("easy_vqa", "compositional", tmp_path)
    cached = latents.LatentCache(records, tmp_path, second.fingerprint)
    images = np.stack([records[2].image(i) for i in range(4)])
    np.testing.assert_allclose(cached[2], np.stack(second.encode(images)), rtol=2e-3, atol=2e-3)


def test_nothing_is_built_without_the_image_tokenizer(wheel, tmp_path):
    flags.FLAGS.mark_as_parsed()
    folder = tmp_path / "data"
    with (
        flagsaver.flagsaver(data_dir=str(folder), image_tokenizer=str(tmp_path / "none")),
        pytest.raises(UserError, match="no image tokenizer"),
    ):
        data.main(["unifluid data", "build", "easy_vqa"])
    assert not folder.exists()


def test_a_folder_is_imported_with_its_latents(tmp_path, capsys, monkeypatch):
    flags.FLAGS.mark_as_parsed()
    mine = tmp_path / "my_pictures"
    mine.mkdir()
    (mine / "a.png").write_bytes(png.encode(np.zeros((8, 8, 3), np.uint8)))
    (mine / "train.jsonl").write_text('{"image": "a.png", "caption": "night"}')
    cached = []
    monkeypatch.setattr(data, "cache_latents", lambda name, *_, anew: cached.append((name, anew)))
    for name in (None, "mine"):
        with flagsaver.flagsaver(data_dir=str(tmp_path / "data"), name=name):
            data.main(["unifluid data", "import", str(mine)])
        found = name or "my_pictures"
        assert f"{found} at" in capsys.readouterr().out
        assert Records(found, "train", tmp_path / "data")[0].captions == [(0, "night")]
    assert cached == [("my_pictures", True), ("mine", True)]
    with (
        flagsaver.flagsaver(data_dir=str(tmp_path / "data"), name="mine"),
        pytest.raises(UserError, match="--name is for one folder"),
    ):
        data.main(["unifluid data", "import", str(mine), str(mine)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build"], "which data set"),
        (["import"], "which folder"),
        (["import", "nowhere"], "no .jsonl file in nowhere"),
        (["bild", "easy_vqa"], 'did you mean "build"'),
        (["build", "easyvqa"], 'did you mean "easy_vqa"'),
        (["build", "openmoji/65px"], 'did you mean "64px"'),
        (["build", "easy_vqa/64px"], 'easy_vqa has no configuration "64px"'),
    ],
)
def test_wrong_commands(arguments, message, tmp_path):
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(data_dir=str(tmp_path)), pytest.raises(UserError, match=message):
        data.main(["unifluid data", *arguments])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    monkeypatch.delitem(sys.modules, "data.openmoji.openmoji_dataset_builder", raising=False)
    with pytest.raises(UserError, match=r"openmoji needs the package resvg_py.*\[data\]"):
        data.make_builder("openmoji", tmp_path)
