"""What a call of the model may set; what it leaves out is taken from `config.sampling`."""

import dataclasses
import math
from typing import Any

from ml_collections import ConfigDict

from unifluid_jax.decode_image import ImageSampling, sampling_from
from unifluid_jax.decode_text import TextSampling
from unifluid_jax.errors import UserError
from unifluid_jax.parts import Parts

_HOW = tuple(f.name for f in dataclasses.fields(ImageSampling) if f.name != "sampler")


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Settings of image decoding; `how` is compiled in.

    Raises:
        UserError: one of them makes no sense.
    """

    guidance: float
    image_guidance: float
    temperature: float
    order: str
    how: ImageSampling

    def __post_init__(self):
        for name in ("guidance", "image_guidance", "temperature"):
            _check_scale(name, getattr(self, name))
        if self.order not in ("random", "raster"):
            raise UserError(f'order is "{self.order}": set it to random or raster')

    def dropped(self, task: str) -> tuple[bool, ...]:
        """Of each branch of guidance but the first, whether it lacks the source besides the text.

        The most conditional first.
        """
        if task == "edit" and self.image_guidance != 1:
            return False, True
        return (False,) if self.guidance != 1 else ()

    def scales(self, task: str) -> tuple[float, ...]:
        """One for each branch but the last."""
        return (self.guidance, self.image_guidance)[: len(self.dropped(task))]


@dataclasses.dataclass(frozen=True)
class Writing:
    """Settings of text decoding; `beams` is compiled in.

    Raises:
        UserError: one of them makes no sense.
    """

    sampling: TextSampling
    beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self):
        s = self.sampling
        _check_scale("temperature", s.temperature)
        if s.top_k < 0:
            raise UserError(f"top_k is {s.top_k}: set it to 1 or more, or to 0 for all tokens")
        if not 0 < s.top_p <= 1:
            raise UserError(f"top_p is {s.top_p}: set it above 0 and to at most 1")
        if self.beams < 1:
            raise UserError(f"beams is {self.beams}: set it to 1 or more")
        _check_scale("length_penalty", self.length_penalty)
        if self.beams > 1 and s.temperature:
            raise UserError(
                f"beams is {self.beams} and temperature {s.temperature}: beam search draws nothing"
                " at random, set temperature to 0 or beams to 1"
            )


def drawing(
    parts: Parts,
    *,
    guidance: float | None = None,
    image_guidance: float | None = None,
    temperature: float | None = None,
    order: str | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    **how: Any,
) -> Drawing:
    """The settings of a call that makes pictures.

    Args:
        guidance: scale of classifier-free guidance by the text; 1 is none, at half the cost.
        image_guidance: of edits, scale of guidance by the source (InstructPix2Pix).
        temperature: of the diffusion sampler.
        order: in which tokens are made, "random" or "raster".
        steps: of the diffusion sampler, for every token.
        sampler: name of the diffusion sampler, its options then being its own defaults.
        **how: fields of `decode_image.ImageSampling`: `schedule`, `interval`, `guided`,
            `last_steps`, `parallel`, ...

    Raises:
        UserError: one makes no sense, or guidance is asked of a model that has not learned to do
            without text or source.
    """
    c = parts.config.sampling
    options = dict(c.sampler)
    if sampler is not None and sampler != options.get("name"):
        options = {"name": sampler, "steps": options["steps"]}
    if steps is not None:
        options["steps"] = steps
    fields = {"schedule": c.schedule, **c.get("image", {}), **how}
    for name in fields:
        if name not in _HOW:
            raise UserError(f'no setting "{name}" of pictures: there are {", ".join(_HOW)}')
    if image_guidance is None:
        # Configs stored before there was such guidance know no such field; `get` would look for
        # names like it, at every call.
        image_guidance = c.image_guidance if "image_guidance" in c else 1.0
    result = Drawing(
        guidance=float(c.guidance if guidance is None else guidance),
        image_guidance=float(image_guidance),
        temperature=float(c.temperature if temperature is None else temperature),
        order=c.order if order is None else order,
        how=sampling_from(parts.process, parts.sequencer.parallel, options, **fields),
    )
    _check_learned(parts.config, result)
    return result


def _check_learned(config: ConfigDict, drawing: Drawing) -> None:
    for name, value, field in (
        ("guidance", drawing.guidance, "text_drop"),
        ("image_guidance", drawing.image_guidance, "source_drop"),
    ):
        if value != 1 and not config.input.get(field, 0.0):
            raise UserError(
                f"{name} {value} needs a model trained with config.input.{field} above 0: set"
                f" {name} to 1"
            )


def writing(
    parts: Parts,
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
) -> Writing:
    """The settings of a call that makes text.

    Args:
        temperature: 0 takes the likeliest token each time.
        top_k: only the k likeliest tokens; 0 is all of them.
        top_p: only the fewest likeliest tokens of this probability together; 1 is all.
        beams: above 1, texts kept at every step of a beam search.
        length_penalty: of the beam search, see `decode_text.beam_search`.

    Raises:
        UserError: one makes no sense.
    """
    c = parts.config.sampling.text
    temperature = c.temperature if temperature is None else temperature
    top_k = c.top_k if top_k is None else top_k
    top_p = c.top_p if top_p is None else top_p
    vocabulary = parts.sequencer.text.vocab_size
    if beams > vocabulary:
        raise UserError(f"beams is {beams}, the vocabulary has {vocabulary} tokens: set it lower")
    # One type each: to the compiler 1 and 1.0 would be two programs.
    sampling = TextSampling(float(temperature), int(top_k), float(top_p))
    return Writing(sampling, beams, float(length_penalty))


def _check_scale(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise UserError(f"{name} is {value}: set it to 0 or more")
