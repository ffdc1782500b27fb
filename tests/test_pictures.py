"""Pictures and masks that go in: what is read, how, and what is refused."""

import io

import numpy as np
import pytest
from PIL import Image

from unifluid_jax import pictures
from unifluid_jax.errors import UserError


def picture(seed, height=20, width=12):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_to_array_knows_grey_alpha_palettes_and_cmyk():
    grey = np.array([[0, 200]], np.uint8)
    for given in (grey, grey[..., None], Image.fromarray(grey)):
        np.testing.assert_array_equal(pictures.to_array(given)[0], [[0] * 3, [200] * 3])
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], np.uint8)
    expected = [[10, 20, 30], [255] * 3, [204] * 3]
    for given in (rgba, Image.fromarray(rgba)):
        np.testing.assert_array_equal(pictures.to_array(given)[0], expected)
    palette = Image.fromarray(rgba[..., :3]).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.info["transparency"] = palette.getpixel((2, 0))
    np.testing.assert_array_equal(pictures.to_array(palette)[0, 2], [255] * 3)
    cmyk = Image.fromarray(rgba[..., :3]).convert("CMYK")
    np.testing.assert_array_equal(pictures.to_array(cmyk)[0, 0], [10, 20, 30])


def test_a_photo_is_turned_as_its_exif_says():
    upright = picture(0)
    turned = Image.fromarray(np.rot90(upright))  # a quarter to the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned a quarter to the right
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(pictures.to_array(Image.open(file)), upright)


@pytest.mark.parametrize(
    ("array", "shown"),
    [
        (np.zeros((4, 4, 3), np.float32), r"float32 \[4, 4, 3\]"),
        (np.zeros((4, 4, 2), np.uint8), r"uint8 \[4, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), r"uint8 \[0, 4, 3\]"),
        (np.zeros(4, np.uint8), r"uint8 \[4\]"),
        (np.zeros((2, 2, 4, 4, 3), np.uint8), r"uint8 \[2, 2, 4, 4, 3\]"),
    ],
)
def test_an_array_that_is_no_picture_is_described(array, shown):
    with pytest.raises(UserError, match=f"an array of {shown} is no picture: give uint8"):
        pictures.to_arrays(array)


def test_pictures_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(UserError, match='no picture ".*none.png": no such file'):
        pictures.to_arrays(tmp_path / "none.png")
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("no picture")
    Image.fromarray(picture(0, 200, 200)).save(cut)
    cut.write_bytes(cut.read_bytes()[:3000])
    for path in (text, cut, tmp_path):
        with pytest.raises(UserError, match=f'"{path}" cannot be read as a picture: ') as error:
            pictures.to_arrays(path)
        assert "\n" not in str(error.value)
    with (
        Image.open(cut) as opened,
        pytest.raises(UserError, match="a picture cannot be read as a picture: "),
    ):
        pictures.to_arrays(opened)
    deep = Image.fromarray(np.zeros((4, 4), np.uint16))
    deep.save(tmp_path / "deep.png")
    for given in (deep, tmp_path / "deep.png"):
        with pytest.raises(UserError, match="mode I;16 has more than 8 bits: convert it to RGB"):
            pictures.to_arrays(given)


def test_a_mask_touches_the_cells_that_it_is_white_in():
    mask = np.zeros((8, 8), bool)
    mask[1, 6] = True
    expected = [False, True, False, False]
    for given in (mask, mask.astype(np.uint8) * 255, Image.fromarray(mask)):
        np.testing.assert_array_equal(pictures.to_cells(given, 8, 2), expected)
    # Of another size, and with an alpha channel: what can be looked through is white.
    large = np.kron(mask, np.ones((5, 7), bool))
    np.testing.assert_array_equal(pictures.to_cells(large, 8, 2), expected)
    layers = np.zeros((8, 8, 4), np.uint8)
    layers[..., 3] = np.where(mask, 0, 255)
    np.testing.assert_array_equal(pictures.to_cells(layers, 8, 2), expected)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((8, 8), bool), "the mask is black everywhere: make white what"),
        (np.ones((8, 8), bool), "the mask is white everywhere: leave black what"),
        (np.zeros((8, 8), np.float32), r"an array of float32 \[8, 8\] is no picture"),
        ("none.png", 'no picture "none.png": no such file'),
    ],
)
def test_a_mask_that_makes_no_sense_is_refused(mask, message):
    with pytest.raises(UserError, match=message):
        pictures.to_cells(mask, 8, 2)


def test_cells_are_taken_from_another_picture_or_checked_grey():
    first, second = picture(0, 8, 8), picture(1, 8, 8)
    mixed = pictures.painted(first, np.array([False, True, False, False]), second)
    np.testing.assert_array_equal(mixed[:4, 4:], second[:4, 4:])
    np.testing.assert_array_equal(mixed[4:], first[4:])
    np.testing.assert_array_equal(mixed[:, :4], first[:, :4])
    unknown = pictures.painted(first, np.array([True, False, False, False]))
    assert set(unknown[:4, :4].ravel()) == {225, 200}
    np.testing.assert_array_equal(unknown[4:], first[4:])
