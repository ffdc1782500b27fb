"""A batch for the eye: nothing shown that is not so."""

import io

import numpy as np
import pytest
import rich.console
from PIL import Image

from unifluid_jax.input import pipeline, show
from unifluid_jax.input.records import Records
from unifluid_jax.sequence import Modality

FEW = {"batch_size": 2, "seq_len": 64, "max_images": 4}


@pytest.fixture
def shown(toys, world):
    """Makes a World and the segments of its first batch, with the batch."""

    def make(**fields):
        made = world(toys, **{**FEW, **fields})
        iterator = pipeline.packed_batches(made.config, made.sequencer)
        batch = next(iterator)
        iterator.close()
        return made, batch, list(show.segments(batch, made.sequencer.layout))

    return make


def only(task):
    return ({"dataset": "toys", "split": "train", "task": task, "weight": 1.0},)


def printed(table):
    file = io.StringIO()
    rich.console.Console(file=file, width=100).print(table)
    return file.getvalue().splitlines()


def test_segments_cover_the_batch_and_have_their_own_pictures(toys, shown):
    made, batch, found = shown()
    records = Records("toys", "train", toys)
    assert sum(map(len, found)) == np.count_nonzero(batch["segment"])
    assert {segment.row for segment in found} == {0, 1}
    starts = [(segment.row, segment.start) for segment in found]
    assert starts == sorted(set(starts)) and starts[0] == (0, 0)
    for segment in found:
        record = records[segment.record]
        task = pipeline.mixture(made.config)[segment.entry]["task"]
        choices = {
            "caption": {image for image, _ in record.captions},
            "vqa": {1},
            "generate": set(),
            "edit": {0},
        }
        values = {int(record.image(image)[0, 0, 0]) for image in choices[task]}
        assert set(np.unique(segment.images).tolist()) <= values
        assert len(segment.images) == (task != "generate")


def test_an_empty_row_has_no_segments(shown):
    made, batch, found = shown()
    empty = {name: np.zeros_like(array) for name, array in batch.items()}
    both = {name: np.concatenate([empty[name][:1], batch[name]]) for name in batch}
    rows = [segment.row for segment in show.segments(both, made.sequencer.layout)]
    assert rows == [segment.row + 1 for segment in found]


def test_understanding_in_words(toys, shown):
    made, _, (segment, *_) = shown(mixture=only("vqa"))
    record = Records("toys", "train", toys)[segment.record]
    _, question, answer = record.questions[0]
    assert show.text(segment, made.sequencer.text) == f"answer en {question} > {answer}"
    vision, text, words = (
        line.split(maxsplit=2) for line in show.lines(segment, made.sequencer.text)
    )
    assert vision == ["0-3", "vision", "tokens 0-3 of the picture"]
    assert text[1] == "text" and text[2].startswith("<bos> ▁an")
    assert text[2].replace("▁", " ").replace(" ", "").endswith(question.replace(" ", ""))
    assert text[0].startswith("4-") and words[0].endswith(f"-{len(segment) - 1}")
    assert words[1] == "answer" and words[2].startswith("\\n > ") and words[2].endswith("> <eos>")
    assert f"\\n > ▁{answer[0]}" in words[2]


def test_generation_in_words(toys, shown):
    made, _, (segment, *_) = shown(mixture=only("generate"), order="raster", text_drop=0.0)
    record = Records("toys", "train", toys)[segment.record]
    assert show.text(segment, made.sequencer.text) in [caption for _, caption in record.captions]
    text, image = show.lines(segment, made.sequencer.text)
    first = len(segment) - 4
    assert text.split(maxsplit=2)[:2] == [f"0-{first - 1}", "text"] and "<bos>" in text
    assert image.split(maxsplit=2) == [
        *(f"{first}-{first + 3}", "image"),
        "<boi> > 0, 0 > 1, 1 > 2, 2 > 3",
    ]


