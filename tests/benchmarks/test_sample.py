"""The benchmark of sampling: its baseline is the slow twin it claims to be, its figures add up."""

import copy
import dataclasses

import numpy as np
import pytest

from benchmarks import sample
from tests import worlds
from unifluid_jax import decode_image
from unifluid_jax.decode_image import ImageSampling
from unifluid_jax.diffusion import process_from
from unifluid_jax.input.examples import Example
from unifluid_jax.samplers import sampler_from

FLOW = process_from(process="flow")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    model = worlds.make_model(tmp_path_factory.mktemp("bench"))
    examples = [
        Example("generate", f"{color} {shape}", target=worlds.drawing(color, shape))
        for color, shape in map(worlds.combination, range(5))
    ]
    return sample.Bench(model, examples, batch=2, repeats=2, seed=0)


def test_the_baseline_without_cache_makes_the_same_pictures(bench):
    how = ImageSampling(sampler_from(FLOW, "sde", steps=3), schedule="linear")
    fast, slow = (
        bench._timed(sample.Setting("", how, cache), [3, 0])[0] for cache in (True, False)
    )
    assert np.abs(slow).max() > 0.5
    np.testing.assert_allclose(fast, slow, atol=1e-4)


def test_figures_table_and_plot(bench, tmp_path):
    how = ImageSampling(sampler_from(FLOW, steps=2))
    results = [bench.measure(sample.Setting(name, how)) for name in (sample.BASELINE, "euler 2")]
    for result in results:
        assert result["head_calls"] == 4 * 2 * 2
        assert result["tokens_per_s"] == pytest.approx(4 * result["images_per_s"])
        assert result["images_per_s_1"] > 0 and result["frechet"] > 0
        assert 0 <= result["both"] <= min(result["color"], result["shape"])
    for name in ("color", "shape", "both", "frechet"):
        assert results[0][name] == results[1][name]
    facts = {"workdir": "runs/x", "prompts": 5, "data": "toys/test", "batch": 2, "device": "cpu"}
    page = sample.table(results, facts, "plot.png")
    assert "![speed and quality](plot.png)" in page
    assert "| baseline | 16 |" in page and "| euler 2 | 16 |" in page
    assert "`unifluid benchmark sample --workdir=runs/x --limit=5 --batch=2`" in page
    sample.plot(results, facts, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.parametrize("process", ["ddpm", "flow"])
@pytest.mark.parametrize("learned", [(1,), (1, 1, 2, 4, 8)], ids=str)
def test_settings_begin_with_the_baseline(bench, process, learned):
    parts = bench.model.parts
    sequencer = copy.copy(parts.sequencer)
    sequencer.parallel = learned
    parts = dataclasses.replace(parts, process=process_from(process=process), sequencer=sequencer)
    first, *others = sample.settings(parts)
    assert first.name == sample.BASELINE and not first.cache
    assert first.how.sampler.steps == 100 and first.how.interval == (0, 1)
    assert first.how.parallel == 1 and first.how.last_steps is None
    assert first.how.sampler == others[0].how.sampler
    assert all(setting.cache for setting in others)
    assert len({setting.name for setting in others}) == len(others)
    assert {setting.how.parallel for setting in others} == set(learned)


def test_head_calls_are_counted_at_the_times_of_the_sampler():
    def calls(name, steps, **how):
        how = ImageSampling(sampler_from(FLOW, name, steps=steps), **how)
        return sample.head_calls(decode_image.stages(16, how), how)

    assert calls("sde", 100) == 16 * 200
    assert calls("heun", 5) == 16 * 18
    assert calls("euler", 10, interval=(0.25, 0.75)) == 16 * 15  # at 0.3, 0.4, 0.5, 0.6, 0.7
    assert calls("heun", 2, interval=(0.9, 1.0)) == 16 * 4
    assert calls("euler", 10, guided=0.5) == 16 * 10 + 8 * 10
    assert calls("euler", 10, last_steps=4) == 4 * 2 * (10 + 8 + 6 + 4)
    assert calls("euler", 10, parallel=4) == 16 * 20
