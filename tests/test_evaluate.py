"""`unifluid evaluate`: scores, their circumstances and pictures, on a small random checkpoint."""

import datetime
import json
import shutil
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import worlds
from unifluid_jax import checkpoint, image_tokenizer, inference, pretrained
from unifluid_jax import config as configs
from unifluid_jax.evaluate import default_folder
from unifluid_jax.image_tokenizer import psnr
from unifluid_jax.input.records import Records, resized

SHARED = {"dataset": "drawings", "split": "test", "every": 0}
EVALS = {
    "answers": {**SHARED, "type": "vqa", "limit": 3, "pictures": 1},
    "tokens": {**SHARED, "type": "reconstruction", "limit": 4, "pictures": 2},
    "colors": {**SHARED, "type": "generate", "limit": 2, "pictures": 0, "judge": True},
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    worlds.build_drawings(folder)
    worlds.save_checkpoint(folder / "run", worlds.make_config(folder, EVALS), step=30)
    return folder / "run"


@pytest.fixture(scope="module")
def program():
    program = worlds.Program("evaluate")
    yield program
    program.close()


@pytest.fixture
def evaluate(program, workdir):
    return lambda *arguments: program(f"--workdir={workdir}", *arguments)


def test_all_evaluations_are_written_with_what_they_depend_on(evaluate, workdir):
    code, out, err = evaluate("--config.sampling.guidance=1")
    assert (code, err) == (0, "")
    folder = workdir / "evals" / "30"
    assert sorted(path.name for path in folder.iterdir()) == ["pictures.png", "scores.json"]
    report = json.loads((folder / "scores.json").read_text())
    scores = ("answers/accuracy", "colors/color", "colors/shape", "colors/both", "tokens/psnr")
    assert tuple(report["scores"]) == scores
    assert 0 <= report["scores"]["answers/accuracy"] <= 1
    assert report["examples"] == {"answers": 3, "tokens": 4, "colors": 2}
    assert report["seconds"].keys() == EVALS.keys()
    assert (report["step"], report["weights"]) == (30, "ema")
    assert report["checkpoint"] == str(workdir / "checkpoints" / "30")
    assert report["sampling"]["guidance"] == 1 and report["sampling"]["sampler"] == {"steps": 2}
    assert report["dtype"] == "float32" and report["data"] == {"drawings": "1.0.0"}
    assert report["evals"]["colors"] == {**EVALS["colors"], "fields": None}
    assert report["image_tokenizer"] == str(workdir.parent / "image_tokenizer")
    assert report["versions"]["jax"] == metadata.version("jax")
    assert {"python", "unifluid_jax", "numpy", "sentencepiece"} < report["versions"].keys()
    assert "1 x cpu" in report["device"]
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(report["time"])
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=10)

    assert f"tokens      drawings/test  4         psnr {report['scores']['tokens/psnr']:.3f}" in out
    assert f"scores in {folder / 'scores.json'}\npictures in {folder / 'pictures.png'}\n" in out
    # Sections of one and of two tiles; none for the evaluation that shows nothing.
    height = np.asarray(Image.open(folder / "pictures.png")).shape[0]
    assert height >= 2 * (10 + 26 + 128)


def test_the_scores_are_those_of_python(evaluate, workdir, tmp_path):
    code, out, _ = evaluate("--evals=tokens", f"--out={tmp_path / 'a' / 'b'}")
    assert code == 0 and "answers" not in out
    report = json.loads((tmp_path / "a" / "b" / "scores.json").read_text())
    tokenizer = image_tokenizer.load(workdir.parent / "image_tokenizer")
    records = Records("drawings", "test", workdir.parent)
    images = np.stack([resized(records[i].image(0), 16) for i in (0, 2, 5, 8)])
    expected = psnr(tokenizer.decode(tokenizer.encode(images)[0]), images).mean()
    assert report["scores"] == {"tokens/psnr": pytest.approx(expected, abs=0.01)}
    assert list(report["evals"]) == ["tokens"]


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/30"])
def test_scores_go_into_the_run_whatever_part_of_it_is_named(workdir, part):
    path = str(workdir / part)
    assert default_folder(path, inference.origin(path)) == workdir / "evals" / "30"


def test_scores_of_an_exported_folder_go_into_it_and_none_into_the_package(tmp_path):
    shipped = pretrained.find("unifluid-small")
    origin = inference.origin(shipped)
    evals = Path("evals", str(origin.step))
    for path in ("unifluid-small", str(shipped)):
        assert default_folder(path, origin) == "runs/unifluid-small" / evals
    own = shutil.copytree(shipped, tmp_path / "own")
    assert default_folder(str(own), inference.origin(own)) == own / evals


def test_without_pictures_no_sheet_is_written(evaluate, tmp_path):
    code, out, _ = evaluate(
        "--evals=tokens", f"--out={tmp_path}", "--config.evals.tokens.pictures=0"
    )
    assert code == 0 and "pictures in" not in out
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evals=answer"], 'no evaluation "answer" in config.evals (did you mean "answers"?)'),
        (["--step=4"], "no checkpoint of step 4 in"),
        (["--config.evals.answers.type=vqs"], 'config.evals.answers is of unknown type "vqs"'),
        (["--config.evals.answers.limit=-1"], "config.evals.answers.limit is -1: set it to 0 or"),
        (["--config.evals.answers.split=tset"], 'data set drawings has no split "tset" (it has'),
        (["--config.data_dir=/nowhere"], "data set drawings is not built in /nowhere: run"),
        (["--config.image_tokenizer.path=/nowhere"], "no image tokenizer at /nowhere"),
        (["--out=/dev/null/x"], "cannot write to /dev/null/x: Not a directory; set --out"),
        (["--weights=mean"], "flag --weights=mean"),
        (["more"], 'unexpected argument "more"; usage: unifluid evaluate'),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(evaluate, arguments, message):
    code, _, err = evaluate(*arguments)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_a_run_without_evaluations_or_checkpoints_is_named(program, workdir, tmp_path):
    config = configs.to_json(checkpoint.stored_config(workdir))
    config["evals"] = {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = program(f"--workdir={workdir}", f"--config={tmp_path / 'config.json'}")
    assert (code, err) == (2, "error: config.evals is empty: there is nothing to score\n")
    code, _, err = program(f"--workdir={tmp_path}")
    assert code == 2 and err.startswith(f"error: no checkpoint in {tmp_path}: give the workdir")
    said = "Run to score, exported folder or name of a shipped model."
    assert program() == (2, "", f"error: --workdir is missing: {said}\n")
