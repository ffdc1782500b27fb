import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from unifluid_jax import config, resume
from unifluid_jax.checkpoint import Checkpointer
from unifluid_jax.errors import UserError


def run_config(**changes) -> ConfigDict:
    result = ConfigDict(
        {
            "seed": 0,
            "model": {"width": 8, "layers": 2},
            "train": {"steps": 10, "log_every": 1},
            "evals": {"vqa": {"every": 5}},
            "betas": (0.9, 0.95),
        }
    )
    result.update_from_flattened_dict(changes)
    return result.lock()


def test_the_same_run_may_go_on_for_longer():
    saved = config.to_json(run_config())
    resume.check_same_run(saved, run_config())
    resume.check_same_run(
        saved, run_config(**{"train.steps": 20, "train.log_every": 5, "evals.vqa.every": 1})
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.width": 16}, "another run: model.width was 8, now 16; take another --workdir$"),
        ({"model.width": 16, "seed": 1}, "seed was 0, now 1; model.width was 8, now 16"),
        ({"betas": (0.9, 0.99)}, r"betas was \[0.9, 0.95\], now \[0.9, 0.99\]"),
    ],
)
def test_another_run_is_named_by_its_differences(changes, message):
    with pytest.raises(UserError, match="the workdir holds") as error:
        resume.check_same_run(config.to_json(run_config()), run_config(**changes))
    for part in message.split("; "):
        assert error.match(part)


def test_a_new_field_makes_another_run_too():
    saved = config.to_json(run_config())
    del saved["model"]["layers"]
    with pytest.raises(UserError, match="model.layers was '.absent.', now 2"):
        resume.check_same_run(saved, run_config())


def test_a_workdir_is_claimed_before_its_first_checkpoint(tmp_path):
    for workdir in (tmp_path, tmp_path / "nowhere"):
        resume.check_workdir(workdir, run_config())
    assert not list(tmp_path.iterdir()), "a check leaves nothing"
    resume.claim(tmp_path, run_config())
    resume.check_workdir(tmp_path, run_config())
    resume.check_workdir(str(tmp_path), run_config(**{"train.steps": 20}))
    with pytest.raises(UserError, match="another run: seed was 0, now 1; take another --workdir$"):
        resume.check_workdir(tmp_path, run_config(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert config.load(str(tmp_path / "config.json")).model.width == 8


def test_a_claim_follows_what_may_change(tmp_path):
    resume.claim(tmp_path, run_config())
    resume.claim(tmp_path, run_config(**{"train.steps": 20}))
    assert config.load(str(tmp_path / "config.json")).train.steps == 20


@pytest.mark.parametrize("empty", [False, True])
def test_a_workdir_without_its_config_is_known_by_its_checkpoint(tmp_path, empty):
    if empty:
        (tmp_path / "checkpoints").mkdir()
    else:
        meta = {"config": config.to_json(run_config())}
        with Checkpointer(tmp_path, keep=1) as checkpointer:
            checkpointer.save(1, {"w": jnp.zeros(2)}, {}, meta)
    resume.check_workdir(tmp_path, run_config())
    if empty:
        resume.check_workdir(tmp_path, run_config(seed=1))
    else:
        with pytest.raises(UserError, match="another run: seed was 0, now 1"):
            resume.check_workdir(tmp_path, run_config(seed=1))


@pytest.mark.parametrize("text", ["", '{"seed": 0, "mod', "[]", "3"])
def test_a_damaged_config_of_a_workdir_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json is damaged .*: delete it to go on") as error:
        resume.check_workdir(tmp_path, run_config())
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").unlink()
    resume.check_workdir(tmp_path, run_config())


def test_only_process_0_claims(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    resume.claim(tmp_path, run_config())
    assert not list(tmp_path.iterdir())


def test_a_workdir_in_a_bucket_is_refused():
    with pytest.raises(UserError, match="workdir=gs://bucket/run is in a bucket.*GCS Fuse"):
        resume.folder("gs://bucket/run")
    assert resume.folder("runs/mine") == Path("runs/mine")


def test_a_read_only_workdir_is_refused(tmp_path):
    workdir = tmp_path / "there" / "run"
    workdir.parent.mkdir()
    workdir.parent.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        tmp_path.chmod(0o755)
        for parent in tmp_path.parents[:2]:
            parent.chmod(0o755)
        os.seteuid(65534)  # root may write everywhere
    try:
        with pytest.raises(UserError, match="cannot write to the workdir .*there.* is read-only"):
            resume.check_workdir(workdir, run_config())
    finally:
        os.seteuid(user)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to the workdir .*: .*/file is a file"):
        resume.check_workdir(tmp_path / "file" / "run", run_config())