def test_editing_in_words(shown):
    made, _, (segment, *_) = shown(mixture=only("edit"), text_drop=1.0)
    assert show.text(segment, made.sequencer.text) == "(text dropped)"
    vision, source, text, image = show.lines(segment, made.sequencer.text)
    assert vision.split(maxsplit=1)[1] == "vision   tokens 0-3 of the picture"
    assert source.split(maxsplit=1)[1] == "source   latents of cells 0 1 2 3"
    assert set(text.split()[2:]) == {"<bos>", "<null>"}
    order = segment.fields["target_position"][-4:].tolist()
    words = ", ".join(f"{a} > {b}" for a, b in zip(["<boi>", *order], order, strict=False))
    assert image.endswith(words)


def test_brackets_are_a_step_and_other_weights_are_told(toys, world):
    made = world(toys)
    made.config.model.bidirectional_prefix = True
    for task, fields in (("caption", "text_weight"), ("generate", "image_weight")):
        made.config.input.mixture = only(task)
        layout_of = type(made.sequencer.layout)
        made.sequencer.layout = layout_of(
            **{**vars(made.sequencer.layout), "bidirectional_prefix": True}
        )
        iterator = pipeline.packed_batches(made.config, made.sequencer)
        segment = next(show.segments(next(iterator), made.sequencer.layout))
        iterator.close()
        *prefix, suffix = show.lines(segment, made.sequencer.text)
        assert "[" not in suffix and "weight" not in suffix
        # An array of one example: to be changed as one likes.
        (at,) = np.nonzero(segment.fields[fields])
        segment.fields[fields][at[1]] = 0.25
        *_, changed = show.lines(segment, made.sequencer.text)
        assert changed.count("(weight 0.25)") == 1
        step = [line.split(maxsplit=2)[2] for line in prefix]
        assert all(words[0] == "[" and words[-1] == "]" for words in step), step


def test_groups_are_bracketed(toys, world):
    made = world(toys, parallel=(3,))  # 1 and 3, however they grow
    made.config.input.mixture = only("generate")
    iterator = pipeline.packed_batches(made.config, made.sequencer)
    segment = next(show.segments(next(iterator), made.sequencer.layout))
    iterator.close()
    *_, image = show.lines(segment, made.sequencer.text)
    asked = segment.fields["target_position"] >= 0
    a, b, c, d = segment.fields["target_position"][asked]
    boi = show._piece(made.sequencer.text, made.sequencer.layout.boi)
    assert image.split(maxsplit=2)[2] == f"{boi} > {a}, [{boi} > {b}, {boi} > {c}, {a} > {d}]"


def test_how_full_the_rows_are(shown):
    made, batch, found = shown()
    lines = {
        line.split()[0]: line.split()
        for line in printed(show.fill(batch, made.config.input, made.sequencer.layout))[1:]
    }
    used = np.count_nonzero(batch["segment"]) / 2
    assert lines["pad"] == ["pad", "positions", f"{64 - used:.1f}", "64", f"{1 - used / 64:.1%}"]
    sums = [float(lines[m.name.lower()][2]) for m in Modality]
    assert sum(sums) == pytest.approx(64, abs=0.2)
    images = sum(len(segment.images) for segment in found) / 2
    assert lines["max_images"] == ["max_images", f"{images:.1f}", "4", f"{images / 4:.1%}"]
    targets = np.count_nonzero(batch["image_weight"]) / 2
    assert lines["max_image_targets"][1:] == [f"{targets:.1f}", "64", f"{targets / 64:.1%}"]
    assert lines["max_text_targets"][2] == "64"
    # A cap of nothing is no division by zero.
    made, batch, _ = shown(mixture=only("generate"), max_images=0)
    table = printed(show.fill(batch, made.config.input, made.sequencer.layout))
    (line,) = (line.split() for line in table if "max_images" in line)
    assert line == ["max_images", "0.0", "0", "-"]


def test_proportions_beside_the_configured_ones(shown):
    made, batch, found = shown()
    entries = pipeline.mixture(made.config)
    title, *lines = printed(show.proportions(found, entries))
    assert title.split() == ["task", "data", "examples", "share", "configured"]
    for number, (line, entry) in enumerate(zip(lines, entries, strict=True)):
        count = sum(segment.entry == number for segment in found)
        assert line.split() == [
            *(entry["task"], "toys/train", str(count)),
            *(f"{count / len(found):.1%}", f"{entry['weight'] / 6:.1%}"),
        ]


