"""Mixtures to packed batches: fixed by the seed, resumed exactly, complete, loud about bad data."""

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from array_record.python import array_record_module

from unifluid_jax.errors import UserError
from unifluid_jax.input import pipeline, records, show
from unifluid_jax.input.pipeline import (
    FIELDS,
    captioned_batches,
    packed_batches,
    picture_batches,
)
from unifluid_jax.input.records import Records
from unifluid_jax.input.tokenizer import TextTokenizer
from unifluid_jax.sequence import Modality, latent_index

TASKS = ("caption", "vqa", "generate", "edit")
SHARES = np.array([1, 2, 2, 1]) / 6  # of the mixture in conftest


def batches(world, count, rows=None):
    iterator = packed_batches(world.config, world.sequencer, rows)
    found = [next(iterator) for _ in range(count)]
    iterator.close()
    return found


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def entries(batch):
    """Examples by mixture entry."""
    found = batch["example_id"][..., 0]
    return np.bincount(found[found >= 0], minlength=4)


def elements(world, count, stream=0):
    iterator = iter(pipeline.sequences(world.config, world.sequencer, stream))
    return [next(iterator) for _ in range(count)]


def only(task, dataset="toys", split="train"):
    return ({"dataset": dataset, "split": split, "task": task, "weight": 1.0},)


# Seeds, positions, workers.


def test_the_seed_fixes_the_batches(toys, world):
    one, same, other = world(toys), world(toys), world(toys)
    other.config.seed = 1
    found = batches(one, 3)
    assert_same(found, batches(same, 3))
    assert not np.array_equal(found[0]["tokens"], batches(other, 1)[0]["tokens"])
    assert not np.array_equal(found[0]["tokens"], found[1]["tokens"])


def test_it_goes_on_exactly_where_it_was(toys, world):
    made = world(toys)
    wanted = batches(made, 6)
    iterator = packed_batches(made.config, made.sequencer)
    states = [json.dumps(iterator.get_state())]
    for _ in range(4):
        next(iterator)  # two more are made ahead meanwhile, and must not count
        states.append(json.dumps(iterator.get_state()))
    for done in (4, 1, 0):
        again = packed_batches(made.config, made.sequencer)
        again.set_state(json.loads(states[done]))
        assert json.dumps(again.get_state()) == states[done]
        assert_same([next(again) for _ in range(2)], wanted[done : done + 2])
        again.close()
    # Back and forth in one iterator.
    for done in (2, 4):
        iterator.set_state(json.loads(states[done]))
        assert_same([next(iterator)], wanted[done : done + 1])
    iterator.close()


def test_workers_change_nothing(toys, world):
    alone, made = world(toys), world(toys, workers=2)
    iterator = packed_batches(alone.config, alone.sequencer)
    wanted = [next(iterator)]
    state = json.dumps(iterator.get_state())
    wanted += [next(iterator) for _ in range(4)]
    iterator.close()
    # Worker processes take seconds to start: begun once, and in the middle.
    iterator = packed_batches(made.config, made.sequencer)
    iterator.set_state(json.loads(state))
    assert_same([next(iterator) for _ in range(3)], wanted[1:4])
    state = json.dumps(iterator.get_state())
    iterator.close()
    again = packed_batches(alone.config, alone.sequencer)
    again.set_state(json.loads(state))
    assert_same([next(again)], wanted[4:])
    again.close()


def test_every_epoch_shows_each_record_once_in_another_order_and_anew(toys, world):
    made = world(toys, mixture=only("generate"))
    found = elements(made, 48)
    numbers = [int(element["example_id"][0, 1]) for element in found]
    first, second = numbers[:24], numbers[24:]
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second
    orders = [tuple(e["target_position"][e["target_position"] >= 0].tolist()) for e in found]
    again = sum(orders[first.index(i)] == orders[24 + second.index(i)] for i in range(24))
    assert again < 8  # by chance: one of 24


