"""Published sizes: the numbers of parameters that everybody knows, and names that nobody does."""

import math

import jax
import pytest

from unifluid_jax import image_tokenizer
from unifluid_jax.errors import UserError
from unifluid_jax.models.functional import Functional
from unifluid_jax.models.gemma import Gemma, GemmaConfig
from unifluid_jax.models.presets import GEMMA, SIGLIP, VAE, preset
from unifluid_jax.models.siglip import Siglip, SiglipConfig
from unifluid_jax.models.vae import VaeConfig


def count(functional):
    shapes = jax.eval_shape(functional.init, jax.random.key(0))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


# As counted in the files on the Hugging Face hub, with their rows of the vocabulary.
SIZES = {
    "gemma1_2b": (256_000, 2_506_172_416),
    "gemma2_2b": (256_000, 2_614_341_888),
    "gemma2_9b": (256_000, 9_241_705_984),
    "gemma2_27b": (256_000, 27_227_128_320),
    "gemma3_270m": (262_144, 268_098_176),
    "gemma3_1b": (262_144, 999_885_952),
    "gemma3_4b": (262_208, 3_880_263_168),
}


def test_gemmas():
    assert SIZES.keys() == GEMMA.keys()
    for name, (rows, size) in SIZES.items():
        config = GemmaConfig(vocab_size=rows, **preset(name))
        assert count(Functional(lambda rngs, c=config: Gemma(c, rngs=rngs))) == size, name


def test_towers():
    """The two of So400m differ in positions alone; 412,442,352 is PaliGemma's tower of 224."""
    sizes = {}
    for name in SIGLIP:
        config = SiglipConfig(**preset(name))
        sizes[name] = count(Functional(lambda rngs, c=config: Siglip(c, rngs=rngs)))
    assert sizes["siglip_so400m_14_224"] == 412_442_352
    assert sizes["siglip_so400m_14_384"] == 412_442_352 + (27**2 - 16**2) * 1152
    assert sizes["siglip_b_16_256"] - sizes["siglip_b_16_224"] == (16**2 - 14**2) * 768


def test_autoencoders():
    """83,653,863 is diffusers' count of Stable Diffusion's; both give 256 tokens of 16 dims."""
    for name in VAE:
        config = VaeConfig(**preset(name))
        assert (config.image_tokens, config.token_dim) == (256, 16)
    sizes = {name: count(image_tokenizer.module(VaeConfig(**preset(name)))) for name in VAE}
    assert sizes["sd_vae"] == 83_653_863


def test_preset_is_a_copy_with_changes():
    fields = preset("gemma2_2b", depth=3, dtype="bfloat16")
    assert fields["depth"] == 3 and fields["dtype"] == "bfloat16" and fields["width"] == 2304
    assert preset("gemma2_2b")["depth"] == 26


def test_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match='no preset called "gema2_2b".*"gemma2_2b"'):
        preset("gema2_2b")
