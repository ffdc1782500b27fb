"""Cached latents: every picture's own, and never those of other data or of another tokenizer."""

import json
import pickle
import shutil

import numpy as np
import pytest
from array_record.python import array_record_module

from unifluid_jax.errors import UserError
from unifluid_jax.input import latents
from unifluid_jax.input.latents import LatentCache
from unifluid_jax.input.records import Records

FOREIGN = {"images": ["before", "after/image"], "edits": "instruction"}


def number(record):
    return int(record.id.split()[1])


def read(path):
    reader = array_record_module.ArrayRecordReader(str(path))
    return reader.read(0, reader.num_records())


def rewrite(path, change):
    entries = read(path)
    change(entries)
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for entry in entries:
        writer.write(entry)
    writer.close()


@pytest.mark.parametrize("split", ["train", "test", "train[25%:50%]"])
def test_each_record_has_the_moments_of_its_own_pictures(toys, stand_in, split):
    records = Records("toys", split, toys)
    cache = LatentCache(records, toys, stand_in().fingerprint)
    for i in range(len(records)):
        moments = cache[i]
        assert moments.shape == (2, 2, 4, 3) and moments.dtype == np.float32
        assert (moments[0, 0] == number(records[i])).all()
        assert (moments[0, 1] == number(records[i]) + 100).all()
        assert (moments[1] == 0.5).all()


def test_tokens_lie_in_raster_order(own_toys, stand_in, monkeypatch):
    quarters = np.arange(4).reshape(2, 2).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    picture = np.stack([quarters] * 3, axis=-1)
    monkeypatch.setattr(latents, "_pictures", lambda *_: [picture])
    latents.build_cache("toys", own_toys, stand_in())
    cache = LatentCache(Records("toys", "train", own_toys), own_toys, stand_in().fingerprint)
    np.testing.assert_array_equal(cache[0][0, 0, :, 0], [0, 1, 2, 3])


def test_the_number_of_pictures_encoded_at_a_time_changes_nothing(
    toys, own_toys, stand_in, monkeypatch
):
    monkeypatch.setattr(latents, "_CHUNK", 5)
    done = []
    path = latents.build_cache("toys", own_toys, stand_in(), done.append)
    assert sum(done) == 2 * 29 and max(done) == 6  # whole records
    for split in ("train", "test"):
        assert read(path / split) == read(latents.folder("toys", toys) / split)


def test_a_foreign_data_set_by_its_fields(toys, stand_in, tmp_path):
    shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
    latents.build_cache("foreign", tmp_path, stand_in(), fields=FOREIGN)
    records = Records("foreign", "train", tmp_path, FOREIGN)
    moments = LatentCache(records, tmp_path, stand_in().fingerprint)[2]
    greys = [record.image(i)[0, 0, 0] for record in (records[2],) for i in (0, 1)]
    np.testing.assert_array_equal(moments[0, :, 0, 0], greys)  # 40 pixels, resized
    other = Records("foreign", "train", tmp_path, {"images": "before", "captions": "instruction"})
    with pytest.raises(UserError, match=r"another choice of pictures: \['before', 'after/image'\]"):
        LatentCache(other, tmp_path, stand_in().fingerprint)


def test_a_corrupt_record_has_none_and_the_others_keep_theirs(own_toys, stand_in):
    (path,) = (own_toys / "toys" / "1.0.0").glob("*-train.array_record*")
    rewrite(path, lambda entries: entries.__setitem__(7, entries[7][:40]))
    latents.build_cache("toys", own_toys, stand_in())
    records = Records("toys", "train", own_toys)
    cache = LatentCache(records, own_toys, stand_in().fingerprint)
    assert cache[7].shape == (2, 0, 4, 3)
    assert [cache[i][0, 0, 0, 0] for i in (6, 8)] == [number(records[i]) for i in (6, 8)]


