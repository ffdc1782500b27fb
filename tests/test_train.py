"""The trainer: the step against slower and simpler twins, whole runs, runs that are cut short."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from unifluid_jax import (
    checkpoint,
    estimate,
    evals,
    planning,
    replay,
    sequence,
    sharding,
    tasks,
    topology,
    train,
    trees,
)
from unifluid_jax import config as configs
from unifluid_jax.errors import Restart, UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data set, latents and image tokenizer. Not to be changed."""
    folder = tmp_path_factory.mktemp("world")
    tiny.build(folder)
    return folder


class Stepper:
    """The train step of a config on some devices, which donates nothing."""

    def __init__(self, config, devices=1, start=None):
        self.task = tasks.make(config)
        self.batch = tiny.batch(self.task._parts.sequencer.layout)
        self.mesh = sharding.make_mesh(config.mesh, jax.devices()[:devices])
        sharding.check_batch(len(self.batch["tokens"]), config.train.accumulate, self.mesh)
        optimizer, abstract = train.describe(config, self.task, self.mesh)
        self.where = jax.tree.map(lambda x: x.sharding, abstract)

        def init(key):
            return train.init(config, self.task, optimizer, key)

        if start is None:
            start = jax.jit(init, out_shardings=self.where)(jax.random.key(config.seed))
        self.start = jax.device_put(jax.device_get(start), self.where)
        described = train.describe_constants(self.task, self.mesh)
        self.constants = sharding.put(self.task.constants, described)
        # A fresh head returns zeros and passes nothing back: from here, all parameters matter.
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32),
            jax.device_get(self.start["params"]),
        )
        moved = {**jax.device_get(self.start), "params": params, "ema": params}
        self.moved = jax.device_put(moved, self.where)
        self._step = jax.jit(
            lambda *arguments: train.train_step(config, self.task, optimizer, *arguments),
            out_shardings=(self.where, sharding.replicated(self.mesh)),
        )

    def __call__(self, steps, batch=None):
        """States and scalars of some steps from `moved`, always on the same batch."""
        batch = sharding.shard_batch(batch or self.batch, self.mesh)
        states, scalars = [self.moved], []
        for _ in range(steps):
            with jax.set_mesh(self.mesh):
                state, found = self._step(states[-1], batch, self.constants)
            states.append(state)
            scalars.append({name: float(x) for name, x in found.items()})
        return states, scalars


@pytest.fixture(scope="module")
def reference(world):
    """One device, float32, the batch in one piece, "ddpm"."""
    return Stepper(tiny.unifluid(world, **{"train.steps": 30, "mesh.data": 1}))


@pytest.fixture(scope="module")
def frozen(world):
    """As `reference`, but "flow", a frozen vision tower, and a warm-up of the average."""
    changes = {
        "train.steps": 30,
        "mesh.data": 1,
        "diffusion": {"process": "flow"},
        "train.ema_warmup": True,
        "optim.rules": (("vision/.*", {"freeze": True}), (".*", {})),
    }
    return Stepper(tiny.unifluid(world, **changes))


# --- one step ---

# step: (loss, loss_text, loss_visual, grad_norm)
GOLDEN = {
    1: (2.463562, 7.332863, 0.996989, 0.666422),
    2: (2.410653, 6.887922, 1.033069, 0.621968),
}


def test_golden_numbers_of_two_steps(reference):
    names = ("loss", "loss_text", "loss_visual", "grad_norm")
    _, scalars = reference(2)
    found = {i: tuple(s[name] for name in names) for i, s in enumerate(scalars, start=1)}
    table = "\n".join(
        f"    {i}: ({', '.join(f'{x:.6f}' for x in row)})," for i, row in found.items()
    )
    np.testing.assert_allclose(
        list(found.values()),
        list(GOLDEN.values()),
        rtol=1e-4,
        err_msg=f"Training computes something else than before. If that is meant, say in the "
        f"commit why, and set in tests/test_train.py\nGOLDEN = {{\n{table}\n}}",
    )


