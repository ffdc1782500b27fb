"""Speed and quality of image sampling.

    pip install -e '.[docs]'
    unifluid benchmark sample --workdir=runs/quickstart

Samplers, steps, DiSA, guidance for some times or some tokens alone, several tokens a step: draws
the same prompts with the same orders and noise under every setting of a list, times it, and judges
the pictures; writes a table, the figures as JSON, and a plot. The baseline is one token at a time,
100 steps of ancestral sampling, guidance everywhere, no cache: every token by a pass over the whole
sequence. For a model that has learned to draw several tokens at once (`config.input.parallel`) the
list goes on with these.

Speeds are those of the compiled program, from prefixes to image tokens, medians over batches;
compilation and the decoding of pixels do not count. Accuracy is that of the exact judge of
easy-vqa's pictures (colour; colour and shape). The Frechet distance is on the mean features of the
model's own vision tower: it compares settings of one model, and is not the FID.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from absl import flags
from jax.typing import ArrayLike
from jaxtyping import Float, UInt8
from matplotlib import ticker

import unifluid_jax
from benchmarks import cores
from unifluid_jax import cli, decode, decode_image, evals, sequence
from unifluid_jax.decode_image import ImageSampling, Stage, sampling_from
from unifluid_jax.diffusion import DDPM
from unifluid_jax.errors import UserError
from unifluid_jax.evals import frechet
from unifluid_jax.evals.judged import agreement
from unifluid_jax.inference import Model
from unifluid_jax.input.examples import Example
from unifluid_jax.input.records import resized
from unifluid_jax.models.functional import Functional, Params
from unifluid_jax.models.unifluid import Batch
from unifluid_jax.parts import Parts
from unifluid_jax.requests import draw_entropy
from unifluid_jax.samplers import guidance_at, guided
from unifluid_jax.sequence import Latents

_WORKDIR = flags.DEFINE_string("workdir", None, "Trained model to measure.", required=True)
_OUT = flags.DEFINE_string("out", "docs/benchmark_sample", "Where to write: .md, .json, .png.")
_DATASET = flags.DEFINE_string("dataset", "easy_vqa", "Data set whose captions are the prompts.")
_SPLIT = flags.DEFINE_string("split", "test", "Its split.")
_LIMIT = flags.DEFINE_integer("limit", 256, "Number of prompts.", lower_bound=2)
_BATCH = flags.DEFINE_integer("batch", 32, "Rows of the large batch, beside which 1 is timed.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls with one row.", lower_bound=1)
_ONLY = flags.DEFINE_multi_string(
    "only", [], "Setting to measure, by name; repeat for more. Default: all."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of orders and noise.", lower_bound=0)

BASELINE = "baseline"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        name: of the row.
        how: the settings of decoding.
        cache: False recomputes the whole sequence for every token.
    """

    name: str
    how: ImageSampling
    cache: bool = True


