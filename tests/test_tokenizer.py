"""The export of an image tokenizer: what is written is what was trained, or nothing is."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from tests import tiny
from unifluid_jax import checkpoint, evals, image_tokenizer
from unifluid_jax import config as configs
from unifluid_jax import tokenizer as program
from unifluid_jax.errors import UserError
from unifluid_jax.input import pipeline

PICTURES = np.stack([tiny.picture(i) for i in range(6)])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The data, and a run with steps 3 and 6, whose averages differ from their parameters."""
    folder = tmp_path_factory.mktemp("world")
    tiny.build(folder)
    save(folder / "run", tiny.tokenizer(folder, evals={"seen": tiny.score("reconstruction")}))
    return folder


def save(workdir, config):
    with checkpoint.Checkpointer(workdir, keep=2) as checkpoints:
        for step in (3, 6):
            state = {
                "step": jnp.asarray(step),
                "params": tiny.vae_params(1),
                "ema": tiny.vae_params(step),
            }
            checkpoints.save(step, state, {}, {"config": configs.to_json(config)})


def export(workdir, out, **options):
    """Runs the program with these flags."""
    flags.FLAGS.mark_as_parsed()
    vars(program._CONFIG).pop("value", None)
    options = {"step": None, "pictures": 64, "config": None, **options}
    with flagsaver.flagsaver(workdir=str(workdir), out=str(out), **options):
        program.main(["unifluid tokenizer"])


@pytest.fixture(scope="module")
def exported(world):
    export(world / "run", world / "assets" / "exported")
    return image_tokenizer.load(world / "assets" / "exported")


def test_what_was_exported_draws_the_pictures_of_the_checkpoint(world, exported):
    assert exported.config == tiny.VAE
    trained = image_tokenizer.ImageTokenizer(
        tiny.VAE, tiny.vae_params(6), np.zeros(32), np.ones(32), "", {}
    )
    for a, b in zip(exported.encode(PICTURES), trained.encode(PICTURES), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.01, atol=0.01)
    tokens = trained.encode(PICTURES)[0]
    a, b = (t.decode(tokens).astype(int) for t in (exported, trained))
    assert np.abs(a - b).max() <= 1
    assert a.std() > 10, "flat pictures would be alike anyway"


def test_the_weights_are_the_averaged_ones_of_the_latest_step(exported):
    for leaf, latest in zip(
        jax.tree.leaves(exported.params), jax.tree.leaves(tiny.vae_params(6)), strict=True
    ):
        np.testing.assert_array_equal(leaf, latest.astype(np.float16))


def test_the_channels_of_training_pictures_have_mean_0_and_variance_1(world, exported):
    config = checkpoint.stored_config(world / "run")
    batches = pipeline.picture_batches(config)
    images = np.concatenate([next(batches)["images"] for _ in range(8)])
    mean, std = exported.encode(images)
    noise = np.random.default_rng(0).normal(size=(50, *mean.shape))
    drawn = (mean + std * noise - exported.channel_mean) / exported.channel_std
    np.testing.assert_allclose(drawn.mean((0, 1, 2)), 0, atol=0.03)
    np.testing.assert_allclose(drawn.std((0, 1, 2)), 1, atol=0.03)


def test_statistics_are_over_as_many_pictures_as_asked_for(world, exported, monkeypatch):
    seen = []
    tokenizer = image_tokenizer.ImageTokenizer(
        tiny.VAE, tiny.vae_params(6), np.zeros(32), np.ones(32), "", {}
    )
    monkeypatch.setattr(
        image_tokenizer.ImageTokenizer,
        "encode",
        lambda self, images: seen.append(images) or (np.ones((1, 4, 32)), np.ones((1, 4, 32))),
    )
    config = checkpoint.stored_config(world / "run")
    mean, std = program.channel_statistics(tokenizer, config, 17)
    assert len(seen[0]) == 24  # three batches
    np.testing.assert_array_equal(mean, 1)
    np.testing.assert_array_equal(std, 1)


def test_the_files_say_where_they_come_from(world, exported):
    info = exported.info
    assert info["step"] == 6 and info["data"] == ["tiny"]
    c = evals.check(checkpoint.stored_config(world / "run"))["seen"]
    score = evals.run_one(checkpoint.stored_config(world / "run"), exported, c).scores["psnr"]
    assert info["scores"] == {"seen/psnr": round(score, 2)}
    folder = world / "assets"
    assert [path.name for path in folder.iterdir()] == ["exported"], "nothing half-done is left"
    assert json.loads((folder / "exported" / "config.json").read_text()) == info


def test_another_step_can_be_exported(world, exported, capsys):
    export(world / "run", world / "other", step=3)
    assert f"image tokenizer of step 3 in {world / 'other'}" in capsys.readouterr().out
    other = image_tokenizer.load(world / "other")
    assert other.info["step"] == 3
    assert other.fingerprint != exported.fingerprint
    with pytest.raises(UserError, match="no checkpoint of step 4 in .*: it has 3, 6"):
        export(world / "run", world / "none", step=4)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_exists_is_not_overwritten(world, tmp_path, kind):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    else:
        out.write_text("mine")
    with pytest.raises(UserError, match=f"{out} exists already: remove it or take another --out"):
        export(world / "run", out)
    assert list(tmp_path.iterdir()) == [out]
    assert not list(out.iterdir()) if kind == "folder" else out.read_text() == "mine"


def test_a_run_of_another_task_is_refused(world, tmp_path):
    save(tmp_path / "run", tiny.unifluid(world))
    with pytest.raises(UserError, match='run is a run of the task "unifluid", not "tokenizer"'):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_mistakes(world, tmp_path):
    with pytest.raises(UserError, match="--pictures is 0: set it to 1 or more"):
        export(world / "run", tmp_path / "out", pictures=0)
    with pytest.raises(UserError, match="no checkpoint in .*: give the workdir"):
        export(tmp_path / "nowhere", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_export_that_fails_leaves_no_tokenizer_and_can_be_repeated(world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evals, "run_one", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        export(world / "run", out)
    assert not out.exists()
    export(world / "run", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    image_tokenizer.load(out)