def test_they_travel_to_worker_processes(toys, stand_in):
    cache = LatentCache(Records("toys", "train", toys), toys, stand_in().fingerprint)
    wanted = cache[3]  # the reader is open now, and cannot travel
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(cache))[3], wanted)


def test_what_was_cached_stays_until_the_new_is_complete(own_toys, stand_in):
    path = latents.build_cache("toys", own_toys, stand_in())
    before = read(path / "train")

    class Breaks(stand_in):
        def encode(self, images):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents.build_cache("toys", own_toys, Breaks("other"))
    assert read(path / "train") == before
    LatentCache(Records("toys", "train", own_toys), own_toys, stand_in().fingerprint)
    # What was left behind is in nobody's way.
    latents.build_cache("toys", own_toys, stand_in("other"))
    assert [p.name for p in path.parent.iterdir()] == ["toys"]
    LatentCache(Records("toys", "train", own_toys), own_toys, stand_in("other").fingerprint)


def test_missing_latents_and_missing_data(own_toys, stand_in):
    with pytest.raises(UserError, match="no cached latents of toys.*run `unifluid data latents"):
        LatentCache(Records("toys", "train", own_toys), own_toys, stand_in().fingerprint)
    with pytest.raises(UserError, match="data set toyz is not built"):
        latents.build_cache("toyz", own_toys, stand_in())


def test_latents_of_another_tokenizer(toys, stand_in):
    one, other = stand_in().fingerprint[:12], stand_in("other").fingerprint
    with pytest.raises(
        UserError,
        match=f"another image tokenizer: {one} cached, {other[:12]} in use: run `unifluid",
    ):
        LatentCache(Records("toys", "train", toys), toys, other)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", "0.9.0", "toys/train are of another version: 0.9.0 cached, 1.0.0 in use"),
        ("sizes", {"train": [24, 1]}, r"another build \(records, bytes\): \[24, 1\] cached"),
        ("sizes", {}, "another build.*None cached"),
        ("images", ["picture"], r"another choice of pictures: \['picture'\] cached"),
        ("sizes", None, "damaged"),
        ("tokenizer", None, "damaged"),
        ("token_dim", ..., "damaged"),
    ],
)
def test_latents_of_other_data_are_refused(own_toys, stand_in, key, value, message):
    path = latents.build_cache("toys", own_toys, stand_in()) / "latents.json"
    info = json.loads(path.read_text())
    info[key] = value
    if value is ...:
        del info[key]
    path.write_text(json.dumps(info))
    with pytest.raises(UserError, match=f"{message}.*run `unifluid data latents"):
        LatentCache(Records("toys", "train", own_toys), own_toys, stand_in().fingerprint)


def test_damaged_files_are_named(own_toys, stand_in):
    path = latents.build_cache("toys", own_toys, stand_in())
    records = Records("toys", "train", own_toys)

    def refused(message):
        with pytest.raises(UserError, match=f"{message}.*run `unifluid data latents"):
            LatentCache(records, own_toys, stand_in().fingerprint)

    whole = (path / "train").read_bytes()
    rewrite(path / "train", list.pop)
    refused("number of records: 23 cached, 24 in use")
    (path / "train").write_bytes(whole[: len(whole) // 2])
    refused("number of records: 0 cached, 24 in use")
    (path / "train").unlink()
    refused("number of records: 0 cached, 24 in use")
    (path / "train").write_bytes(whole)
    for text in ("{", "null", "[]", '"text"'):
        (path / "latents.json").write_text(text)
        refused("damaged")


def test_a_damaged_entry_is_a_value_error(own_toys, stand_in):
    path = latents.build_cache("toys", own_toys, stand_in())
    rewrite(path / "train", lambda entries: entries.__setitem__(7, entries[7][:-2]))
    records = Records("toys", "train", own_toys)
    cache = LatentCache(records, own_toys, stand_in().fingerprint)
    with pytest.raises(ValueError):
        cache[7]
    assert (cache[8][0, 0] == number(records[8])).all()
    with pytest.raises(ValueError, match="cached latents"):
        cache[99]