@pytest.mark.parametrize(
    ("sizes", "accumulate"),
    [
        ((1, 1, 1), 4),
        ((2, 2, 2), 2),
        # Every other mesh of all devices.
        ((8, 1, 1), 1),
        ((4, 2, 1), 1),
        ((4, 1, 2), 1),
        ((2, 4, 1), 1),
        ((2, 1, 4), 1),
        ((1, 8, 1), 1),
        ((1, 4, 2), 1),
        ((1, 2, 4), 1),
        ((1, 1, 8), 1),
    ],
)
def test_cut_over_devices_or_in_parts_a_step_is_the_same(world, reference, sizes, accumulate):
    changes = {
        "mesh": dict(zip(sharding.AXES, sizes, strict=True)),
        "train.accumulate": accumulate,
        "train.steps": 30,
    }
    config = tiny.unifluid(world, **changes)
    other = Stepper(config, devices=int(np.prod(sizes)), start=reference.start)
    for kernel in ("params", "ema"):
        place = other.start[kernel]["head"]["cond_in"]["kernel"].sharding
        assert place.num_devices == np.prod(sizes)
        assert place.is_fully_replicated == (sizes[1] * sizes[2] == 1)
    (_, *wanted), scalars = reference(2)
    (_, *states), others = other(2)
    for a, b in zip(scalars, others, strict=True):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=1e-5)
    for a, b in zip(wanted, states, strict=True):
        assert_close(a, b, 1e-5)
    for leaf, place in zip(jax.tree.leaves(states[-1]), jax.tree.leaves(other.where), strict=True):
        assert leaf.sharding == place


def test_muon_cut_over_devices_and_in_parts_is_the_same(world):
    """Its momentum is made orthogonal as a whole matrix, wherever the parts of it lie."""
    rules = (("head/.*kernel", {"muon": (0,)}), (".*", {}))
    changes = {"train.steps": 30, "optim.rules": rules}
    one = Stepper(tiny.unifluid(world, **changes, **{"mesh.data": 1}))
    cut = {"mesh": {"data": 1, "fsdp": 2, "tensor": 2}, "train.accumulate": 2}
    other = Stepper(tiny.unifluid(world, **changes, **cut), devices=4, start=one.start)
    moments = trees.flatten(one.start["opt_state"])
    assert any("head/cond_in/kernel" in name and "/nu/" not in name for name in moments)
    assert not any("head/cond_in/kernel" in name and "/nu/" in name for name in moments)
    (_, *wanted), _ = one(2)
    (_, *states), _ = other(2)
    assert not other.moved["params"]["head"]["cond_in"]["kernel"].sharding.is_fully_replicated
    for a, b in zip(wanted, states, strict=True):
        assert_close(a, b, 1e-4)


ENCODED = {"input.max_encoded_images": 6}


