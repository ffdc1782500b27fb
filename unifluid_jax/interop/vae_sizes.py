"""What the files of an autoencoder say of its sizes."""

import json
import math
import re
from pathlib import Path
from typing import Any

from unifluid_jax.errors import UserError
from unifluid_jax.interop import diffusers_vae, ldm_vae
from unifluid_jax.interop.rules import Shape, Table
from unifluid_jax.interop.tensors import Source
from unifluid_jax.models.presets import LATENT_SCALE, VAE


def read(source: Source) -> dict[str, Any]:
    """Fields of a `VaeConfig` that the tensors and a config.json beside them tell.

    `groups` and `patch` are told by no tensor: without a config.json `groups` is 32, as everywhere;
    `patch` is that of the preset with as many latent channels (our choice for SD).

    Raises:
        UserError: the tensors are those of no autoencoder.
    """
    found = max(
        (_found(table, source) for table in (*diffusers_vae.TABLES, *ldm_vae.TABLES)), key=len
    )
    levels: dict[int, Shape] = {}
    blocks, encoder, decoder = 0, set(), set()
    for path, shape in found.items():
        if match := re.fullmatch(r"encoder/down_(\d+)/resnet_(\d+)/conv1/kernel", path):
            levels[int(match[1])] = shape
            blocks = max(blocks, int(match[2]) + 1)
        if match := re.fullmatch(r"(encoder|decoder)/(?:down|up)_(\d+)/attention_0/.*", path):
            (encoder if match[1] == "encoder" else decoder).add(int(match[2]))
    wanted = ("encoder/conv_in/kernel", "post_quant_conv/kernel")
    if not all(name in found for name in wanted) or sorted(levels) != list(range(len(levels))):
        raise UserError(
            f"{source.path} holds no KL autoencoder: it has tensors like "
            f"{next(iter(source.leaves), 'none at all')}"
        )
    channels = found["encoder/conv_in/kernel"][0]
    multipliers = tuple(levels[i][0] // channels for i in range(len(levels)))
    config = _config(source.path)
    latents = found["post_quant_conv/kernel"][0]
    preset = next((p for p in VAE.values() if p["latent_channels"] == latents), {"patch": 1})
    return {
        "channels": channels,
        "multipliers": multipliers,
        "blocks": blocks,
        "encoder_attention": tuple(sorted(encoder)),
        "decoder_attention": tuple(sorted(len(levels) - 1 - i for i in decoder)),
        "latent_channels": latents,
        "groups": config.get("norm_num_groups") or 32,
        "patch": preset["patch"],
    }


def scale_and_shift(source: Source, latent_channels: int) -> tuple[float, float]:
    """What normalises the latents: (x - shift) * scale. From config.json, or as published.

    Raises:
        UserError: neither is known.
    """
    config = _config(source.path)
    published = {VAE[name]["latent_channels"]: scale for name, scale in LATENT_SCALE.items()}
    scale = config.get("scaling_factor") or published.get(latent_channels)
    if not isinstance(scale, int | float) or not (scale > 0 and math.isfinite(scale)):
        raise UserError(
            f"nothing says how latents of {latent_channels} channels are scaled: set --vae_scale"
        )
    return float(scale), float(config.get("shift_factor") or 0.0)


def _found(table: Table, source: Source) -> dict[str, Shape]:
    """Shapes of the foreign tensors, by the path that they would have in our tree."""
    names = {table.canonical(name): leaf.shape for name, leaf in source.leaves.items()}
    levels = 1 + max(
        (int(m[1]) for name in names if (m := re.match(r"decoder\.up\w*\.(\d+)\.", name))),
        default=-1,
    )
    found = {}
    for rule in table.rules:
        pattern = re.compile(
            re.sub(
                r"\\\{(\\?~)?(\w+)\\\}",
                lambda m: f"(?P<{'down_' if m[1] else ''}{m[2]}>\\d+)",
                re.escape(rule.theirs),
            )
        )
        for name, shape in names.items():
            if match := pattern.fullmatch(name):
                numbers = {
                    key.removeprefix("down_"): levels - 1 - int(n) if "down_" in key else int(n)
                    for key, n in match.groupdict().items()
                }
                found[rule.ours.format(**numbers)] = shape
    return found


def _config(path: Path) -> dict[str, Any]:
    """config.json beside the weights, empty when there is none."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): fetch it anew") from None
    return config if isinstance(config, dict) else {}
