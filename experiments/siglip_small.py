"""A small SigLIP on easy-vqa and OpenMoji: the vision tower that UniFluid starts from.

    unifluid data build easy_vqa openmoji
    unifluid train --config=experiments/siglip_small.py --workdir=runs/siglip_small
    unifluid convert --checkpoint=runs/siglip_small --to=siglip --out=siglip_small

UniFluid reads pictures through a pretrained SigLIP. No package carries one, so this one stands in
for it: SigLIP's loss, SigLIP's towers, only smaller, on pictures and captions of the training
splits alone. The weights are in unifluid_jax/assets/siglip_small.

Expected: 15 minutes on two cores; unifluid_jax/assets/README.md has the scores.

Arguments: `steps`, `debug` (a CPU minute).
"""

from ml_collections import ConfigDict

from unifluid_jax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, steps=1500, debug=False)
    config = ConfigDict()
    config.task = "siglip"
    config.seed = 0
    config.data_dir = "data_cache"
    config.init_from = ""  # a checkpoint or an exported model to start from

    config.tokenizer = ConfigDict({"path": "unifluid_jax/assets/spm_small.model"})
    config.model = ConfigDict()
    config.model.vision = ConfigDict(
        {
            "image_size": 64,
            "patch_size": 8,
            "width": 32 if arg.debug else 128,
            "depth": 1 if arg.debug else 4,
            "heads": 4,
            "mlp_dim": 64 if arg.debug else 512,
            "dtype": "float32",
        }
    )
    config.model.text = ConfigDict(
        {
            "tokens": 16,
            "depth": 1 if arg.debug else 2,
            "heads": 4,
            "mlp_dim": 64 if arg.debug else 512,
        }
    )

    config.input = ConfigDict(
        {
            "batch_size": 8 if arg.debug else 64,
            "image_size": 64,
            "flip": False,  # some emoji are told from others by where they face
            "shift": 6,
            "streams": 1,
            "workers": 0,
            "max_corrupt": 0,
            "mixture": (
                {"dataset": "easy_vqa", "split": "train", "weight": 1.0},
                {"dataset": "openmoji", "split": "train", "weight": 1.0},
            ),
        }
    )
    config.optim = ConfigDict(
        {
            "lr": 4e-3,
            "warmup_steps": 10 if arg.debug else 50,
            "decay": "linear",
            "decay_steps": -1,
            "end_scale": 0.01,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "clip": 1.0,
            "weight_decay": 0.02,
            "mu_dtype": "float32",
            "nu_dtype": "float32",
            "rules": (
                (r"(vision|text)/blocks/attention_out/kernel", {"muon": (1, 2)}),
                (
                    r"(vision|text)/blocks/(query|key|value|mlp_in|mlp_out)/kernel",
                    {"muon": (1,)},
                ),
                (r".*(kernel|out)", {"lr_scale": 0.3}),
                (r".*", {"decay": 0.0, "lr_scale": 0.3}),
            ),
        }
    )
    config.train = ConfigDict(
        {
            "steps": 20 if arg.debug else arg.steps,
            "accumulate": 1,
            "ema_decay": 0.998,
            "ema_warmup": True,
            "log_every": 50,
            "checkpoint_every": 10 if arg.debug else 500,
            "keep": 1,
            "keep_every": 0,
            "keep_best": "",
            "max_skipped": 0,
            "hang_seconds": 600,
            "hang_exit_seconds": 0,
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    shown = {"limit": 32 if arg.debug else 0, "every": 0 if arg.debug else 500, "pictures": 9}
    config.evals = ConfigDict()
    for dataset in ("easy_vqa", "openmoji"):
        config.evals[f"{dataset}_test"] = {
            "type": "match",
            "dataset": dataset,
            "split": "test",
            **shown,
        }
    return config