def test_a_step_that_encodes_pictures_is_the_step_on_their_latents(world, reference):
    """Cut over devices and in parts, against latents made on the host beforehand."""
    changes = {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "train.accumulate": 2}
    config = tiny.unifluid(world, **ENCODED, **changes, **{"train.steps": 30})
    other = Stepper(config, devices=8, start=reference.start)
    kernel = other.constants["encoder"]["encoder"]["conv_out"]["kernel"]
    assert kernel.sharding.spec == jax.P(None, None, None, "fsdp")
    batch = next(other.task.batches())
    del batch["example_id"]
    pictures = batch["pictures"]
    assert pictures.shape[:2] == (8, 6)

    parts = other.task._parts
    mean, std = parts.images.encode(pictures.reshape(-1, *pictures.shape[2:]))
    latents = [
        parts.sequencer.scale.normalised(*moments) for moments in zip(mean, std, strict=True)
    ]
    index = np.asarray(sequence.latent_index(batch, parts.vae.image_tokens))
    with_latents = {name: x for name, x in batch.items() if name != "pictures"}
    for name in ("mean", "std"):
        moments = np.stack([getattr(picture, name) for picture in latents])
        moments = moments.reshape(8, -1, parts.vae.token_dim)
        moments = np.take_along_axis(moments, np.maximum(index, 0)[:, :, None], axis=1)
        moments = np.where(index[:, :, None] >= 0, moments, np.float32(0))
        with_latents[f"latent_{name}"] = moments

    (*_, wanted), scalars = reference(2, with_latents)
    (*_, state), others = other(2, batch)
    for a, b in zip(scalars, others, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert_close(wanted, state, 1e-5)
    assert not any("quant_conv" in name for name in trees.flatten(state))


@pytest.mark.parametrize("field", ["latent_mean", "image_weight"])
def test_nothing_of_a_step_that_is_not_finite_stays(reference, field):
    batch = jax.tree.map(np.copy, reference.batch)
    batch[field][np.nonzero(batch["image_weight"])] = np.nan
    (before, after), (scalars,) = reference(1, batch)
    assert scalars["skipped"] == 1 and after["step"] == before["step"] + 1
    for part in ("params", "ema", "opt_state"):
        assert_same(after[part], before[part])
    _, (fine,) = reference(1)
    assert fine["skipped"] == 0


def test_rows_beside_it_do_not_change_a_rows_noise(reference):
    """Only rows 0 to 2 have targets left: what fills the others is nothing to their loss."""
    batch = jax.tree.map(np.copy, reference.batch)
    for name in ("text_weight", "image_weight"):
        batch[name][3:] = 0
    _, (alone,) = reference(1, batch)
    batch["latent_mean"][3:] += 1
    batch["tokens"][3:] += 1
    _, (beside,) = reference(1, batch)
    _, (all_rows,) = reference(1)
    assert alone == beside
    assert alone["loss"] != all_rows["loss"]


def test_every_step_has_noise_of_its_own(reference):
    scalars = []
    batch = sharding.shard_batch(reference.batch, reference.mesh)
    for step in (0, 0, 5):
        place = reference.where["step"]
        state = {**reference.moved, "step": jax.device_put(np.int32(step), place)}
        _, found = reference._step(state, batch, reference.constants)
        scalars.append(float(found["loss_visual"]))
    assert scalars[0] == scalars[1] != scalars[2]


@pytest.mark.parametrize("name", ["reference", "frozen"])
def test_the_loss_of_one_batch_goes_down(request, name):
    _, scalars = request.getfixturevalue(name)(30)
    first, last = scalars[0], {key: np.mean([s[key] for s in scalars[-5:]]) for key in scalars[0]}
    assert last["loss_text"] < 0.25 * first["loss_text"]
    assert last["loss_visual"] < 0.95 * first["loss_visual"]
    assert last["accuracy_text"] > 0.9
    assert all(np.isfinite(list(s.values())).all() for s in scalars)


def test_scalars_and_step(reference):
    states, scalars = reference(3)
    weights = {name: reference.batch[f"{name}_weight"] for name in ("text", "image")}
    for i, found in enumerate(scalars):
        assert states[i + 1]["step"] == i + 1
        assert found["lr"] == pytest.approx((0.005, 0.01, 0.01)[i])
        assert found["loss"] == pytest.approx(found["loss_visual"] + 0.2 * found["loss_text"])
        for name, weight in weights.items():
            assert found[f"{name}_targets"] == np.count_nonzero(weight)


def test_frozen_parameters_stand_still_and_have_no_state(frozen):
    states, _ = frozen(3)
    assert set(states[0]["frozen"]) == {"vision"}
    assert_same(states[0]["frozen"], states[-1]["frozen"])
    before, after = (trees.flatten(states[i]["params"]) for i in (0, -1))
    for name in before:
        assert not np.array_equal(before[name], after[name]), name
    for part in ("params", "ema", "opt_state"):
        assert not [name for name in trees.flatten(states[-1][part]) if "vision/" in name]


def test_frozen_parameters_do_not_count_in_the_gradients_norm(frozen):
    """The norm before clipping, from the first moments: mu = 0.1 * clipped gradient."""
    states, (scalars,) = frozen(1)
    mu = {n: x for n, x in trees.flatten(states[1]["opt_state"]).items() if "/mu/" in n}
    norm = np.sqrt(sum(np.square(x).sum() for x in mu.values())) / 0.1
    assert norm == pytest.approx(min(1.0, scalars["grad_norm"]), rel=1e-4)


@pytest.mark.parametrize(("name", "decays"), [("reference", (0.9, 0.9)), ("frozen", (0.1, 2 / 11))])
def test_the_average_of_the_weights(request, name, decays):
    states, _ = request.getfixturevalue(name)(2)
    expected = jax.device_get(states[0]["params"])
    for decay, state in zip(decays, states[1:], strict=True):
        params = jax.device_get(state["params"])
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected, params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state["ema"], expected
        )


