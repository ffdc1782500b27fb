"""A training step of ours beside one of PyTorch: the same model, numbers and work, on the CPU.

    python3.11 -m venv .venv-torch
    .venv-torch/bin/pip install torch==2.13.0 transformers==5.24.0 safetensors
    unifluid benchmark against_torch

The model has the quickstart's backbone and diffusion head, MAR's process and no vision tower; rows
are a text and an image, so that nothing is padded or packed on either side. Both sides begin at the
same weights; two steps on the same batch, times and noise must have the same losses and gradient
norms. Then each side runs some steps in turn, with noise of its own; the ratio is the median over
the turns. All of it for batches of several sizes: in large ones a step is little but matrix
products, in small ones what lies between them counts too. Both sides take their memory from glibc:

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 unifluid benchmark against_torch

gives them huge pages, which a large batch gains by.
"""

import json
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from absl import flags
from ml_collections import ConfigDict

from benchmarks import cores
from unifluid_jax import cli, interop, losses, sharding
from unifluid_jax import config as configs
from unifluid_jax.errors import UserError
from unifluid_jax.parts import Parts, assemble
from unifluid_jax.sequence import Layout, Modality
from unifluid_jax.step import describe, donated, init, row_keys, train_step
from unifluid_jax.tasks import UniFluidTask

_PYTHON = flags.DEFINE_string("python", ".venv-torch/bin/python", "A Python that has PyTorch.")
_TURNS = flags.DEFINE_integer("turns", 9, "Turns of each side.")
_STEPS = flags.DEFINE_integer("steps", 10, "Steps of a turn.")
_ROWS = flags.DEFINE_multi_integer("rows", [2, 8, 32], "Rows of a batch; repeat for more.")

TEXT, IMAGE = 15, 16


def config_of(rows: int) -> ConfigDict:
    """The quickstart with MAR's process and AdamW, on short rows without pictures to read."""
    config = configs.load("experiments/quickstart.py:process=ddpm")
    config.init_from = ""
    config.diffusion.learned_variance = True
    config.loss.latent_noise = 1.0
    config.input.batch_size = rows
    config.input.max_images = 0
    config.input.max_text_targets = TEXT - 1
    config.input.max_image_targets = IMAGE
    config.input.seq_len = TEXT + IMAGE
    config.optim.rules = (("vision/.*", {"freeze": True}), (".*", {}))
    config.optim.lr = 1e-3
    config.optim.decay = "none"
    config.optim.warmup_steps = 0
    return config


def main(argv: list[str]) -> None:
    cli.positional(argv)
    console = rich.console.Console(soft_wrap=True, highlight=False)
    table = rich.table.Table(
        *("rows", "examples/s, ours", "PyTorch's", "ratio", "of turns", "losses differ by"),
        box=None,
    )
    apart = 0.0
    with Theirs(_PYTHON.value) as theirs:
        for rows in _ROWS.value:
            measured = measure(rows, theirs, _TURNS.value, _STEPS.value)
            seconds = [statistics.median(side) for side in zip(*measured.turns, strict=True)]
            ratios = sorted(b / a for a, b in measured.turns)
            table.add_row(
                str(rows),
                *(f"{rows / x:.0f}" for x in seconds),
                f"{statistics.median(ratios):.2f}",
                f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                f"{measured.apart:.1e}",
            )
            apart = max(apart, measured.apart)
    console.print(table)
    console.print(
        f"{cores()} CPU cores, jax {jax.__version__}, torch {measured.torch}, Python"
        f" {platform.python_version()}; {TEXT} text and {IMAGE} image tokens a row, 4 draws;"
        f" {_TURNS.value} turns of {_STEPS.value} steps"
    )
    if apart > 1e-4:
        raise UserError(f"the two sides differ by {apart:.1e}: their speeds mean nothing")


class Measured(NamedTuple):
    """Both sides on batches of one size.

    Attributes:
        turns: median seconds of a step, ours and theirs, of every turn.
        apart: largest relative difference of their losses and gradient norms.
        torch: version of theirs.
    """

    turns: list[list[float]]
    apart: float
    torch: str


def measure(rows: int, theirs: "Theirs", turns: int, steps: int) -> Measured:
    """Both sides checked against each other, then timed in turns."""
    parts = assemble(config_of(rows))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sizes.json").write_text(json.dumps(sizes_of(parts, cores())))
        version = theirs("make", folder)["torch"]
        ours = Ours(parts, rows, Path(folder))
        np.savez(Path(folder) / "batch.npz", **ours.numbers())
        theirs("read")
    pairs = zip(ours.check(), theirs("check")["steps"], strict=True)
    apart = max(abs(a - b) / abs(b) for pair in pairs for a, b in zip(*pair, strict=True))
    for side in (ours.time, lambda steps: theirs("time", steps)):
        side(steps)  # caches and thread pools get warm
    found = [
        [statistics.median(x) for x in (ours.time(steps), theirs("time", steps)["seconds"])]
        for _ in range(turns)
    ]
    return Measured(found, apart, version)


