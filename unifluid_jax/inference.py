"""The Python interface: a trained model that generates, edits, captions and answers.

    m = unifluid_jax.load("runs/quickstart")
    m.generate(["a red circle", "red apple"], n=4, guidance=3.0, seed=1)
    m.edit("circle.png", "make it blue")
    m.caption("circle.png")
    m.answer("circle.png", ["what color is the shape?", "is there a triangle?"])

Pictures go in as PIL images, paths or uint8 arrays, one or a list of them, of any size; they are
squashed to the model's square, as in training. Whatever a call leaves out is taken from
`config.sampling`.
"""

import collections
import dataclasses
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from unifluid_jax import checkpoint, decode, decode_text, sequence
from unifluid_jax.decode_text import TextSampling
from unifluid_jax.diffusion import Sampler, guidance_at, sampler_from
from unifluid_jax.errors import UserError
from unifluid_jax.input.examples import Example
from unifluid_jax.input.records import resized
from unifluid_jax.models.functional import Params
from unifluid_jax.parts import Parts, assemble

Picture = Image.Image | str | os.PathLike | np.ndarray


def load(path: str | os.PathLike, which: str = "ema", step: int | None = None) -> "Model":
    """The model in a checkpoint.

    Args:
        path: the workdir of a run, or the folder of one of its checkpoints.
        which: "ema", the averaged weights, or "params".
        step: of the checkpoint, by default the latest.

    Raises:
        UserError: there is no such checkpoint, or it does not fit its own config.
    """
    return from_checkpoint(checkpoint.stored_config(path, step), path, which, step)


