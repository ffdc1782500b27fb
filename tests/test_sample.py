"""`unifluid sample`: files, lines and messages, on a small random checkpoint."""

import json

import numpy as np
import pytest
from PIL import Image

from tests import worlds


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    worlds.save_checkpoint(folder / "run", worlds.make_config(folder))
    for name, color in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        Image.new("RGB", (20, 12), color).save(folder / f"{name}.png")
    return folder / "run"


@pytest.fixture(scope="module")
def program():
    program = worlds.Program("sample")
    yield program
    program.close()


@pytest.fixture
def sample(program, workdir, tmp_path):
    """Runs one command on the checkpoint, with `tmp_path`/out for its files."""

    def run(command, *arguments):
        return program(command, f"--workdir={workdir}", f"--out={tmp_path / 'out'}", *arguments)

    return run


def lines(tmp_path):
    with open(tmp_path / "out" / "samples.jsonl") as file:
        return [json.loads(line) for line in file]


def test_generate_writes_pictures_a_sheet_and_how_they_were_made(sample, workdir, tmp_path):
    out = tmp_path / "out"
    arguments = ("--prompt=A red/circle!", "--prompt=???", "--n=2", "--seed=5")
    code, said, err = sample("generate", *arguments, "--config.sampling.guidance=3")
    assert (code, err) == (0, "")
    assert said == f"4 pictures in {out}, all of them on {out / 'sheet.png'}\n"
    names = ["00000-a-red-circle.png", "00001-a-red-circle.png", "00002-.png", "00003-.png"]
    assert sorted(path.name for path in out.iterdir()) == [*names, "samples.jsonl", "sheet.png"]
    pictures = [np.asarray(Image.open(out / name)) for name in names]
    assert {picture.shape for picture in pictures} == {(16, 16, 3)}
    assert len({picture.tobytes() for picture in pictures}) == 4
    assert Image.open(out / "sheet.png").size == (10 + 4 * 138, 10 + 128 + 15 + 10)
    written = lines(tmp_path)
    assert [line["file"] for line in written] == names
    assert [line["prompt"] for line in written] == ["A red/circle!"] * 2 + ["???"] * 2
    assert [line["number"] for line in written] == [0, 1, 0, 1]
    for line in written:
        assert line["command"] == "generate" and line["weights"] == "ema"
        assert line["checkpoint"] == str(workdir / "checkpoints" / "3")
        assert line["sampling"]["seed"] == 5 and line["sampling"]["guidance"] == 3
        assert line["sampling"]["sampler"] == {"steps": 2}

    assert len({line["id"] for line in written}) == 2

    # The same call does nothing again; one of another seed adds.
    (out / names[1]).unlink()
    code, said, err = sample("generate", *arguments, "--config.sampling.guidance=3")
    assert (code, err) == (0, "")
    assert said.startswith(f"4 pictures in {out}, 3 of them from before, all of them on ")
    assert sorted(path.name for path in out.glob("0*")) == [
        names[0],
        *names[2:],
        "00004-a-red-circle.png",
    ]
    again = np.asarray(Image.open(out / "00004-a-red-circle.png"))
    assert np.abs(again.astype(int) - pictures[1]).max() <= 1
    assert (
        sample("generate", "--prompt=???", "--seed=6", "--settings=guidance=3,order=raster")[0] == 0
    )
    last = lines(tmp_path)[-1]
    assert last["file"] == "00005-.png" and last["sampling"]["order"] == "raster"


def test_a_file_of_prompts_is_finished_where_it_stopped(sample, tmp_path):
    out, file = tmp_path / "out", tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n  a blue square \na red circle\n", encoding="utf-8")
    code, said, err = sample("generate", f"--prompts={file}", "--settings=steps=2")
    assert (code, err) == (0, "") and said.startswith("3 pictures in")
    written = lines(tmp_path)
    assert [(line["prompt"], line["number"]) for line in written] == [
        ("a red circle", 0), ("a blue square", 0), ("a red circle", 1)
    ]  # fmt: skip
    pictures = [Image.open(out / line["file"]).tobytes() for line in written]
    assert len(set(pictures)) == 3
    # Killed while it wrote its last line.
    path = out / "samples.jsonl"
    path.write_text(path.read_text()[:-40])
    code, said, err = sample("generate", f"--prompts={file}", "--settings=steps=2")
    assert (code, err) == (0, "") and ", 2 of them from before, " in said
    assert lines(tmp_path)[:2] == written[:2]
    assert lines(tmp_path)[2] == written[2] | {"file": "00003-a-red-circle.png"}
    path.write_text("[]\n" + path.read_text())
    code, _, err = sample("generate", f"--prompts={file}")
    assert (code, err.count("\n")) == (2, 1)
    assert f"line 1 of {path} says nothing of a picture or text: remove it" in err


def test_inpaint_draws_where_the_mask_is_white(sample, workdir, tmp_path):
    red, mask = workdir.parent / "red.png", tmp_path / "mask.png"
    Image.fromarray(np.repeat(np.uint8([[0, 255]]), 8, axis=1).repeat(16, axis=0)).save(mask)
    code, _, err = sample("inpaint", f"--image={red}", f"--mask={mask}", "--prompt=a red circle")
    assert (code, err) == (0, "")
    (line,) = lines(tmp_path)
    assert (line["image"], line["mask"]) == (str(red), str(mask))
    drawn = np.asarray(Image.open(tmp_path / "out" / line["file"]))
    assert (drawn[:, :8] == (200, 0, 0)).all() and (drawn[:, 8:] != (200, 0, 0)).any()