def settings(parts: Parts) -> list[Setting]:
    """What is measured for a model, the baseline first."""
    process, learned = parts.process, parts.sequencer.parallel
    c = parts.config.sampling
    if isinstance(process, DDPM):
        names, fixed = ("ddpm", "ddim", "dpm"), {"clip": c.sampler.get("clip")}
        grid = [("ddpm", 100), ("ddpm", 25), ("ddim", 25), ("ddim", 10), ("dpm", 10), ("dpm", 6)]
    else:
        names, fixed = ("sde", "euler", "heun"), {}
        grid = [("sde", 100), ("sde", 25), ("euler", 25), ("euler", 10), ("euler", 6), ("heun", 5)]
    slow, fast = names[0], names[1]

    def make(name: str, sampler: str, steps: int, cache: bool = True, **how: Any) -> Setting:
        options = {"name": sampler, "steps": steps, **fixed}
        how = {"schedule": c.schedule, **how}
        return Setting(name, sampling_from(process, learned, options, **how), cache)

    found = [make(BASELINE, slow, 100, cache=False)]
    found += [make(f"{sampler} {steps}", sampler, steps) for sampler, steps in grid]
    # Guidance decides what is drawn: it is for the noisy times, and for the first tokens.
    interval, half, disa = {"interval": (0.3, 1.0)}, {"guided": 0.5}, {"last_steps": 3}
    found += [
        make(f"{fast} 10, interval", fast, 10, **interval),
        make(f"{fast} 10, half guided", fast, 10, **half),
        make(f"{fast} 10, DiSA", fast, 10, **disa),
        make(f"{fast} 10, DiSA, interval, half guided", fast, 10, **disa, **interval, **half),
        make(f"{fast} 6, DiSA, interval", fast, 6, **disa, **interval),
        make(f"{fast} 6, DiSA, interval, half guided", fast, 6, **disa, **interval, **half),
    ]
    few = {"last_steps": 2, **interval}
    found += [
        make(f"{fast} 4, DiSA, interval, half guided", fast, 4, **few, **half),
        make(f"{fast} 4, DiSA, interval, third guided", fast, 4, **few, guided=1 / 3),
    ]
    for k in sorted(set(learned) - {1}):
        cosine = {"parallel": k, "growth": "cosine"}
        all_of_it = {**cosine, **disa, **interval, **half}
        found += [
            make(f"{fast} 25, k={k}", fast, 25, parallel=k),
            make(f"{fast} 25, k={k} cosine", fast, 25, **cosine),
            make(f"{fast} 8, k={k} cosine, DiSA, interval, half guided", fast, 8, **all_of_it),
        ]
    return found


@functools.partial(jax.jit, static_argnums=0, static_argnames="how")
def images_without_cache(
    functional: Functional,
    params: Params,
    whole: Batch,
    order_BN: jax.Array,
    entropy_B2: decode.Entropy,
    guidance: ArrayLike,
    temperature: ArrayLike,
    *,
    how: ImageSampling,
) -> jax.Array:
    """As `decode_image.images` with one scale of guidance, one token at a time and without a cache.

    Args:
        whole: whole sequences, conditional then unconditional, of which the image's latents are not
            looked at.
    """
    model = functional.bind(params).unstacked()
    rows, count = order_BN.shape
    key_B = decode.keys_of(entropy_B2)
    dim = model.config.head.token_dim
    # Places of the positions that predict the image's tokens, in their order.
    place_RN = jnp.argsort(whole["target_position"] < 0, axis=1, stable=True)[:, :count]
    row_R1, row_B1 = jnp.arange(2 * rows)[:, None], jnp.arange(rows)[:, None]

    def step(i: jax.Array, tokens_BNC: jax.Array) -> jax.Array:
        made_BNC = jnp.tile(tokens_BNC[row_B1, order_BN], (2, 1, 1))
        latents_RLC = whole["latent_mean"].at[row_R1, place_RN].set(made_BNC)
        hidden_RLD = model.hidden(whole, latents_RLC)
        cell_B1 = order_BN[:, i][:, None]
        hidden_R1D = hidden_RLD[row_R1, place_RN[:, i][:, None]]
        z_R1D = model.condition(hidden_R1D, jnp.tile(cell_B1, (2, 1)))
        z_GBD = z_R1D.reshape(2, rows, -1)
        scale = guidance_at(how.schedule, guidance, (i + 1) / count, how.power)
        predict = guided(lambda x_1BC, t: model.head(x_1BC, t, z_GBD), (scale,), dim)
        key_i_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, i)
        x_BC = how.sampler(key_i_B, predict, dim, temperature)
        return tokens_BNC.at[row_B1, cell_B1].set(x_BC[:, None])

    return jax.lax.fori_loop(0, count, step, jnp.zeros((rows, count, dim), jnp.float32))


