"""What the demo's page does, without a browser."""

import time
import types
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
from gradio.data_classes import FileData
from PIL import Image

from tests import worlds
from unifluid_jax import demo


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return worlds.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def handlers(model, monkeypatch):
    monkeypatch.setattr(demo, "_PAUSE", 0.0)
    return demo.Handlers(model)


# Guidance, temperature, steps, tokens at once, order, seed, whether a fresh one.
SETTINGS = (2.0, 1.0, 2, 1, "random", 5, False)
MASK = np.kron(np.array([[0, 1], [0, 0]]), np.ones((8, 8), int))


def picture():
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)


def shown(pictures):
    """What the page enlarges, as it was."""
    return [np.asarray(Image.open(path))[::16, ::16] for path in pictures]


@pytest.fixture
def old(tmp_path):
    """A file of the history."""
    path = tmp_path / "old.png"
    Image.fromarray(picture()).save(path)
    return str(path)


def test_pictures_appear_as_they_are_made(handlers, model, old):
    history = [(old, "label"), ("forgotten.png", "forgotten")]
    frames = list(handlers.generate("a red circle", 2, history, *SETTINGS))
    assert len(frames) == 6  # nothing yet, four tokens, done
    for pictures, status, _ in frames[:-1]:
        assert len(pictures) == 2 and "seed 5" in status
    assert np.isin(shown(frames[0][0])[0], (225, 200)).all()
    pictures, status, history = frames[-1]
    expected = model.generate("a red circle", n=2, seed=5)
    for found, wanted in zip(shown(pictures), expected, strict=True):
        assert np.abs(found.astype(int) - np.asarray(wanted)).max() <= 1
    assert status.startswith("done in ") and status.endswith("seed 5")
    assert [label for _, label in history] == ["a red circle (seed 5)"] * 2 + ["label"]


def test_a_fresh_seed_gives_another_picture_and_is_told(handlers):
    fresh = (*SETTINGS[:6], True)
    (*_, first), (*_, second) = (list(handlers.generate("a", 1, [], *fresh)) for _ in range(2))
    assert first[1].split()[-1] != second[1].split()[-1]
    assert np.any(shown(first[0])[0] != shown(second[0])[0])


def test_history_forgets_the_oldest(handlers, old):
    full = [(old, str(i)) for i in range(24)]
    *_, (_, _, history) = handlers.generate("a", 1, full, *SETTINGS)
    assert len(history) == 24 and history[1:] == full[:-1]


def test_a_picture_is_one_file_written_once_until_it_is_old(monkeypatch):
    files = demo.Files()
    path = Path(files.path(Image.fromarray(picture())))
    before = path.stat()
    time.sleep(0.01)
    assert files.path(Image.fromarray(picture())) == str(path)
    assert path.stat().st_ino == before.st_ino and path.stat().st_mtime > before.st_mtime
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    files.forget_old()
    assert path.exists()
    monkeypatch.setattr(demo, "_KEPT", -1)
    files.forget_old()
    assert not path.exists()


