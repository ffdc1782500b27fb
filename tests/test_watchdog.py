"""The heartbeat for those outside, and what happens to a run that hangs."""

import json
import os
import subprocess
import sys
import time

import pytest

from unifluid_jax import watchdog
from unifluid_jax.watchdog import Watchdog


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_heartbeat_says_what_the_process_does(tmp_path):
    assert watchdog.read(tmp_path, 3) is None
    with Watchdog(tmp_path, 3, every=0.01) as watching:
        watching.enter("input", 7)
        until(lambda: watchdog.read(tmp_path, 3)["phase"] == "input")
        beat = watchdog.read(tmp_path, 3)
        assert (beat["step"], beat["process"], beat["pid"]) == (7, 3, os.getpid())
        watching.enter("compute")
        until(lambda: watchdog.read(tmp_path, 3)["phase"] == "compute")
        later = watchdog.read(tmp_path, 3)
        assert later["step"] == 7 and later["since"] >= beat["since"]
        until(lambda: watchdog.read(tmp_path, 3)["time"] > later["time"])
        assert watchdog.read(tmp_path, 3)["since"] == later["since"]
    assert watchdog.read(tmp_path, 3)["phase"] == "end"
    assert [path.name for path in (tmp_path / "heartbeats").iterdir()] == ["3.json"]


@pytest.mark.parametrize("text", ["", "{", "\xff"])
def test_a_heartbeat_that_cannot_be_read_is_none(tmp_path, text):
    path = watchdog.path(tmp_path, 0)
    path.parent.mkdir()
    path.write_text(text, "latin-1")
    assert watchdog.read(tmp_path, 0) is None


HANGING = """
import sys, threading, time
from pathlib import Path
from unifluid_jax.watchdog import Watchdog

def stuck_forever():
    time.sleep(600)

with Watchdog(Path(sys.argv[1]), 0, hang=0.2, end=float(sys.argv[3]), every=0.02) as watching:
    watching.enter(sys.argv[2], 5)
    if sys.argv[2] == "evaluate":
        time.sleep(1)
    else:
        stuck_forever()
"""


@pytest.mark.parametrize("phase", ["input", "compute", "checkpoint"])
def test_a_hanging_phase_shows_all_stacks_and_ends_the_process(tmp_path, phase):
    ended = subprocess.run(
        [sys.executable, "-c", HANGING, str(tmp_path), phase, "0.5"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 75
    assert f"process 0 is in {phase} of step 5 since" in ended.stderr
    assert ended.stderr.count("stuck_forever") == 1, "once a phase"
    assert "Thread" in ended.stderr and "restart: process 0 is in" in ended.stderr


def test_an_evaluation_may_take_long(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", HANGING, str(tmp_path), "evaluate", "0.5"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads((tmp_path / "heartbeats" / "0.json").read_text())["phase"] == "end"


DEADLINE = """
import time
from unifluid_jax import watchdog
with watchdog.deadline(60, lambda: "never"):
    pass
with watchdog.deadline(0.1, lambda: "nobody came"):
    time.sleep(600)
"""


def test_a_deadline_ends_the_process_with_a_reason():
    ended = subprocess.run(
        [sys.executable, "-c", DEADLINE], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stderr) == (75, "restart: nobody came\n")