@dataclasses.dataclass
class Bench:
    """A model, its prompts, and what is known of the true pictures."""

    model: Model
    examples: list[Example]
    batch: int
    repeats: int
    seed: int

    def __post_init__(self):
        layout = self.model.parts.sequencer.layout
        rngs = [np.random.default_rng((self.seed, i)) for i in range(len(self.examples))]
        random = self.model.config.sampling.order == "random"
        self._orders = [
            rng.permutation(layout.image_tokens).astype(np.int32)
            if random
            else sequence.raster(layout)
            for rng in rngs
        ]
        self._entropy = [draw_entropy(rng) for rng in rngs]
        self._truths = [example.target for example in self.examples]
        self._true_features = self._features(self._truths)

    def measure(self, setting: Setting) -> dict[str, Any]:
        """Speeds and scores of a setting."""
        alone = [self._timed(setting, [0])[1] for _ in range(self.repeats + 1)][1:]
        rows = list(range(len(self.examples)))
        batches = [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]
        # The last one filled up with rows of the first: one program for all.
        filled = [(part + rows * self.batch)[: self.batch] for part in batches]
        self._timed(setting, filled[0])  # compiles
        drawn, seconds = zip(*(self._timed(setting, part) for part in filled), strict=True)
        tokens = np.concatenate(drawn)[: len(rows)]
        parts = self.model.parts
        pictures = list(parts.images.pictures(tokens))
        speed = self.batch / statistics.median(seconds)
        return {
            "name": setting.name,
            "head_calls": head_calls(
                decode_image.stages(tokens.shape[1], setting.how), setting.how
            ),
            "images_per_s_1": 1 / statistics.median(alone),
            "images_per_s": speed,
            "tokens_per_s": speed * tokens.shape[1],
            **agreement(pictures, self._truths),
            "frechet": frechet.distance(self._features(pictures), self._true_features),
        }

    def _timed(self, setting: Setting, rows: list[int]) -> tuple[Float[np.ndarray, "B N C"], float]:
        """Tokens of some rows, and the seconds that the program took."""
        program, arguments = self._program(setting, rows)
        begun = time.perf_counter()
        tokens = jax.device_get(program(*arguments, how=setting.how))
        return tokens, time.perf_counter() - begun

    def _program(self, setting: Setting, rows: list[int]) -> tuple[Callable, tuple]:
        """What to call, but for `how`."""
        parts, c = self.model.parts, self.model.config.sampling
        length = parts.sequencer.prefix_length("generate")
        if not setting.cache:
            length += parts.sequencer.layout.image_tokens - 1
        branches = [
            [self._sequence(i, dropped, whole=not setting.cache) for i in rows]
            for dropped in (False, True)
        ]
        shared = (
            parts.model,
            self.model.params,
            decode_image.branched(branches, length),
            np.stack([self._orders[i] for i in rows]),
            np.stack([self._entropy[i] for i in rows]),
        )
        if setting.cache:
            return decode_image.images, (*shared, (c.guidance,), c.temperature)
        return images_without_cache, (*shared, c.guidance, c.temperature)

    def _sequence(self, i: int, dropped: bool, whole: bool) -> sequence.Sequence:
        example, order = self.examples[i], self._orders[i]
        sequencer = self.model.parts.sequencer
        layout = sequencer.layout
        if not whole:
            made = sequencer.prefix(example, order)
        else:
            prompt = sequencer.text.encode(example.prompt)
            nothing = np.zeros((layout.image_tokens, layout.token_dim), np.float32)
            made = sequence.generation(layout, prompt, Latents(nothing, nothing), order)
        return sequence.dropped(layout, made) if dropped else made

    def _features(self, pictures: Sequence[UInt8[np.ndarray, "_h _w 3"]]) -> np.ndarray:
        size = self.model.parts.sequencer.image_size
        pixels = np.stack([resized(picture, size) for picture in pictures])
        return jax.device_get(_mean_features(self.model.parts.model, self.model.params, pixels))


@functools.partial(jax.jit, static_argnums=0)
def _mean_features(functional: Functional, params: Params, pixels: jax.Array) -> jax.Array:
    model = functional.bind(params)
    return model.vision(pixels.astype(jnp.float32) / 127.5 - 1.0).mean(axis=1)


def head_calls(stages: Sequence[Stage], how: ImageSampling) -> int:
    """Passes of one token through the head for a picture, both branches of guidance counted."""
    calls = 0
    for stage in stages:
        times = stage.sampler.times
        guided = stage.guided & (how.interval[0] <= times) & (times <= how.interval[1])
        calls += stage.groups * stage.width * int((1 + guided).sum())
    return calls


