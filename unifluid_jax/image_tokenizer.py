"""The trained image tokenizer as files.

A KL autoencoder, what its latents look like, and where it came from. A directory holds
`config.json` (architecture, per-channel mean and standard deviation of the latents, provenance) and
`weights.safetensors` (parameters by path, 'encoder/conv_in/kernel', float16 or float32).
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from unifluid_jax import sharding, trees
from unifluid_jax.errors import UserError
from unifluid_jax.models.functional import Functional, Params
from unifluid_jax.models.vae import Vae, VaeConfig

CONFIG, WEIGHTS = "config.json", "weights.safetensors"


@dataclasses.dataclass(frozen=True)
class ImageTokenizer:
    """Pictures to raw posterior moments and raw tokens to pictures.

    Jitted, in chunks of `batch` pictures.

    Raw means as the autoencoder gives them; the model works on `(x - channel_mean) / channel_std`,
    which keeps the diffusion head's input at unit variance whatever autoencoder is used (as
    NextStep-1 does; SD has one scalar, 0.18215, for it).

    Attributes:
        channel_mean, channel_std: [C], over training pictures.
        fingerprint: sha256 of the weights file; latents cached with other weights are refused.
        info: the rest of config.json.
    """

    config: VaeConfig
    params: Params
    channel_mean: Float[np.ndarray, "C"]
    channel_std: Float[np.ndarray, "C"]
    fingerprint: str
    info: dict[str, Any]
    batch: int = 64

    def encode(
        self, images: UInt8[np.ndarray, "B H W 3"]
    ) -> tuple[Float[np.ndarray, "B N C"], Float[np.ndarray, "B N C"]]:
        """Raw posterior mean and standard deviation of every token, raster order.

        Raises:
            UserError: the pictures are not of the size this tokenizer was made for.
        """
        size = self.config.image_size
        if images.shape[1:3] != (size, size):
            raise UserError(
                f"the image tokenizer reads {size} x {size} pictures, "
                f"got {images.shape[1]} x {images.shape[2]}: resize them first"
            )
        return in_chunks(functools.partial(_encode, self.config), self.params, images, self.batch)

    def decode(self, tokens: Float[np.ndarray, "B N C"]) -> UInt8[np.ndarray, "B H W 3"]:
        """Pictures of raw tokens, clipped to the range of pixels."""
        return in_chunks(functools.partial(_decode, self.config), self.params, tokens, self.batch)

    def pictures(
        self, tokens: Float[jax.Array, "B N C"] | Float[np.ndarray, "B N C"]
    ) -> UInt8[np.ndarray, "B H W 3"]:
        """Pictures of the model's tokens, which need not have left the devices."""
        scale = (self.channel_mean, self.channel_std)
        program = functools.partial(_decode_scaled, self.config, scale)
        return in_chunks(program, self.params, tokens, self.batch)

    def placed(self, where: jax.sharding.Sharding) -> "ImageTokenizer":
        """The tokenizer with its parameters there; pictures are spread over the devices of it."""
        return dataclasses.replace(self, params=jax.device_put(self.params, where))


@functools.lru_cache(maxsize=4)
def module(config: VaeConfig) -> Functional:
    """The autoencoder's functional face, one per configuration."""
    return Functional(lambda rngs: Vae(config, rngs=rngs))


