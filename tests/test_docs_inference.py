"""docs/inference.md is executed: its Python on a small random model, its commands' flags."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import unifluid_jax
from tests import worlds

TEXT = Path("docs/inference.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = re.findall(r"^    (unifluid .*)$", TEXT, re.MULTILINE)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return worlds.make_model(tmp_path_factory.mktemp("model"))


def test_the_python_of_the_page_runs(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("circle", "square"):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(f"{name}.png")
    Image.fromarray(np.kron([[0, 255], [0, 0]], np.ones((8, 8))).astype(np.uint8)).save("mask.png")
    monkeypatch.setattr(unifluid_jax, "load", lambda path: model, raising=False)
    names = {}
    for block in PYTHON:
        exec(block, names)
    assert names["pictures"][0].size == (16, 16) and Path("preview.png").exists()


def test_every_setting_of_the_table_is_one(model):
    rows = re.findall(r"^\| (`\w+`.*?) \|", TEXT, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    drawing = model.drawing()
    known = {"steps", "sampler", *vars(drawing), *vars(drawing.how)} - {"how"}
    assert set(names) == known


def test_the_flags_of_the_commands_exist():
    assert len(COMMANDS) >= 5
    for command in COMMANDS:
        _, program, *rest = shlex.split(command, comments=True)
        benchmark = program == "benchmark"
        source = Path(f"benchmarks/{rest[0]}.py" if benchmark else f"unifluid_jax/{program}.py")
        source = source.read_text()
        for flag in re.findall(r"--(\w+)", " ".join(rest)):
            assert re.search(rf'DEFINE_\w+\(\s*"{flag}"', source), f"--{flag} of {command}"
