"""Records to examples to sequences: what each task takes from a record, and how it is laid out.

What a model reads before a caption or an answer is said by `config.tokenizer`. Generation and
editing read the caption or instruction as it is.
"""

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int, UInt8
from ml_collections import ConfigDict

from unifluid_jax import sequence
from unifluid_jax.config import make_part
from unifluid_jax.errors import UserError
from unifluid_jax.input.records import TASK_PARTS, Record, resized
from unifluid_jax.input.tokenizer import TextTokenizer
from unifluid_jax.models.siglip import SiglipConfig
from unifluid_jax.sequence import Latents, Layout, Sequence

if TYPE_CHECKING:
    # Worker processes of the pipeline import this module, and need no network for it.
    from unifluid_jax.image_tokenizer import ImageTokenizer

TASKS = tuple(TASK_PARTS)


class Unfit(Exception):
    """A sound record that a task can make no use of: nothing for it, no text, a text too long."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One thing to learn or to be asked.

    Attributes:
        task: one of `TASKS`.
        prompt: question, instruction or caption, as a user would write it; empty for captioning.
        answer: text to be produced (caption, vqa).
        image: picture to be understood (caption, vqa, edit).
        target: picture to be produced (generate, edit).
        source_latents, target_latents: their latents, normalised, where the model reads them.
        record: what it was taken from.
    """

    task: str
    prompt: str
    answer: str | None = None
    image: UInt8[np.ndarray, "H W 3"] | None = None
    target: UInt8[np.ndarray, "H W 3"] | None = None
    source_latents: Latents | None = None
    target_latents: Latents | None = None
    record: Record | None = None


@dataclasses.dataclass(frozen=True)
class LatentScale:
    """Channel statistics of an image tokenizer's latents: the model's have mean 0 and variance 1.

    Attributes:
        mean, std: over training pictures, per dim of a token.
    """

    mean: Float[np.ndarray, "C"]
    std: Float[np.ndarray, "C"]

    def normalised(self, mean: Float[np.ndarray, "N C"], std: Float[np.ndarray, "N C"]) -> Latents:
        """Raw posterior moments of one picture on the model's scale."""
        return Latents((mean - self.mean[None]) / self.std[None], std / self.std[None])


def take(task: str, record: Record, choice: int) -> Example:
    """The example number `choice` of a task in a record, pictures decoded.

    Raises:
        ValueError: the record is corrupt there.
    """
    if task == "caption":
        image, text = record.captions[choice]
        return Example(task, "", answer=text, image=record.image(image), record=record)
    if task == "vqa":
        image, question, answer = record.questions[choice]
        return Example(task, question, answer=answer, image=record.image(image), record=record)
    if task == "generate":
        image, text = record.captions[choice]
        return Example(task, text, target=record.image(image), record=record)
    source, target, text = record.edits[choice]
    return Example(
        task, text, image=record.image(source), target=record.image(target), record=record
    )


def draw(
    task: str,
    record: Record,
    moments: Float[np.ndarray, "2 images N C"] | None,
    scale: LatentScale,
    rng: np.random.Generator,
) -> Example:
    """A random example of a task in a record; with `moments`, latents instead of targets' pixels.

    Args:
        moments: raw posterior means and standard deviations of all the record's pictures.

    Raises:
        ValueError: the record is corrupt.
        Unfit: it has nothing for the task.
    """
    choices = len(getattr(record, TASK_PARTS[task]))
    if not choices:
        raise Unfit(f"nothing for the task {task}")
    choice = int(rng.integers(choices))
    if task in ("caption", "vqa") or moments is None:
        return take(task, record, choice)

    def latents(image: int) -> Latents:
        if not 0 <= image < moments.shape[1]:
            raise ValueError(f"no latents of image {image}, there are {moments.shape[1]}")
        return scale.normalised(moments[0, image], moments[1, image])

    if task == "generate":
        image, text = record.captions[choice]
        return Example(task, text, target_latents=latents(image), record=record)
    source, target, text = record.edits[choice]
    return Example(
        task,
        text,
        image=record.image(source),
        source_latents=latents(source),
        target_latents=latents(target),
        record=record,
    )


def encodes_in_step(input_config: ConfigDict) -> bool:
    """Whether the training step encodes pictures, and no latents are read from a cache."""
    # Configs stored before there was the choice know no such field.
    return input_config.get("max_encoded_images", 0) > 0