def greys(path):
    """The values of large flat grey areas of a PNG."""
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        pixels = np.asarray(sheet.convert("RGB"))
    grey = pixels[(pixels == pixels[..., :1]).all(-1)][:, 0]
    values, counts = np.unique(grey, return_counts=True)
    return set(values[counts >= 128 * 128].tolist()) - {255}


@pytest.mark.parametrize("task", ["caption", "generate", "edit"])
def test_pictures_of_a_batch_are_drawn_with_their_latents_decoded(
    toys, shown, stand_in, tmp_path, task
):
    made, _, found = shown(mixture=only(task), text_drop=0.0)
    segment, records = found[0], Records("toys", "train", toys)
    path = tmp_path / "batch.png"
    show.draw(found[:1], pipeline.mixture(made.config), made.sequencer.text, stand_in(), path)
    record = records[segment.record]
    number = int(record.id.split()[1])
    if task == "edit":
        wanted = {number, number + 100}  # seen and source; target
    else:
        words = show.text(segment, made.sequencer.text).rpartition("> ")[2]
        (image,) = {image for image, caption in record.captions if caption == words}
        wanted = {number + 100 * image}
    assert greys(path) == wanted
    with Image.open(path) as sheet:
        # 16 pixels enlarged to 128, and pictures beside each other.
        assert sheet.width >= 128 * {"caption": 1, "generate": 1, "edit": 3}[task]


def test_a_whole_mixed_batch_is_drawn(shown, stand_in, tmp_path):
    made, _, found = shown()
    labels = []

    def grid(pictures, names, path):
        labels.extend(names)
        assert len(pictures) == len(found)

    path = tmp_path / "batch.png"
    entries = pipeline.mixture(made.config)
    show.draw(found, entries, made.sequencer.text, stand_in(), path)
    with Image.open(path) as sheet:
        assert sheet.width > 6 * 150 and sheet.height > 2 * 128
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(show, "grid", grid)
        show.draw(found, entries, made.sequencer.text, stand_in(), path)
    titles = {
        "caption": "caption: seen",
        "vqa": "vqa: seen",
        "generate": "generate: target",
        "edit": "edit: seen | source | target",
    }
    for (title, below), segment in zip(labels, found, strict=True):
        assert title == titles[entries[segment.entry]["task"]]
        assert below == show.text(segment, made.sequencer.text)


def test_latents_are_decoded_in_raster_order_whatever_the_order(shown, stand_in):
    made, _, found = shown(mixture=only("generate"), batch_size=1)
    segment = found[0]
    order = segment.fields["target_position"][-4:]
    raw = np.zeros((4, 3), np.float32)
    raw[order] = np.arange(4, dtype=np.float32)[:, None] * 10
    # As if the cell that comes first had 0, the next 10, ...
    scale = made.sequencer.scale
    segment.fields["latent_mean"][-4:] = scale.normalised(raw[order], raw[order]).mean
    (tokens,) = show._tokens(segment)
    np.testing.assert_allclose(tokens * scale.std + scale.mean, raw, atol=1e-4)


def test_a_grid_of_pictures(tmp_path):
    path = tmp_path / "grid.png"
    pictures = [np.full((64, 64, 3), 10 * i, np.uint8) for i in range(1, 9)]
    show.grid(pictures, [("", "")] * 8, path, columns=3)
    assert greys(path) == {10 * i for i in range(1, 9)}
    with Image.open(path) as sheet:
        plain = sheet.size
    assert plain[0] == 3 * (150 + 16) and plain[1] >= 3 * 128
    long = "a very long caption that has to be broken into several lines to be read at all"
    show.grid(pictures, [("above", long)] * 8, path, columns=3)
    with Image.open(path) as sheet:
        assert sheet.width == plain[0] and sheet.height > plain[1] + 3 * 15 * 3
        dark = np.asarray(sheet.convert("L"))[:15]
    assert dark.min() < 200  # the title is there
    show.grid(pictures[:1], [("", "")], path)
    assert greys(path) == {10}