def test_edits_and_inpainting(handlers, tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(picture()).save(path)
    *_, (pictures, _, _) = handlers.edit(str(path), "make it blue", 1, [], *SETTINGS)
    assert len(pictures) == 1
    layer = np.dstack([np.zeros((16, 16, 3), np.uint8), np.uint8(200 * MASK)])
    drawn = {"background": picture(), "layers": [layer, layer * 0], "composite": None}
    *_, (pictures, _, _) = handlers.inpaint(drawn, "a", 1, [], *SETTINGS)
    np.testing.assert_array_equal(shown(pictures)[0][MASK == 0], picture()[MASK == 0])


def test_texts_grow(handlers, model, tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(picture()).save(path)
    texts = [text for text, _ in handlers.answer(str(path), "what color is it?")]
    whole = model.answer(path, "what color is it?")[0] or "(nothing)"
    assert texts[-1] == whole and all(whole.startswith(text) for text in texts)
    *_, (text, status) = handlers.caption(str(path))
    assert text == (model.caption(path)[0] or "(nothing)") and status.startswith("done in ")


def settings(**changes):
    names = ("guidance", "temperature", "steps", "parallel", "order", "seed", "fresh")
    return tuple((dict(zip(names, SETTINGS, strict=True)) | changes).values())


NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: h.generate("", 1, [], *SETTINGS), "The prompt of the task generate is empty"),
        (lambda h: h.generate("a " * 99, 1, [], *SETTINGS), "tokens, more than "),
        (lambda h: h.generate("a", 0, [], *SETTINGS), "0 pictures at once: ask for 1 to 4."),
        (lambda h: h.generate("a", 999, [], *SETTINGS), "999 pictures at once: ask for 1 to 4."),
        (lambda h: h.generate("a", NAN, [], *SETTINGS), "Nan pictures at once: ask for 1 to 4."),
        (lambda h: h.generate("a", 1, [], *settings(guidance=NAN)), "Guidance is nan: set it to"),
        (lambda h: h.generate("a", 1, [], *settings(steps=0)), "0 sampling steps: set 1 or more."),
        (
            lambda h: h.generate("a", 1, [], *settings(parallel=2)),
            "Parallel=2, and the model has learned to draw at most 1 at once",
        ),
        (lambda h: h.generate("a", 1, [], *settings(order="x")), 'Order is "x": set it to random'),
        (lambda h: h.generate("a", 1, [], *settings(seed=None)), "There is no seed: type a whole"),
        (lambda h: h.generate("a", 1, [], *settings(seed=-4)), "Seed is -4: set it to 0 or more."),
        (lambda h: h.edit(None, "a", 1, [], *SETTINGS), "There is no picture: upload one, or use"),
        (
            lambda h: h.edit("none.png", "a", 1, [], *SETTINGS),
            'No picture "none.png": no such file',
        ),
        (lambda h: h.inpaint(None, "a", 1, [], *SETTINGS), "There is no picture: upload one, or"),
        (
            lambda h: h.inpaint({"background": picture(), "layers": []}, "a", 1, [], *SETTINGS),
            "Nothing is painted: paint over what is to be drawn anew.",
        ),
        (lambda h: h.caption(None), "There is no picture: upload one, or use one that was drawn."),
        (lambda h: h.answer(__file__, "what?"), "cannot be read as a picture"),
    ],
)
def test_mistakes_become_readable_messages(handlers, call, message):
    with pytest.raises(gr.Error) as error:
        list(call(handlers))
    assert message.lower() in error.value.message.lower()
    assert "\n" not in error.value.message and not error.value.print_exception


def test_a_bug_is_no_stack_trace_either(handlers, model, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(model, "stream", broken)
    with pytest.raises(gr.Error) as error:
        list(handlers.generate("a", 1, [], *SETTINGS))
    assert "secret" not in error.value.message and "server's log" in error.value.message


def test_an_upload_that_is_no_picture_is_said_so(model):
    page = demo.build(model, "tiny", queue=3)
    uploads = [x for x in page.blocks.values() if isinstance(x, gr.Image) and x.type == "filepath"]
    assert len(uploads) == 3
    (painting,) = [x for x in page.blocks.values() if isinstance(x, gr.ImageEditor)]
    file = FileData(path=__file__, orig_name="a.png")
    broken = types.SimpleNamespace(id=None, background=file, layers=[], composite=None)
    for component, payload in [(painting, broken), *[(x, file) for x in uploads]]:
        with pytest.raises(gr.Error) as error:
            component.preprocess(payload)
        assert error.value.message == "This file cannot be read as a picture."


def test_all_work_waits_in_one_queue(model):
    page = demo.build(model, "tiny", queue=3)
    busy = [x for x in page.fns.values() if x.concurrency_id == "model"]
    assert {x.api_name for x in busy} == {"generate", "edit", "inpaint", "caption", "answer"}
    assert {x.concurrency_limit for x in busy} == {1}
    assert page._queue.max_size == 3
