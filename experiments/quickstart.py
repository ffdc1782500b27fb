"""A small UniFluid on easy-vqa and OpenMoji: four tasks in one pretraining run, minutes on a CPU.

    unifluid data build easy_vqa openmoji
    unifluid convert --config=experiments/quickstart.py \\
        --siglip=unifluid_jax/assets/siglip_small --out=runs/quickstart_initial
    unifluid train --config=experiments/quickstart.py --workdir=runs/quickstart
    unifluid evaluate --workdir=runs/quickstart

Every part is the real one, only smaller: Gemma-2 blocks, a SigLIP vision tower, KL-VAE latents as
image tokens, MAR's per-token diffusion head, random order. As in the paper, vision tower and image
tokenizer come pretrained (ours by experiments/siglip_small.py and experiments/tokenizer_small.py,
on the same training splits); unlike there, the decoder does not: it learns its text from nothing.
What else differs, and why, is said at each field.

Expected: 17 minutes on two cores; the README has the scores.

Arguments: `steps`, `order` ("random" or "raster"), `process` ("flow" or "ddpm"; the second is MAR's
and takes about twice the steps to make tokens agree with each other), `parallel` (the most image
tokens that the model learns to draw at once; `unifluid benchmark sample` measures what that is
worth), `debug` (a CPU minute).
"""

from ml_collections import ConfigDict

