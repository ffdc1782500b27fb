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
from unifluid_jax.models.functional import Functional
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
    return Parts(config, model, sequencer, images, process)


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
