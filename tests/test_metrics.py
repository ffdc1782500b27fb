import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from unifluid_jax import metrics
from unifluid_jax.metrics import Meter, Progress, Writer


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """(step, tag) of everything in TensorBoard's files: length, checksum, data, checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").glob("events*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            found += [(event.step, value.tag) for value in event.summary.value]
            data = data[16 + size :]
    return found


def test_scalars_go_to_json_lines_at_once_and_to_tensorboard(tmp_path):
    with Writer(tmp_path / "new" / "dir") as writer, jax.transfer_guard("disallow"):
        value = jax.device_put(np.float32(0.1))
        writer.scalars(1, {"loss": value, "speed": 3, "bad": float("nan")})
        assert lines(tmp_path / "new" / "dir") == [
            {"step": 1, "loss": float(np.float32(0.1)), "speed": 3.0, "bad": None}
        ]
        writer.scalars(2, {"eval/vqa": np.float32(0.5)})
    assert lines(tmp_path / "new" / "dir")[1] == {"step": 2, "eval/vqa": 0.5}
    assert events(tmp_path / "new" / "dir") == [
        (1, "loss"),
        (1, "speed"),
        (1, "bad"),
        (2, "eval/vqa"),
    ]


def test_images_are_files_and_in_tensorboard(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
    with Writer(tmp_path) as writer:
        writer.images(30, {"samples/easy_vqa": image})
    np.testing.assert_array_equal(
        Image.open(tmp_path / "images" / "samples" / "easy_vqa_0000030.png"), image
    )
    assert events(tmp_path) == [(30, "samples/easy_vqa")]


@pytest.mark.parametrize("end", ["", '{"step": 5, "lo', "\n", "nonsense\n"])
def test_a_resumed_run_reports_every_step_once(tmp_path, end):
    with Writer(tmp_path) as writer:
        for step in range(1, 5):
            writer.scalars(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(end)
    with Writer(tmp_path, start_step=2) as writer:
        for step in range(3, 5):
            writer.scalars(step, {"loss": 10 * step})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (1, 1),
        (2, 2),
        (3, 30),
        (4, 40),
    ]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_from_the_start_drops_what_an_earlier_one_left(tmp_path):
    with Writer(tmp_path) as writer:
        writer.scalars(1, {"loss": 1})
    with Writer(tmp_path):
        assert lines(tmp_path) == []


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    stream = io.StringIO()
    console = Console(file=stream)
    with Writer(tmp_path) as writer, Progress(2, 0, "train", console) as progress:
        writer.scalars(1, {"loss": 1.0})
        writer.images(1, {"x": np.zeros((4, 4, 3), np.uint8)})
        progress.update(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())
    assert stream.getvalue() == ""


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_meter_leaves_compilation_and_evaluations_out_of_speeds():
    clock = Clock()
    meter = Meter(window=4, clock=clock)
    clock.now += 100
    assert meter.read({"examples": 8}) == {}
    for _ in range(6):
        with meter.phase("input"):
            clock.now += 0.5
        clock.now += 1.5
        with meter.phase("evaluate"):
            clock.now += 30
        speeds = meter.read({"examples": 8, "tokens": 100})
    assert speeds == {"steps/s": 0.5, "examples/s": 4.0, "tokens/s": 50.0}
    for _ in range(4):
        clock.now += 1
        speeds = meter.read({"examples": 8})
    assert speeds == {"steps/s": 1.0, "examples/s": 8.0}


def test_a_meter_splits_the_time_since_it_was_asked_last():
    clock, heard = Clock(), []
    meter = Meter(lambda *phase: heard.append(phase), clock=clock)
    with meter.phase("input", 3):
        clock.now += 1
        with meter.phase("compile"):  # one inside another
            clock.now += 4
        clock.now += 1
    clock.now += 2
    shares = meter.shares()
    assert shares.pop("time/goodput") >= 0
    assert shares == {"time/input": 0.25, "time/compile": 0.5, "time/compute": 0.25}
    assert heard[:4] == [("input", 3), ("compile", None), ("input", None), ("compute", None)]
    with meter.phase("checkpoint", 4):
        clock.now += 3
    clock.now += 1
    shares = meter.shares()
    shares.pop("time/goodput")
    assert shares == {"time/checkpoint": 0.75, "time/compute": 0.25}


def test_goodput_counts_what_led_to_the_present_state(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics.time, "time", lambda: 1000 + clock.now)
    # Began 100 s ago; 40 s of it computed what was restored; the rest was lost, or waited.
    meter = Meter(productive=40.0, began=1000.0, clock=clock)
    assert meter.shares()["time/goodput"] == 0.4
    clock.now += 10
    with meter.phase("evaluate"):
        clock.now += 10
    assert meter.productive() == 50
    assert meter.shares()["time/goodput"] == 50 / 120


def test_every_start_is_noted_and_the_first_one_remembered(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics.time, "time", clock)
    assert metrics.log_start(tmp_path / "run", 0) == 100
    clock.now += 50
    assert metrics.log_start(tmp_path / "run", 7) == 100
    lines = (tmp_path / "run" / "starts.jsonl").read_text().splitlines()
    assert [(json.loads(line)["time"], json.loads(line)["step"]) for line in lines] == [
        (100, 0),
        (150, 7),
    ]
    assert json.loads(lines[0])["devices"] == 8
    (tmp_path / "run" / "starts.jsonl").write_text("nonsense\n")
    assert metrics.log_start(tmp_path / "run", 9) == 150
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert metrics.log_start(tmp_path / "other", 0) == 150
    assert not (tmp_path / "other").exists()


def test_plain_lines_have_step_losses_speed_and_time_left():
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, width=20)
    with Progress(1000, 100, "train", console, seconds=10.0, clock=clock) as progress:
        clock.now += 60  # compilation; no part of the speed
        for step in range(101, 131):
            progress.update(step, {"loss": jnp.asarray(1.5), "text": 0.25}, {"examples/s": 64.04})
            clock.now += 0.5
        progress.update(1000, {"loss": 1.0}, {})
    shown = stream.getvalue().splitlines()
    assert shown == [
        "train 101/1000  loss 1.500  text 0.250  64.0 examples/s",
        "train 121/1000  loss 1.500  text 0.250  64.0 examples/s  0:07:20 left",
        "train 1000/1000  loss 1.000  0:00:00 left",
    ]


def test_a_terminal_gets_a_bar():
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=True, width=100)
    with Progress(10, 0, "train", console, clock=clock) as progress:
        for step in range(1, 11):
            clock.now += 1
            progress.update(step, {"loss": 0.5}, {"examples/s": 2.0})
    last = stream.getvalue().rpartition("train")[2]
    for part in ("10/10", "loss 0.500", "2.0 examples/s", "0:00:00 left"):
        assert part in last
