"""Decoding of image tokens against plain loops of full passes; what it depends on; its stages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import decoding
from tests.decoding import LAYOUTS, PROMPTS, C, N, entropy, latents, make_params, order
from unifluid_jax import decode, decode_image, sequence
from unifluid_jax.decode_image import Given, ImageSampling, sampling_from, stages
from unifluid_jax.diffusion import process_from
from unifluid_jax.errors import UserError
from unifluid_jax.samplers import guidance_at, guided, sampler_from
from unifluid_jax.sequence import Latents

FLOW = process_from(process="flow")
HOW = ImageSampling(sampler_from(FLOW, steps=3), schedule="linear")
PLAIN = ("causal", "generate")
CASES = [PLAIN, ("bidirectional", "edit")]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
# Tokens at once, and how they grow.
GROUPS = [(1, "constant"), (2, "constant"), (3, "constant"), (2, "cosine")]
groups = pytest.mark.parametrize("parallel, growth", GROUPS, ids=str)

MODEL = decoding.make_model()


@pytest.fixture(scope="module")
def params():
    return make_params(MODEL)


def example(case, row, branch=0, target=None, given=None, groups=()):
    """The prefix of a row in a branch; with `target` [N, C], the whole, or what is given of it."""
    name, task = case
    layout = LAYOUTS[name]
    target = None if target is None else Latents(np.asarray(target), np.zeros((N, C), np.float32))
    if task == "generate":
        made = sequence.generation(layout, PROMPTS[row], target, order(row), given, groups)
    else:
        source = (decoding.picture(row), latents(row))
        made = sequence.editing(layout, *source, PROMPTS[row], target, order(row), given, groups)
    return made if branch == 0 else sequence.dropped(layout, made, source=branch == 2)


def call(
    case, params, rows=(0, 1, 2), guidance=(2.5,), length=24, how=HOW, known=None, counts=None
):
    """The arguments of `images`: `known` [B, N, C], of which `counts` tokens are given."""
    given = None if known is None else Given(np.asarray(known)[list(rows)], np.array(counts))
    branches = [
        [
            example(case, row, branch, *((known[row], count) if given else ()))
            for row, count in zip(rows, counts or [0] * len(rows), strict=True)
        ]
        for branch in range(len(guidance) + 1)
    ]
    arguments = (
        MODEL,
        params,
        decode_image.branched(branches, length),
        np.stack([order(row) for row in rows]),
        entropy()[np.array(rows)],
        guidance,
        0.9,
        given,
    )
    return arguments, {"how": how}


def draw(*args, **kwargs):
    positional, named = call(*args, **kwargs)
    return jax.device_get(decode_image.images(*positional, **named))


@functools.partial(jax.jit, static_argnums=0)
def run_full(model, params, batch):
    return model.bind(params).hidden(batch, batch["latent_mean"])


@functools.partial(jax.jit, static_argnums=(0, 5))
def run_head(model, params, z_G1D, scales, key, sampler):
    head = model.bind(params).head
    return sampler(key, guided(lambda x, t: head(x, t, z_G1D), scales, C), C, 0.9)


def slow_images(case, params, guidance, how=HOW, known=None, counts=(0, 0, 0)):
    """Without cache, padding or batch: full passes over whole images, of which z is taken."""
    bound = MODEL.bind(params)
    pictures = []
    for row, key in enumerate(decode.keys_of(entropy())):
        tokens = np.zeros((N, C), np.float32) if known is None else np.array(known[row])
        for stage in stages(N, how):
            for first in range(stage.first, stage.first + stage.groups * stage.width, stage.width):
                drawn = {}
                for i in range(max(first, counts[row]), first + stage.width):
                    cell, z = order(row)[i], []
                    branches = len(guidance) + 1 if stage.guided else 1
                    for branch in range(branches):
                        whole, at = asked(case, row, branch, tokens, counts[row], how)
                        hidden = run_full(MODEL, params, decode.stack([whole], 40))[:, at + i]
                        z.append(bound.condition(hidden[:, None], jnp.full((1, 1), cell))[:, 0])
                    fraction = (first + stage.width) / N
                    scales = [guidance_at(how.schedule, w, fraction, how.power) for w in guidance]
                    scales = scales[: branches - 1]
                    key_i = jax.random.fold_in(key, i)[None]
                    head = MODEL, params, jnp.stack(z), scales
                    drawn[cell] = run_head(*head, key_i, stage.sampler)[0]
                for cell, x in drawn.items():
                    tokens[cell] = x
        pictures.append(tokens)
    return np.stack(pictures)


def asked(case, row, branch, tokens, count, how):
    """The training sequence of an image whose first `count` tokens came one by one, the others as
    the settings say; and the place that asks for its first token."""
    sizes = sequence.group_sizes(N, how.parallel, how.growth)
    ends = np.cumsum(sizes).tolist()
    groups = [1] * count + [
        min(s, e - count) for s, e in zip(sizes, ends, strict=True) if e > count
    ]
    whole = example(case, row, branch, tokens, groups=groups)
    return whole, np.flatnonzero(whole.image_weight)[0]


@cases
def test_images_equal_a_plain_loop_of_full_passes(params, case):
    fast, slow = draw(case, params), slow_images(case, params, (2.5,))
    assert np.abs(slow).max() > 0.5
    np.testing.assert_allclose(fast, slow, atol=1e-4)


@pytest.mark.parametrize("parallel, growth", GROUPS[1:], ids=str)
def test_several_tokens_a_step_equal_a_plain_loop(params, parallel, growth):
    how = dataclasses.replace(HOW, parallel=parallel, growth=growth, last_steps=2)
    fast, slow = draw(PLAIN, params, how=how), slow_images(PLAIN, params, (2.5,), how)
    np.testing.assert_allclose(fast, slow, atol=1e-4)
    assert np.abs(fast - draw(PLAIN, params)).max() > 0.01


@cases
@groups
def test_given_tokens_are_kept_and_seen(params, case, parallel, growth):
    how = dataclasses.replace(HOW, parallel=parallel, growth=growth)
    known = np.stack([latents(20 + row).mean for row in range(len(PROMPTS))])
    counts = [1, 0, 3]
    fast = draw(case, params, how=how, known=known, counts=counts)
    slow = slow_images(case, params, (2.5,), how, known, counts)
    np.testing.assert_allclose(fast, slow, atol=1e-4)
    for row, count in enumerate(counts):
        kept = order(row)[:count]
        np.testing.assert_array_equal(fast[row, kept], known[row, kept])
        assert (fast[row] != known[row]).any(axis=-1).sum() == N - count
    everything = draw(case, params, how=how, known=known, counts=[N] * 3)
    np.testing.assert_array_equal(everything, known)


@pytest.mark.parametrize(
    "case, guidance", [(PLAIN, (2.5,)), (("causal", "edit"), (2.5, 1.5))], ids=str
)
def test_the_last_tokens_without_guidance_equal_a_plain_loop(params, case, guidance):
    how = dataclasses.replace(HOW, guided=0.5)
    fast = draw(case, params, guidance=guidance, how=how)
    np.testing.assert_allclose(fast, slow_images(case, params, guidance, how), atol=1e-4)
    everywhere = draw(case, params, guidance=guidance)
    for row in range(len(PROMPTS)):
        first, last = np.split(order(row), [N // 2])
        np.testing.assert_allclose(fast[row, first], everywhere[row, first], atol=1e-4)
        assert np.abs(fast[row, last] - everywhere[row, last]).max() > 0.01
    np.testing.assert_allclose(
        draw(case, params, guidance=(), how=how), draw(case, params, guidance=()), atol=1e-6
    )


def test_three_branches_guide_by_text_and_source_apart(params):
    case = ("causal", "edit")
    fast = draw(case, params, guidance=(2.5, 1.5))
    np.testing.assert_allclose(fast, slow_images(case, params, (2.5, 1.5)), atol=1e-4)
    # With both scales 1 it is the first branch alone.
    one = draw(case, params, guidance=(1.0, 1.0))
    np.testing.assert_allclose(one, draw(case, params, guidance=()), atol=1e-4)


@groups
def test_a_step_at_a_time_is_the_same(params, parallel, growth):
    how = dataclasses.replace(HOW, parallel=parallel, growth=growth, guided=0.5)
    known = np.stack([latents(20 + row).mean for row in range(len(PROMPTS))])
    counts = [1, 2, 3]
    positional, named = call(CASES[1], params, how=how, known=known, counts=counts)
    shown = [(np.asarray(x), n) for x, n in decode_image.stream(*positional, **named)]
    whole = draw(CASES[1], params, how=how, known=known, counts=counts)
    np.testing.assert_allclose(shown[-1][0], whole, atol=1e-5)
    np.testing.assert_array_equal((shown[0][0] != 0).any(axis=-1).sum(axis=1), counts)
    ends = np.cumsum(sequence.group_sizes(N, parallel, growth)).tolist()
    assert [n for _, n in shown] == [1, *(end for end in ends if end > 1)]
    for (before, _), (after, count) in zip(shown, shown[1:], strict=False):
        done = (before != 0).any(axis=-1)
        np.testing.assert_array_equal(before[done], after[done])
        assert ((after != 0).any(axis=-1).sum(axis=1) >= count).all()


@pytest.mark.parametrize("case, parallel", [(CASES[1], 1), (PLAIN, 2)], ids=str)
def test_a_picture_does_not_depend_on_the_batch_around_it(params, case, parallel):
    how = dataclasses.replace(HOW, parallel=parallel)
    together = draw(case, params, how=how)
    for row in range(len(PROMPTS)):
        alone = draw(case, params, [row], how=how)
        np.testing.assert_allclose(alone[0], together[row], atol=1e-4)


def test_padding_makes_no_difference(params):
    np.testing.assert_allclose(draw(PLAIN, params, length=7), draw(PLAIN, params), atol=1e-4)


def test_layers_under_scan_give_the_same(params):
    scanned = decoding.make_model(scan_layers=True)
    (_, *positional), named = call(PLAIN, params)
    found = decode_image.images(scanned, *positional, **named)
    np.testing.assert_allclose(draw(PLAIN, params), found, atol=1e-4)


def prefixes(case, rows=(0, 1, 2), branches=2, given=None):
    known = None if given is None else latents(5).mean
    return [[example(case, r, branch, known, given) for r in rows] for branch in range(branches)]


def test_one_row_of_null_text_stands_for_all(params):
    arguments, named = call(PLAIN, params)
    assert len(arguments[2]["segment"]) == 3 + 1
    apart = decode_image.branched(prefixes(PLAIN), 24, share=False)
    assert len(apart["segment"]) == 3 + 3
    found = [
        decode_image.images(*arguments[:2], p, *arguments[3:], **named)
        for p in (arguments[2], apart)
    ]
    np.testing.assert_allclose(*found, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (("bidirectional", "generate"), {}),  # the nulls of a longer prompt are seen
        (("causal", "edit"), {}),  # sources are unlike
        (("causal", "edit"), {"branches": 3}),  # the vision tower's rows are of all branches
        (PLAIN, {"given": 2}),
        (PLAIN, {"rows": (1,)}),
        (PLAIN, {"branches": 1}),
    ],
)
def test_where_rows_are_unlike_each_has_its_own(case, options):
    branches = prefixes(case, **options)
    batch = decode_image.branched(branches, 40)
    assert len(batch["segment"]) == sum(map(len, branches))


def test_guidance_of_one_equals_decoding_without_a_twin(params):
    one, none = (draw(PLAIN, params, guidance=w) for w in ((1.0,), ()))
    np.testing.assert_allclose(one, none, atol=1e-4)


def test_a_row_may_have_its_own_guidance(params):
    mixed = draw(PLAIN, params, guidance=(np.array([2.5, 1.0, 7.0], np.float32),))
    for row, w in enumerate((2.5, 1.0, 7.0)):
        np.testing.assert_allclose(mixed[row], draw(PLAIN, params, guidance=(w,))[row], atol=1e-4)


def test_guidance_entropy_and_schedule_matter(params):
    run = functools.partial(draw, PLAIN, params)
    base = run()
    assert np.abs(run(guidance=(1.0,)) - base).max() > 0.01
    constant = dataclasses.replace(HOW, schedule="constant")
    assert np.abs(run(how=constant) - base).max() > 0.01
    assert np.abs(base[0] - base[1]).max() > 0.01


def test_one_program_serves_all_prompts_entropy_and_settings(params):
    run = functools.partial(draw, PLAIN, params)
    run()
    compiled = decode_image.images._cache_size()
    run(guidance=(7.0,))
    run(rows=[2, 0, 1])
    (*positional, temperature, given), named = call(PLAIN, params)
    decode_image.images(*positional, 0.1, given, **named)
    assert decode_image.images._cache_size() == compiled


def test_outside_the_interval_the_unconditional_branch_is_not_run(params, monkeypatch):
    rows = []
    bound = type(MODEL.bind(params).head)
    plain = bound.__call__

    def counting(self, x, t, z):
        jax.debug.callback(lambda t, n=z.size // z.shape[-1]: rows.append((float(t), n)), t)
        return plain(self, x, t, z)

    monkeypatch.setattr(bound, "__call__", counting)
    sampler = sampler_from(FLOW, steps=5)  # times 1, 0.8, 0.6, 0.4, 0.2
    draw(PLAIN, params, how=ImageSampling(sampler, interval=(0.3, 0.7)))
    jax.effects_barrier()
    assert len(rows) == N * 5
    found = {(round(t), n) for t, n in rows}
    one, both = len(PROMPTS), 2 * len(PROMPTS)
    assert found == {(1000, one), (800, one), (600, both), (400, both), (200, one)}


def test_an_interval_without_a_step_is_no_guidance(params):
    outside = dataclasses.replace(HOW, interval=(0.0, 0.1))  # times 1/3, 2/3, 1
    found, free = draw(PLAIN, params, how=outside), draw(PLAIN, params, guidance=())
    np.testing.assert_allclose(found, free, atol=1e-4)


def test_the_limit_bounds_the_length_of_a_token(params):
    free = draw(PLAIN, params, guidance=(9.0,))
    rms = np.sqrt(np.square(free).mean(axis=-1))
    limit = float(np.median(rms))
    bound = draw(PLAIN, params, guidance=(9.0,), how=dataclasses.replace(HOW, limit=limit))
    assert np.sqrt(np.square(bound).mean(axis=-1)).max() <= limit + 1e-5
    first = [order(row)[0] for row in range(len(PROMPTS))]
    rows = np.arange(len(PROMPTS))
    scale = np.minimum(1, limit / rms[rows, first])[:, None]
    np.testing.assert_allclose(bound[rows, first], free[rows, first] * scale, atol=1e-4)


# --- stages ---


def test_stages_of_disa_take_fewer_steps_as_more_is_known():
    sampler = sampler_from(FLOW, steps=20)
    found = stages(16, ImageSampling(sampler, last_steps=5))
    assert [(s.first, s.groups, s.width, s.sampler.steps) for s in found] == [
        (0, 4, 1, 20), (4, 4, 1, 15), (8, 4, 1, 10), (12, 4, 1, 5)
    ]  # fmt: skip
    (one,) = stages(16, ImageSampling(sampler, parallel=4))
    assert one == (0, 4, 4, 0, True, sampler)
    guided, free = stages(16, ImageSampling(sampler, guided=0.6))
    assert (guided.guided, guided.groups) == (True, 10) and (free.guided, free.first) == (False, 10)
    grown = stages(16, ImageSampling(sampler, parallel=4, growth="cosine"))
    assert [(s.first, s.groups, s.width, s.before) for s in grown] == [
        (0, 1, 1, 0), (1, 1, 4, 1), (5, 1, 5, 4), (10, 1, 6, 5)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"schedule": "square"},
            "no guidance schedule called 'square': choose constant, linear, cosine, power",
        ),
        ({"power": 0.0}, "power is 0.0: set it above 0"),
        ({"power": float("nan")}, "power is nan"),
        ({"interval": (0.5, 0.5)}, r"interval is \(0.5, 0.5\): set two times"),
        ({"interval": (0.1, 1.5)}, "interval is"),
        ({"interval": (float("nan"), 1.0)}, "interval is"),
        ({"interval": (0.1,)}, r"interval is \(0.1,\): set two times"),
        ({"guided": 0.0}, "guided is 0.0: set it above 0 and to at most 1"),
        ({"guided": float("nan")}, "guided is nan"),
        ({"last_steps": 0}, "0 sampling steps: set 1 or more"),
        ({"last_steps": 9}, "last_steps is 9 and the sampler's steps are 3"),
        ({"parallel": 0}, "parallel is 0: draw 1 token or more"),
        ({"parallel": 3}, "parallel=3, and the model has learned to draw at most 2 at once"),
        ({"growth": "square"}, 'growth is "square": set it to constant or cosine'),
        ({"limit": 0.0}, "limit is 0.0: set it above 0"),
        ({"limit": float("nan")}, "limit is nan"),
        ({"sampler": {"name": "ddim", "steps": 3}}, "no sampler called 'ddim'"),
        ({"sampler": {"steps": 0}}, "0 sampling steps"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        sampling_from(FLOW, (1, 2), **{"sampler": {"steps": 3}, **fields})


def test_prefixes_that_do_not_fit_the_branches_are_refused(params):
    (*positional, guidance, temperature, given), named = call(PLAIN, params)
    with pytest.raises(ValueError, match="4 prefixes for 1 branches of 3 pictures"):
        decode_image.images(*positional, (), temperature, given, **named)
