"""A page in the browser: draw, edit, inpaint, describe and ask, with pictures as they are made.

    unifluid demo --workdir=unifluid-small
    unifluid demo --workdir=runs/quickstart --host=0.0.0.0 --port=8080

Needs `pip install 'unifluid_jax[demo]'`. Requests wait in one queue and are worked on one at a
time; when --queue of them wait, further ones are told to come back later.
"""

import contextlib
import functools
import hashlib
import io
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging
from PIL import Image

from unifluid_jax import cli, inference
from unifluid_jax.errors import UserError

# Before it is imported: it would otherwise ask its maker's servers for news.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
try:
    import gradio as gr
except ImportError as error:
    raise UserError("the demo needs Gradio: pip install 'unifluid_jax[demo]'") from error

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run, checkpoint, exported folder or name of a shipped model.", required=True
)
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint, by default the latest.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 is all of them.")
_PORT = flags.DEFINE_integer("port", 7860, "Port to listen on.")
_QUEUE = flags.DEFINE_integer("queue", 16, "Requests that may wait.")

Number = int | float  # what a slider gives

MOST = 4  # pictures of one request
_HISTORY = 24  # pictures remembered for a visitor
_SHOWN = 256  # pixels, about, that small pictures are enlarged to
_KEPT = 7200  # seconds that files are kept
_PAUSE = 0.1  # seconds between previews at least: a browser shows no more
_ABOUT = """# {name}
One model draws from text, edits, fills in, describes and answers. Pictures appear as their tokens
are made, in random order. The first request of a kind waits for its program to be compiled."""
_EXAMPLES = ["a red circle", "a blue triangle", "a green rectangle", "red apple", "smiling cat"]


def main(argv: list[str]) -> None:
    cli.positional(argv)
    if _QUEUE.value < 1:
        raise UserError(f"--queue is {_QUEUE.value}: set it to 1 or more")
    model = inference.load(_WORKDIR.value, step=_STEP.value)
    page = build(model, os.path.basename(os.path.normpath(_WORKDIR.value)), _QUEUE.value)
    try:
        launch(page, _HOST.value, _PORT.value, block=True)
    except OSError as error:
        raise UserError(f"cannot listen on {_HOST.value}:{_PORT.value}: {error}") from error