def table(results: Sequence[dict[str, Any]], facts: dict[str, Any], picture: str) -> str:
    """The figures as a page of Markdown, which shows the picture of this name."""
    lines = [
        "# Image sampling: speed and quality",
        "",
        f"`unifluid benchmark sample --workdir={facts['workdir']} --limit={facts['prompts']}"
        f" --batch={facts['batch']}`",
        "",
        " | ".join(f"{name} {value}" for name, value in facts.items() if name != "workdir"),
        "",
        f"| setting | head calls | images/s, 1 row | images/s, {facts['batch']} rows | times the"
        f" baseline | tokens/s, {facts['batch']} rows | colour | colour and shape | Frechet |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = next((r["images_per_s"] for r in results if r["name"] == BASELINE), None)
    for r in results:
        times = "" if base is None else f"{r['images_per_s'] / base:.1f}"
        lines.append(
            f"| {r['name']} | {r['head_calls']} | {r['images_per_s_1']:.2f} |"
            f" {r['images_per_s']:.2f} | {times} | {r['tokens_per_s']:.0f} |"
            f" {r['color']:.3f} | {r['both']:.3f} | {r['frechet']:.3f} |"
        )
    error = 0.5 / facts["prompts"] ** 0.5
    lines += [
        "",
        f"Standard error of an accuracy: at most {error:.3f}. Head calls: passes of a token through"
        " the diffusion head for one picture, both branches of guidance counted. Frechet: distance"
        " to the true pictures on the mean features of this model's own vision tower, not the FID.",
        "",
        f"![speed and quality]({picture})",
        "",
    ]
    return "\n".join(lines)


def plot(results: Sequence[dict[str, Any]], facts: dict[str, Any], path: Path) -> None:
    """Quality over speed, one point a setting."""
    figure, axes = plt.subplots(1, 2, figsize=(14, 5.5), layout="constrained")
    for ax, (score, title) in zip(
        axes, {"both": "colour and shape right", "frechet": "Frechet distance"}.items(), strict=True
    ):
        for number, r in enumerate(results, start=1):
            mark = "s" if r["name"] == BASELINE else "o"
            ax.plot(r["images_per_s"], r[score], mark, label=f"{number}  {r['name']}")
            place = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 8}
            ax.annotate(str(number), (r["images_per_s"], r[score]), **place)
        ax.set(xscale="log", xlabel=f"images/s, {facts['batch']} rows", ylabel=title)
        ax.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(2, 0.5)))
        ax.grid(alpha=0.3)
    axes[1].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(f"{facts['device']}, {facts['prompts']} prompts of {facts['data']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> None:
    cli.positional(argv)
    model = unifluid_jax.load(_WORKDIR.value)
    if not model.config.input.text_drop:
        raise UserError("the baseline is guided: give a model trained with config.input.text_drop")
    listed = settings(model.parts)
    if unknown := set(_ONLY.value) - {s.name for s in listed}:
        names = "; ".join(s.name for s in listed)
        raise UserError(f'no setting "{min(unknown)}" for this model: there are {names}')
    chosen = evals.generate.Config(
        type="generate",
        dataset=_DATASET.value,
        split=_SPLIT.value,
        limit=_LIMIT.value,
        every=0,
        pictures=0,
        judge=True,
    )
    examples = evals.generate.read(model.config, chosen)
    bench = Bench(model, examples, _BATCH.value, _REPEATS.value, _SEED.value)
    facts = {
        "workdir": _WORKDIR.value,
        "prompts": len(examples),
        "data": f"{_DATASET.value}/{_SPLIT.value}",
        "batch": _BATCH.value,
        "guidance": model.config.sampling.guidance,
        "temperature": model.config.sampling.temperature,
        "seed": _SEED.value,
        "device": f"{jax.devices()[0].device_kind}, {cores()} CPU cores",
        "jax": jax.__version__,
    }
    out = Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for setting in listed:
        if _ONLY.value and setting.name not in _ONLY.value:
            continue
        results.append(bench.measure(setting))
        print(json.dumps(results[-1]), flush=True)
    out.with_suffix(".json").write_text(json.dumps({"facts": facts, "results": results}, indent=1))
    picture = out.with_suffix(".png")
    plot(results, facts, picture)
    out.with_suffix(".md").write_text(table(results, facts, picture.name))


if __name__ == "__main__":
    cli.run(main)
