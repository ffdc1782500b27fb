"""Cached decoding against full passes, row by row, and against plain Python loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifluid_jax import decode, sequence
from unifluid_jax.decode import TextSampling
from unifluid_jax.diffusion import guidance_at, guided, process_from, sampler_from
from unifluid_jax.models.functional import Functional
from unifluid_jax.models.gemma import GemmaConfig
from unifluid_jax.models.head import HeadConfig
from unifluid_jax.models.siglip import SiglipConfig
from unifluid_jax.models.unifluid import UniFluid, UniFluidConfig
from unifluid_jax.sequence import Latents, Layout

C, N, WIDTH, VOCAB, EOS = 3, 4, 16, 30, 1
# The window is shorter than every sequence; the depth ends with half a period of the pattern.
CONFIG = UniFluidConfig(
    backbone=GemmaConfig(
        vocab_size=VOCAB, width=WIDTH, depth=3, mlp_dim=32, heads=2, kv_heads=1, head_dim=8,
        window=4, scan_layers=False,
    ),
    vision=SiglipConfig(image_size=8, patch_size=4, width=16, depth=1, heads=2, mlp_dim=16),
    head=HeadConfig(token_dim=C, cond_dim=WIDTH, width=16, depth=1, out_dim=C),
    image_tokens=N,
)  # fmt: skip
LAYOUTS = {
    "causal": Layout(
        bos=2, eos=EOS, boi=4, null=5, separator=6, vision_tokens=4, image_tokens=N, token_dim=C
    )
}
LAYOUTS["bidirectional"] = dataclasses.replace(LAYOUTS["causal"], bidirectional_prefix=True)
SAMPLER = sampler_from(process_from(process="flow"), steps=3)
PROMPTS = [[10], [11, 12, 13, 14, 15], [16, 17, 18]]
GREEDY = TextSampling()


@pytest.fixture(scope="module")
def model():
    return Functional(lambda rngs: UniFluid(CONFIG, rngs=rngs))


@pytest.fixture(scope="module")
def scanned():
    config = dataclasses.replace(
        CONFIG, backbone=dataclasses.replace(CONFIG.backbone, scan_layers=True)
    )
    return Functional(lambda rngs: UniFluid(config, rngs=rngs))


@pytest.fixture(scope="module")
def params(model):
    params = jax.jit(model.init)(jax.random.key(0))
    # Off the zero initialisation of the head, so that z matters.
    return jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )


CASES = [(LAYOUTS["causal"], "generate"), (LAYOUTS["bidirectional"], "edit")]
cases = pytest.mark.parametrize("layout, task", CASES, ids=["causal", "bidirectional"])
both_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def latents(seed):
    mean = np.random.default_rng(seed).normal(size=(N, C)).astype(np.float32)
    return Latents(mean, np.zeros_like(mean))


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)


def order(seed):
    return np.random.default_rng(seed).permutation(N).astype(np.int32)


def sequences(layout, task, targets=None, drop=False):
    """One per prompt: prefixes, or whole sequences with `targets` [B, N, C] in raster order."""
    made = []
    for i, prompt in enumerate(PROMPTS):
        prompt = sequence.dropped(layout, prompt) if drop else prompt
        target = None
        if targets is not None:
            target = Latents(np.asarray(targets[i]), np.zeros((N, C), np.float32))
        if task == "generate":
            made.append(sequence.generation(layout, prompt, target, order(i)))
        else:
            made.append(sequence.editing(layout, picture(i), latents(i), prompt, target, order(i)))
    return made


@functools.partial(jax.jit, static_argnums=0)
def run_full(model, params, batch):
    return model.bind(params).hidden(batch, batch["latent_mean"])


def full(model, params, rows):
    """Hidden states of whole sequences by the pass that training uses."""
    return run_full(model, params, decode.stack(rows, 20))


def keys():
    return jax.random.split(jax.random.key(1), len(PROMPTS))


def draw(model, params, layout, task, rows=(0, 1, 2), guidance=2.5, length=20, **settings):
    rows = list(rows)
    prefix, twin = (
        [sequences(layout, task, drop=drop)[row] for row in rows] for drop in (False, True)
    )
    settings = {"sampler": SAMPLER, "schedule": "linear", **settings}
    return jax.device_get(
        decode.images(
            model,
            params,
            decode.stack(prefix, length),
            None if guidance is None else decode.stack(twin, length),
            np.stack([order(row) for row in rows]),
            keys()[np.array(rows)],
            1.0 if guidance is None else guidance,
            0.9,
            **settings,
        )
    )


@cases
def test_the_cache_gives_the_hidden_states_of_the_full_pass(model, params, layout, task):
    targets = np.stack([latents(10 + i).mean for i in range(len(PROMPTS))])
    rows = sequences(layout, task, targets)
    expected = full(model, params, rows)
    starts = [len(row) - N for row in rows]

    @jax.jit
    def run(params, prefix):
        bound = model.bind(params)
        hidden, state = decode.prefill(bound, prefix, N - 1)
        found = [hidden]
        for i in range(N - 1):
            cells = np.stack([order(row) for row in range(len(rows))])
            fed = targets[np.arange(len(rows)), cells[:, i]][:, None]
            x = bound.embed_content(jnp.asarray(fed), jnp.asarray(cells[:, i : i + 1]))
            x += bound.embed_target(jnp.asarray(cells[:, i + 1 : i + 2]))
            hidden, state = decode.feed(bound, x[:, 0], state)
            found.append(hidden)
        return jnp.stack(found, axis=1)

    found = run(params, decode.stack(sequences(layout, task), 20))
    for row, start in enumerate(starts):
        np.testing.assert_allclose(found[row], expected[row, start : start + N], atol=1e-4)


def slow_images(model, params, layout, task, guidance):
    """The image loop without cache, padding or batch: full passes over what is known so far."""
    bound = model.bind(params)
    pictures = []
    for row, key in enumerate(keys()):
        tokens = np.zeros((len(PROMPTS), N, C), np.float32)
        for i, cell in enumerate(order(row)):
            z = []
            for drop in (False, True):
                example = sequences(layout, task, tokens, drop)[row]
                place = len(example) - N + i
                hidden = full(model, params, [example])[:, place : place + 1]
                z.append(bound.condition(hidden, jnp.full((1, 1), cell))[:, 0])
            scale = guidance_at("linear", guidance, (i + 1) / N)
            z = jnp.stack(z)
            predict = guided(lambda x, t, z=z: bound.head(x, t, z), scale, C)
            tokens[row, cell] = SAMPLER(jax.random.fold_in(key, i)[None], predict, C, 0.9)[0]
        pictures.append(tokens[row])
    return np.stack(pictures)


@cases
def test_images_equal_a_plain_loop_of_full_passes(model, params, layout, task):
    fast = draw(model, params, layout, task)
    slow = slow_images(model, params, layout, task, guidance=2.5)
    assert np.abs(slow).max() > 0.5
    np.testing.assert_allclose(fast, slow, atol=1e-4)


@cases
def test_a_picture_does_not_depend_on_the_batch_around_it(model, params, layout, task):
    together = draw(model, params, layout, task)
    for row in range(len(PROMPTS)):
        alone = draw(model, params, layout, task, rows=[row])
        np.testing.assert_allclose(alone[0], together[row], atol=1e-4)


def test_padding_makes_no_difference(model, params):
    short, long = (draw(model, params, LAYOUTS["causal"], "generate", length=n) for n in (7, 13))
    np.testing.assert_allclose(short, long, atol=1e-4)


def test_layers_under_scan_give_the_same(model, scanned, params):
    unrolled, scanned = (draw(m, params, *CASES[0]) for m in (model, scanned))
    np.testing.assert_allclose(unrolled, scanned, atol=1e-4)


def test_guidance_of_one_equals_decoding_without_a_twin(model, params):
    one, none = (draw(model, params, *CASES[0], guidance=w) for w in (1.0, None))
    np.testing.assert_allclose(one, none, atol=1e-4)


def test_guidance_keys_and_schedule_matter(model, params):
    run = functools.partial(draw, model, params, *CASES[0])
    base = run()
    assert np.abs(run(guidance=1.0) - base).max() > 0.01
    assert np.abs(run(schedule="constant") - base).max() > 0.01
    assert np.abs(base[0] - base[1]).max() > 0.01


def test_one_program_serves_all_prompts_keys_and_settings(model, params):
    run = functools.partial(draw, model, params, *CASES[0])
    run()
    compiled = decode.images._cache_size()
    run(guidance=7.0)
    run(rows=[2, 0, 1])
    assert decode.images._cache_size() == compiled


# --- text ---


def questions(layout):
    return [sequence.understanding(layout, picture(i), p, None) for i, p in enumerate(PROMPTS)]


def write(model, params, layout, rows=(0, 1, 2), sampling=GREEDY, length=14, eos=EOS):
    rows = list(rows)
    prefix = decode.stack([questions(layout)[row] for row in rows], length)
    key_B = keys()[np.array(rows)]
    ids = decode.text(model, params, prefix, key_B, sampling, eos=eos, max_tokens=6)
    return jax.device_get(ids)


def slow_text(model, params, layout, eos):
    """Greedy answers by full passes, one row and one token at a time."""
    bound, answers = model.bind(params), []
    for i, prompt in enumerate(PROMPTS):
        answer = []
        while len(answer) < 6 and eos not in answer:
            example = sequence.understanding(layout, picture(i), prompt, answer or None)
            hidden = full(model, params, [example])[0, len(example) - 1]
            answer.append(int(bound.backbone.logits(hidden).argmax()))
        answers.append(answer + [eos] * (6 - len(answer)))
    return np.array(answers)


@both_layouts
def test_greedy_text_equals_a_plain_loop_of_full_passes(model, params, layout):
    free = slow_text(model, params, layout, eos=EOS)
    # A token that ends one row early, and not all of them.
    eos = next(t for t in free[:, 1:5].ravel() if 0 < (free == t).any(1).sum() < len(free))
    slow = slow_text(model, params, layout, eos)
    np.testing.assert_array_equal(write(model, params, layout, eos=int(eos)), slow)


def test_an_answer_does_not_depend_on_the_batch_around_it(model, params):
    layout, sampling = LAYOUTS["causal"], TextSampling(temperature=1.5)
    together = write(model, params, layout, sampling=sampling)
    for row in range(len(PROMPTS)):
        alone = write(model, params, layout, [row], sampling, length=12)
        np.testing.assert_array_equal(alone[0], together[row])


def test_one_program_serves_all_ways_of_sampling(model, params):
    run = functools.partial(write, model, params, LAYOUTS["causal"])
    greedy = run()
    compiled = decode.text._cache_size()
    hot = run(sampling=TextSampling(temperature=3.0, top_k=20, top_p=0.9))
    assert decode.text._cache_size() == compiled
    assert (hot != greedy).any()
    np.testing.assert_array_equal(run(sampling=TextSampling(3.0, top_k=1)), greedy)
    np.testing.assert_array_equal(run(sampling=TextSampling(3.0, top_p=1e-6)), greedy)
    np.testing.assert_array_equal(run(sampling=TextSampling(1e-4)), greedy)


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (TextSampling(1.0), [0.4, 0.3, 0.2, 0.1]),
        (TextSampling(1.0, top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (TextSampling(1.0, top_p=0.69), [4 / 7, 3 / 7, 0, 0]),
        (TextSampling(1.0, top_p=0.71), [4 / 9, 3 / 9, 2 / 9, 0]),
        (TextSampling(1.0, top_k=3, top_p=0.5), [4 / 7, 3 / 7, 0, 0]),
        (TextSampling(0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_asked_for(sampling, kept):
    place = np.array([2, 0, 3, 1])  # where the k-th likeliest token stands
    logits = np.zeros(4, np.float32)
    logits[place] = np.log([0.4, 0.3, 0.2, 0.1])
    key_B = jax.random.split(jax.random.key(0), 4000)
    drawn = decode.choose(jnp.broadcast_to(logits[None], (4000, 4)), key_B, sampling)
    found = np.bincount(drawn, minlength=4)[place] / 4000
    np.testing.assert_allclose(found, kept, atol=0.03)
    assert (found[np.array(kept) == 0] == 0).all()


def test_a_prefix_too_long_for_its_rows_is_refused():
    with pytest.raises(ValueError, match="7 positions for rows of 6"):
        decode.stack(sequences(LAYOUTS["causal"], "generate"), 6)
