"""PNG files as bytes: TFDS takes pictures in this form without TensorFlow."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def encode(image_HWC: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """The picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def decode(png: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """The picture of a PNG file; transparency is dropped."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
