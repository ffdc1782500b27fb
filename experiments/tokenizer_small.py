"""The small image tokenizer: a KL autoencoder on easy-vqa and OpenMoji, 64 pixels to 16 tokens.

    unifluid data build --nolatents easy_vqa openmoji
    unifluid train --config=experiments/tokenizer_small.py --workdir=runs/tokenizer_small
    unifluid tokenizer --workdir=runs/tokenizer_small --out=unifluid_jax/assets/tokenizer_small

Stable Diffusion's architecture with smaller widths: three halvings, 8 x 8 latents of 4 channels,
2 x 2 of them in a token of 16 dims, as the paper's 256 pixels give 256 tokens of 16 dims.

Expected: 40 minutes on two cores; unifluid_jax/assets/README.md has the PSNR on held-out pictures.

Arguments: `steps`, `debug` (a CPU minute).
"""

from ml_collections import ConfigDict

from unifluid_jax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, steps=3000, debug=False)
    config = ConfigDict()
    config.task = "tokenizer"
    config.seed = 0
    config.data_dir = "data_cache"
    config.init_from = ""  # a checkpoint or an exported model to start from

    config.model = ConfigDict(
        {
            "image_size": 64,
            "channels": 8 if arg.debug else 16,
            "multipliers": (1, 2, 4, 4),
            "blocks": 1,
            "latent_channels": 4,
            "groups": 8,
            "patch": 2,
            "dtype": "float32",
        }
    )
    # Nats per pixel value: enough to keep the latents' scale, and room between them, in check.
    config.loss = ConfigDict({"kl_weight": 0.2})

    config.input = ConfigDict(
        {
            "batch_size": 8 if arg.debug else 16,
            "image_size": 64,
            "flip": True,
            "shift": 4,
            "streams": 1,
            "workers": 0,
            "max_corrupt": 0,
            # Emoji are the harder pictures, and the more varied ones.
            "mixture": (
                {"dataset": "easy_vqa", "split": "train", "weight": 1.0},
                {"dataset": "openmoji", "split": "train", "weight": 2.0},
            ),
        }
    )
    config.optim = ConfigDict(
        {
            "lr": 1.5e-3,
            "warmup_steps": 10 if arg.debug else 100,
            "decay": "linear",
            "decay_steps": -1,
            "end_scale": 0.02,
            "b1": 0.9,
            "b2": 0.99,
            "eps": 1e-8,
            "clip": 1.0,
            "weight_decay": 0.0,
            "mu_dtype": "float32",
            "nu_dtype": "float32",
            "rules": ((".*", {}),),
        }
    )
    config.train = ConfigDict(
        {
            "steps": 20 if arg.debug else arg.steps,
            "accumulate": 1,
            "ema_decay": 0.999,
            "ema_warmup": True,
            "log_every": 50,
            "checkpoint_every": 10 if arg.debug else 400,
            "keep": 1,
            "keep_every": 0,
            "keep_best": "",
            "max_skipped": 0,
            "hang_seconds": 600,
            "hang_exit_seconds": 0,
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    shown = {"limit": 32 if arg.debug else 0, "every": 0 if arg.debug else 2000, "pictures": 9}
    config.evals = ConfigDict()
    for dataset in ("easy_vqa", "openmoji"):
        config.evals[f"{dataset}_test"] = {
            "type": "reconstruction",
            "dataset": dataset,
            "split": "test",
            **shown,
        }
    return config
