"""A small UniFluid on easy-vqa and OpenMoji: all four tasks in one pretraining run, minutes on two CPU cores.

    unifluid data build easy_vqa openmoji
    unifluid train --config=experiments/quickstart.py --workdir=runs/quickstart
    unifluid evaluate --workdir=runs/quickstart

Every part is the real one, only smaller: Gemma-2 blocks, a SigLIP-style vision tower, KL-VAE latents as image tokens, MAR's per-token
diffusion head, random order. What differs from the paper, and why, is said at each field.

Arguments: `steps`, `order` ("random" | "raster"), `process` ("ddpm" | "flow"), `debug` (a CPU minute).
"""

from ml_collections import ConfigDict

from unifluid_jax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, steps=2500, order="random", process="ddpm", debug=False)
    width = 32 if arg.debug else 192
    config = ConfigDict()
    config.task = "unifluid"
    config.seed = 0
    config.data_dir = "data_cache"

    config.tokenizer = ConfigDict({"path": "unifluid_jax/assets/spm_small.model"})
    config.image_tokenizer = ConfigDict({"path": "unifluid_jax/assets/tokenizer_small"})

    config.model = ConfigDict()
    config.model.backbone = ConfigDict({
        "width": width,
        "depth": 2 if arg.debug else 6,
        "mlp_dim": 4 * width,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": width // 4,
        "attention": ("local", "global"),
        "window": 64,
        "scan_layers": False,  # the body of a scan runs on one core of a CPU
        "dtype": "float32",
    })
    config.model.vision = ConfigDict({
        "image_size": 64,
        "patch_size": 16,
        "width": 32 if arg.debug else 128,
        "depth": 1 if arg.debug else 2,
        "heads": 4,
        "mlp_dim": 64 if arg.debug else 512,
        "dtype": "float32",
    })
    config.model.head = ConfigDict({
        "width": 32 if arg.debug else 256,
        "depth": 3,
        "dtype": "float32",
    })
    config.model.position_init = 0.02
    config.model.target_in_head = True
    config.model.bidirectional_prefix = False

    if arg.process == "ddpm":
        config.diffusion = ConfigDict({"process": "ddpm", "learned_variance": False})
    else:
        config.diffusion = ConfigDict({"process": "flow"})

    # lambda: the paper's 0.005 suits a pretrained language model; here text is learned from nothing.
    config.loss = ConfigDict({"text_weight": 0.2, "draws": 4})