def test_computing_in_bfloat16_keeps_the_state_in_float32(world, reference):
    parts = ("backbone", "vision", "head")
    changes = {f"model.{part}.dtype": "bfloat16" for part in parts}
    config = tiny.unifluid(world, **{**changes, "mesh.data": 1, "train.steps": 30})
    states, low = Stepper(config, start=reference.start)(2)
    for name, leaf in trees.flatten(states[-1]).items():
        assert leaf.dtype == (jnp.int32 if leaf.ndim == 0 else jnp.float32), name
    _, full = reference(2)
    for key in ("loss", "loss_text", "loss_visual", "grad_norm"):
        for a, b in zip(low, full, strict=True):
            assert a[key] == pytest.approx(b[key], rel=0.03), key
        assert low[0][key] != full[0][key], f"{key}: nothing was computed in bfloat16"


# --- whole runs ---


def run(config, workdir, batches=None, interrupt=None):
    """Trains; the last state, the records of metrics.jsonl, and every batch that was drawn.

    Args:
        batches: list to add the batches to.
        interrupt: number of batches before the user stops the run.
    """
    batches = [] if batches is None else batches
    shard = sharding.shard_batch

    def spy(batch, mesh):
        if len(batches) == interrupt:
            raise KeyboardInterrupt
        batches.append({name: rows for name, rows in batch.items() if name != "stop"})
        return shard(batch, mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "shard_batch", spy)
        state = train.train(config, workdir)
    for group in ("params", "ema", "opt_state"):
        largest = max(jax.tree.leaves(state[group]), key=lambda leaf: leaf.size)
        assert largest.sharding.num_devices == 8
        assert largest.sharding.is_fully_replicated == (config.mesh.fsdp == 1), group
    return jax.device_get(state), records(workdir), batches


def records(workdir):
    """The lines of metrics.jsonl, but for speeds and scores."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: x for name, x in line.items() if not name.endswith("/s") and "time/" not in name}
        for line in lines
        if "loss" in line
    ]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    others = trees.flatten(b)
    for name, leaf in trees.flatten(a).items():
        np.testing.assert_array_equal(leaf, others[name], err_msg=name)


def assert_close(a, b, tolerance):
    """Every array of a tree is near that of the same name in another."""
    others = trees.flatten(b)
    for name, leaf in trees.flatten(a).items():
        np.testing.assert_allclose(leaf, others[name], atol=tolerance, rtol=tolerance, err_msg=name)


def saved_iterator(workdir, step):
    return json.loads((workdir / "checkpoints" / str(step) / "iterator" / "metadata").read_text())


MESH = {"data": 1, "fsdp": -1, "tensor": 1}


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """8 steps in one go, with an evaluation on the way: (workdir, state, records, batches)."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    evals = {"quiz": tiny.score("vqa", every=5), "later": tiny.score("vqa", every=0)}
    config = tiny.unifluid(world, evals=evals, mesh=MESH)
    return workdir, *run(config, workdir)


# Step 7 takes for ever: there is time to kill it.
VICTIM = """
import sys, time
from unifluid_jax import __main__, metrics
read, steps = metrics.Meter.read, []
def slow(*args):
    steps.append(1)
    if len(steps) == 7:
        time.sleep(600)
    return read(*args)
metrics.Meter.read = slow
sys.argv[:1] = ["unifluid", "train"]
__main__.main()
"""