from unifluid_jax.config import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    arg = parse_arg(arg, steps=3400, order="random", process="flow", parallel=1, debug=False)
    width = 32 if arg.debug else 128
    config = ConfigDict()
    config.task = "unifluid"
    config.seed = 0
    config.data_dir = "data_cache"
    # The pretrained vision tower, and all else fresh: what `unifluid convert` made.
    config.init_from = "" if arg.debug else "runs/quickstart_initial"

    config.tokenizer = ConfigDict({"path": "unifluid_jax/assets/spm_small.model"})
    config.image_tokenizer = ConfigDict({"path": "unifluid_jax/assets/tokenizer_small"})

    config.model = ConfigDict()
    config.model.backbone = ConfigDict(
        {
            "width": width,
            "depth": 2 if arg.debug else 6,
            "mlp_dim": 4 * width,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": width // 4,
            "attention": ("local", "global"),
            "window": 64,
            "post_norm_init": 0.25,
            "scan_layers": False,  # the body of a scan runs on one core of a CPU
            "dtype": "float32",
        }
    )
    config.model.vision = ConfigDict(
        {
            "image_size": 64,
            "patch_size": 8,
            "width": 32 if arg.debug else 128,
            "depth": 1 if arg.debug else 4,
            "heads": 4,
            "mlp_dim": 64 if arg.debug else 512,
            "pool": 2,  # 16 features of a picture are enough here, and a quarter of the length
            "dtype": "float32",
        }
    )
    config.model.head = ConfigDict(
        {"width": 32 if arg.debug else 192, "depth": 3, "dtype": "float32"}
    )
    config.model.position_init = 1.0
    config.model.target_in_head = True
    config.model.bidirectional_prefix = False

    if arg.process == "ddpm":
        config.diffusion = ConfigDict({"process": "ddpm", "learned_variance": False})
    else:
        config.diffusion = ConfigDict({"process": "flow"})

    # lambda: the paper's 0.005 suits a pretrained language model; here text is learned from
    # nothing.
    # latent_noise: the small tokenizer has a wide posterior, a quarter of the latents' deviation;
    # its means are easier to learn, and decode as well.
    config.loss = ConfigDict({"text_weight": 0.3, "draws": 4, "text_chunk": 0, "latent_noise": 0.0})

    config.input = ConfigDict(
        {
            "batch_size": 8,
            "seq_len": 128,
            "max_images": 1,
            "max_text_targets": 24,
            "max_image_targets": 64,
            "max_encoded_images": 0,  # of a row, by the step itself: latents are cached
            "max_prompt_tokens": 20,
            "order": arg.order,
            "parallel": tuple(2**i for i in range(arg.parallel.bit_length())),
            "text_drop": 0.1,
            "source_drop": 0.0,  # 0.05 for guidance by the source of an edit
            "edit_vision": False,  # the latents show all that a recolouring needs, in less length
            "edit_latents": True,
            "streams": 1,
            "workers": 0,
            "max_corrupt": 0,
            "mixture": tuple(
                {"dataset": dataset, "split": "train", "task": task, "weight": weight}
                for dataset, task, weight in (
                    # Reading comes cheaply with a pretrained tower; drawing begins at nothing.
                    ("easy_vqa", "caption", 0.2),
                    ("easy_vqa", "vqa", 0.8),
                    ("easy_vqa", "generate", 3.9),
                    ("easy_vqa", "edit", 0.6),
                    ("openmoji", "caption", 0.1),
                    ("openmoji", "vqa", 0.05),
                    ("openmoji", "generate", 0.6),
                    ("openmoji", "edit", 0.1),
                )
            ),
        }
    )
    config.optim = ConfigDict(
        {
            "lr": 1e-2,  # a small model on a short run bears more than the paper's 1e-4
            "warmup_steps": 10 if arg.debug else 100,
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
            # Muon makes several times as much of few steps as Adam does.
            "rules": (
                (r"vision/.*", {"freeze": not arg.debug}),
                (r"backbone/layers/o", {"muon": (1, 2)}),
                (r"backbone/layers/(q|k|v|gate|up|down)", {"muon": (1,)}),
                (r"head/blocks/mlp_(in|out)/kernel", {"muon": (1,), "decay": 0.0}),
                (
                    r"head/.*|.*(scale|bias|norm|embed|embedding|positions)",
                    {"decay": 0.0, "lr_scale": 0.3},
                ),
                (r".*", {"lr_scale": 0.3}),
            ),
        }
    )
    config.train = ConfigDict(
        {
            "steps": 20 if arg.debug else arg.steps,
            "accumulate": 1,
            "ema_decay": 0.99,
            "ema_warmup": True,
            "log_every": 50,
            "checkpoint_every": 10 if arg.debug else 500,
            "keep": 2,
            "keep_every": 0,
            "keep_best": "",
            "max_skipped": 0,
            "hang_seconds": 600,
            "hang_exit_seconds": 0,
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    config.sampling = ConfigDict(
        {
            "batch_size": 64,
            "seed": 0,
            # Measured on the flow head: less noise makes firmer shapes, much less blank pictures.
            "guidance": 2.5,
            "temperature": 0.5,
            "order": arg.order,
            "schedule": "constant",
            "sampler": {"name": "ddpm", "steps": 50, "clip": 4.0}
            if arg.process == "ddpm"
            else {"name": "euler", "steps": 25},
            "text": {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "max_tokens": 16},
        }
    )

    def score(kind: str, dataset: str, split: str, limit: int, pictures: int, **fields) -> dict:
        return {
            "type": kind,
            "dataset": dataset,
            "split": split,
            "limit": min(limit, 8) if arg.debug else limit,
            "every": 0,
            "pictures": pictures,
            **fields,
        }

    config.evals = ConfigDict(
        {
            "vqa": score("vqa", "easy_vqa", "test", 1000, 12),
            "caption": score("caption", "easy_vqa", "test", 500, 12),
            "generate": score("generate", "easy_vqa", "test", 256, 12, judge=True),
            "edit": score("edit", "easy_vqa", "test", 256, 12, judge=True),
            "compositional": score("generate", "easy_vqa", "compositional", 128, 12, judge=True),
            "emoji": score("generate", "openmoji", "train", 36, 36, judge=False),
            "emoji_edit": score("edit", "openmoji", "train", 18, 18, judge=False),
            "emoji_caption": score("caption", "openmoji", "train", 100, 12),
        }
    )
    return config