@functools.partial(jax.jit, static_argnums=0)
def _encode(config: VaeConfig, params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return module(config).bind(params).encode(to_pixels(images))


@functools.partial(jax.jit, static_argnums=0)
def _decode(config: VaeConfig, params: Params, tokens: jax.Array) -> jax.Array:
    return to_bytes(module(config).bind(params).decode(tokens))


@functools.partial(jax.jit, static_argnums=0)
def _decode_scaled(
    config: VaeConfig, scale: tuple[jax.Array, jax.Array], params: Params, tokens: jax.Array
) -> jax.Array:
    mean, std = scale
    return _decode(config, params, tokens * std[None, None] + mean[None, None])


def to_pixels(images: jax.Array) -> jax.Array:
    """uint8 to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_bytes(pixels: jax.Array) -> jax.Array:
    """Floats in [-1, 1] (clipped) to uint8."""
    return jnp.round((jnp.clip(pixels, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def in_chunks(function: Callable, params: Params, x: np.ndarray | jax.Array, size: int) -> Any:
    """`function` of parameters and some of `x`, over its leading axis in chunks of one size.

    The last one is filled up, a single one to a power of two: few compilations for any number. What
    is on the devices and just one chunk stays there.
    """
    mesh = sharding.mesh_of(params)
    size = sharding.divisible(min(size, 1 << max(len(x) - 1, 0).bit_length()), mesh)
    chunks = [x]
    if len(x) != size:
        x = sharding.fetch(x) if isinstance(x, jax.Array) else x
        padded = np.concatenate([x, np.repeat(x[-1:], -len(x) % size, axis=0)])
        chunks = [padded[i : i + size] for i in range(0, len(padded), size)]
    results = [
        jax.tree.map(sharding.fetch, function(params, sharding.spread(chunk, mesh)))
        for chunk in chunks
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(x)], *results)


def load(path: str | os.PathLike) -> ImageTokenizer:
    """The tokenizer in this directory.

    Raises:
        UserError: no tokenizer there, or its files are damaged or do not belong together.
    """
    path = Path(path)
    try:
        info = json.loads((path / CONFIG).read_text())
        weights = load_file(path / WEIGHTS)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"no image tokenizer at {path}: "
            f"{Path(error.filename or path / WEIGHTS).name} is missing; "
            "train one with experiments/tokenizer_small.py and export it with `unifluid tokenizer`"
        ) from None
    except (SafetensorError, ValueError) as error:  # ValueError: neither JSON nor even text
        raise UserError(
            f"the image tokenizer at {path} is damaged ({error}): fetch or export it anew"
        ) from None
    try:
        config, mean, std = _described(info)
        abstract = jax.eval_shape(module(config).init, jax.random.key(0))
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{path / CONFIG} describes no image tokenizer ({reason}): fetch or export it anew"
        ) from error
    wanted = trees.flatten(abstract)
    for name in sorted(wanted.keys() ^ weights.keys()):
        state = "missing from" if name in wanted else "unknown in"
        raise UserError(
            f"tensor {name} is {state} {path / WEIGHTS}: config and weights do not belong together"
        )
    for name, leaf in wanted.items():
        if weights[name].shape != leaf.shape:
            raise UserError(
                f"tensor {name} of {path / WEIGHTS} has shape {weights[name].shape}, "
                f"the config says {leaf.shape}"
            )
    # Flattened in the tree's own order, so the leaves fit back by position.
    params = jax.tree.unflatten(
        jax.tree.structure(abstract), [weights[name].astype(np.float32) for name in wanted]
    )
    return ImageTokenizer(
        config=config,
        params=jax.device_put(params),
        channel_mean=mean,
        channel_std=std,
        fingerprint=hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest(),
        info=info,
    )


def _described(
    info: dict[str, Any],
) -> tuple[VaeConfig, Float[np.ndarray, "C"], Float[np.ndarray, "C"]]:
    """Architecture, and mean and standard deviation of the channels, from config.json."""
    vae = {**info["vae"]}  # a TypeError where it is no mapping
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in vae.items()}
    # Looked up by name, so that its default cannot stand in for what the file lacks.
    config = VaeConfig(**{**frozen, "multipliers": frozen["multipliers"]})
    mean, std = (np.asarray(info[name], np.float32) for name in ("channel_mean", "channel_std"))
    if not mean.shape == std.shape == (config.token_dim,):
        raise ValueError(
            f"statistics of {mean.size} and {std.size} channels, tokens have {config.token_dim}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise ValueError("statistics of channels that are no numbers, or deviations not above 0")
    return config, mean, std


def save(
    path: str | os.PathLike,
    config: VaeConfig,
    params: Params,
    channel_mean: Float[np.ndarray, "C"],
    channel_std: Float[np.ndarray, "C"],
    info: dict[str, Any],
) -> None:
    """Write a tokenizer directory; weights in float16, which costs less than 0.01 dB."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    flat = trees.flatten(jax.device_get(params))
    save_file({name: leaf.astype(np.float16) for name, leaf in flat.items()}, path / WEIGHTS)
    write_config(path, config, channel_mean.round(6), channel_std.round(6), info)


def write_config(
    path: Path,
    config: VaeConfig,
    channel_mean: Float[np.ndarray, "C"],
    channel_std: Float[np.ndarray, "C"],
    info: dict[str, Any],
) -> None:
    """Writes config.json alone: for weights that are written by other means."""
    record = {
        "vae": dataclasses.asdict(config),
        # The shortest text that is read back as the same float32.
        "channel_mean": [float(str(x)) for x in channel_mean.astype(np.float32)],
        "channel_std": [float(str(x)) for x in channel_std.astype(np.float32)],
        **info,
    }
    (path / CONFIG).write_text(json.dumps(record, indent=2) + "\n")


def psnr(
    a: UInt8[np.ndarray, "B H W 3"], b: UInt8[np.ndarray, "B H W 3"]
) -> Float[np.ndarray, "B"]:
    """Peak signal-to-noise ratio of each picture pair, dB; equal pictures count as 100 dB."""
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean((1, 2, 3))
    return np.minimum(10.0 * np.log10(255.0**2 / np.maximum(error, 1e-12)), 100.0)