def test_a_killed_run_goes_on_bit_for_bit(world, whole, tmp_path):
    """2N steps = N, saved + 2, killed in the third + N."""
    workdir = tmp_path / "killed"
    config = tiny.unifluid(world, mesh=MESH)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(configs.to_json(config)))
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    arguments = [f"--config={file}", f"--workdir={workdir}"]
    process = subprocess.Popen(
        [sys.executable, "-c", VICTIM, *arguments], env=environment, stderr=subprocess.PIPE
    )
    try:
        lines = workdir / "metrics.jsonl"
        while not (lines.exists() and len(lines.read_bytes().splitlines()) == 6):
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.02)
        while not (workdir / "checkpoints" / "4").exists():
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert [line["step"] for line in records(workdir)] == [1, 2, 3, 4, 5, 6]
    assert json.loads((workdir / "config.json").read_text()) == configs.to_json(config)
    assert checkpoint.locate(workdir, None)[1] == 4

    state, resumed, batches = run(config, workdir)
    other, expected, in_one_go, all_batches = whole
    assert_same(state, expected)
    assert resumed == in_one_go
    assert [line["step"] for line in resumed] == list(range(1, 9))
    assert len(batches) == 4
    for a, b in zip(batches, all_batches[4:], strict=True):
        assert_same(a, b)
    assert (all_batches[4]["example_id"] != all_batches[0]["example_id"]).any()
    assert saved_iterator(workdir, 8) == saved_iterator(other, 8)


def test_a_run_is_one_step_after_another(whole, reference):
    """The loop, cut over 8 devices and with an evaluation in it, against a plain one on one."""
    _, expected, lines, batches = whole
    state, source = reference.start, reference.task.batches()
    for batch, line in zip(batches, lines, strict=True):
        assert_same(batch, next(source))
        fields = {name: x for name, x in batch.items() if name != "example_id"}
        placed = sharding.shard_batch(fields, reference.mesh)
        state, scalars = reference._step(state, placed, reference.constants)
        found = {name: float(x) for name, x in scalars.items()}
        assert found == pytest.approx({n: x for n, x in line.items() if n != "step"}, rel=1e-4)
    assert_close(state, expected, 1e-4)


def test_a_run_tells_its_model_flops_and_their_share_of_the_peak(world, tmp_path, monkeypatch):
    monkeypatch.setattr(topology, "peak", lambda kind: 1e12)
    config = tiny.unifluid(world, mesh=MESH, **{"train.steps": 3})
    train.train(config, tmp_path / "run")
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    step = planning.describe(config, jax.devices())
    by_part = estimate.parts(step.plan, step.state["params"])
    work = config.input.batch_size * sum(part.step for part in by_part.values())
    assert last["model_flops/s"] == pytest.approx(work * last["steps/s"])
    assert last["mfu"] == pytest.approx(last["model_flops/s"] / 8e12)


def test_a_run_that_encodes_pictures_needs_no_cache_and_saves_no_encoder(world, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(world, folder)
    shutil.rmtree(folder / "latents")
    config = tiny.unifluid(folder, mesh=MESH, **ENCODED, **{"train.steps": 2})
    state, lines, batches = run(config, tmp_path / "run")
    assert len(lines) == 2 and np.isfinite(lines[1]["loss"])
    assert all("pictures" in batch and "latent_mean" not in batch for batch in batches)
    assert set(state["params"]) == {
        "backbone", "vision", "vision_proj", "latent_in", "content_embed", "target_embed", "head"
    }  # fmt: skip


def test_the_state_after_a_run_is_its_last_checkpoint(whole):
    workdir, state, *_ = whole
    assert int(state["step"]) == checkpoint.locate(workdir, None)[1] == 8
    abstract = jax.eval_shape(lambda: state["ema"])
    assert_same(checkpoint.restore_params(workdir, abstract, "ema"), state["ema"])
    assert_same(checkpoint.restore_params(workdir, abstract, "params"), state["params"])
    assert not np.array_equal(state["ema"]["content_embed"], state["params"]["content_embed"])


def test_an_evaluation_during_training_writes_scores_and_pictures(whole):
    """Every 5 steps and at the end; "every": 0 is for `unifluid evaluate` alone."""
    workdir, *_ = whole
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if "loss" not in line]
    assert [line["step"] for line in scores] == [5, 8]
    for line in scores:
        assert line.keys() == {"step", "quiz/accuracy"}
        assert 0 <= line["quiz/accuracy"] <= 1
    names = sorted(path.name for path in (workdir / "images").iterdir())
    assert names == ["quiz_0000005.png", "quiz_0000008.png"]


def test_a_finished_run_has_nothing_left_to_do(world, whole, tmp_path):
    workdir, expected, lines, _ = whole
    shutil.copytree(workdir, tmp_path / "copy")
    state, after, batches = run(tiny.unifluid(world, mesh=MESH), tmp_path / "copy")
    assert_same(state, expected)
    assert after == lines and not batches


