"""Processes that find each other, and what is said of one that is missing."""

import os
import socket
import subprocess
import sys

import pytest

from unifluid_jax import distributed
from unifluid_jax.errors import UserError

JOIN = """
import sys
from pathlib import Path
import jax
from unifluid_jax import distributed
process, processes, port, workdir, act = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 2)
distributed.start(
    Path(workdir), f"localhost:{port}", int(processes), int(process), False,
    4 if act == "alone" else 60,
)
assert jax.process_count() == int(processes) and jax.device_count() == 2 * int(processes)
if act == "gather":
    values = distributed.gather({"process": jax.process_index(), "text": "x" * 3**int(process)})
    assert [v["process"] for v in values] == list(range(int(processes))), values
    assert [len(v["text"]) for v in values] == [3**i for i in range(int(processes))]
    print("gathered")
elif act == "late":
    if process == "0":
        distributed.barrier("the meeting", 3)
    import os, time
    time.sleep(6)
    os._exit(0)
elif act == "lost":
    import os, time
    if process == "1":
        time.sleep(0.5)
        os._exit(9)
    with distributed.peers(3):
        time.sleep(1)
        raise RuntimeError("Connection closed by peer")
"""


def run(workdir, act, processes, launched=None):
    """Exit codes and outputs of some processes; `launched` of them are really started."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = str(server.getsockname()[1])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN, str(i), str(processes), port, str(workdir), act],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(processes)[:launched]
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(started, outputs, strict=True)]


def test_a_process_that_does_not_come_is_named(tmp_path):
    ((code, _, err),) = run(tmp_path, "alone", 2, launched=1)
    assert code == 75 and "restart: process 1 of 2 did not come within 4 s" in err


def test_a_process_that_does_not_reach_a_barrier_is_named(tmp_path):
    (code, _, err), _ = run(tmp_path, "late", 2)
    assert code == 75 and "restart: process 1 of 2 did not reach the meeting within 3 s" in err


def test_a_process_that_dies_is_named(tmp_path):
    (code, _, err), (other, _, _) = run(tmp_path, "lost", 2)
    assert (code, other) == (75, 9)
    assert "restart: process 1 of 2 does not answer any more (Connection closed by peer)" in err


def test_values_of_all_processes_are_gathered(tmp_path):
    for code, out, err in run(tmp_path, "gather", 4):
        assert code == 0 and out.endswith("gathered\n"), err  # after Gloo's greetings
    beats = sorted(path.name for path in (tmp_path / "heartbeats").iterdir())
    assert beats == ["0.json", "1.json", "2.json", "3.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, None, False), "--process and --processes need --coordinator=HOST:PORT or --mul"),
        (("a:1", 2, None, False), "--coordinator, --processes and --process go together"),
        (("a:1", 2, 2, False), "--process=2 is none of 0 to 1"),
        (("a:1", None, 0, True), "--coordinator, --processes and --process go together"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        distributed.start(tmp_path, *arguments, 1)
    assert not list(tmp_path.iterdir())


def test_variables_of_the_environment_do_as_well(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match='JAX_NUM_PROCESSES is "two": a number is needed'):
        distributed.start(tmp_path, None, None, 0, False, 1)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "5")
    with pytest.raises(UserError, match="--process=5 is none of 0 to 1"):
        distributed.start(tmp_path, None, None, None, False, 1)


def test_one_process_waits_for_nobody(tmp_path):
    distributed.start(tmp_path, None, None, None, False, 1)
    distributed.barrier("nobody else", 60)
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    assert distributed.local({"a": 1}) == {"a": 1}
    with pytest.raises(ZeroDivisionError), distributed.peers(60):
        1 / 0  # noqa: B018