def test_edit_takes_one_prompt_for_all_pictures(sample, workdir, tmp_path):
    red, blue = workdir.parent / "red.png", workdir.parent / "blue.png"
    arguments = (f"--image={red}", f"--image={blue}", "--prompt=make it blue")
    code, _, err = sample("edit", *arguments, "--weights=params", "--step=3")
    assert (code, err) == (0, "")
    written = lines(tmp_path)
    assert [line["image"] for line in written] == [str(red), str(blue)]
    assert [line["file"] for line in written] == [
        "00000-make-it-blue.png",
        "00001-make-it-blue.png",
    ]
    assert {line["weights"] for line in written} == {"params"}
    # The sheet shows source and result side by side, eight times as large.
    sheet = np.asarray(Image.open(tmp_path / "out" / "sheet.png"))
    edited = np.asarray(Image.open(tmp_path / "out" / "00000-make-it-blue.png"))
    np.testing.assert_array_equal(sheet[10:138, 10 : 10 + 128], np.tile([200, 0, 0], (128, 128, 1)))
    right = sheet[10:138, 10 + 128 + 8 : 10 + 2 * 128 + 8]
    np.testing.assert_array_equal(right[::8, ::8], edited)


def test_caption_and_answer_print_a_line_each_and_write_no_picture(sample, workdir, tmp_path):
    red, blue = (str(workdir.parent / name) for name in ("red.png", "blue.png"))
    code, out, err = sample("caption", f"--image={red}", f"--image={blue}")
    assert (code, err) == (0, "")
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[0] for row in rows] == [red, blue]
    code, out, _ = sample("answer", f"--image={red}", "--prompt=what is it?", "--prompt=why?")
    assert code == 0
    asked = [line.split("\t") for line in out.splitlines()]
    assert [row[:2] for row in asked] == [[red, "what is it?"], [red, "why?"]]
    written = lines(tmp_path)
    assert [line["text"] for line in written] == [row[-1] for row in rows + asked]
    assert [line["command"] for line in written] == ["caption"] * 2 + ["answer"] * 2
    assert written[0]["image"] == red and "prompt" not in written[0]
    assert written[3]["prompt"] == "why?" and written[3]["sampling"]["seed"] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["samples.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["draw"],
            'unknown command "draw" (known: answer, caption, edit, generate, inpaint); usage: unif',
        ),
        ([], "generate|edit|inpaint|caption|answer is missing; usage: unifluid sample"),
        (["generate"], "`unifluid sample generate` needs --prompt"),
        (["generate", "--prompt=a", "--image=x"], "`unifluid sample generate` takes no --image"),
        (["edit", "--prompt=a"], "`unifluid sample edit` needs --image"),
        (["caption", "--image=x", "--prompt=a"], "`unifluid sample caption` takes no --prompt"),
        (["caption", "--image=none.png"], 'no picture "none.png": no such file'),
        (["generate", "--prompt=a", "--step=4"], "no checkpoint of step 4 in"),
        (["generate", "--prompt=a", "--weights=mean"], "flag --weights=mean"),
        (["generate", "--prompt=a", "--n=0"], "n is 0: ask for 1 picture or more"),
        (["generate", "--prompt=a", "--seed=-1"], "seed is -1: set it to 0 or more"),
        (["generate", "--prompt= "], "the prompt of the task generate is empty"),
        (["generate", "--prompt=a", "--config.sampling.guidence=1"], 'did you mean "guidance"?'),
        (["generate", "--prompt=a", "--config.sampling.order=x"], 'order is "x": set it to random'),
        (["generate", "--prompt=a", "--settings=guidance=nan"], "guidance is nan: set it to 0 or"),
        (
            ["generate", "--prompt=a", "--settings=guidance"],
            '"guidance" is no setting, write name=',
        ),
        (["generate", "--prompt=a", "--settings=hue=3"], 'no setting "hue" of pictures: there are'),
        (["generate", "--prompts=none.txt"], "--prompts=none.txt: No such file or directory"),
        (["generate", "--prompts=/dev/null"], "--prompts=/dev/null: there is no line with a text"),
        (["inpaint", "--prompt=a", "--image=x"], "`unifluid sample inpaint` needs --mask"),
        (["generate", "--prompt=a", "--out=/dev/null/x"], "cannot write to /dev/null/x: Not a dir"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(sample, arguments, message):
    code, out, err = sample(*(arguments or ["--n=1"]))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_a_place_without_a_checkpoint_is_named(program, tmp_path):
    code, _, err = program("generate", "--prompt=a", f"--workdir={tmp_path}")
    assert (code, err) == (
        2, f"error: no checkpoint in {tmp_path}: give the workdir of a training run\n"
    )  # fmt: skip
    code, _, err = program("generate", "--prompt=a")
    said = "Run, checkpoint, exported folder or name of a shipped model."
    assert (code, err) == (2, f"error: --workdir is missing: {said}\n")
    code, _, err = program("generate", "--prompt=a", "--workdir=unifluid-none")
    assert code == 2 and err.startswith('error: no model "unifluid-none": no such folder, and no m')