def on_batch(monkeypatch, number, action):
    """Does something to the trainer when the batch of a step is sent to the devices."""
    shard, seen = sharding.shard_batch, []

    def spy(batch, mesh):
        seen.append(1)
        return shard(action(batch) if len(seen) == number else batch, mesh)

    monkeypatch.setattr(sharding, "shard_batch", spy)


def test_sigterm_saves_and_asks_to_be_started_again(world, whole, tmp_path):
    config = tiny.unifluid(world, mesh=MESH)

    def terminate(batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        on_batch(patch, 2, terminate)
        with pytest.raises(Restart, match="SIGTERM has come; step 4 of 8 is saved"):
            train.train(config, tmp_path)
    assert checkpoint.saved_steps(tmp_path) == [4]
    state, resumed, _ = run(config, tmp_path)
    _, expected, in_one_go, _ = whole
    assert_same(state, expected)
    assert resumed == in_one_go
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[-1]["time/goodput"] <= 1
    shares = [x for n, x in lines[-1].items() if n.startswith("time/") and n.count("/") == 1]
    assert sum(shares) - lines[-1]["time/goodput"] - lines[-1]["time/compile_seconds"] == (
        pytest.approx(1)
    )
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 4]
    assert json.loads((tmp_path / "heartbeats" / "0.json").read_text())["phase"] == "end"


def spoil(batch):
    spoiled = dict(batch)
    spoiled["latent_mean"] = np.full_like(batch["latent_mean"], np.nan)
    return spoiled


def test_a_step_that_is_not_finite_is_passed_over_or_ends_the_run(world, tmp_path):
    borne = tiny.unifluid(world, mesh=MESH, **{"train.max_skipped": 1})
    with pytest.MonkeyPatch.context() as patch:
        on_batch(patch, 6, spoil)
        train.train(borne, tmp_path / "borne")
    skipped = [line["skipped"] for line in records(tmp_path / "borne")]
    assert skipped == [0, 0, 0, 0, 0, 1, 0, 0]
    assert records(tmp_path / "borne")[5]["loss"] is None
    workdir = tmp_path / "ended"
    with pytest.MonkeyPatch.context() as patch:
        on_batch(patch, 6, spoil)
        with pytest.raises(UserError, match="loss or gradients of step 6 are not finite.*replay=6"):
            train.train(tiny.unifluid(world, mesh=MESH), workdir)
    assert checkpoint.saved_steps(workdir) == [4]
    config = configs.load(str(workdir / "config.json"))
    # What was spoilt on the way to the devices is fine in the file: spoil it there.
    (file,) = (workdir / "nonfinite").iterdir()
    np.savez(file, **spoil(np.load(file)))
    text = "\n".join(replay.replay(config, workdir, 6))
    assert text.startswith("step 6, 2 after the checkpoint of step 4")
    assert "the input gives another batch today: latent_mean differ" in text
    assert "parameters: all finite" in text and "the batch: not finite\n  latent_mean: " in text
    assert "gradients: not finite\n" in text and "first: invalid value (nan)" in text
    with pytest.raises(UserError, match="no batch of step 5 in .*: it has .6."):
        replay.replay(config, workdir, 5)


def test_a_score_that_a_killed_run_owes_is_made_up_for(world, tmp_path):
    common = {"train.checkpoint_every": 3, "train.steps": 4}
    watched = {"seen": tiny.score("reconstruction", every=2)}
    config = tiny.tokenizer(world, evals=watched, **common)
    with pytest.MonkeyPatch.context() as patch:

        def killed(*arguments):
            raise KeyboardInterrupt

        patch.setattr(evals, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, tmp_path)
    assert checkpoint.saved_steps(tmp_path) == [2], "what is evaluated is saved before"
    train.train(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "seen/psnr" in line] == [2, 4]
    assert checkpoint.saved_steps(tmp_path) == [2, 3, 4]
    train.train(config, tmp_path)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.count("seen/psnr") == 2, "nothing is owed any more"


