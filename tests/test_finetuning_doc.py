"""docs/finetuning.md: what it tells the user to type is accepted."""

import ast
import inspect
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from data import folder
from tests import tiny, worlds
from unifluid_jax import config as configs
from unifluid_jax import optim, parts
from unifluid_jax.input.tokenizer import TextTokenizer

DOC = Path("docs/finetuning.md").read_text()
LINES = [line.strip() for line in DOC.splitlines() if line.startswith("    ")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "quickstart"
    config = configs.load("experiments/quickstart.py:debug")
    worlds.save_checkpoint(workdir, config)
    return workdir


def test_its_configs_are_made(base):
    commands = [line for line in LINES if line.startswith("unifluid train")]
    found = [re.search(r"--config=(\S+)", line)[1] for line in commands]
    found.append("experiments/finetune_vqa.py:" + re.search(r"`(data=my_\S+)`", DOC)[1])
    assert len(found) > 3
    for path in found:
        path = path.replace("base=runs/quickstart,", "").replace(":base=runs/quickstart", "")
        config = configs.load(f"{path}{',' if ':' in path else ':'}base={base}")
        (entry,) = config.input.mixture
        assert entry["dataset"] == (re.findall(r"[:,]data=(\w+)", path) or ["easy_vqa"])[0]
        if "split=" in path:
            assert entry["split"] == "train[:90%]"
            assert config.evals.vqa.split == "train[90%:]"


def test_its_rules_say_what_is_trained(tmp_path):
    worlds.save_image_tokenizer(tmp_path / "image_tokenizer")
    config = tiny.unifluid(tmp_path).unlock()
    config.lora = {"rank": 1, "alpha": 1.0, "target": "backbone/layers/q"}
    made = parts.assemble(config)
    shapes = jax.eval_shape(made.trained.init, jax.random.key(0))
    rules = [re.match(r"(\(\(.*\)\))\s{2,}", line) for line in LINES]
    rules = [ast.literal_eval(match[1]) for match in rules if match]
    trained = []
    for rule in rules:
        split, _ = optim.split(configs.ConfigDict({"rules": rule}), shapes)
        trained.append(set(split))
    assert trained == [{"lora"}, {"lora", "head"}, set(shapes) - {"vision"}]


def test_its_lines_are_read(tmp_path):
    lines = [line for line in LINES if line.startswith("{")]
    assert len(lines) == 3
    (tmp_path / "photos").mkdir()
    for path in {p for line in lines for p in re.findall(r'"(photos/[^"]+)"', line)}:
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / path)
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (read,) = folder.read(tmp_path).values()
    assert [json.loads(line)["image"] for line in lines] == ["photos/0001.jpg"] * 3
    kinds = [(len(x.captions), len(x.questions), len(x.instructions)) for x in read]
    assert kinds == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]


def test_its_table_has_the_fields_of_the_tokenizer():
    rows = re.findall(r"^\| (`.*?`) \|", DOC, re.MULTILINE)
    fields = {field for row in rows for field in re.findall(r"`(\w+)`", row)}
    assert fields == set(inspect.signature(TextTokenizer).parameters)