def make_batch(layout: Layout, rows: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Rows of random numbers: as the trainer reads them, and as plain tokens and order."""
    count, rng = layout.image_tokens, np.random.default_rng(0)
    shape = (rows, TEXT + count)
    tokens = rng.integers(4, 200, (rows, TEXT + 1)).astype(np.int32)
    order = np.stack([rng.permutation(count) for _ in range(rows)]).astype(np.int32)
    latents = rng.normal(size=(2, rows, count, layout.token_dim)).astype(np.float32)
    mean, std = latents[0], 0.1 * np.abs(latents[1])

    def placed(values: Any, at: slice, fill: float, like: type) -> np.ndarray:
        whole = np.full(shape + np.shape(values)[2:], fill, like)
        whole[:, at] = values
        return whole

    text, asked = slice(0, TEXT - 1), slice(TEXT, None)
    behind = slice(TEXT + 1, None)
    along = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
    batch = {
        "tokens": placed(tokens, slice(0, TEXT + 1), 0, np.int32),
        "modality": placed(np.full((rows, 1), Modality.LATENT), behind, Modality.TEXT, np.int32),
        "position": along,
        "step": along,
        "segment": np.ones(shape, np.int32),
        "text_target": placed(tokens[:, 1:TEXT], text, 0, np.int32),
        "text_weight": placed(np.ones((rows, 1)), text, 0, np.float32),
        "image_weight": placed(np.ones((rows, 1)), asked, 0, np.float32),
        "behind": placed(np.ones((rows, 1)), behind, 0, np.int32),
        "content_position": placed(order[:, :-1], behind, -1, np.int32),
        "target_position": placed(order, asked, -1, np.int32),
        "latent_mean": placed(mean, asked, 0, np.float32),
        "latent_std": placed(std, asked, 0, np.float32),
        "images": np.zeros((rows, 0, 64, 64, 3), np.uint8),
    }
    return batch, {"tokens": tokens, "order": order, "mean": mean, "std": std}


class Ours:
    """Our side: the trainer's own step."""

    def __init__(self, parts: Parts, rows: int, folder: Path):
        config, task = parts.config, UniFluidTask(parts.config, parts)
        self._parts = parts
        mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
        optimizer, _ = describe(config, task, mesh)
        params = jax.device_get(jax.jit(task.model.init)(jax.random.key(config.seed)))
        abstract = jax.eval_shape(lambda: params)
        for part, kind, name in (
            ("backbone", "gemma", "gemma"),
            ("head", "head", "head.safetensors"),
        ):
            params[part] = interop.read_part(kind, folder / name, abstract[part])
        self._params = params
        self._batch, self._plain = make_batch(parts.sequencer.layout, rows)
        start = jax.jit(lambda key, given: init(config, task, optimizer, key, given))
        self._state = start(jax.random.key(config.seed), params)
        self._step = jax.jit(
            lambda state, batch: train_step(config, task, optimizer, state, batch, {}),
            donate_argnums=donated(),
        )
        self._placed = jax.device_put(self._batch)

    def numbers(self) -> dict[str, np.ndarray]:
        """What the other side needs: the batch, this side's first noise, the remaining weights."""
        c, asked = self._parts.config, slice(TEXT, None)
        noise = losses.draw_noise(
            self._parts.process,
            row_keys(c, 0, c.input.batch_size),
            self._batch["latent_mean"].shape[1:],
            c.input.max_image_targets,
            c.loss.draws,
        )
        latents = self._plain["mean"] + self._plain["std"] * noise.latent_BLC[:, asked]
        return jax.device_get(
            {
                **self._plain,
                "latents": latents,
                "t": noise.t_RBN,
                "noise": noise.token_RBNC,
                "latent_kernel": self._params["latent_in"]["kernel"],
                "latent_bias": self._params["latent_in"]["bias"],
                "content_embed": self._params["content_embed"],
                "target_embed": self._params["target_embed"],
            }
        )

    def check(self) -> list[tuple[float, float]]:
        """Losses and gradient norms of two steps with the first step's noise."""
        found = []
        for _ in range(2):
            self._state["step"] = jnp.zeros((), jnp.int32)
            self._state, scalars = self._step(self._state, self._placed)
            found.append((float(scalars["loss"]), float(scalars["grad_norm"])))
        return found

    def time(self, steps: int) -> list[float]:
        """Seconds of each of some steps."""
        seconds = []
        for _ in range(steps):
            begun = time.perf_counter()
            self._state, scalars = self._step(self._state, self._placed)
            jax.block_until_ready(scalars)
            seconds.append(time.perf_counter() - begun)
        return seconds


class Theirs:
    """PyTorch's side, in a process of its own."""

    def __init__(self, python: str):
        try:
            self._process = subprocess.Popen(
                [python, str(Path(__file__).with_name("torch_side.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            raise UserError(
                f"no Python with PyTorch at {python} ({error.strerror}): make one as"
                " benchmarks/against_torch.py says, or name one by --python"
            ) from error

    def __call__(self, *words: Any) -> dict[str, Any]:
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise UserError(
                f"{self._process.args[0]} ended at the command {words[0]}: it needs torch,"
                " transformers and safetensors"
            )
        return json.loads(line)

    def __enter__(self) -> "Theirs":
        return self

    def __exit__(self, *unused: Any) -> None:
        self._process.stdin.close()
        self._process.wait()


def sizes_of(parts: Parts, threads: int) -> dict[str, Any]:
    """What the other side is to build."""
    config, sizes = parts.config, parts.sizes
    c, head = sizes.backbone, sizes.head
    return {
        "gemma": {
            "vocab_size": c.vocab_size,
            "hidden_size": c.width,
            "intermediate_size": c.mlp_dim,
            "num_hidden_layers": c.depth,
            "num_attention_heads": c.heads,
            "num_key_value_heads": c.kv_heads,
            "head_dim": c.head_dim,
            "query_pre_attn_scalar": c.head_dim,
            "sliding_window": c.window,
            "attn_logit_softcapping": c.attention_cap,
            "final_logit_softcapping": c.final_cap,
            "rope_theta": c.rope_base,
        },
        "head": [head.width, head.depth],
        "token_dim": head.token_dim,
        "image_tokens": sizes.image_tokens,
        "threads": threads,
        "lr": config.optim.lr,
        "weight_decay": config.optim.weight_decay,
        "clip": config.optim.clip,
        "text_weight": config.loss.text_weight,
    }


if __name__ == "__main__":
    cli.run(main)