class Sequencer:
    """Lays out examples as token sequences. Holds no device arrays: it goes to worker processes.

    Args:
        text: the text tokenizer.
        layout: constants of the model's sequences.
        scale: of the image tokenizer's latents.
        fingerprint: of the image tokenizer.
        image_size: side of the pictures that the vision tower reads; others are resized.
        picture_size: side of those that the image tokenizer reads.
        input_config: `max_prompt_tokens`, `order` ("random" or "raster"), `parallel` (numbers of
            image tokens asked for at once, a random one of which each image is laid out with),
            `text_drop`, `source_drop`, `edit_vision`, `edit_latents`, `max_encoded_images`.
    """

    def __init__(
        self,
        text: TextTokenizer,
        layout: Layout,
        scale: LatentScale,
        fingerprint: str,
        image_size: int,
        picture_size: int,
        input_config: ConfigDict,
    ):
        c = input_config
        if c.order not in ("random", "raster"):
            raise UserError(f'config.input.order is "{c.order}": set it to random or raster')
        self.text, self.layout, self.scale = text, layout, scale
        self.fingerprint, self.image_size = fingerprint, image_size
        self.picture_size = picture_size
        self.encode_in_step = encodes_in_step(c)
        self._random_order = c.order == "random"
        # Configs stored before there was the choice know no such field.
        self.parallel = tuple(c.get("parallel", (1,)))
        if not self.parallel or min(self.parallel) < 1:
            raise UserError(
                f"config.input.parallel is {self.parallel}: give numbers of image tokens to be"
                " asked for at once, (1,) for one at a time"
            )
        self._limit, self._text_drop = c.max_prompt_tokens, c.text_drop
        # Configs stored before there was one know no `source_drop`.
        self._source_drop = c.get("source_drop", 0.0)
        if not 0 <= self._text_drop + self._source_drop <= 1:
            raise UserError(
                f"config.input.text_drop={self._text_drop} and source_drop={self._source_drop} are"
                " shares of the examples: together at most 1"
            )
        self._edit_vision, self._edit_latents = c.edit_vision, c.edit_latents

    def train(self, example: Example, rng: np.random.Generator) -> Sequence:
        """The supervised sequence of an example: text dropped at random, tokens in a fresh order.

        Where the step encodes pictures, it has those and no latents.

        Of edits the share `text_drop` loses its text, and the share `source_drop` text and source:
        what the branches of guidance are given (see `decode_image.py`).

        Raises:
            Unfit: a text of it is empty or longer than `max_prompt_tokens`. It is not cut: a cut
                answer would teach the model to stop anywhere.
        """
        prompt = self._checked(self.text.prompt(example.task, example.prompt))
        if example.task in ("caption", "vqa"):
            image = resized(example.image, self.image_size)
            return sequence.understanding(self.layout, image, prompt, self._checked(example.answer))
        drawn = rng.random()
        source_dropped = example.task == "edit" and drawn > 1 - self._source_drop
        order, pictures = self.order(rng), []
        if self.encode_in_step:
            if example.task == "edit" and self._edit_latents and not source_dropped:
                pictures.append(resized(example.image, self.picture_size))
            pictures.append(resized(example.target, self.picture_size))
            blank = np.zeros((self.layout.image_tokens, self.layout.token_dim), np.float32)
            unknown = Latents(blank, blank)
            example = dataclasses.replace(example, source_latents=unknown, target_latents=unknown)
        target, groups = example.target_latents, self._groups(rng)
        if example.task == "generate":
            laid_out = sequence.generation(self.layout, prompt, target, order, groups=groups)
        else:
            laid_out = self._edit(example, prompt, target, order, groups=groups)
        if drawn < self._text_drop or source_dropped:
            laid_out = sequence.dropped(self.layout, laid_out, source_dropped)
        return dataclasses.replace(laid_out, pictures=np.stack(pictures)) if pictures else laid_out

    def prefix(
        self,
        example: Example,
        order: Int[np.ndarray, "N"],
        *,
        given: int = 0,
    ) -> Sequence:
        """The sequence to decode from.

        Args:
            example: its answer and target are not looked at, but for what is `given`. An edit
                brings `source_latents` if the model reads them.
            given: number of tokens of `target_latents`, the first in the order, that are known
                beforehand (inpainting).

        Raises:
            UserError: the prompt is empty or too long.
        """
        if example.task != "caption" and not example.prompt.strip():
            raise UserError(f"the prompt of the task {example.task} is empty: say what is wanted")
        try:
            prompt = self._checked(self.text.prompt(example.task, example.prompt))
        except Unfit as error:
            raise UserError(f'prompt "{_short(example.prompt)}": {error}') from None
        if example.task in ("caption", "vqa"):
            image = resized(example.image, self.image_size)
            return sequence.understanding(self.layout, image, prompt, None)
        target = example.target_latents if given else None
        if example.task == "generate":
            return sequence.generation(self.layout, prompt, target, order, given)
        return self._edit(example, prompt, target, order, given)

    def order(self, rng: np.random.Generator) -> Int[np.ndarray, "N"]:
        """An order of the image tokens: a fresh permutation, or raster."""
        if self._random_order:
            return rng.permutation(self.layout.image_tokens).astype(np.int32)
        return sequence.raster(self.layout)

    def _groups(self, rng: np.random.Generator) -> list[int]:
        """Numbers of image tokens that an example asks for at once.

        They grow in one of the ways that decoding knows.
        """
        parallel = self.parallel[0] if len(self.parallel) == 1 else int(rng.choice(self.parallel))
        growth = "constant" if parallel == 1 else str(rng.choice(sequence.GROWTHS))
        return sequence.group_sizes(self.layout.image_tokens, parallel, growth)

    def largest(self, task: str) -> dict[str, int]:
        """What an example of a task takes up at most, by the names of the caps in the config.

        Raises:
            UserError: an edit is to see nothing of its source.
        """
        layout, limit = self.layout, self._limit
        if task in ("caption", "vqa"):
            # BOS and separator around the prompt; the answer's EOS is predicted, never fed.
            length = layout.vision_tokens + 2 + 2 * limit
            return {"seq_len": length, "max_images": 1, "max_text_targets": limit + 1}
        length = 1 + limit + layout.image_tokens
        if task == "edit":
            sequence.check_views(self._edit_vision, self._edit_latents)
            length += self._edit_vision * layout.vision_tokens
            length += self._edit_latents * layout.image_tokens
        caps = {
            "seq_len": length,
            "max_images": int(task == "edit" and self._edit_vision),
            "max_image_targets": layout.image_tokens,
        }
        if self.encode_in_step:
            caps["max_encoded_images"] = 1 + (task == "edit" and self._edit_latents)
        return caps

    def prefix_length(self, task: str, inpainting: bool = False) -> int:
        """Positions of the longest prefix of a task; with given tokens, of any number of them."""
        layout, longest = self.layout, self.largest(task)["seq_len"]
        if task in ("caption", "vqa"):
            return longest - self._limit
        length = longest - layout.image_tokens + 1
        return length + layout.image_tokens - 1 if inpainting else length

    def _checked(self, text: str) -> list[int]:
        ids = self.text.encode(text)
        if not self.text.decode(ids):
            raise Unfit("an empty text")  # or one of white space
        if len(ids) > self._limit:
            raise Unfit(
                f"{len(ids)} tokens, more than config.input.max_prompt_tokens={self._limit}:"
                " shorten it"
            )
        return ids

    def _edit(
        self,
        example: Example,
        prompt: list[int],
        target: Latents | None,
        order: np.ndarray,
        given: int | None = None,
        groups: Collection[int] = (),
    ) -> Sequence:
        source, latents = None, None
        if self._edit_vision:
            source = resized(example.image, self.image_size)
        if self._edit_latents:
            latents = example.source_latents
            if latents is None:
                raise ValueError("an edit needs its source's latents: encode the picture first")
        return sequence.editing(
            self.layout,
            source,
            latents,
            prompt,
            target,
            order,
            given,
            groups,
        )


def make_sequencer(config: ConfigDict, images: "ImageTokenizer") -> Sequencer:
    """The sequencer of a config and its image tokenizer; reads the text tokenizer.

    Raises:
        UserError: the text tokenizer cannot be used, or the vision tower lacks a size.
    """
    text = make_part(TextTokenizer, "config.tokenizer", config.tokenizer)
    vision = make_part(SiglipConfig, "config.model.vision", config.model.vision)
    layout = Layout(
        **text.layout_ids,
        vision_tokens=vision.tokens,
        image_tokens=images.config.image_tokens,
        token_dim=images.config.token_dim,
        bidirectional_prefix=config.model.bidirectional_prefix,
    )
    scale = LatentScale(images.channel_mean, images.channel_std)
    sizes = vision.image_size, images.config.image_size
    return Sequencer(text, layout, scale, images.fingerprint, *sizes, config.input)


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
