"""What a config makes of a UniFluid but its parameters: model, tokenizers, noise process.

The trainer and inference put the same parts together here.
"""

import dataclasses

import jax
from ml_collections import ConfigDict

from unifluid_jax import image_tokenizer, lora
from unifluid_jax.config import make_part
from unifluid_jax.diffusion import DDPM, Flow, process_from
from unifluid_jax.errors import UserError
from unifluid_jax.image_tokenizer import ImageTokenizer
from unifluid_jax.input.examples import Sequencer, make_sequencer
from unifluid_jax.input.tokenizer import TextTokenizer
from unifluid_jax.lora import Adapted, LoraConfig
from unifluid_jax.models.functional import Functional, Params
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
        sizes: of all parts of the network.
        model: the functional face of the network.
        trained: what is trained and in checkpoints: the model, with adapters beside its parameters
            if there is a group `config.lora`.
        sequencer: the text tokenizer, and the layout of sequences.
        images: the image tokenizer.
        process: the noise process of the diffusion head.
    """

    config: ConfigDict
    sizes: UniFluidConfig
    model: Functional
    trained: Functional | Adapted
    sequencer: Sequencer
    images: ImageTokenizer
    process: DDPM | Flow

    @property
    def vae(self) -> VaeConfig:
        """Sizes of the image tokenizer."""
        return self.images.config

    def merged(self, params: Params) -> Params:
        """Parameters of `model` from those of `trained`, where they lie."""
        if self.trained is self.model:
            return params
        where = jax.tree.map(lambda x: x.sharding, lora.base(params))
        return jax.jit(self.trained.merge, out_shardings=where)(params)


def assemble(config: ConfigDict) -> Parts:
    """The parts of a config with `task` "unifluid".

    Raises:
        UserError: a tokenizer cannot be read, or a part of the model has no such option.
    """
    _check_task(config)
    images = image_tokenizer.load(config.image_tokenizer.path)
    said = config.image_tokenizer.get("vae")
    # In which type it computes is for whoever runs it.
    if (
        said is not None
        and dataclasses.replace(make_part(VaeConfig, _VAE, said), dtype=images.config.dtype)
        != images.config
    ):
        raise UserError(
            f"{_VAE} is not the architecture of {config.image_tokenizer.path}: {images.config}"
        )
    sequencer = make_sequencer(config, images)
    sizes, process = _model_config(config, sequencer.text.vocab_size, images.config)
    model, trained = _networks(config, sizes)
    return Parts(config, sizes, model, trained, sequencer, images, process)


_VAE = "config.image_tokenizer.vae"


@dataclasses.dataclass(frozen=True, eq=False)
class Blueprint:
    """What a config says of its model before any file is read: enough to compile the step.

    Attributes:
        config: what it was made of.
        sizes: of all parts of the network.
        vae: sizes of the image tokenizer.
        model, trained, process: as in `Parts`.
    """

    config: ConfigDict
    sizes: UniFluidConfig
    vae: VaeConfig
    model: Functional
    trained: Functional | Adapted
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
    if not size:
        size = make_part(TextTokenizer, "config.tokenizer", config.tokenizer).vocab_size
    sizes, process = _model_config(config, size, vae)
    return Blueprint(config, sizes, vae, *_networks(config, sizes), process)


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
    sizes = UniFluidConfig(
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
    return sizes, process


def _networks(config: ConfigDict, sizes: UniFluidConfig) -> tuple[Functional, Functional | Adapted]:
    """The model, and what is trained."""
    model = Functional(lambda rngs: UniFluid(sizes, rngs=rngs))
    if "lora" not in config:
        return model, model
    return model, Adapted(model, make_part(LoraConfig, "config.lora", config.lora))
