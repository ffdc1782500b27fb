"""What a step will need, from sizes alone: to choose what to compile, and to say what would fit.

Memory is that of one device. It counts the large things: state, gradients, what layers keep for the
backward pass, logits. The compiler's own figures (plan.py) are the truth.
"""

import dataclasses
import math
from typing import Any

import jax

from unifluid_jax import flops, lora, sharding
from unifluid_jax.input.examples import encodes_in_step
from unifluid_jax.models.functional import KEPT
from unifluid_jax.parts import Blueprint, Parts
from unifluid_jax.topology import Chip


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, by class."""

    parameters: float
    ema: float
    optimizer: float
    batch: float
    gradients: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def bytes_of(tree: Any) -> float:
    """Bytes on one device of abstract arrays with shardings."""
    return float(
        sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )
    )


def memory(plan: Blueprint, state: Any, batch: Any, constants: Any, mesh: Any) -> Memory:
    """What a step will need.

    Args:
        plan: the model.
        state, batch, constants: abstract, with shardings.
        mesh: of these.
    """
    config, backbone = plan.config, plan.sizes.backbone
    rows = config.input.batch_size / config.train.accumulate
    rows /= mesh.shape["data"] * mesh.shape["fsdp"]
    accumulators = 2 if config.train.accumulate > 1 else 1
    chunk = config.loss.get("text_chunk") or config.input.max_text_targets
    pieces = mesh.shape["fsdp"] * mesh.shape["tensor"]
    return Memory(
        parameters=bytes_of((state["params"], state["frozen"], constants)),
        ema=bytes_of(state["ema"]),
        optimizer=bytes_of(state["opt_state"]),
        batch=bytes_of(batch),
        gradients=accumulators * bytes_of(state["params"]),
        activations=_kept(plan, mesh) * rows,
        # Of the group among which the vocabulary is cut; float32, and their gradients in 16 bits.
        logits=6.0 * rows * mesh.shape["fsdp"] * chunk * backbone.vocab_size / pieces,
    )


def _kept(plan: Blueprint, mesh: Any) -> float:
    """Bytes that the layers keep of one row for the backward pass."""
    c, length = plan.sizes.backbone, plan.config.input.seq_len
    tensor = mesh.shape["tensor"]
    sizes = {
        "qkv": c.head_dim * (c.heads + 2 * c.kv_heads) / tensor,
        "attention": c.head_dim * c.heads / tensor,
        "up": c.mlp_dim / tensor,
        "gate": c.mlp_dim / tensor,
    }
    # Without remat about everything between the matrices too; "dots" keeps all their results.
    kept = KEPT.get(c.remat or "dots", ())
    width = c.width + sum(sizes[name] for name in kept)
    if c.remat in (None, "dots"):
        width += sum(sizes.values()) + 2 * c.width
    if c.remat is None:
        width *= 2
    return float(width * c.depth * length * jax.numpy.dtype(c.dtype).itemsize)


def parts(plan: Blueprint | Parts, params: Any) -> dict[str, flops.Part]:
    """Model FLOPs of one row by part.

    Args:
        plan: the model.
        params: those that are trained, abstract. A part with adapters counts as trained: their
            gradient passes through one of the matrix's own size (see `lora`).
    """
    config = plan.config
    trained = {*params, *params.get(lora.BRANCH, {})}
    return flops.of_row(
        plan.sizes,
        length=config.input.seq_len,
        text_targets=config.input.max_text_targets,
        image_targets=config.input.max_image_targets,
        draws=config.loss.draws,
        pictures=config.input.max_images,
        frozen={part: part not in trained for part in ("backbone", "vision", "head")},
        vae=plan.vae if encodes_in_step(config.input) else None,
        encoded=config.input.get("max_encoded_images", 0),
    )


def seconds(plan: Blueprint, state: Any, chip: Chip, mesh: Any) -> float:
    """A step's time, roughly: products at 85 % of peak, what is recomputed too, and collectives."""
    config, c = plan.config, plan.sizes.backbone
    rows = config.input.batch_size / math.prod(mesh.shape[axis] for axis in sharding.AXES)
    by_part = parts(plan, state["params"])
    work = sum(part.step for part in by_part.values())
    width, length = c.width, config.input.seq_len
    again = {
        "qkv": width * c.head_dim * (c.heads + 2 * c.kv_heads),
        "up": width * c.mlp_dim,
        "gate": width * c.mlp_dim,
    }
    if c.remat not in (None, "dots"):
        kept = KEPT.get(c.remat, ())
        work += 2.0 * length * c.depth * sum(x for name, x in again.items() if name not in kept)
        work += 2.0 * length * c.depth * width * c.head_dim * c.heads
    products = work * rows / (0.85 * chip.flops)
    trained, frozen = (
        # 16 bits
        2.0 / mesh.shape["tensor"] * sum(math.prod(x.shape) for x in jax.tree.leaves(state[name]))
        for name in ("params", "frozen")
    )
    # Gathered forward and backward, and gradients summed once, for each part of the batch.
    fsdp = (3 * trained + 2 * frozen) * config.train.accumulate * (1 - 1 / mesh.shape["fsdp"])
    data = 2 * trained / mesh.shape["fsdp"] * config.train.accumulate * (1 - 1 / mesh.shape["data"])
    tensor = 0.0
    if mesh.shape["tensor"] > 1:
        tensor = 4 * c.depth * 2.0 * length * width * rows * mesh.shape["tensor"] * 2
    return products + (fsdp + data + tensor) / chip.link
