import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import png
from data.easy_vqa import easy_vqa_dataset_builder as easy_vqa
from unifluid_jax.evals import shapes

SAMPLE = Path(__file__).parent.parent / "evals" / "easy_vqa_sample"


@pytest.fixture(scope="module")
def pictures():
    """48 real pictures as (number, picture, questions, color, shape)."""
    sheet = np.asarray(Image.open(SAMPLE.with_suffix(".png")))
    images = sheet.reshape(6, 64, 8, 64, 3).transpose(0, 2, 1, 3, 4).reshape(48, 64, 64, 3)
    entries = json.loads(SAMPLE.with_suffix(".json").read_text())["pictures"]
    return [
        (e["number"], image, [tuple(q) for q in e["questions"]], e["color"], e["shape"])
        for e, image in zip(entries, images, strict=True)
    ]


def make_record(picture, official_split="train", questions=None):
    number, image, real_questions, _, _ = picture
    asked = real_questions if questions is None else questions
    return easy_vqa.make_record(official_split, number, png.encode(image), asked)


def decode(record):
    return [png.decode(file.getvalue()) for file in record["images"]]


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("what is the blue shape?", "rectangle", ("blue", "rectangle")),
        ("what color is the triangle?", "gray", ("gray", "triangle")),
        ("what shape is present?", "circle", ("", "circle")),
        ("is there a red shape?", "yes", ("red", "")),
        ("is there a red shape?", "no", ("", "")),
        ("is there not a red shape?", "no", ("red", "")),
        ("is there not a red shape?", "yes", ("", "")),
        ("is no circle present?", "no", ("", "circle")),
        ("does the image not contain a circle?", "yes", ("", "")),
    ],
)
def test_labels_follow_from_answers(question, answer, expected):
    assert easy_vqa.labels_from_answers([(question, answer)]) == expected


def test_contradictory_answers_are_refused():
    questions = [("is there a red shape?", "yes"), ("what color is the shape?", "blue")]
    with pytest.raises(ValueError, match="blue.*red"):
        easy_vqa.labels_from_answers(questions)


def test_recoloring_changes_the_color_alone(pictures):
    for _, image, _, color, shape in pictures[::3]:
        for new_color in easy_vqa.COLORS:
            old, new = shapes.PALETTE[color], shapes.PALETTE[new_color]
            recolored = easy_vqa.recolor(image, old, new)
            judged = shapes.judge(recolored)
            assert (judged.color, judged.shape) == (new_color, shape)
            # There and back: the rim is rounded to whole levels once on each way.
            back = easy_vqa.recolor(recolored, new, old)
            np.testing.assert_allclose(back.astype(int), image, atol=3)
            # The background, four pixels away from the shape, is untouched.
            y, x = (int(c) for c in judged.center)
            reach = int(max(judged.size)) + 4
            far = np.ones((64, 64), bool)
            far[max(y - reach, 0) : y + reach, max(x - reach, 0) : x + reach] = False
            np.testing.assert_array_equal(recolored[far], image[far])


def test_a_record_shows_what_it_says(pictures):
    for picture in pictures:
        _, image, questions, color, shape = picture
        split, record = make_record(picture)
        images = decode(record)
        np.testing.assert_array_equal(images[0], image)
        assert len(images) == 1 + easy_vqa.VARIANTS
        assert record["captions"] == [{"image": 0, "text": f"a {color} {shape}"}]
        assert len(record["questions"]) == len(questions)
        for edit in record["edits"]:
            before, after = (shapes.judge(images[edit[end]]) for end in ("source", "target"))
            assert before.shape == after.shape == shape
            assert before.color != after.color
            assert after.color in edit["instruction"].split()
        assert (split == "compositional") == ((color, shape) in easy_vqa.HELD_OUT)


def test_held_out_combinations_are_never_in_train_or_test(pictures):
    for official_split in ("train", "test"):
        for picture in pictures:
            split, record = make_record(picture, official_split)
            combinations = [(j.color, j.shape) for j in map(shapes.judge, decode(record))]
            if split == "compositional":
                assert combinations[0] in easy_vqa.HELD_OUT
                assert {edit["target"] for edit in record["edits"]} == {0}
            else:
                assert split == official_split
                assert not set(combinations) & easy_vqa.HELD_OUT


def test_held_out_combinations_cover_all_shapes_in_different_colors():
    colors, kinds = zip(*easy_vqa.HELD_OUT, strict=True)
    assert sorted(kinds) == sorted(easy_vqa.SHAPES)
    assert len(set(colors)) == len(colors)


def test_pictures_that_answers_do_not_name_have_questions_only(pictures):
    picture = next(p for p in pictures if (p[3], p[4]) in easy_vqa.HELD_OUT)
    questions = [("is there a nose in the image?", "no")]
    split, record = make_record(picture, questions=questions)
    assert split == "compositional"
    assert (record["labels"], record["color"], record["shape"]) == (
        "pixels",
        picture[3],
        picture[4],
    )
    assert len(record["questions"]) == 1
    assert record["captions"] == record["edits"] == []
    assert len(record["images"]) == 1


def test_records_are_deterministic(pictures):
    (split, first), (_, second) = make_record(pictures[0]), make_record(pictures[0])
    assert split in ("train", "compositional")
    for record in (first, second):
        record["images"] = [file.getvalue() for file in record["images"]]
    assert first == second


def test_builds_and_reads_without_tensorflow(pictures, tmp_path, monkeypatch):
    wheel = tmp_path / "wheel"
    with zipfile.ZipFile(wheel, "w") as f:
        for official_split, part in (("train", pictures[:36]), ("test", pictures[36:])):
            root = f"easy_vqa/data/{official_split}"
            questions = [[q, a, p[0]] for p in part for q, a in p[2]]
            f.writestr(f"{root}/questions.json", json.dumps(questions))
            for number, image, *_ in part:
                f.writestr(f"{root}/images/{number}.png", png.encode(image))
    monkeypatch.setattr(easy_vqa, "fetch", lambda source, data_dir: wheel)
    builder = easy_vqa.Builder(data_dir=tmp_path / "data", file_format="array_record")
    builder.download_and_prepare()
    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    assert sum(counts.values()) == 48
    assert counts["compositional"] == 6  # two pictures of each held-out combination
    by_number = {p[0]: p for p in pictures}
    for split in counts:
        for record in builder.as_data_source(split):
            official_split, number = record["id"].decode().split("/")
            _, image, questions, color, shape = by_number[int(number)]
            np.testing.assert_array_equal(record["images"][0], image)
            assert record["official_split"].decode() == official_split
            assert (record["color"].decode(), record["shape"].decode()) == (color, shape)
            asked = zip(record["questions"]["question"], record["questions"]["answer"], strict=True)
            assert [(q.decode(), a.decode()) for q, a in asked] == questions
    licence = Path(builder.data_path) / "LICENSE"
    assert "Copyright (c) 2019 Victor Zhou" in licence.read_text()


def test_png_drops_transparency():
    file = io.BytesIO()
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(file, "PNG")
    assert png.decode(file.getvalue()).shape == (4, 4, 3)
