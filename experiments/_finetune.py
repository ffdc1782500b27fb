"""What the finetuning experiments share: the model of a checkpoint, and LoRA's adapters for it."""

from ml_collections import ConfigDict

from unifluid_jax import config as configs
from unifluid_jax import inference


def parse(arg: str) -> ConfigDict:
    """The arguments of a finetuning experiment."""
    return configs.parse_arg(
        arg,
        base="runs/quickstart",
        data="easy_vqa",
        split="train",
        test="test",
        rank=8,
        steps=200,
        debug=False,
    )


def start(base: str, rank: int, steps: int, debug: bool) -> ConfigDict:
    """The config of a model to be finetuned: its parts as they are, its training ours.

    Args:
        base: workdir of a run, of `unifluid convert`, or an exported model, also by name.
        rank: of the adapters.

    Raises:
        UserError: there is no model.
    """
    config = ConfigDict(inference.stored_config(base).to_dict())
    config.seed = 0
    config.data_dir = "data_cache"
    config.init_from = base
    # All matrices of the decoder's layers. What reads and draws pictures, and the words, stay as
    # pretraining left them.
    config.lora = ConfigDict(
        {
            "rank": rank,
            "alpha": 2.0 * rank,
            "target": r"backbone/layers/(q|k|v|o|gate|up|down)",
        }
    )
    config.optim = ConfigDict(
        {
            "lr": 5e-3,  # for the quickstart's small model; Gemma's size bears 1e-4 to 5e-4
            "warmup_steps": 5 if debug else 20,
            "decay": "cosine",
            "decay_steps": -1,
            "end_scale": 0.0,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "clip": 1.0,
            "weight_decay": 0.0,
            "mu_dtype": "float32",
            "nu_dtype": "float32",
            # What no rule before ".*" names stays frozen: put (r"head/.*", {}) in front of it to
            # train the diffusion head in full beside the adapters.
            "rules": ((r"lora/.*", {}), (r".*", {"freeze": True})),
        }
    )
    config.train = ConfigDict(
        {
            "steps": 10 if debug else steps,
            "accumulate": 1,
            "ema_decay": 0.98,
            "ema_warmup": True,
            "log_every": 5 if debug else 20,
            "checkpoint_every": 5 if debug else 100,
            "keep": 1,
            "keep_every": 0,
            "keep_best": "",
            "max_skipped": 0,
            "hang_seconds": 600,
            "hang_exit_seconds": 0,
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.evals = ConfigDict()
    return config


def learn(config: ConfigDict, task: str, data: str, split: str) -> None:
    """Sets the one task that is learned, and of which data set."""
    mixture = ({"dataset": data, "split": split, "task": task, "weight": 1.0},)
    config.input.update({"mixture": mixture, "workers": 0, "max_corrupt": 0})
