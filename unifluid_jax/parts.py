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
from unifluid_jax.lora import Adapted, LoraConfig
from unifluid_jax.models.functional import Functional, Params
from unifluid_jax.models.gemma import GemmaConfig
from unifluid_jax.models.head import HeadConfig
from unifluid_jax.models.siglip import SiglipConfig
from unifluid_jax.models.unifluid import UniFluid, UniFluidConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """A UniFluid without its parameters.

    Attributes:
        config: what it was made of.
        model: the functional face of the network.
        trained: what is trained and in checkpoints: the model, with adapters beside its parameters
            if there is a group `config.lora`.
        sequencer: the text tokenizer, and the layout of sequences.
        images: the image tokenizer.
        process: the noise process of the diffusion head.
    """

    config: ConfigDict
    model: Functional
    trained: Functional | Adapted
    sequencer: Sequencer
    images: ImageTokenizer
    process: DDPM | Flow

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
    if config.task != "unifluid":
        raise UserError(
            f'the config is of the task "{config.task}": one of the task "unifluid" is needed'
        )
    c = config.model
    images = image_tokenizer.load(config.image_tokenizer.path)
    sequencer = make_sequencer(config, images)
    process = process_from(**config.diffusion)
    token_dim = images.config.token_dim
    model_config = UniFluidConfig(
        backbone=make_part(
            GemmaConfig, "config.model.backbone", c.backbone, vocab_size=sequencer.text.vocab_size
        ),
        vision=make_part(SiglipConfig, "config.model.vision", c.vision),
        head=make_part(
            HeadConfig,
            "config.model.head",
            c.head,
            token_dim=token_dim,
            cond_dim=c.backbone.width,
            out_dim=process.outputs(token_dim),
        ),
        image_tokens=images.config.image_tokens,
        position_init=c.position_init,
        target_in_head=c.target_in_head,
        queries=sequencer.layout.queries,
    )
    model = Functional(lambda rngs: UniFluid(model_config, rngs=rngs))
    trained = model
    if "lora" in config:
        trained = Adapted(model, make_part(LoraConfig, "config.lora", config.lora))
    return Parts(config, model, trained, sequencer, images, process)
