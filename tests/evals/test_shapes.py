import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw
from scipy import ndimage

from unifluid_jax.evals import shapes

HERE = Path(__file__).parent
BACKGROUND = (240, 246, 235)


@pytest.fixture(scope="module")
def sample():
    """48 real pictures, small and medium ones of all 24 combinations, and their (color, shape)."""
    sheet = np.asarray(Image.open(HERE / "easy_vqa_sample.png"))
    images = sheet.reshape(6, 64, 8, 64, 3).transpose(0, 2, 1, 3, 4).reshape(48, 64, 64, 3)
    entries = json.loads((HERE / "easy_vqa_sample.json").read_text())["pictures"]
    return images, [(entry["color"], entry["shape"]) for entry in entries]


def blurred(image, sigma):
    pixels = ndimage.gaussian_filter(image.astype(float), (sigma, sigma, 0))
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def noisy(image, sigma):
    noise = np.random.default_rng(0).normal(0, sigma, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


DISTORTIONS = {
    "none": lambda image: image,
    "noise": lambda image: noisy(image, 6),
    "blur": lambda image: blurred(image, 0.7),
    "blur and noise": lambda image: noisy(blurred(image, 0.7), 6),
    "float": lambda image: image.astype(np.float32) / 127.5 - 1,
}


@pytest.mark.parametrize("distortion", DISTORTIONS)
def test_real_pictures_are_judged_right(sample, distortion):
    for image, label in zip(*sample, strict=True):
        judged = shapes.judge(DISTORTIONS[distortion](image))
        assert (judged.color, judged.shape) == label


def test_float_pictures_are_judged_as_their_bytes(sample):
    for image in sample[0][::7]:
        assert shapes.judge(image) == shapes.judge((image / 127.5 - 1).astype(np.float64))


@pytest.mark.skipif(
    not Path("data_cache/easy_vqa/1.0.0/dataset_info.json").exists(), reason="easy_vqa is not built"
)
def test_the_whole_test_set_is_judged_right():
    right = total = 0
    for split in ("test", "compositional"):
        for record in tfds.builder("easy_vqa", data_dir="data_cache").as_data_source(split):
            if record["labels"] == b"answers" and record["official_split"] == b"test":
                judged = shapes.judge(np.asarray(record["images"][0]))
                label = record["color"].decode(), record["shape"].decode()
                right += (judged.color, judged.shape) == label
                total += 1
    assert total == 880
    assert right / total >= 0.98  # 880 of 880 when this was written


@pytest.mark.parametrize("color", shapes.PALETTE)
@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_drawings_are_measured(color, shape):
    rng = np.random.default_rng(len(color) + len(shape))
    for _ in range(5):
        size = rng.uniform(8, 30, 2)
        size = (size[0], size[0]) if shape == "circle" else tuple(size)
        center = rng.uniform(22, 42, 2)
        alpha = shapes.draw(shape, tuple(center), size, (64, 64))[..., None]
        background, foreground = np.asarray(BACKGROUND), np.asarray(shapes.PALETTE[color])
        image = np.rint(background + alpha * (foreground - background)).astype(np.uint8)
        judged = shapes.judge(image)
        assert (judged.color, judged.shape) == (color, shape)
        np.testing.assert_allclose(judged.center, center, atol=0.15)
        np.testing.assert_allclose(judged.size, size, atol=0.5)


def draw_polygon(points, color=(255, 0, 0)):
    """Antialiased polygon of (x, y) pixels."""
    canvas = Image.new("RGB", (256, 256), BACKGROUND)
    ImageDraw.Draw(canvas).polygon([(4 * x, 4 * y) for x, y in points], fill=color)
    return np.asarray(canvas.resize((64, 64), Image.Resampling.BOX))


def regular_polygon(corners, radius=12):
    angles = 2 * np.pi * np.arange(corners) / corners
    return [(32 + radius * np.sin(a), 32 - radius * np.cos(a)) for a in angles]


NO_SHAPES = {
    "triangle upside down": [(20, 20), (44, 20), (32, 42)],
    "triangle on its side": [(20, 20), (20, 44), (42, 32)],
    "right-angled triangle": [(20, 20), (20, 44), (44, 44)],
    "diamond": regular_polygon(4),
    "L": [(20, 20), (32, 20), (32, 32), (44, 32), (44, 44), (20, 44)],
    "half circle": [(32 + 12 * np.cos(a), 38 - 12 * np.sin(a)) for a in np.linspace(0, np.pi, 40)],
    "flat ellipse": [
        (32 + 14 * np.cos(a), 32 + 7 * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 60)
    ],
}


@pytest.mark.parametrize("name", NO_SHAPES)
def test_other_shapes_have_a_color_but_no_shape(name):
    judged = shapes.judge(draw_polygon(NO_SHAPES[name]))
    assert (judged.color, judged.shape) == ("red", None)


def test_two_shapes_are_none():
    image = np.full((64, 64, 3), BACKGROUND, np.uint8)
    image[10:24, 10:24] = image[40:54, 36:50] = (0, 128, 128)
    judged = shapes.judge(image)
    assert (judged.color, judged.shape) == ("teal", None)


def test_two_colors_are_none():
    image = np.full((64, 64, 3), BACKGROUND, np.uint8)
    image[20:44, 20:32] = (255, 0, 0)
    image[20:44, 32:44] = (0, 0, 255)
    assert shapes.judge(image).color is None


def test_colors_off_the_palette_are_none():
    purple = draw_polygon(regular_polygon(30), color=(160, 0, 200))
    assert shapes.judge(purple) == shapes.Judgement(color=None, shape=None)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_an_empty_picture_has_nothing(value):
    image = np.full((64, 64, 3), value, np.uint8)
    assert shapes.judge(image) == shapes.Judgement(color=None, shape=None)


def test_pure_noise_has_no_shape():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert shapes.judge(image).shape is None


def test_a_wide_blur_is_no_shape():
    """Colour survives a blur of three pixels, but a blob must not pass for a circle."""
    image = draw_polygon([(24, 24), (38, 24), (38, 38), (24, 38)])
    assert shapes.judge(blurred(image, 3)).shape is None


def test_drawn_areas():
    area = {"circle": np.pi / 4 * 20 * 20, "rectangle": 20 * 12, "triangle": 20 * 12 / 2}
    for shape in shapes.SHAPES:
        size = (20.0, 20.0) if shape == "circle" else (20.0, 12.0)
        drawn = shapes.draw(shape, (32.3, 30.7), size, (64, 64)).sum()
        np.testing.assert_allclose(drawn, area[shape], rtol=0.03)
    with pytest.raises(ValueError, match="none of"):
        shapes.draw("star", (32.0, 32.0), (9.0, 9.0), (64, 64))
