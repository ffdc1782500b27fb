"""The step's program, why it was compiled, profiles."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from absl import logging

from unifluid_jax import observe
from unifluid_jax.errors import UserError


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: found.append(text % values))
    return found


def test_a_program_is_compiled_once_and_says_why_it_is_again(tmp_path, warnings):
    entered = []

    @contextlib.contextmanager
    def compiling():
        entered.append(True)
        yield

    double = observe.Program(
        jax.jit(lambda batch: {"sum": jnp.sin(batch["x"]).sum()}), "step", None, compiling
    )
    for _ in range(3):
        double({"x": jnp.zeros(4), "same": jnp.zeros(1)})
    seconds = double.seconds
    assert len(entered) == 1 and seconds > 0 and not warnings
    double({"x": jnp.zeros(6), "same": jnp.zeros(1)})
    (warning,) = warnings
    assert warning.startswith("step is compiled again: 0/x was float32[4] on ")
    assert "now float32[6] on " in warning and "same" not in warning
    assert len(entered) == 2 and double.seconds > seconds
    assert not list(tmp_path.iterdir())


def test_an_error_that_is_no_other_signature_passes_through():
    def bad(x):
        raise ValueError("a bug")

    program = observe.Program(jax.jit(bad), "step")
    with pytest.raises(ValueError, match="a bug"):
        program(jnp.zeros(2))


def test_the_program_is_written_on_demand(tmp_path):
    program = observe.Program(jax.jit(lambda x: jnp.sin(x)), "step", tmp_path / "program")
    program(jnp.zeros(4))
    texts = {path.name: path.read_text() for path in (tmp_path / "program").iterdir()}
    assert texts.keys() == {"step.jaxpr.txt", "step.stablehlo.txt", "step.hlo.txt"}
    assert "sin" in texts["step.jaxpr.txt"] and "f32[4]" in texts["step.jaxpr.txt"]
    assert "stablehlo.sine" in texts["step.stablehlo.txt"]
    assert "HloModule" in texts["step.hlo.txt"]


def test_a_window_of_steps():
    assert observe.profile_window(None) == range(0)
    assert observe.profile_window("100:105") == range(100, 105)


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "5:5", "7:5", "0:3", "a:b", "-1:3"])
def test_what_is_no_window_is_refused(text):
    with pytest.raises(UserError, match="give steps like --profile=100:105"):
        observe.profile_window(text)


def test_a_window_is_profiled(monkeypatch, tmp_path):
    """Starts before its first step is sent off, ends when its last one is done."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    profiler = observe.Profiler(tmp_path, range(3, 5))
    for step in range(1, 8):
        with profiler.step(step):
            calls.append(step)
        if step > 1:
            profiler.done(step - 1)
    profiler.close()
    assert calls == [1, 2, str(tmp_path), 3, 4, 5, "stop", 6, 7]
    # A run that ends inside the window writes what there is.
    profiler = observe.Profiler(tmp_path, range(3, 50))
    with profiler.step(4):
        pass
    profiler.close()
    assert calls[-2:] == [str(tmp_path), "stop"]


def test_memory_of_the_fullest_device(monkeypatch):
    class Device:
        def __init__(self, used):
            self.used = used

        def memory_stats(self):
            return self.used and {"bytes_in_use": self.used, "bytes_limit": 2**34}

    assert observe.memory() == {}, "CPUs do not say"
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(2**30), Device(2**31), Device(None)])
    assert observe.memory() == {"hbm/used": 2.0, "hbm/limit": 16.0}
