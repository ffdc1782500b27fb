"""The Python interface: a trained model that generates, edits, captions and answers.

    m = unifluid_jax.load("runs/quickstart")
    m.generate(["a red circle", "red apple"], n=4, guidance=3.0, seed=1)
    m.edit("circle.png", "make it blue")
    m.inpaint("circle.png", "mask.png", "a red circle")
    m.caption("circle.png")
    m.answer("circle.png", ["what color is the shape?", "is there a triangle?"])

Pictures go in as PIL images, paths or uint8 arrays, one or a list of them, of any size; they are
squashed to the model's square, as in training. Settings that a call leaves out are taken from
`config.sampling`; which there are, `settings.py` says.

Rows are spread over the devices on which the parameters lie.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, UInt8
from ml_collections import ConfigDict
from PIL import Image

from unifluid_jax import (
    checkpoint,
    decode,
    decode_image,
    decode_text,
    pretrained,
    sequence,
    settings,
    sharding,
)
from unifluid_jax.decode_image import Given
from unifluid_jax.decode_text import Shared
from unifluid_jax.errors import UserError, nearest
from unifluid_jax.input.examples import Example
from unifluid_jax.input.records import resized
from unifluid_jax.interop import unifluid
from unifluid_jax.models.functional import Params
from unifluid_jax.parts import Parts, assemble
from unifluid_jax.pictures import Picture, painted, to_arrays, to_cells
from unifluid_jax.requests import (
    TASKS,
    Request,
    draw_entropy,
    numbered,
    paired,
    rngs,
    texts_of,
)
from unifluid_jax.settings import Drawing, Writing

PROGRAMS = "~/.cache/unifluid_jax/programs"


def load(
    path: str | os.PathLike,
    which: str | None = None,
    step: int | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    config: ConfigDict | None = None,
) -> "Model":
    """A trained model.

    Compiled programs are kept on disk, in `PROGRAMS` if JAX has not been told another place.

    Args:
        path: the workdir of a run, the folder of one of its checkpoints, an exported folder, or the
            name of a model that the package ships ("unifluid-small").
        which: "ema", the averaged weights, or "params"; by default averaged ones, or what an
            exported folder has.
        step: of the checkpoint, by default the latest.
        mesh: where to put the parameters, from `sharding.make_mesh`; by default whole on each of
            all devices.
        config: to be used in place of the stored one.

    Raises:
        UserError: there is no such model, or its weights do not fit its config.
    """
    _keep_programs()
    found = origin(path, which, step)
    parts = assemble(stored_config(path, step) if config is None else config)
    if mesh is None and jax.device_count() > 1:
        mesh = sharding.make_mesh(ConfigDict({"data": -1, "fsdp": 1, "tensor": 1}))
    abstract = jax.eval_shape(parts.trained.init, jax.random.key(0))
    if mesh is not None:
        where = sharding.shardings(parts.trained.axes, abstract, mesh)
        abstract = sharding.abstract(abstract, where)
        parts = dataclasses.replace(parts, images=parts.images.placed(sharding.replicated(mesh)))
    folder = pretrained.find(path)
    if folder is None:
        params = checkpoint.restore_params(path, abstract, found.weights, step)
    else:
        params = unifluid.read_params(folder, abstract)
    return Model(parts, parts.merged(params), found)


def stored_config(path: str | os.PathLike, step: int | None = None) -> ConfigDict:
    """The config of a trained model; arguments as for `load`."""
    folder = pretrained.find(path)
    return checkpoint.stored_config(path, step) if folder is None else unifluid.read_config(folder)


class Origin(NamedTuple):
    """Where weights come from: folder, training step, "ema" or "params"."""

    folder: str
    step: int
    weights: str


def origin(path: str | os.PathLike, which: str | None = None, step: int | None = None) -> Origin:
    """What `load` would read.

    Raises:
        UserError: there is no such model, or it has no such step or weights.
    """
    folder = pretrained.find(path)
    if folder is None:
        located, step = checkpoint.locate(path, step)
        (_, weights, _), *_ = checkpoint.parameter_folders(located, which or "ema")
        return Origin(str(located), step, weights)
    about = unifluid.read_about(folder)
    found = Origin(str(folder), about.get("step", 0), about.get("weights", "params"))
    if step not in (None, found.step) or which not in (None, found.weights):
        raise UserError(
            f'{folder} holds the weights "{found.weights}" of step {found.step} alone, not'
            f' "{which or found.weights}" of step {found.step if step is None else step}'
        )
    return found


def _keep_programs() -> None:
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(PROGRAMS))


class _Row(NamedTuple):
    """A request made ready: prefixes, one for each branch, order, number of tokens given, seed."""

    request: Request
    prefixes: list[sequence.Sequence]
    order: np.ndarray
    given: int
    entropy: np.ndarray


class Model:
    """A UniFluid with its parameters.

    Making one is cheap, so that a trainer can do it at every evaluation: compiled programs belong
    to `parts`, and parameters are their arguments.

    Attributes:
        parts: model, tokenizers, noise process and config.
        params: parameters of the model, on the devices where they are to be used.
        origin: where they come from, if they were read.
    """

    def __init__(self, parts: Parts, params: Params, origin: Origin | None = None):
        self.parts, self.params, self.origin = parts, params, origin
        self._mesh = sharding.mesh_of(params)

    @property
    def config(self) -> ConfigDict:
        return self.parts.config

    def generate(
        self, prompts: str | Sequence[str], n: int = 1, *, seed: int | None = None, **settings: Any
    ) -> list[Image.Image]:
        """Pictures of texts: n of the first prompt, then n of the second, ...

        A picture depends on the seed, its prompt, and on how many pictures of this prompt come
        before it in the call; not on the other prompts.

        Args:
            **settings: those of `settings.drawing`: `guidance`, `steps`, `temperature`, ...

        Raises:
            UserError: an empty prompt, one too long, or a setting that makes no sense.
        """
        drawing = self.drawing(**settings)
        return list(self.draw(self.requests("generate", prompts, n=n), drawing, seed))

    def edit(
        self,
        images: Picture | Sequence[Picture],
        instructions: str | Sequence[str],
        n: int = 1,
        *,
        seed: int | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Edited pictures, n of each; arguments as for `generate`.

        One picture goes with many instructions, one instruction with many pictures; else they are
        as many.

        Raises:
            UserError: also over a picture that cannot be read.
        """
        drawing = self.drawing(**settings)
        return list(self.draw(self.requests("edit", images, instructions, n=n), drawing, seed))

    def inpaint(
        self,
        images: Picture | Sequence[Picture],
        masks: Picture | Sequence[Picture],
        prompts: str | Sequence[str],
        n: int = 1,
        *,
        seed: int | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Pictures with a part drawn anew, n of each; arguments as for `generate`.

        Args:
            masks: white where to draw anew, or bool arrays. A cell of the token grid that a mask
                touches is drawn whole; all others stay as they are, to the bit. One of images,
                masks or prompts goes with many of the others.
            prompts: what the whole picture is to show.

        Raises:
            UserError: also over a mask that touches nothing, or leaves nothing.
        """
        drawing = self.drawing(**settings)
        asked = self.requests("inpaint", images, masks, prompts, n=n)
        return list(self.draw(asked, drawing, seed))

    def caption(
        self, images: Picture | Sequence[Picture], *, seed: int | None = None, **settings: Any
    ) -> list[str]:
        """A caption of each picture.

        Args:
            **settings: those of `settings.writing`: `temperature`, `top_k`, `top_p`, `beams`, ...

        Raises:
            UserError: a picture that cannot be read, or a setting that makes no sense.
        """
        return list(self.write(self.requests("caption", images), self.writing(**settings), seed))

    def answer(
        self,
        images: Picture | Sequence[Picture],
        questions: str | Sequence[str],
        *,
        seed: int | None = None,
        **settings: Any,
    ) -> list[str]:
        """Answers to questions about pictures, paired as in `edit`, settings as for `caption`.

        Questions on one picture that stand in one batch share the work on the picture.
        """
        asked = self.requests("answer", images, questions)
        return list(self.write(asked, self.writing(**settings), seed))

    def stream(
        self, method: str, *what: Any, n: int = 1, seed: int | None = None, **settings: Any
    ) -> Iterator[str] | Iterator[list[Image.Image]]:
        """What a method makes, while it is being made.

            for piece in m.stream("answer", picture, "what color is the shape?"):
                print(piece, end="", flush=True)
            for pictures in m.stream("generate", "a red circle", n=4):
                show(pictures)

        Args:
            method: "generate", "edit", "inpaint", "caption" or "answer".
            *what: what this method is called with; a stream of text is of one picture and one
                question.
            n, seed, **settings: as for the method.

        Returns:
            Pieces of the text, which joined are the text; or, once for every step of decoding, all
            pictures as far as they are known, what is not yet being checked grey. The last are what
            the method returns. All pictures are decoded in one batch.
        """
        requests = self.requests(method, *what, n=n)
        if not requests:
            return iter(())
        if method in ("caption", "answer"):
            return self._streamed_text(requests, self.writing(**settings), seed)
        return self._streamed_pictures(requests, self.drawing(**settings), seed)

    def drawing(self, **fields: Any) -> Drawing:
        """`settings.drawing` of this model."""
        return settings.drawing(self.parts, **fields)

    def writing(self, **fields: Any) -> Writing:
        """`settings.writing` of this model."""
        return settings.writing(self.parts, **fields)

    def requests(self, method: str, *what: Any, n: int = 1) -> list[Request]:
        """What a call asks for, one by one.

        Raises:
            UserError: an unknown method, pictures that cannot be read, numbers that do not match.
        """
        if method not in TASKS:
            raise UserError(f'no method "{method}"{nearest(method, TASKS)}')
        if n < 1:
            raise UserError(f"n is {n}: ask for 1 picture or more of each prompt")
        takes, task = TASKS[method]
        readers = {"images": to_arrays, "texts": texts_of, "masks": self._cells}
        columns = {name: readers[name](x) for name, x in zip(takes, what, strict=True)}
        examples, cells = [], []
        for row in paired(columns):
            examples.append(Example(task, row.get("texts", ""), image=row.get("images")))
            cells.append(row.get("masks"))
        kept = [None] * len(examples)
        if method == "inpaint":
            kept, examples = self._to_be_inpainted(examples)
        elif method == "edit" and self.config.input.edit_latents:
            latents = self._latents([example.image for example in examples])
            examples = [
                dataclasses.replace(example, source_latents=x)
                for example, x in zip(examples, latents, strict=True)
            ]
        several = zip(examples, cells, kept, strict=True)
        return numbered([Request(e, 0, c, k) for e, c, k in several for _ in range(n)])

    def _cells(self, masks: Picture | Sequence[Picture]) -> list[Bool[np.ndarray, "N"]]:
        size = self.parts.images.config.image_size
        side = round(self.parts.images.config.image_tokens**0.5)
        several = isinstance(masks, Sequence) and not isinstance(masks, str)
        several |= isinstance(masks, np.ndarray) and masks.ndim == (3 if masks.dtype == bool else 4)
        return [to_cells(mask, size, side) for mask in (masks if several else [masks])]

    def _to_be_inpainted(
        self, examples: list[Example]
    ) -> tuple[list[UInt8[np.ndarray, "S S 3"]], list[Example]]:
        size = self.parts.images.config.image_size
        kept = [resized(example.image, size) for example in examples]
        latents = self._latents(kept)
        return kept, [
            dataclasses.replace(example, image=None, target_latents=x)
            for example, x in zip(examples, latents, strict=True)
        ]

    def _latents(self, images: list[UInt8[np.ndarray, "H W 3"]]) -> list[sequence.Latents]:
        """Of each picture, normalised; equal ones are encoded once."""
        if not images:
            return []
        size = self.parts.images.config.image_size
        different = {image.tobytes(): resized(image, size) for image in images}
        moments = zip(*self.parts.images.encode(np.stack(list(different.values()))), strict=True)
        scale = self.parts.sequencer.scale
        found = {
            key: scale.normalised(mean, std)
            for key, (mean, std) in zip(different, moments, strict=True)
        }
        return [found[image.tobytes()] for image in images]

    # --- pictures ---

    def draw(
        self, requests: Sequence[Request], drawing: Drawing, seed: int | None = None
    ) -> Iterator[Image.Image]:
        """The pictures of some requests of one method, a batch at a time.

        Raises:
            UserError: at once, if one of the prompts is bad.
        """
        return self._drawn(self._image_rows(requests, drawing, self._seed(seed)), drawing)

    def _drawn(self, rows: list[_Row], drawing: Drawing) -> Iterator[Image.Image]:
        for filled, count in self._chunks(rows):
            tokens = decode_image.images(*self._image_arguments(filled, drawing), how=drawing.how)
            yield from self._pictures(tokens, filled[:count])

    def _streamed_pictures(
        self, requests: list[Request], drawing: Drawing, seed: int | None
    ) -> Iterator[list[Image.Image]]:
        rows = self._image_rows(requests, drawing, self._seed(seed))
        filled = self._filled(rows, _power(len(rows)))
        arguments = self._image_arguments(filled, drawing)
        for tokens, known in decode_image.stream(*arguments, how=drawing.how):
            yield self._pictures(tokens, rows, known)

    def _image_rows(self, requests: Sequence[Request], drawing: Drawing, seed: int) -> list[_Row]:
        sequencer, layout = self.parts.sequencer, self.parts.sequencer.layout
        rows = []
        for request, rng in zip(requests, rngs(requests, seed), strict=True):
            order = rng.permutation(layout.image_tokens).astype(np.int32)
            if drawing.order == "raster":
                order = sequence.raster(layout)
            given = 0
            if request.cells is not None:
                given = int((~request.cells).sum())
                # What is kept comes first.
                order = order[np.argsort(request.cells[order], kind="stable")]
            whole = sequencer.prefix(request.example, order, given=given)
            less = [
                sequence.dropped(layout, whole, source)
                for source in drawing.dropped(request.example.task)
            ]
            rows.append(_Row(request, [whole, *less], order, given, draw_entropy(rng)))
        return rows

    def _image_arguments(self, rows: list[_Row], drawing: Drawing) -> tuple[Any, ...]:
        """What `decode_image.images` takes."""
        task = rows[0].request.example.task
        given = None
        if inpainting := rows[0].request.cells is not None:
            known = np.stack([row.request.example.target_latents.mean for row in rows])
            given = Given(known, np.array([row.given for row in rows], np.int32))
        branches = zip(*[row.prefixes for row in rows], strict=True)
        length = self.parts.sequencer.prefix_length(task, inpainting)
        alone = sharding.divisible(1, self._mesh) == 1
        prefix, order, keys, given = sharding.spread(
            (
                decode_image.branched([list(branch) for branch in branches], length, share=alone),
                np.stack([row.order for row in rows]),
                np.stack([row.entropy for row in rows]),
                given,
            ),
            self._mesh,
        )
        scales = drawing.scales(task)
        return (
            self.parts.model, self.params, prefix, order, keys, scales, drawing.temperature, given
        )  # fmt: skip

    def _pictures(
        self, tokens: jax.Array, rows: list[_Row], known: int | None = None
    ) -> list[Image.Image]:
        """Pictures of tokens, of which the first `known` of each row's order are made.

        Args:
            rows: of these; tokens of others, by which a batch was filled up, may follow.
        """
        pixels, pictures = self.parts.images.pictures(tokens)[: len(rows)], []
        for picture, row in zip(pixels, rows, strict=True):
            if row.request.cells is not None:
                picture = painted(row.request.kept, row.request.cells, picture)
            if known is not None:
                unknown = np.zeros(len(row.order), bool)
                unknown[row.order[max(known, row.given) :]] = True
                picture = painted(picture, unknown)
            pictures.append(Image.fromarray(picture))
        return pictures

    # --- text ---

    def write(
        self, requests: Sequence[Request], writing: Writing, seed: int | None = None
    ) -> Iterator[str]:
        """The texts of some requests of one method, a batch at a time; errors as in `draw`."""
        return self._written(self._text_rows(requests, self._seed(seed)), writing)

    def _written(self, rows: list[_Row], writing: Writing) -> Iterator[str]:
        text = self.parts.sequencer.text
        for filled, count in self._chunks(rows):
            model, params, prefix, shared, keys = self._text_arguments(filled)
            limits = {"eos": text.eos, "max_tokens": self.config.sampling.text.max_tokens}
            if writing.beams > 1:
                ids = decode_text.beam_search(
                    model, params, prefix, shared, writing.length_penalty,
                    beams=writing.beams, **limits,
                )  # fmt: skip
            else:
                ids = decode_text.text(
                    model, params, prefix, shared, keys, writing.sampling, **limits
                )
            yield from map(text.decode, sharding.fetch(ids)[:count])

    def _streamed_text(
        self, requests: list[Request], writing: Writing, seed: int | None
    ) -> Iterator[str]:
        if len(requests) > 1 or writing.beams > 1:
            raise UserError(
                f"a stream of text is of one picture and one question, without beams; got"
                f" {len(requests)} and beams={writing.beams}"
            )
        return self._pieces(self._text_rows(requests, self._seed(seed)), writing)

    def _pieces(self, rows: list[_Row], writing: Writing) -> Iterator[str]:
        text = self.parts.sequencer.text
        shown = whole = ""
        for ids in decode_text.stream(
            *self._text_arguments(self._filled(rows, 1)),
            writing.sampling,
            eos=text.eos,
            max_tokens=self.config.sampling.text.max_tokens,
        ):
            whole = text.decode(sharding.fetch(ids)[0])
            # A letter of several bytes may not be complete yet.
            if whole.startswith(shown) and whole != shown and not whole.endswith("\ufffd"):
                yield whole[len(shown) :]
                shown = whole
        if whole != shown:
            yield whole[len(shown) :]

    def _text_rows(self, requests: Sequence[Request], seed: int) -> list[_Row]:
        limit = self.config.sampling.text.max_tokens
        if limit < 1:
            raise UserError(f"config.sampling.text.max_tokens is {limit}: set it to 1 or more")
        order = sequence.raster(self.parts.sequencer.layout)  # of no use here
        return [
            _Row(request, [self.parts.sequencer.prefix(request.example, order)], order, 0, entropy)
            for request, entropy in zip(
                requests, map(draw_entropy, rngs(requests, seed)), strict=True
            )
        ]

    def _text_arguments(self, rows: list[_Row]) -> tuple[Any, ...]:
        """What `decode_text.text` takes, up to the keys."""
        layout = self.parts.sequencer.layout
        whole = [row.prefixes[0] for row in rows]
        length = self.parts.sequencer.prefix_length(rows[0].request.example.task)
        different: dict[bytes, int] = {}
        owner = [different.setdefault(s.images.tobytes(), len(different)) for s in whole]
        shared = None
        if len(different) <= len(rows) // 2 and not layout.bidirectional_prefix:
            starts, whole = zip(
                *[decode_text.cut(s, layout.vision_tokens) for s in whole], strict=True
            )
            length -= layout.vision_tokens
            last = len(different) - 1
            first = [owner.index(min(i, last)) for i in range(_power(len(different)))]
            start = decode.stack([starts[i] for i in first], layout.vision_tokens)
            shared = Shared(start, np.array(owner, np.int32))
        arrays = (
            decode.stack(list(whole), length),
            shared,
            np.stack([row.entropy for row in rows]),
        )
        return self.parts.model, self.params, *sharding.spread(arrays, self._mesh)

    # --- batches ---

    def _chunks(self, rows: list[_Row]) -> Iterator[tuple[list[_Row], int]]:
        """Rows `config.sampling.batch_size` at a time, filled up; and how many are no filling."""
        size = self.config.sampling.batch_size
        if size < 1:
            raise UserError(f"config.sampling.batch_size is {size}: set it to 1 or more")
        # The last of several is filled to the size of those before it.
        size = min(size, _power(len(rows)))
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            yield self._filled(chunk, size), len(chunk)

    def _filled(self, rows: list[_Row], size: int) -> list[_Row]:
        """Some more of the last row, up to `size` and to a multiple of the mesh's replicas."""
        return rows + [rows[-1]] * (sharding.divisible(size, self._mesh) - len(rows))

    def _seed(self, seed: int | None) -> int:
        seed = self.config.sampling.seed if seed is None else seed
        if seed < 0:
            raise UserError(f"seed is {seed}: set it to 0 or more")
        return seed


def _power(count: int) -> int:
    """The least power of two that is not below: of few sizes few programs are compiled."""
    return 1 << max(count - 1, 0).bit_length()
