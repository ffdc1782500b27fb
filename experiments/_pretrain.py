"""What the pretraining recipes share: the paper's batch at 256 px, laid out on named chips."""

from ml_collections import ConfigDict

from unifluid_jax.errors import UserError, nearest
from unifluid_jax.models.presets import preset

# One example fills a row: 256 image tokens after up to 128 of text, or 256 vision tokens, a
# question and its answer. A multiple of 128, which the attention kernel needs.
LENGTH = 384


def layout_for(topology: str, layouts: dict[str, dict]) -> dict:
    """A recipe's layout for a topology.

    Raises:
        UserError: it has none.
    """
    if topology not in layouts:
        raise UserError(f'no layout for the topology "{topology}"{nearest(topology, layouts)}')
    return layouts[topology]


def pretrain(
    backbone: str,
    head: tuple[int, int],
    vocab_size: int,
    layout: dict,
    tokenizer: str,
    debug: bool,
) -> ConfigDict:
    """The config of a pretraining run.

    Args:
        backbone: a preset of the decoder.
        head: depth and width of the diffusion head.
        vocab_size: of the text tokenizer.
        layout: `mesh`, (data, fsdp, tensor) inside a slice; `slices`; `accumulate`, parts of a
            batch; `remat`, what layers keep.
        tokenizer: file of the text tokenizer.
        debug: a CPU minute on easy-vqa, with every part small.
    """
    depth, width = (1, 32) if debug else head
    config = ConfigDict()
    config.task = "unifluid"
    config.seed = 0
    config.data_dir = "data_cache"
    # What `unifluid convert` made of pretrained parts: the command names it (docs/launch.md).
    config.init_from = ""
    if debug:
        config.tokenizer = ConfigDict({"path": "unifluid_jax/assets/spm_small.model"})
        config.image_tokenizer = ConfigDict({"path": "unifluid_jax/assets/tokenizer_small"})
    else:
        # What is in the two files is said here too, so that the step can be compiled before they
        # are at hand; reading them checks it.
        config.tokenizer = ConfigDict({"path": tokenizer, "vocab_size": vocab_size})
        vae = preset("sd_vae", image_size=256, dtype="bfloat16")
        config.image_tokenizer = ConfigDict({"path": "pretrained/sd_vae", "vae": vae})

    small = {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 4, "kv_heads": 1, "head_dim": 8}
    kept = {"remat": layout["remat"], "scan_layers": not debug, "kernel": "auto"}
    dtype = "float32" if debug else "bfloat16"
    config.model = ConfigDict()
    config.model.backbone = ConfigDict(
        preset(backbone, **(small if debug else {}), **kept, dtype=dtype)
    )
    vision = {"image_size": 64, "patch_size": 16, "width": 32, "depth": 1, "heads": 4}
    config.model.vision = ConfigDict(
        {**vision, "mlp_dim": 64, "dtype": dtype}
        if debug
        else preset("siglip_so400m_14_224", scan_layers=True, dtype=dtype)
    )
    config.model.head = ConfigDict({"depth": depth, "width": width, "dtype": dtype})
    config.model.position_init = 1.0
    config.model.target_in_head = True
    config.model.bidirectional_prefix = False

    # MAR's process and its four draws for each token; the paper's weight of the text.
    config.diffusion = ConfigDict({"process": "ddpm", "learned_variance": False})
    config.loss = ConfigDict(
        {
            "text_weight": 0.005,
            "draws": 4,
            "text_chunk": 0 if debug else 16,
            "latent_noise": 1.0,
        }
    )

    dataset = "easy_vqa" if debug else "pairs"
    config.input = ConfigDict(
        {
            "batch_size": 8 if debug else 2048,
            "seq_len": 128 if debug else LENGTH,
            "max_images": 4 if debug else 1,
            "max_text_targets": 24 if debug else 64,
            "max_image_targets": 48 if debug else 256,
            # 0: latents come from a cache. Else the step encodes so many pictures of a row: 1, or 2
            # with edits.
            "max_encoded_images": 0,
            "max_prompt_tokens": 20 if debug else 126,
            "order": "random",
            "parallel": (1,),  # image tokens asked for at once
            "text_drop": 0.1,
            "source_drop": 0.0,
            "edit_vision": True,
            "edit_latents": True,
            "streams": 1 if debug else 128,  # two v6e-256 are as many hosts
            "workers": 0 if debug else 16,
            "max_corrupt": 0 if debug else 1000,
            "mixture": tuple(
                {"dataset": dataset, "split": "train", "task": task, "weight": weight}
                for task, weight in (("generate", 0.5), ("caption", 0.25), ("vqa", 0.25))
            ),
        }
    )
    config.optim = ConfigDict(
        {
            "lr": 1e-4,
            "warmup_steps": 2 if debug else 5000,
            "decay": "none",
            "decay_steps": -1,
            "end_scale": 0.0,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "clip": 1.0,
            "weight_decay": 0.02,
            "mu_dtype": "float32",
            "nu_dtype": "float32",
            "rules": (
                (r"vision/.*", {"freeze": True}),
                (r"head/.*|.*(scale|bias|norm|_embed|embedding)", {"decay": 0.0}),
                (r".*", {}),
            ),
        }
    )
    config.train = ConfigDict(
        {
            "steps": 20 if debug else 1_000_000,
            "accumulate": 1 if debug else layout["accumulate"],
            "ema_decay": 0.9999,
            "ema_warmup": False,
            "log_every": 10 if debug else 100,
            "checkpoint_every": 10 if debug else 1000,
            "keep": 2,
            "keep_every": 0 if debug else 50_000,
            "keep_best": "",
            "max_skipped": 0 if debug else 100,
            "hang_seconds": 600,
            "hang_exit_seconds": 0 if debug else 1800,
        }
    )
    data, fsdp, tensor = (-1, 1, 1) if debug else layout["mesh"]
    config.mesh = ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})
    # The slow links between slices carry one sum of gradients for each part of a batch.
    slices = 1 if debug else layout.get("slices", 1)
    config.mesh.dcn = ConfigDict({"data": slices, "fsdp": 1, "tensor": 1})

    config.sampling = ConfigDict(
        {
            "batch_size": 8 if debug else 256,
            "seed": 0,
            # Fluid's, for random order and continuous tokens.
            "guidance": 5.0,
            "temperature": 0.975,
            "order": "random",
            "schedule": "linear",
            "sampler": {"name": "ddpm", "steps": 4 if debug else 100},
            "text": {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "max_tokens": 16},
        }
    )
    score = {"dataset": dataset, "limit": 8, "pictures": 8}
    split = "test" if debug else "validation"
    config.evals = ConfigDict(
        {
            "caption": {"type": "caption", **score, "split": split, "every": 0},
            "generate": {"type": "generate", **score, "split": split, "every": 0, "judge": False},
        }
    )
    return config
