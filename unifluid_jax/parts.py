"""What a config makes of a UniFluid but its parameters: model, tokenizers, noise process.

The trainer and inference put the same parts together here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from unifluid_jax import image_tokenizer
from unifluid_jax.diffusion import DDPM, Flow, process_from
from unifluid_jax.errors import UserError, nearest
from unifluid_jax.image_tokenizer import ImageTokenizer
from unifluid_jax.input.examples import Sequencer, make_sequencer
from unifluid_jax.input.tokenizer import TextTokenizer
from unifluid_jax.models.functional import Functional
from unifluid_jax.models.gemma import GemmaConfig
from unifluid_jax.models.head import HeadConfig
from unifluid_jax.models.siglip import SiglipConfig
from unifluid_jax.models.unifluid import UniFluid, UniFluidConfig
from unifluid_jax.models.vae import VaeConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """A UniFluid without its parameters.

    Attributes:
        config: what it was made of.
        model: the functional face of the network.
        sequencer: the text tokenizer, and the layout of sequences.
        images: the image tokenizer.
        process: the noise process of the diffusion head.
    """

    config: ConfigDict
    model: Functional
    sequencer: Sequencer
    images: ImageTokenizer
    process: DDPM | Flow


def assemble(config: ConfigDict) -> Parts:
    """The parts of a config with `task` "unifluid".

    Raises:
        UserError: a tokenizer cannot be read, or a part of the model has no such option.
    """
    _check_task(config)
    images = image_tokenizer.load(config.image_tokenizer.path)
    said = config.image_tokenizer.get("vae")
    if said is not None and make_part(VaeConfig, _VAE, said) != images.config:
        raise UserError(
            f"{_VAE} is not the architecture of {config.image_tokenizer.path}: {images.config}"
        )
    sequencer = make_sequencer(config, images)
    size = config.tokenizer.get("vocab_size")
    if size is not None and size != sequencer.text.vocab_size:
        raise UserError(
            f"config.tokenizer.vocab_size is {size}, {config.tokenizer.path} has "
            f"{sequencer.text.vocab_size}"
        )
    model_config, process = _model_config(config, sequencer.text.vocab_size, images.config)
    model = Functional(lambda rngs: UniFluid(model_config, rngs=rngs))
    return Parts(config, model, sequencer, images, process)


_VAE = "config.image_tokenizer.vae"


@dataclasses.dataclass(frozen=True, eq=False)
class Blueprint:
    """What a config says of its model before any file is read: enough to compile the step.

    Attributes:
        config: what it was made of.
        sizes: of all parts of the network.
        vae: sizes of the image tokenizer.
        model, process: as in `Parts`.
    """

    config: ConfigDict
    sizes: UniFluidConfig
    vae: VaeConfig
    model: Functional
    process: DDPM | Flow


def blueprint(config: ConfigDict) -> Blueprint:
    """The model of a config with `task` "unifluid", without its weights.

    The tokenizers' files are read only where the config does not say what is in them
    (`config.tokenizer.vocab_size`, `config.image_tokenizer.vae`).

    Raises:
        UserError: as `assemble`.
    """
    _check_task(config)
    if config.image_tokenizer.get("vae") is None:
        vae = image_tokenizer.load(config.image_tokenizer.path).config
    else:
        vae = make_part(VaeConfig, _VAE, config.image_tokenizer.vae)
    size = config.tokenizer.get("vocab_size")
    if size is None:
        size = TextTokenizer(config.tokenizer.path).vocab_size
    sizes, process = _model_config(config, size, vae)
    model = Functional(lambda rngs: UniFluid(sizes, rngs=rngs))
    return Blueprint(config, sizes, vae, model, process)


def _check_task(config: ConfigDict) -> None:
    if config.task != "unifluid":
        raise UserError(
            f'the config is of the task "{config.task}": one of the task "unifluid" is needed'
        )


def _model_config(
    config: ConfigDict, vocab_size: int, vae: VaeConfig
) -> tuple[UniFluidConfig, DDPM | Flow]:
    c = config.model
    process = process_from(**config.diffusion)
    model_config = UniFluidConfig(
        backbone=make_part(GemmaConfig, "config.model.backbone", c.backbone, vocab_size=vocab_size),
        vision=make_part(SiglipConfig, "config.model.vision", c.vision),
        head=make_part(
            HeadConfig,
            "config.model.head",
            c.head,
            token_dim=vae.token_dim,
            cond_dim=c.backbone.width,
            out_dim=process.outputs(vae.token_dim),
        ),
        image_tokens=vae.image_tokens,
        position_init=c.position_init,
        target_in_head=c.target_in_head,
    )
    return model_config, process


def make_part(kind: Callable[..., Any], where: str, fields: ConfigDict, **fixed: Any) -> Any:
    """`kind`, a dataclass, of a sub-config and of what the other parts fix.

    Args:
        where: path of the sub-config, for messages.

    Raises:
        UserError: the sub-config has a field that `kind` has not, or lacks one.
    """
    known = [field.name for field in dataclasses.fields(kind) if field.name not in fixed]
    for field in fields:
        if field not in known:
            raise UserError(f'{where} has no option "{field}"{nearest(field, known)}')
    try:
        return kind(**fields, **fixed)
    except TypeError as error:
        raise UserError(f"{where}: {error}") from error
