"""The image tokenizer's files, and pictures through it and back."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests import worlds
from unifluid_jax import image_tokenizer, trees
from unifluid_jax.errors import UserError


@pytest.fixture(scope="module")
def params():
    return worlds.make_params(image_tokenizer.module(worlds.VAE), seed=4)


@pytest.fixture
def saved(tmp_path, params):
    stats = np.linspace(0.5, 1.2, worlds.VAE.token_dim).astype(np.float32)
    folder = tmp_path / "below" / "tokenizer"
    image_tokenizer.save(folder, worlds.VAE, params, -stats, stats, {"trained": {"steps": 7}})
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    worlds.save_image_tokenizer(folder)
    return image_tokenizer.load(folder)


def pictures(count, size=16):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def test_what_is_saved_is_loaded(saved, params):
    loaded = image_tokenizer.load(str(saved))
    assert loaded.config == worlds.VAE
    assert loaded.info["trained"] == {"steps": 7}
    np.testing.assert_allclose(loaded.channel_mean, -loaded.channel_std, atol=1e-6)
    np.testing.assert_allclose(loaded.channel_std[[0, -1]], [0.5, 1.2], atol=1e-6)
    found, given = trees.flatten(loaded.params), trees.flatten(params)
    assert list(found) == list(given)
    for name, leaf in given.items():
        # Half precision in the file, and nothing lost but that.
        np.testing.assert_array_equal(found[name], np.float32(np.float16(leaf)))
        assert found[name].dtype == np.float32


def test_the_fingerprint_is_that_of_the_weights_file(saved, params):
    weights = (saved / "weights.safetensors").read_bytes()
    first = image_tokenizer.load(saved).fingerprint
    assert first == hashlib.sha256(weights).hexdigest()
    moved = jax.tree.map(lambda x: x + 1, params)
    stats = np.ones(worlds.VAE.token_dim, np.float32)
    image_tokenizer.save(saved, worlds.VAE, moved, stats, stats, {})
    assert image_tokenizer.load(saved).fingerprint != first


def test_the_files_hold_parameters_by_path_in_half_precision(saved):
    weights = load_file(saved / "weights.safetensors")
    assert weights["encoder/conv_in/kernel"].shape == (3, 3, 3, 8)
    assert {leaf.dtype for leaf in weights.values()} == {np.dtype(np.float16)}
    config = json.loads((saved / "config.json").read_text())
    assert config["vae"]["multipliers"] == [1, 2] and config["channel_std"][0] == 0.5


def test_encoding_and_decoding_are_the_networks_own(tokenizer):
    images = pictures(3)
    bound = image_tokenizer.module(tokenizer.config).bind(tokenizer.params)
    mean, std = tokenizer.encode(images)
    pixels = images.astype(np.float32) / 127.5 - 1
    for found, expected in zip((mean, std), jax.jit(bound.encode)(pixels), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert (std > 0).all()
    decoded = tokenizer.decode(mean)
    expected = np.clip((np.asarray(jax.jit(bound.decode)(mean)) + 1) * 127.5, 0, 255)
    assert decoded.shape == images.shape and decoded.dtype == np.uint8
    assert np.abs(decoded - expected).max() <= 0.51
    assert decoded.std() > 10  # not everything clipped


@pytest.mark.parametrize("count", [2, 3, 4])
def test_tokens_of_the_model_are_scaled_be_they_on_a_device_or_not(tokenizer, count):
    """Also where they are several chunks, or less than one."""
    small = dataclasses.replace(tokenizer, batch=2)
    normal = np.random.default_rng(0).normal(size=(count, 4, 32)).astype(np.float32)
    expected = tokenizer.decode(normal * tokenizer.channel_std + tokenizer.channel_mean)
    for which in (tokenizer, small):
        for tokens in (normal, jnp.asarray(normal)):
            found = which.pictures(tokens)
            assert found.shape == expected.shape
            assert np.abs(found.astype(int) - expected).max() <= 1
    assert expected.std() > 10


def test_chunks_do_not_show(tokenizer):
    """7 pictures in chunks of 64, and of 2 with one left over."""
    small = dataclasses.replace(tokenizer, batch=2)
    images = pictures(7)
    whole, cut = tokenizer.encode(images), small.encode(images)
    for a, b in zip(whole, cut, strict=True):
        assert a.shape == b.shape == (7, 4, 32)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    a, b = tokenizer.decode(whole[0]), small.decode(whole[0])
    assert a.shape == b.shape == (7, 16, 16, 3)
    assert np.abs(a.astype(int) - b).max() <= 1


def test_bytes_and_pixels_are_inverse():
    images = np.arange(256, dtype=np.uint8)
    pixels = image_tokenizer.to_pixels(jnp.asarray(images))
    assert (pixels[0], pixels[-1]) == (-1, 1)
    np.testing.assert_array_equal(image_tokenizer.to_bytes(pixels), images)
    np.testing.assert_array_equal(image_tokenizer.to_bytes(jnp.array([-9.0, 9.0])), [0, 255])


def test_pictures_of_another_size_are_refused(tokenizer):
    with pytest.raises(UserError, match="reads 16 x 16 pictures, got 8 x 8: resize them first"):
        tokenizer.encode(pictures(1, 8))


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(UserError, match=f"no image tokenizer at {saved}: {name} is missing; train"):
        image_tokenizer.load(saved)


def test_a_missing_folder_or_a_file_in_its_place_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(UserError, match=f"no image tokenizer at {path}: config.json is"):
            image_tokenizer.load(path)


@pytest.mark.parametrize("size", [0, 5, 100, -40])
def test_cut_weights_are_named(saved, size):
    weights = saved / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(UserError, match=f"the image tokenizer at {saved} is damaged .*: fetch"):
        image_tokenizer.load(saved)


@pytest.mark.parametrize("content", [b"", b'{"vae": ', b"\xff\xfe\x00"])
def test_a_config_that_is_no_json_is_named(saved, content):
    (saved / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=f"the image tokenizer at {saved} is damaged") as error:
        image_tokenizer.load(saved)
    assert "\n" not in str(error.value)


def without(key):
    return lambda config: config.pop(key)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("vae"), "KeyError: 'vae'"),
        (without("channel_std"), "KeyError: 'channel_std'"),
        (lambda config: config["vae"].pop("multipliers"), "KeyError: 'multipliers'"),
        (lambda config: config["vae"].update(chanels=8), "unexpected keyword argument 'chanels'"),
        (lambda config: config.update(vae=[]), "TypeError"),
        (lambda config: config["vae"].update(channels="8"), "Type.*Error"),
        (lambda config: config["channel_mean"].pop(), "of 31 and 32 channels, tokens have 32"),
        (lambda config: config.update(channel_mean="x"), "ValueError"),
        (lambda config: config.update(channel_std=[0.0] * 32), "deviations not above 0"),
    ],
)
def test_a_config_that_describes_no_tokenizer_is_named(saved, change, reason):
    config = json.loads((saved / "config.json").read_text())
    change(config)
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=rf"config.json describes no image tokenizer \(.*{reason}.*\): fetch or"
    ) as error:
        image_tokenizer.load(saved)
    assert "\n" not in str(error.value)


def test_a_config_that_is_a_list_is_named(saved):
    (saved / "config.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="config.json describes no image tokenizer"):
        image_tokenizer.load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("encoder/conv_in/bias"),
            "tensor encoder/conv_in/bias is missing from .*: config and weights do not belong",
        ),
        (
            lambda weights: weights.update({"encoder/extra": np.zeros(1, np.float16)}),
            "tensor encoder/extra is unknown in .*/weights.safetensors: config and",
        ),
        (
            lambda weights: weights.update({"encoder/conv_in/bias": np.zeros(3, np.float16)}),
            r"tensor encoder/conv_in/bias of .* has shape \(3,\), the config says \(8,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(saved, change, message):
    weights = load_file(saved / "weights.safetensors")
    change(weights)
    save_file(weights, saved / "weights.safetensors")
    with pytest.raises(UserError, match=message):
        image_tokenizer.load(saved)


def test_float32_weights_are_read_too(saved):
    weights = load_file(saved / "weights.safetensors")
    weights = {name: leaf.astype(np.float32) + 1e-6 for name, leaf in weights.items()}
    save_file(weights, saved / "weights.safetensors")
    found = trees.flatten(image_tokenizer.load(saved).params)
    for name, leaf in weights.items():
        np.testing.assert_array_equal(found[name], leaf)


def test_psnr_is_that_of_each_pair():
    a = np.full((3, 4, 4, 3), 100, np.uint8)
    b = a.copy()
    b[1] += 16
    b[2, :2] -= 50  # half of the pixels: half the error
    expected = [100, 20 * np.log10(255 / 16), 10 * np.log10(255**2 / (50**2 / 2))]
    np.testing.assert_allclose(image_tokenizer.psnr(a, b), expected)