def test_a_program_may_end_while_batches_are_being_made(toys, world):
    """Grain alone would abort it: a thread of its own outlives the interpreter."""
    made = world(toys, batch_size=4)
    program = (
        "import pickle, sys; from unifluid_jax.input import pipeline;"
        "batches = pipeline.packed_batches(*pickle.load(sys.stdin.buffer)); next(batches)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps((made.config, made.sequencer)),
        capture_output=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr.decode()


# Mixture and processes.


@pytest.mark.parametrize("streams", [1, 3])
def test_every_batch_has_the_tasks_in_the_configured_proportions(toys, world, streams):
    made, total = world(toys, streams=streams), np.zeros(4, int)
    for rows in ([0, 1, 2],) if streams == 1 else ([0], [1], [2]):
        for batch in batches(made, 4, rows):
            counts = entries(batch)
            total += counts
            assert counts.min() >= 1
            np.testing.assert_allclose(counts, SHARES * counts.sum(), atol=1.5)
    np.testing.assert_allclose(total / total.sum(), SHARES, atol=0.03)


def test_an_entry_is_made_into_sequences_of_its_own_task(toys, world):
    made = world(toys)
    for segment in show.segments(batches(made, 1)[0], made.sequencer.layout):
        fields, task = segment.fields, TASKS[segment.entry]
        assert bool(fields["text_weight"].any()) == (task in ("caption", "vqa"))
        assert bool(fields["image_weight"].any()) == (task in ("generate", "edit"))
        assert bool(len(segment.images)) == (task != "generate")


def test_streams_read_disjoint_shares_that_make_up_the_whole(toys, world):
    made = world(toys, streams=3)
    seen = {task: [] for task in TASKS}
    for stream in range(3):
        for element in elements(made, 24, stream):
            entry, index = element["example_id"][0].tolist()
            seen[TASKS[entry]].append(index)
    # 24 elements of each stream are 8 of vqa and of generate, 4 of the others.
    assert sorted(seen["generate"]) == list(range(24))
    for task, count in {"caption": 12, "edit": 12}.items():
        assert len(seen[task]) == len(set(seen[task])) == count
    questions = Records("toys", "train", toys).with_task("vqa").tolist()
    assert len(questions) == 16
    # One epoch has 16, six for the first stream and five each for the others.
    counts = [seen["vqa"].count(i) for i in questions]
    assert sum(counts) == 24 and min(counts) >= 1 and max(counts) <= 2


def test_batches_do_not_depend_on_who_holds_which_rows(toys, world):
    """Also when that changes on the way: one process, then two, then four, then one."""
    made = world(toys, batch_size=8, streams=4)
    whole = batches(made, 4)
    assert len({rows.tobytes() for rows in whole[0]["tokens"].reshape(4, 2, -1)}) == 4
    state, places = (
        None,
        ([range(8)], [[0, 1, 4, 5], [2, 3, 6, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]]),
    )
    for step, shares in enumerate((*places, [range(8)])):
        states = {}
        for rows in shares:
            iterator = packed_batches(made.config, made.sequencer, rows)
            if state is not None:
                iterator.set_state(state)
            expected = {name: array[np.asarray(rows)] for name, array in whole[step].items()}
            assert_same([next(iterator)], [expected])
            states |= json.loads(json.dumps(iterator.get_state()))
            iterator.close()
        state = states
        assert state.keys() == {"0", "1", "2", "3"}


def test_a_weight_of_zero_switches_an_entry_off(toys, world):
    off = {"dataset": "none", "split": "train", "task": "vqa", "weight": 0}
    made = world(toys, mixture=(off, *only("caption")))
    assert [entry["task"] for entry in pipeline.mixture(made.config)] == ["caption"]
    assert entries(batches(made, 1)[0])[1:].sum() == 0


# Packing.


def test_shapes_are_fixed_and_segments_lie_one_after_another(toys, world):
    made = world(toys)
    shapes = {
        **{name: (3, 128) for name in (*FIELDS, "segment")},
        **{name: (3, 128, 3) for name in ("latent_mean", "latent_std")},
        "images": (3, 16, 16, 16, 3),
        "example_id": (3, 128 // 6, 2),
    }
    for batch in batches(made, 3):
        assert {name: array.shape for name, array in batch.items()} == shapes
        assert batch["images"].dtype == np.uint8
        for row, segment in enumerate(batch["segment"]):
            used = np.count_nonzero(segment)
            assert used > 64 and not segment[used:].any()
            assert segment[0] == 1 and set(np.diff(segment[:used]).tolist()) <= {0, 1}
            starts = np.flatnonzero(np.diff(segment[:used], prepend=0))
            assert (batch["position"][row, starts] == 0).all()
            known = batch["example_id"][row] >= 0
            assert known.all(1).sum() == known.any(1).sum() == segment.max()
            assert known[: segment.max()].all()
        padding = batch["segment"] == 0
        assert padding.any()
        for name in FIELDS:
            expected = -1 if name in ("content_position", "target_position") else 0
            assert (batch[name][padding] == expected).all(), name


def test_packed_equals_alone(toys, world):
    """Every packed example is what it is alone; none is lost, doubled, or given other pictures."""
    made = world(toys)

    def key(entry, record, fields, images):
        return (entry, record, *(fields[name].tobytes() for name in FIELDS), images.tobytes())

    packed = [
        [
            key(s.entry, s.record, s.fields, s.images)
            for s in show.segments(batch, made.sequencer.layout)
        ]
        for batch in batches(made, 3)
    ]
    alone = [
        key(*element["example_id"][0].tolist(), element, element["images"])
        for element in elements(made, sum(map(len, packed)))
    ]
    for found in packed:
        assert sorted(found) == sorted(alone[: len(found)])
        del alone[: len(found)]


@pytest.mark.parametrize(
    ("cap", "size"), [("max_images", 2), ("max_text_targets", 20), ("max_image_targets", 8)]
)
def test_no_row_exceeds_its_slots(toys, world, cap, size):
    made = world(toys, **{cap: size})
    full = 0
    for batch in batches(made, 3):
        vision = np.count_nonzero(batch["modality"] == Modality.VISION, axis=1)
        used = {
            "max_images": vision // 4,
            "max_text_targets": np.count_nonzero(batch["text_weight"], axis=1),
            "max_image_targets": np.count_nonzero(batch["image_weight"], axis=1),
        }
        for name, count in used.items():
            assert (count <= made.config.input[name]).all()
        full += (used[cap] > size // 2).sum()
    assert full  # the cap is what ended rows


def test_pictures_in_place_of_latents_are_those_that_the_latents_were_of(toys, world, stand_in):
    """What the step is to do, done by hand: the same batches as with latents from the cache."""
    cached, made = world(toys), world(toys, max_encoded_images=32)
    tokenizer, scale = stand_in(), made.sequencer.scale
    for batch, wanted in zip(batches(made, 2), batches(cached, 2), strict=True):
        pictures = batch.pop("pictures")
        assert pictures.shape == (3, 32, 16, 16, 3) and pictures.dtype == np.uint8
        index = np.asarray(latent_index(batch, 4))
        counts = index.max(axis=1) // 4 + 1
        for name, moments in zip(
            ("latent_mean", "latent_std"),
            tokenizer.encode(pictures.reshape(-1, 16, 16, 3)),
            strict=True,
        ):
            shift = scale.mean if name == "latent_mean" else 0
            tokens = ((moments - shift) / scale.std).reshape(3, 32 * 4, 3)
            placed = np.take_along_axis(tokens, np.maximum(index, 0)[:, :, None], axis=1)
            batch[name] = np.where(index[:, :, None] >= 0, placed, 0)
        assert_same([batch], [wanted])
        for row, count in zip(pictures, counts, strict=True):
            assert row[:count].any((1, 2, 3)).sum() >= count - 1 > 0 and not row[count:].any()


# Bad data.


def rewrite(path, change):
    reader = array_record_module.ArrayRecordReader(str(path))
    entries = reader.read(0, reader.num_records())
    change(entries)
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for entry in entries:
        writer.write(entry)
    writer.close()


@pytest.fixture
def damaged(toys, tmp_path):
    """A copy of the data in which some records, pictures and latents of toys/train are broken."""

    def make(records=(), pictures=(), latents=()):
        shutil.copytree(toys, tmp_path, dirs_exist_ok=True)
        (path,) = (tmp_path / "toys" / "1.0.0").glob("*-train.array_record*")

        def change(entries):
            for i in records:
                entries[i] = entries[i][: len(entries[i]) // 2]
            for i in pictures:
                assert b"IDAT" in entries[i]
                entries[i] = entries[i].replace(b"IDAT", b"I\0AT")

        rewrite(path, change)
        for i in latents:
            rewrite(
                tmp_path / "latents" / "toys" / "train",
                lambda entries, i=i: entries.__setitem__(i, b"?"),
            )
        return tmp_path

    return make


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(pipeline.logging, "warning", lambda text, *args: found.append(text % args))
    return found


@pytest.mark.parametrize(
    ("task", "what"),
    [
        ("caption", "records"),
        ("caption", "pictures"),
        ("generate", "records"),
        ("edit", "pictures"),
    ],
)
def test_corrupt_records_are_named_and_skipped_up_to_the_limit(
    damaged, world, warnings, task, what
):
    made = world(damaged(**{what: [7, 9]}), max_corrupt=2, mixture=only(task))
    seen = {int(element["example_id"][0, 1]) for element in elements(made, 60)}
    wanted = set(Records("toys", "train", made.config.data_dir).with_task(task).tolist())
    assert seen == wanted - {7, 9}
    assert len(warnings) == 2  # though every epoch comes by them
    assert sorted(text.split(", ")[0] for text in warnings) == [
        "skipped toys/train record 7",
        "skipped toys/train record 9",
    ]
    assert warnings[0].endswith(": 1 of at most 2") and warnings[1].endswith(": 2 of at most 2")


def test_one_corrupt_record_too_many_ends_the_run(damaged, world, warnings):
    made = world(damaged(records=[7, 9]), max_corrupt=1, mixture=only("caption"))
    iterator = iter(pipeline.sequences(made.config, made.sequencer))
    state = None
    message = (
        r"toys/train record [79] is corrupt \(.+\): 2 such records, more than"
        r" config.input.max_corrupt=1; build the data set anew or raise the limit"
    )
    with pytest.raises(UserError, match=message):
        for _ in range(24):
            next(iterator)
            if warnings and state is None:
                state = json.loads(json.dumps(iterator.get_state()))
    # What was skipped before an interruption counts after it.
    again = iter(pipeline.sequences(made.config, made.sequencer))
    again.set_state(state)
    with pytest.raises(UserError, match="2 such records"):
        for _ in range(24):
            next(again)
    assert len(warnings) == 1


def test_the_error_reaches_whoever_waits_for_batches(damaged, world):
    made = world(damaged(records=[7]))
    iterator = packed_batches(made.config, made.sequencer)
    with pytest.raises(UserError, match="toys/train record 7 is corrupt"):
        for _ in range(8):
            next(iterator)
    iterator.close()


@pytest.mark.parametrize("task", ["generate", "edit"])
def test_corrupt_latents_are_treated_like_corrupt_records(damaged, world, warnings, task):
    index = 5
    data_dir = damaged(latents=[index])
    made = world(data_dir, max_corrupt=1, mixture=only(task))
    wanted = set(Records("toys", "train", data_dir).with_task(task).tolist())
    assert index in wanted
    seen = {int(element["example_id"][0, 1]) for element in elements(made, 50)}
    assert seen == wanted - {index}
    (warning,) = warnings
    assert warning.startswith("skipped toys/train record 5, which is corrupt")
    strict = world(data_dir, mixture=only(task))
    with pytest.raises(UserError, match=r"record 5 is corrupt.*max_corrupt=0"):
        elements(strict, 24)
    # Tasks that read no latents are not concerned.
    elements(world(data_dir, mixture=only("caption")), 24)


def test_texts_that_do_not_fit_are_passed_over_and_heard_of_ever_more_rarely(toys, world, warnings):
    found, text = Records("toys", "train", toys), world(toys).sequencer.text
    lengths = {
        i: len(text.encode(text.prompt("vqa", found[i].questions[0][1])))
        for i in found.with_task("vqa").tolist()
    }
    limit = min(lengths.values())
    short = {i for i, length in lengths.items() if length == limit}
    assert 0 < len(short) < len(lengths)
    made = world(toys, max_prompt_tokens=limit, mixture=only("vqa"))
    iterator = iter(pipeline.sequences(made.config, made.sequencer))
    seen = {int(next(iterator)["example_id"][0, 1]) for _ in range(3 * len(short))}
    assert seen == short
    count = iterator.get_state()["unfit"]
    assert count > 8 and iterator.get_state()["corrupt"] == []
    assert len(warnings) == int(np.log2(count)) + 1
    for i, text in enumerate(warnings):
        assert text.startswith("passed over toys/train record ")
        assert f"more than config.input.max_prompt_tokens={limit}" in text
        assert text.endswith(f"(number {2**i})")


def test_a_mixture_of_which_nothing_can_be_used_does_not_hang(toys, world, warnings, monkeypatch):
    monkeypatch.setattr(pipeline, "_VAIN", 50)
    made = world(toys, max_prompt_tokens=1)
    message = "nothing of config.input.mixture can be used, 50 examples.*record.*max_prompt_tokens"
    with pytest.raises(UserError, match=message):
        elements(made, 1)


# What a user may get wrong.


def lacking(name):
    entry = {"dataset": "toys", "split": "train", "task": "vqa", "weight": 1.0}
    return tuple({k: v for k, v in entry.items() if k != name} for _ in range(1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixture": only("captoin")}, 'unknown task "captoin".*did you mean "caption"'),
        ({"mixture": lacking("task")}, 'unknown task "" in config.input.mixture .known: '),
        ({"mixture": ()}, "config.input.mixture is empty"),
        ({"mixture": ({**only("vqa")[0], "weight": 0},)}, "is empty: give at least one entry"),
        ({"mixture": ({**only("vqa")[0], "weight": -1.0},)}, "weight -1.0 of toys"),
        ({"mixture": lacking("split")}, 'an entry of config.input.mixture lacks "split": '),
        ({"mixture": lacking("weight")}, 'an entry of config.input.mixture lacks "weight": '),
        ({"mixture": only("vqa", "toyz")}, "data set toyz is not built"),
        ({"mixture": only("vqa", split="dev")}, 'toys has no split "dev"'),
        ({"mixture": only("generate", "foreign")}, 'foreign has no feature "id"'),
        ({"seq_len": 30}, "task caption takes up to 38, config.input.seq_len is 30: raise it or"),
        ({"max_images": 0}, "task caption takes up to 1, config.input.max_images is 0"),
        ({"max_text_targets": 16}, "task caption takes up to 17, config.input.max_text_targets"),
        ({"max_image_targets": 3}, "task generate takes up to 4, config.input.max_image_targets"),
        ({"max_encoded_images": 1}, "task edit takes up to 2, config.input.max_encoded_images"),
    ],
)
def test_configs_that_cannot_be_are_refused_before_the_first_batch(toys, world, fields, message):
    made = world(toys, **fields)
    with pytest.raises(UserError, match=message):
        packed_batches(made.config, made.sequencer)


def test_streams_that_do_not_fit_the_rows(toys, world):
    for options in ({"streams": 2}, {"streams": 0}):
        made = world(toys, **options)
        message = "batch_size=3 rows do not divide among config.input.streams=[02]"
        with pytest.raises(UserError, match=message):
            packed_batches(made.config, made.sequencer)
        made = world(toys, image_size=16, flip=False, shift=0, **options)
        with pytest.raises(UserError, match=message):
            picture_batches(made.config)
    made = world(toys, batch_size=4)
    message = (
        "holds 2 of 4 rows, which is no whole number of config.input.streams=1: set it to a mul"
    )
    with pytest.raises(UserError, match=message):
        packed_batches(made.config, made.sequencer, [0, 1])


def test_a_part_without_anything_for_its_task(toys, world):
    found = Records("toys", "train", toys)
    (index, *_) = set(range(24)) - set(found.with_task("vqa").tolist())
    made = world(toys, mixture=only("vqa", split=f"train[{index}:{index + 1}]"))
    with pytest.raises(UserError, match=r"nothing for config.input.mixture's .*vqa.*: remove it"):
        packed_batches(made.config, made.sequencer)


def test_latents_that_are_missing_or_of_another_tokenizer(own_toys, toys, world, stand_in):
    made = world(own_toys)
    with pytest.raises(UserError, match="no cached latents of toys.*unifluid data latents"):
        packed_batches(made.config, made.sequencer)
    made = world(toys)
    made.sequencer.fingerprint = stand_in("other").fingerprint
    with pytest.raises(UserError, match="another image tokenizer.*unifluid data latents"):
        packed_batches(made.config, made.sequencer)
    # Understanding needs none.
    made = world(own_toys, mixture=only("vqa"))
    assert len(elements(made, 1)) == 1


# Examples for evaluation.


def numbered(example):
    return int(example.record.id.split()[1])


def test_evaluation_reads_each_example_once_and_in_order(toys, world):
    config = world(toys).config
    found = Records("toys", "train", toys)
    wanted = [
        (record.id, question)
        for record in (found[i] for i in range(24))
        for _, question, _ in record.questions
    ]
    examples = list(pipeline.eval_examples(config, "vqa", "toys", "train"))
    assert [(e.record.id, e.prompt) for e in examples] == wanted
    assert all((e.image == numbered(e) + 100).all() for e in examples)
    for example in pipeline.eval_examples(config, "edit", "toys", "test"):
        assert (example.image == numbered(example)).all()
        assert (example.target == numbered(example) + 100).all()


def test_a_limit_draws_the_same_examples_every_time(toys, world):
    config = world(toys).config

    def ids(limit):
        found = pipeline.eval_examples(config, "caption", "toys", "train", limit)
        return [(e.record.id, e.answer) for e in found]

    config.seed = 5
    first = ids(7)
    config.seed = 6
    everything = ids(None)
    assert first == ids(7) and len(first) == 7
    assert [e for e in everything if e in first] == first != everything[:7]
    assert ids(1000) == everything and len(everything) == 36


def test_evaluation_of_a_foreign_data_set(toys, world):
    fields = {"images": "before", "captions": "texts/raw"}
    found = pipeline.eval_examples(world(toys).config, "caption", "foreign", "train", None, fields)
    assert sorted(e.answer for e in found) == [f"picture {i} {j}" for i in range(6) for j in (0, 1)]


def test_evaluation_names_what_is_wrong(damaged, world):
    config = world(damaged(records=[7])).config
    with pytest.raises(UserError, match="toys/train record 7 is corrupt.*build the data set anew"):
        list(pipeline.eval_examples(config, "caption", "toys", "train"))
    with pytest.raises(UserError, match='unknown task "captoin".*"caption"'):
        list(pipeline.eval_examples(config, "captoin", "toys", "train"))
    with pytest.raises(UserError, match='no split "dev"'):
        list(pipeline.eval_examples(config, "caption", "toys", "dev"))


def test_evaluation_names_a_broken_picture(damaged, world):
    config = world(damaged(pictures=[7])).config
    with pytest.raises(UserError, match="record 7 is corrupt.*image 0 cannot be decoded"):
        list(pipeline.eval_examples(config, "caption", "toys", "train"))


# Plain pictures.


def pictures(world, count, rows=None):
    iterator = picture_batches(world.config, rows)
    found = [next(iterator)["images"] for _ in range(count)]
    iterator.close()
    return np.concatenate(found)


def test_pictures_for_an_image_tokenizer(toys, world):
    mixture = ({"dataset": "toys", "split": "train", "weight": 1.0},)
    made = world(toys, mixture=mixture, image_size=8, flip=True, shift=2, batch_size=12)
    images = pictures(made, 4)
    assert images.shape == (48, 8, 8, 3) and images.dtype == np.uint8
    values = images[:, 0, 0, 0]
    assert sorted(values[:24] % 100) == sorted(values[24:] % 100) == list(range(24))
    assert 12 < np.count_nonzero(values >= 100) < 36  # either picture of a record
    np.testing.assert_array_equal(images, pictures(made, 4))
    made.config.input.streams = 2
    halves = [pictures(made, 2, rows) for rows in (range(6), range(6, 12))]
    assert [len(half) for half in halves] == [12, 12]
    assert sorted(np.concatenate(halves)[:, 0, 0, 0] % 100) == list(range(24))


def test_positions_in_the_pictures_are_kept(toys, world):
    made = world(toys, image_size=8, flip=True, shift=2)
    wanted = pictures(made, 4).reshape(4, 3, 8, 8, 3)
    iterator = picture_batches(made.config)
    next(iterator)
    state = json.dumps(iterator.get_state())
    again = picture_batches(made.config)
    again.set_state(json.loads(state))
    for i in range(1, 4):
        np.testing.assert_array_equal(next(again)["images"], wanted[i])
    iterator.close()
    again.close()


def test_flips_and_shifts(toys, world, monkeypatch):
    y, x = np.mgrid[:16, :16].astype(np.uint8)
    picture = np.stack([y, x, x], axis=-1)
    monkeypatch.setattr(records.Record, "image", lambda self, index: picture)

    made = world(toys, image_size=16, flip=False, shift=0)
    assert (pictures(made, 2) == picture).all()

    made = world(toys, image_size=16, flip=True, shift=0, batch_size=50)
    flipped = np.array([image[0, 0, 1] == 15 for image in pictures(made, 2)])
    assert 30 < flipped.sum() < 70
    assert (pictures(made, 2)[flipped] == picture[:, ::-1]).all()

    made = world(toys, image_size=16, flip=False, shift=2, batch_size=100)
    moves = set()
    for image in pictures(made, 1):
        down, right = (int(image[8, 8, axis]) - 8 for axis in (0, 1))
        moves.add((down, right))
        rows, columns = (np.clip(np.arange(16) + move, 0, 15) for move in (down, right))
        np.testing.assert_array_equal(image, picture[rows][:, columns])  # the edge repeated
    assert {axis for move in moves for axis in move} == {-2, -1, 0, 1, 2} and len(moves) > 15


def test_broken_pictures_are_counted_too(damaged, world, warnings):
    data_dir = damaged(pictures=[7])
    made = world(data_dir, image_size=16, flip=False, shift=0, max_corrupt=1, batch_size=24)
    assert len(pictures(made, 2)) == 48
    (warning,) = warnings
    assert warning.startswith("skipped toys/train record 7, which is corrupt (image ")


# Pictures with captions.


def captioned(made):
    made.config.model.text = {"tokens": 8}
    return captioned_batches(made.config, TextTokenizer(made.config.tokenizer.path))


def test_a_captioned_picture_comes_with_a_caption_of_its_own(toys, world):
    mixture = ({"dataset": "toys", "split": "train", "weight": 1.0},)
    made = world(toys, mixture=mixture, image_size=16, flip=False, shift=2, batch_size=24)
    text = TextTokenizer(made.config.tokenizer.path)
    batch = next(captioned(made))
    assert batch["images"].shape == (24, 16, 16, 3) and batch["tokens"].shape == (24, 8)
    seen = set()
    for image, tokens in zip(batch["images"], batch["tokens"], strict=True):
        value = int(image[0, 0, 0])
        record, picture = value % 100, value // 100
        assert record % 2 or picture == 0  # an even record's second picture has no caption
        whole = [
            *text.encode(
                f"a {('red', 'green', 'blue', 'teal', 'brown')[record % 5]}"
                f" shape {record} {picture}"
            ),
            text.eos,
        ]
        wanted = [*whole[:7], text.eos] if len(whole) > 8 else whole
        assert tokens.tolist() == wanted + [text.pad] * (8 - len(wanted))
        seen.add(record)
    assert len(seen) == 24


def test_broken_captioned_pictures_are_counted(damaged, world, warnings):
    mixture = ({"dataset": "toys", "split": "train", "weight": 1.0},)
    fields = {"mixture": mixture, "image_size": 16, "flip": False, "shift": 0, "batch_size": 23}
    batches = captioned(world(damaged(pictures=[6]), max_corrupt=1, **fields))
    assert len(next(batches)["images"]) == len(next(batches)["images"]) == 23
    assert len(warnings) == 1 and "record 6, which is corrupt" in warnings[0]
