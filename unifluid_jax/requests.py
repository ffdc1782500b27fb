"""What a call asks for, one by one, and the random numbers that belong to each.

A picture or text depends on the seed, on what is asked, and on how many equal requests come before
it in its call: not on what else is asked.
"""

import collections
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8, UInt32

from unifluid_jax.errors import UserError
from unifluid_jax.input.examples import Example

# What a method is called with besides settings: (pictures, masks, texts), and its task.
TASKS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "generate": (("texts",), "generate"),
    "edit": (("images", "texts"), "edit"),
    "inpaint": (("images", "masks", "texts"), "generate"),
    "caption": (("images",), "caption"),
    "answer": (("images", "texts"), "vqa"),
}
_NAMES = {"images": "pictures", "masks": "masks", "texts": "texts"}


class Request(NamedTuple):
    """One picture or one text that is wanted.

    Attributes:
        example: what is asked. For inpainting its `target_latents` are those of the picture.
        number: how many equal requests come before it in its call.
        cells: of an inpainting, the grid cells to draw anew.
        kept: of an inpainting, the picture, in the model's size.
    """

    example: Example
    number: int = 0
    cells: Bool[np.ndarray, "N"] | None = None
    kept: UInt8[np.ndarray, "S S 3"] | None = None


def numbered(requests: Sequence[Request]) -> list[Request]:
    """The requests of one call with their numbers among equal ones."""
    seen: dict[int, int] = collections.Counter()
    result = []
    for request in requests:
        key = asked(request)
        result.append(request._replace(number=seen[key]))
        seen[key] += 1
    return result


def texts_of(texts: str | Sequence[Any]) -> list[str]:
    """The texts of a call.

    Raises:
        UserError: one of them is none.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"prompts, instructions and questions are texts, got {text!r:.40}")
    return texts


def paired(columns: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Row by row; a column of one goes with all rows."""
    count = max(map(len, columns.values()))
    if not all(columns.values()):
        count = 0
    for values in columns.values():
        if len(values) not in (1, count):
            said = " and ".join(f"{len(x)} {_NAMES[name]}" for name, x in columns.items())
            raise UserError(f"{said}: give as many of each, or one")
    for i in range(count):
        yield {name: values[i % len(values)] for name, values in columns.items()}


def asked(request: Request) -> int:
    """A number that tells what is asked; equal for equal requests."""
    content = request.example.prompt.encode()
    for array in (request.example.image, request.kept, request.cells):
        if array is not None:
            content += np.ascontiguousarray(array).tobytes()
    return zlib.crc32(content)


def rngs(requests: Sequence[Request], seed: int) -> list[np.random.Generator]:
    """A generator per request, of the seed, what is asked, and its number among equal ones."""
    return [np.random.default_rng((seed, asked(request), request.number)) for request in requests]


def draw_entropy(rng: np.random.Generator) -> UInt32[np.ndarray, "2"]:
    """What the row's random numbers come from, see `decode.keys_of`."""
    return rng.integers(2**32, size=2, dtype=np.uint32)