def from_checkpoint(
    config: ConfigDict, path: str | os.PathLike, which: str, step: int | None
) -> "Model":
    """The weights of a checkpoint under a config that may differ from the stored one."""
    parts = assemble(config)
    abstract = jax.eval_shape(parts.model.init, jax.random.key(0))
    return Model(parts, checkpoint.restore_params(path, abstract, which, step))


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Settings of image decoding; `sampler` and `schedule` are compiled in.

    Raises:
        UserError: one of them makes no sense.
    """

    guidance: float
    temperature: float
    order: str
    schedule: str
    sampler: Sampler

    def __post_init__(self):
        _finite("guidance", self.guidance)
        _finite("temperature", self.temperature)
        if self.order not in ("random", "raster"):
            raise UserError(f'order is "{self.order}": set it to random or raster')
        guidance_at(self.schedule, 1.0, 1.0)  # knows the schedules


class Model:
    """A UniFluid with its parameters.

    Making one is cheap, so that a trainer can do it at every evaluation: compiled programs belong
    to `parts`, and parameters are their arguments.

    Attributes:
        parts: model, tokenizers, noise process and config.
        params: parameters of the model, on the devices where they are to be used.
    """

    def __init__(self, parts: Parts, params: Params):
        self.parts, self.params = parts, params

    @property
    def config(self) -> ConfigDict:
        return self.parts.config

    def generate(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        *,
        guidance: float | None = None,
        steps: int | None = None,
        temperature: float | None = None,
        order: str | None = None,
        seed: int | None = None,
    ) -> list[Image.Image]:
        """Pictures of texts: n of the first prompt, then n of the second, ...

        A picture depends on the seed, its prompt, and on how many pictures of this prompt come
        before it in the call; not on the other prompts.

        Args:
            guidance: scale of classifier-free guidance; 1 is none, at half the cost.
            steps: of the diffusion sampler, for every token.
            temperature: of the diffusion sampler.
            order: in which tokens are made, "random" or "raster".

        Raises:
            UserError: an empty prompt, one too long, or a setting that makes no sense.
        """
        examples = [Example("generate", prompt) for prompt in _texts(prompts, "prompt")]
        return self._draw(examples, n, seed, self.drawing(guidance, steps, temperature, order))

    def edit(
        self,
        images: Picture | Sequence[Picture],
        instructions: str | Sequence[str],
        n: int = 1,
        *,
        guidance: float | None = None,
        steps: int | None = None,
        temperature: float | None = None,
        order: str | None = None,
        seed: int | None = None,
    ) -> list[Image.Image]:
        """Edited pictures, n of each; arguments as for `generate`.

        One picture goes with many instructions, one instruction with many pictures; else they are
        as many.

        Raises:
            UserError: also over a picture that cannot be read.
        """
        drawing = self.drawing(guidance, steps, temperature, order)
        examples = [
            Example("edit", text, image=image) for image, text in _pairs(images, instructions)
        ]
        if self.config.input.edit_latents and examples:
            size = self.parts.images.config.image_size
            sources = np.stack([resized(example.image, size) for example in examples])
            moments = zip(*self.parts.images.encode(sources), strict=True)
            scale = self.parts.sequencer.scale
            examples = [
                dataclasses.replace(example, source_latents=scale.normalised(mean, std))
                for example, (mean, std) in zip(examples, moments, strict=True)
            ]
        return self._draw(examples, n, seed, drawing)

    def caption(
        self,
        images: Picture | Sequence[Picture],
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> list[str]:
        """A caption of each picture.

        Args:
            temperature: 0 takes the likeliest word each time.
            top_k: only the k likeliest tokens; 0 is all of them.
            top_p: only the fewest likeliest tokens of this probability together; 1 is all.

        Raises:
            UserError: a picture that cannot be read, or a setting that makes no sense.
        """
        examples = [Example("caption", "", image=image) for image in _pictures(images)]
        return self._write(examples, seed, self.writing(temperature, top_k, top_p))

    def answer(
        self,
        images: Picture | Sequence[Picture],
        questions: str | Sequence[str],
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> list[str]:
        """Answers to questions about pictures, paired as in `edit`, settings as for `caption`."""
        examples = [Example("vqa", text, image=image) for image, text in _pairs(images, questions)]
        return self._write(examples, seed, self.writing(temperature, top_k, top_p))

    def drawing(
        self,
        guidance: float | None = None,
        steps: int | None = None,
        temperature: float | None = None,
        order: str | None = None,
    ) -> Drawing:
        """The settings of a call, completed from `config.sampling`.

        Raises:
            UserError: one makes no sense, or guidance is asked of a model that has not learned to
                do without text.
        """
        c = self.config.sampling
        sampler = c.sampler if steps is None else {**c.sampler, "steps": steps}
        drawing = Drawing(
            guidance=float(c.guidance if guidance is None else guidance),
            temperature=float(c.temperature if temperature is None else temperature),
            order=c.order if order is None else order,
            schedule=c.schedule,
            sampler=sampler_from(self.parts.process, **sampler),
        )
        if drawing.guidance != 1 and not self.config.input.text_drop:
            raise UserError(
                f"guidance {drawing.guidance} needs a model trained with"
                " config.input.text_drop above 0: set guidance to 1"
            )
        return drawing

    def writing(
        self, temperature: float | None = None, top_k: int | None = None, top_p: float | None = None
    ) -> TextSampling:
        """The settings of a call, completed from `config.sampling.text`.

        Raises:
            UserError: one makes no sense.
        """
        c = self.config.sampling.text
        temperature = c.temperature if temperature is None else temperature
        top_k = c.top_k if top_k is None else top_k
        top_p = c.top_p if top_p is None else top_p
        _finite("temperature", temperature)
        if top_k < 0:
            raise UserError(f"top_k is {top_k}: set it to 1 or more, or to 0 for all tokens")
        if not 0 < top_p <= 1:
            raise UserError(f"top_p is {top_p}: set it above 0 and to at most 1")
        # One type each: to the compiler 1 and 1.0 would be two programs.
        return TextSampling(float(temperature), int(top_k), float(top_p))

    def _draw(
        self, examples: Sequence[Example], n: int, seed: int | None, drawing: Drawing
    ) -> list[Image.Image]:
        if n < 1:
            raise UserError(f"n is {n}: ask for 1 picture or more of each prompt")
        sequencer, layout = self.parts.sequencer, self.parts.sequencer.layout
        examples = [example for example in examples for _ in range(n)]
        rngs = _rngs(examples, self._seed(seed))
        orders = [rng.permutation(layout.image_tokens).astype(np.int32) for rng in rngs]
        if drawing.order == "raster":
            orders = [sequence.raster(layout)] * len(examples)
        twins = (False, True) if drawing.guidance != 1 else (False,)
        # All before the first is decoded: a bad prompt is refused at once.
        prefixes = [
            [sequencer.prefix(example, order, dropped=dropped) for dropped in twins]
            for example, order in zip(examples, orders, strict=True)
        ]
        seeds = [_entropy(rng) for rng in rngs]

        def run(rows: list[int]) -> Float[np.ndarray, "B N C"]:
            length = self._prefix_length(examples[0].task)
            batches = [
                decode.stack([prefixes[i][branch] for i in rows], length)
                for branch in range(len(twins))
            ]
            tokens = decode.images(
                self.parts.model,
                self.params,
                batches[0],
                batches[1] if len(batches) == 2 else None,
                np.stack([orders[i] for i in rows]),
                _keys([seeds[i] for i in rows]),
                drawing.guidance,
                drawing.temperature,
                sampler=drawing.sampler,
                schedule=drawing.schedule,
            )
            return jax.device_get(tokens)

        tokens = self._in_batches(run, len(examples))
        if not tokens:
            return []
        pixels = self.parts.images.decode(sequencer.scale.raw(np.stack(tokens)))
        return [Image.fromarray(picture) for picture in pixels]

    def _write(
        self, examples: Sequence[Example], seed: int | None, writing: TextSampling
    ) -> list[str]:
        sequencer, limit = self.parts.sequencer, self.config.sampling.text.max_tokens
        if limit < 1:
            raise UserError(f"config.sampling.text.max_tokens is {limit}: set it to 1 or more")
        no_order = sequence.raster(sequencer.layout)
        prefixes = [sequencer.prefix(example, no_order) for example in examples]
        seeds = [_entropy(rng) for rng in _rngs(examples, self._seed(seed))]

        def run(rows: list[int]) -> Int[np.ndarray, "B T"]:
            length = self._prefix_length(examples[0].task)
            tokens = decode_text.text(
                self.parts.model,
                self.params,
                decode.stack([prefixes[i] for i in rows], length),
                _keys([seeds[i] for i in rows]),
                writing,
                eos=sequencer.text.eos,
                max_tokens=limit,
            )
            return jax.device_get(tokens)

        return [sequencer.text.decode(ids.tolist()) for ids in self._in_batches(run, len(examples))]

    def _prefix_length(self, task: str) -> int:
        """P: what the longest prefix of a task takes up, so that one program serves all."""
        longest = self.parts.sequencer.largest(task)["seq_len"]
        if task in ("caption", "vqa"):
            return longest - self.config.input.max_prompt_tokens
        return longest - self.parts.sequencer.layout.image_tokens + 1

    def _in_batches(self, run: Callable[[list[int]], np.ndarray], count: int) -> list[np.ndarray]:
        """Results of rows 0 .. count - 1, decoded `config.sampling.batch_size` at a time.

        Fewer rows than that are filled up to a power of two, so that few programs are compiled.
        """
        size = self.config.sampling.batch_size
        if size < 1:
            raise UserError(f"config.sampling.batch_size is {size}: set it to 1 or more")
        size = min(size, 1 << max(count - 1, 0).bit_length())
        results = []
        for start in range(0, count, size):
            rows = range(start, min(start + size, count))
            filled = [*rows, *[rows[-1]] * (size - len(rows))]
            results += list(run(filled)[: len(rows)])
        return results

    def _seed(self, seed: int | None) -> int:
        seed = self.config.sampling.seed if seed is None else seed
        if seed < 0:
            raise UserError(f"seed is {seed}: set it to 0 or more")
        return seed


def to_array(picture: Picture) -> UInt8[np.ndarray, "H W 3"]:
    """A picture as RGB: turned as its EXIF data says, transparency over white, grey as grey.

    Raises:
        UserError: the file cannot be read, or the array is no picture.
    """
    if isinstance(picture, np.ndarray):
        return _from_array(picture)
    try:
        if isinstance(picture, Image.Image):
            return _rgb(picture)
        with Image.open(picture) as opened:
            return _rgb(opened)
    except FileNotFoundError:
        raise UserError(f'no picture "{picture}": no such file') from None
    except UserError:
        raise
    except Exception as error:
        # Pillow raises many kinds over damaged files, an opened one is read only here: OSError,
        # SyntaxError, zlib.error.
        name = "a picture" if isinstance(picture, Image.Image) else f'"{picture}"'
        raise UserError(f"{name} cannot be read as a picture: {error}") from error


def _from_array(x: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    channels = x.shape[2] if x.ndim == 3 else 1
    if x.dtype != np.uint8 or x.ndim not in (2, 3) or channels not in (1, 3, 4) or not x.size:
        raise UserError(
            f"an array of {x.dtype} {list(x.shape)} is no picture: give uint8 [height, width] or"
            " [height, width, 1, 3 or 4], values 0 to 255"
        )
    return _rgb(Image.fromarray(x[..., 0] if x.ndim == 3 and channels == 1 else x))


def _rgb(picture: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    if picture.mode.startswith(("I", "F")):
        raise UserError(f"a picture of mode {picture.mode} has more than 8 bits: convert it to RGB")
    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def _pictures(images: Picture | Sequence[Picture]) -> list[UInt8[np.ndarray, "H W 3"]]:
    several = isinstance(images, Sequence) and not isinstance(images, str)
    several |= isinstance(images, np.ndarray) and images.ndim == 4
    return [to_array(image) for image in (images if several else [images])]


def _texts(texts: str | Sequence[str], what: str) -> list[str]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"a {what} is text, got {type(text).__name__}")
    return texts


def _pairs(
    images: Picture | Sequence[Picture], texts: str | Sequence[str]
) -> Iterator[tuple[UInt8[np.ndarray, "H W 3"], str]]:
    images, texts = _pictures(images), _texts(texts, "question or instruction")
    if len(images) == 1:
        images *= len(texts)
    elif len(texts) == 1:
        texts *= len(images)
    if len(images) != len(texts):
        raise UserError(
            f"{len(images)} pictures and {len(texts)} texts: give as many of both, or one of either"
        )
    return zip(images, texts, strict=True)


def _finite(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{name} is {value}: set it to 0 or more")


def _rngs(examples: Sequence[Example], seed: int) -> list[np.random.Generator]:
    """A generator per example, of the seed, what is asked, and its number among equal ones."""
    seen: Mapping[int, int] = collections.Counter()
    rngs = []
    for example in examples:
        asked = example.prompt.encode()
        if example.image is not None:
            asked += np.ascontiguousarray(example.image).tobytes()
        asked = zlib.crc32(asked)
        rngs.append(np.random.default_rng((seed, asked, seen[asked])))
        seen[asked] += 1
    return rngs


def _entropy(rng: np.random.Generator) -> UInt8[np.ndarray, "2"] | Any:
    return rng.integers(2**32, size=2, dtype=np.uint32)


def _keys(entropy: Sequence[np.ndarray]) -> jax.Array:
    """Typed keys of 64 bits each, whatever kind of keys JAX is set to."""
    return _keys_of(np.stack(entropy))


@jax.jit
def _keys_of(entropy_B2: jax.Array) -> jax.Array:
    first_B = jax.vmap(jax.random.key)(entropy_B2[:, 0])
    return jax.vmap(jax.random.fold_in)(first_B, entropy_B2[:, 1])