def launch(page: gr.Blocks, host: str, port: int | None, *, block: bool) -> str:
    """Serves the page; returns its address."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not block,
        max_file_size="20mb",
        state_session_capacity=1000,
        footer_links=[],
        theme=theme,
        share=False,
        ssr_mode=False,
    )
    return url


def readable(method: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """What goes wrong in a handler, as a message on the page: never as a stack trace."""

    @functools.wraps(method)
    def run(*arguments: Any) -> Iterator[Any]:
        try:
            yield from method(*arguments)
        except UserError as error:
            raise gr.Error(_sentence(str(error)), print_exception=False) from None
        except gr.Error:
            raise
        except Exception:
            logging.exception("a request to the demo failed")
            message = "This did not work, and it is not your fault: the server's log says why."
            raise gr.Error(message, print_exception=False) from None

    return run


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


class Files:
    """Pictures as files, each written once and whole.

    Gradio would write what is no file anew whenever it is shown, also while a browser reads it.
    """

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="unifluid_demo_")

    def path(self, picture: Image.Image) -> str:
        """The file of a picture, enlarged to be looked at."""
        encoded = io.BytesIO()
        _enlarged(picture).save(encoded, "PNG")
        name = hashlib.sha256(encoded.getvalue()).hexdigest()
        path = Path(self._folder.name) / f"{name}.png"
        if not path.exists():
            partial = path.with_suffix(f".{threading.get_ident()}")
            partial.write_bytes(encoded.getvalue())
            partial.rename(path)
        os.utime(path)
        return str(path)

    def forget_old(self) -> None:
        """Removes what has not been shown for as long as Gradio keeps its files."""
        for path in Path(self._folder.name).iterdir():
            with contextlib.suppress(FileNotFoundError):  # another request was faster
                if time.time() - path.stat().st_mtime > _KEPT:
                    path.unlink()


class Handlers:
    """What the page does, without the page: generators of what its outputs show.

    Handlers of pictures yield (pictures, status, history), those of text (text, status). Their
    last arguments are the settings, in the order of `Handlers.settings`.
    """

    def __init__(self, model: inference.Model):
        self._model, self._files = model, Files()

    @readable
    def generate(self, prompt: str, n: Number, history: list, *settings: Any) -> Iterator[tuple]:
        yield from self._draw("generate", (prompt,), prompt, n, history, settings)

    @readable
    def edit(
        self, image: str | None, instruction: str, n: Number, history: list, *settings: Any
    ) -> Iterator[tuple]:
        what = (_given(image), instruction)
        yield from self._draw("edit", what, instruction, n, history, settings)

    @readable
    def inpaint(
        self, drawn: dict | None, prompt: str, n: Number, history: list, *settings: Any
    ) -> Iterator[tuple]:
        image = _given(None if drawn is None else drawn["background"])
        mask = np.zeros(image.shape[:2], bool)
        for layer in drawn["layers"]:
            mask |= layer[..., 3] > 0
        if not mask.any():
            raise UserError("nothing is painted: paint over what is to be drawn anew")
        yield from self._draw("inpaint", (image, mask, prompt), prompt, n, history, settings)

    @readable
    def caption(self, image: str | None) -> Iterator[tuple[str, str]]:
        yield from self._write("caption", _given(image))

    @readable
    def answer(self, image: str | None, question: str) -> Iterator[tuple[str, str]]:
        yield from self._write("answer", _given(image), question)

    def _draw(
        self, method: str, what: tuple, title: str, n: Number, history: list, values: tuple
    ) -> Iterator[tuple]:
        begun, shown_at = time.monotonic(), -math.inf
        if not 1 <= n <= MOST:
            raise UserError(f"{n:g} pictures at once: ask for 1 to {MOST}")
        settings = self.settings(*values)
        self._files.forget_old()
        pictures, count = [], 0
        for pictures in self._model.stream(method, *what, n=int(n), **settings):
            count += 1
            if time.monotonic() - shown_at < _PAUSE:
                continue
            status = f"step {count}, seed {settings['seed']}"
            yield [self._files.path(picture) for picture in pictures], status, gr.skip()
            shown_at = time.monotonic()
        shown = [self._files.path(picture) for picture in pictures]
        label = f"{title} (seed {settings['seed']})"
        kept = [(path, label) for path, label in history if os.path.exists(path)]
        history = [(path, label) for path in shown] + kept
        status = f"done in {time.monotonic() - begun:.1f} s, seed {settings['seed']}"
        yield shown, status, history[:_HISTORY]

    def _write(self, method: str, *what: Any) -> Iterator[tuple[str, str]]:
        begun, text = time.monotonic(), ""
        for piece in self._model.stream(method, *what):
            text += piece
            yield text, "writing"
        yield text or "(nothing)", f"done in {time.monotonic() - begun:.1f} s"

    @staticmethod
    def settings(
        guidance: Number,
        temperature: Number,
        steps: Number,
        parallel: Number,
        order: str,
        seed: Number | None,
        fresh: bool,
    ) -> dict[str, Any]:
        """The settings of a call from what the page has: a fresh seed when one is wanted."""
        if fresh:
            seed = np.random.default_rng().integers(2**31)
        elif seed is None or not math.isfinite(seed):
            raise UserError("there is no seed: type a whole number, or tick the box beside it")
        return {
            "guidance": guidance,
            "temperature": temperature,
            "steps": int(steps),
            "parallel": int(parallel),
            "order": order,
            "seed": int(seed),
        }


def _given(image: Any) -> Any:
    if image is None:
        raise UserError("there is no picture: upload one, or use one that was drawn")
    return image


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = max(1, _SHOWN // picture.width)
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


def guarded(component: gr.components.Component) -> gr.components.Component:
    """The same component; what it cannot read of an upload becomes a message."""
    read = component.preprocess

    def preprocess(payload: Any) -> Any:
        try:
            return read(payload)
        except Exception as error:  # of many kinds, as in `pictures.to_array`
            logging.info("unreadable upload: %s", error)
            message = "This file cannot be read as a picture."
            raise gr.Error(message, print_exception=False) from None

    # Not a subclass: Gradio writes a stub file beside the source of each.
    component.preprocess = preprocess
    return component


def _upload() -> gr.components.Component:
    """A picture, as the path of its file."""
    return guarded(gr.Image(type="filepath", image_mode=None, label="Picture", height=280))


def build(model: inference.Model, name: str, queue: int) -> gr.Blocks:
    """The page of a model; `queue` requests may wait."""
    handlers = Handlers(model)
    with gr.Blocks(title=f"{name}: unifluid_jax", delete_cache=(3600, _KEPT)) as page:
        gr.Markdown(_ABOUT.format(name=name))
        history = gr.State([])
        with gr.Row():
            with gr.Column(scale=3), gr.Tabs() as tabs:
                asked = _tabs()
            with gr.Column(scale=2):
                pictures = gr.Gallery(
                    label="Pictures",
                    format="png",
                    columns=2,
                    height=480,
                    object_fit="contain",
                    fit_columns=False,
                    interactive=False,
                    elem_id="pictures",
                )
                status = gr.Textbox(label="Status", interactive=False, elem_id="status")
                with gr.Row():
                    use = gr.Button("Use this picture", elem_id="use")
                    stop = gr.Button("Stop", variant="stop", elem_id="stop")
                settings = _settings(model)
        past = gr.Gallery(
            label="History",
            format="png",
            columns=8,
            height=190,
            object_fit="contain",
            fit_columns=False,
            interactive=False,
            elem_id="history",
        )

        events = []
        for method in ("generate", "edit", "inpaint"):
            inputs = asked[method]
            event = gr.on(
                [inputs["button"].click, inputs["text"].submit],
                getattr(handlers, method),
                [*inputs["inputs"], history, *settings],
                [pictures, status, history],
                api_name=method,
                concurrency_limit=1,
                concurrency_id="model",
                show_progress="minimal",
            )
            event.success(lambda history: history, history, past, api_visibility="private")
            events.append(event)
        for method in ("caption", "answer"):
            inputs = asked[method]
            triggers = [inputs["button"].click]
            if "text" in inputs:
                triggers.append(inputs["text"].submit)
            events.append(
                gr.on(
                    triggers,
                    getattr(handlers, method),
                    inputs["inputs"],
                    [inputs["output"], status],
                    api_name=method,
                    concurrency_limit=1,
                    concurrency_id="model",
                    show_progress="minimal",
                )
            )
        stop.click(None, cancels=events, api_visibility="private")

        # The picture that was clicked, by default the first.
        chosen = gr.State(0)
        pictures.select(_index, None, chosen, api_visibility="private")
        uploads = [
            asked[method]["inputs"][0] for method in ("edit", "inpaint", "caption", "answer")
        ]
        use.click(
            functools.partial(_use, len(uploads)),
            [pictures, chosen],
            [*uploads, tabs],
            api_visibility="private",
        )
    return page.queue(max_size=queue)


def _tabs() -> dict[str, dict[str, Any]]:
    """The tabs of the page: by method, its inputs, its button, and where its text goes."""
    asked: dict[str, dict[str, Any]] = {}

    def number() -> gr.Slider:
        return gr.Slider(1, MOST, 1, step=1, label="Pictures")

    def words(label: str, example: str) -> gr.Textbox:
        return gr.Textbox(label=label, placeholder=example, max_length=500, max_lines=1)

    with gr.Tab("Draw", id="generate"):
        text, n = words("Prompt", "a red circle"), number()
        text.elem_id = "prompt"
        button = gr.Button("Draw", variant="primary", elem_id="draw")
        gr.Examples(_EXAMPLES, text)
        asked["generate"] = {"inputs": [text, n], "text": text, "button": button}
    with gr.Tab("Edit", id="edit"):
        image = _upload()
        text, n = words("Instruction", "make it blue"), number()
        button = gr.Button("Edit", variant="primary", elem_id="do-edit")
        asked["edit"] = {"inputs": [image, text, n], "text": text, "button": button}
    with gr.Tab("Inpaint", id="inpaint"):
        image = gr.ImageEditor(
            type="numpy",
            label="Paint over what is to be drawn anew",
            height=420,
            brush=gr.Brush(default_size=40, colors=["#ff00ff"], color_mode="fixed"),
            transforms=(),
            layers=False,
            format="png",
        )
        image = guarded(image)
        text, n = words("What the whole picture shows", "a red circle"), number()
        button = gr.Button("Inpaint", variant="primary", elem_id="do-inpaint")
        asked["inpaint"] = {"inputs": [image, text, n], "text": text, "button": button}
    with gr.Tab("Describe", id="caption"):
        image = _upload()
        button = gr.Button("Describe", variant="primary", elem_id="do-caption")
        output = gr.Textbox(label="Caption", interactive=False, elem_id="caption")
        asked["caption"] = {"inputs": [image], "button": button, "output": output}
    with gr.Tab("Ask", id="answer"):
        image = _upload()
        text = words("Question", "what color is the shape?")
        button = gr.Button("Ask", variant="primary", elem_id="do-answer")
        output = gr.Textbox(label="Answer", interactive=False, elem_id="answer")
        inputs = [image, text]
        asked["answer"] = {"inputs": inputs, "text": text, "button": button, "output": output}
    return asked


def _settings(model: inference.Model) -> list[Any]:
    """What `Handlers.settings` takes, from the defaults of the model's config."""
    drawing, sampler = model.drawing(), model.config.sampling.sampler
    learned = max(model.parts.sequencer.parallel)
    with gr.Accordion("Settings", open=False):
        guidance = gr.Slider(
            1, 10, drawing.guidance, step=0.1, label="Guidance",
            info="how closely to follow the text", interactive=drawing.guidance != 1,
        )  # fmt: skip
        temperature = gr.Slider(
            0, 1.5, drawing.temperature, step=0.01, label="Temperature", info="how much varies"
        )
        steps = gr.Slider(
            1, max(100, sampler.steps), sampler.steps, step=1, label="Steps of the sampler"
        )
        parallel = gr.Slider(
            1, max(learned, 2), drawing.how.parallel, step=1, label="Tokens at once",
            info="more are faster, and know less of each other", visible=learned > 1,
        )  # fmt: skip
        order = gr.Radio(["random", "raster"], value=drawing.order, label="Order of the tokens")
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
            fresh = gr.Checkbox(True, label="a new one each time", elem_id="fresh")
    return [guidance, temperature, steps, parallel, order, seed, fresh]


def _index(event: gr.SelectData) -> int:
    return event.index


def _use(count: int, pictures: list | None, chosen: int) -> list[Any]:
    """The chosen picture, for every tab that takes one."""
    if not pictures:
        message = "There is no picture yet: draw one first."
        raise gr.Error(message, print_exception=False)
    path = pictures[chosen if chosen < len(pictures) else 0][0]
    return [path] * count + [gr.Tabs(selected="edit")]


if __name__ == "__main__":
    cli.run(main)