def test_an_interrupted_tokenizer_goes_on_bit_for_bit(world, tmp_path):
    common = {"train.checkpoint_every": 2, "train.log_every": 2, "train.steps": 4}
    config = tiny.tokenizer(world, **common)
    watched = tiny.tokenizer(world, evals={"seen": tiny.score("reconstruction", every=2)}, **common)
    expected, lines, all_batches = run(watched, tmp_path / "whole")
    batches = []
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "parts", batches, interrupt=2)
    assert checkpoint.locate(tmp_path / "parts", None)[1] == len(batches) == 2
    state, resumed, _ = run(config, tmp_path / "parts", batches)
    assert_same(state, expected)
    assert resumed == lines
    assert [line["step"] for line in lines] == [2, 4]
    for a, b in zip(batches, all_batches, strict=True):
        assert_same(a, b)
    # Scored and shown on the way.
    text = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert text.count('"seen/psnr"') == 2
    names = sorted(path.name for path in (tmp_path / "whole" / "images").iterdir())
    assert names == ["seen_0000002.png", "seen_0000004.png"]
    stored = checkpoint.stored_config(tmp_path / "parts")
    claimed = json.loads((tmp_path / "parts" / "config.json").read_text())
    assert configs.to_json(stored) == claimed == configs.to_json(config)


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "unified"}, 'config.task is "unified" .*"unifluid"'),
        ({"input.batch_size": 12}, "batch_size = 12 does not divide by the 8 replicas"),
        ({"train.accumulate": 2}, "= 8 does not divide by the 8 replicas .*accumulate = 2"),
        ({"mesh.data": 3}, "data=3.* does not fit 8 devices"),
        ({"evals": {"a": tiny.score("vqas")}}, 'config.evals.a is of unknown type "vqas"'),
        ({"evals": {"a": tiny.score("vqa", dataset="x")}}, "data set x is not built"),
        (
            {"evals": {"a": tiny.score("vqa", split="tst")}},
            'tiny has no split "tst" .it has train, test',
        ),
        ({"input.edit_vision": False, "input.edit_latents": False}, "an edit needs a view of its"),
        (
            {
                "input.edit_vision": False,
                "input.edit_latents": False,
                "input.mixture": (
                    {"dataset": "tiny", "split": "train", "task": "vqa", "weight": 1.0},
                ),
                "evals": {"a": tiny.score("edit", judge=False)},
            },
            "an edit needs a view of its",
        ),
        ({"optim.warmup_steps": 9}, "do not fit into a run of 8 steps"),
        ({"optim.rules": (("vision/.*", {}),)}, 'no rule covers "backbone/'),
        ({"input.mixture": ()}, "config.input.mixture is empty"),
        ({"input.seq_len": 16}, "takes up to .*, config.input.seq_len is 16"),
        ({"data_dir": "/nowhere"}, "data set tiny is not built in /nowhere"),
        ({"image_tokenizer.path": "/nowhere"}, "no image tokenizer at /nowhere"),
        ({"train.log_every": 0}, "config.train.log_every is 0: set it to 1 or more"),
        ({"train.checkpoint_every": 0}, "config.train.checkpoint_every is 0: set it to 1 or"),
        ({"train.keep": 0}, "config.train.keep is 0: set it to 1 or"),
        ({"train.keep_best": "vqa/accuracy"}, 'keep_best is "vqa/accuracy": give EVALUATION/SCORE'),
        ({"train.max_skipped": -1}, "config.train.max_skipped is -1: set it to 0 or"),
        ({"input.streams": 3}, "batch_size=8 rows do not divide among config.input.streams=3"),
        ({"train.steps": 0, "optim.warmup_steps": 0}, "config.train.steps is 0: set it to 1 or"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_before_anything_is_written(
    world, tmp_path, changes, message
):
    with pytest.raises(UserError, match=message) as error:
        train.train(tiny.unifluid(world, **changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_missing_latents_are_named_before_anything_is_written(world, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(world, data, ignore=shutil.ignore_patterns("latents"))
    with pytest.raises(UserError, match="no cached latents of tiny .*unifluid data latents"):
        train.train(tiny.unifluid(data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_workdir_of_another_run_is_left_as_it_is(world, whole):
    workdir, *_ = whole
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    for config in (tiny.unifluid(world, seed=1), tiny.tokenizer(world)):
        with pytest.raises(UserError, match="the workdir holds another run: .* take another --w"):
            train.train(config, workdir)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
