import io
import pickle

import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image

from unifluid_jax.errors import UserError
from unifluid_jax.input import records
from unifluid_jax.input.records import Record, Records

FOREIGN = {
    "id": "key",
    "images": ["before", "after/image"],
    "captions": "texts/raw",
    "questions": "qa/q",
    "answers": "qa/a",
    "edits": "instruction",
}


def shard(data_dir, split="train"):
    (path,) = (data_dir / "toys" / "1.0.0").glob(f"*-{split}.array_record*")
    return path


def test_canonical_records(toys):
    found = Records("toys", "train", toys)
    assert len(found) == 24
    by_id = {found[i].id: found[i] for i in range(24)}
    record = by_id["toy 5"]
    assert record.captions == [(0, "a red shape 5 0"), (1, "a red shape 5 1")]
    assert record.questions == [(1, "what color is 5?", "red")] * 2
    assert record.edits == [(0, 1, "make it red")]
    assert record.extra == {"color": "red"}
    for image, value in ((0, 5), (1, 105)):
        picture = record.image(image)
        assert picture.shape == (16, 16, 3) and picture.dtype == np.uint8
        assert (picture == value).all()


def test_records_with_something_for_a_task(toys):
    found = Records("toys", "train", toys)
    numbers = {task: set() for task in records.TASK_PARTS}
    for task in numbers:
        numbers[task] = {int(found[i].id.split()[1]) for i in found.with_task(task)}
    assert numbers["caption"] == numbers["generate"] == set(range(24))
    assert numbers["vqa"] == {i for i in range(24) if i % 3}
    assert numbers["edit"] == {i for i in range(24) if i % 4}


def test_a_large_split_is_not_read_through(toys, monkeypatch):
    monkeypatch.setattr(records, "_SMALL", 0)
    found = Records("toys", "train", toys)
    monkeypatch.setattr(Records, "__getitem__", lambda *_: pytest.fail("read"))
    np.testing.assert_array_equal(found.with_task("vqa"), np.arange(24))


def test_parts_of_a_split(toys):
    whole, part = Records("toys", "train", toys), Records("toys", "train[25%:50%]", toys)
    assert (len(part), part.start, part.base) == (6, 6, "train")
    assert [part[i].id for i in range(6)] == [whole[i].id for i in range(6, 12)]


def test_they_travel_to_worker_processes(toys):
    found = Records("toys", "train", toys)
    ids = [found[i].id for i in range(24)]
    data = pickle.dumps(found)
    assert not any(id.encode() in data for id in ids)  # what was read stays here
    assert [pickle.loads(data)[i].id for i in (3, 4)] == ids[3:5]


def test_a_foreign_data_set_by_its_fields(toys):
    found = Records("foreign", "train", toys, FOREIGN)
    record = next(found[i] for i in range(6) if found[i].id == "f3")
    assert record.captions == [(0, "picture 3 0"), (0, "picture 3 1")]
    assert record.questions == [(0, "which is 3?", "this")]
    assert record.edits == [(0, 1, "make it bright")]
    assert [int(record.image(i)[0, 0, 0]) for i in range(2)] == [3, 53]


def test_class_labels_become_their_names(toys):
    found = Records("foreign", "train", toys, {"images": "before", "captions": "label"})
    captions = {found[i].captions[0][1] for i in range(6)}
    assert captions == {"cat", "dog"}
    assert found[0].id == "foreign/train/0"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": "before", "caption": "texts/raw"}, 'unknown field "caption".*"captions"'),
        ({"images": "befor"}, 'no feature "befor".*before'),
        ({"images": "before", "captions": "texts/text"}, 'no feature "texts/text"'),
        ({"images": "key"}, 'feature "key" of data set foreign is no image'),
        ({"captions": "texts/raw"}, 'lack "images"'),
        ({"images": "before", "questions": "qa/q"}, 'both "questions" and "answers"'),
        (None, 'no feature "id".*fields'),
    ],
)
def test_wrong_fields(toys, fields, message):
    with pytest.raises(UserError, match=message):
        Records("foreign", "train", toys, fields)


def test_a_field_of_another_type_is_corrupt(toys):
    found = Records("foreign", "train", toys, {"images": "before", "captions": "texts/score"})
    with pytest.raises(ValueError, match="expected text"):
        found[0]


def test_missing_and_half_built_data_sets(own_toys):
    with pytest.raises(UserError, match="toy is not built.*unifluid data build toy"):
        Records("toy", "train", own_toys)
    with pytest.raises(UserError, match='no split "trian".*train, test'):
        Records("toys", "trian", own_toys)
    with pytest.raises(UserError, match="parts of one"):
        Records("toys", "train+test", own_toys)
    for part in ("train[12:12]", "train[25%:12]"):  # TFDS reads the second as 25% to 12%
        with pytest.raises(UserError, match=r"train\[.* holds no record of 24"):
            Records("toys", part, own_toys)
    path = shard(own_toys)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="half-built.*train.*run `unifluid data build toys`"):
        Records("toys", "test", own_toys)
    path.unlink()
    with pytest.raises(UserError, match="half-built.*no toys-train"):
        Records("toys", "train", own_toys)
    info = path.parent / "dataset_info.json"
    info.write_text(info.read_text()[:100])
    with pytest.raises(UserError, match="half-built.*run `unifluid data build toys`"):
        Records("toys", "train", own_toys)
    info.unlink()
    with pytest.raises(UserError, match="half-built.*dataset_info.json.*run `unifluid"):
        Records("toys", "train", own_toys)


def test_corrupt_bytes_are_a_value_error(own_toys):
    path = shard(own_toys)
    reader = array_record_module.ArrayRecordReader(str(path))
    entries = reader.read(0, reader.num_records())
    entries[7] = entries[7][: len(entries[7]) // 2]
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for entry in entries:
        writer.write(entry)
    writer.close()
    found = Records("toys", "train", own_toys)
    with pytest.raises(ValueError):
        found[7]
    assert found[8].id
    assert 7 in found.with_task("vqa")


def make_record(*images):
    return Record("x", list(images), [], [], [], {})


def test_broken_pictures_are_value_errors():
    file = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(file, "PNG")
    whole = file.getvalue()
    assert make_record(whole).image(0).shape == (32, 32, 3)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for data in (whole[:60], whole[:-40], b"", b"no picture", bytes(flipped)):
        with pytest.raises(ValueError, match="image 0 cannot be decoded"):
            make_record(data).image(0)
    for index in (1, -1):
        with pytest.raises(ValueError, match=f"no image {index}"):
            make_record(whole).image(index)


def test_resized():
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 20:] = 200
    small = records.resized(image, 10)
    assert small.shape == (10, 10, 3)
    assert (small[:, :3] == 0).all() and (small[:, -3:] == 200).all()
    assert records.resized(small, 10) is small
