"""LoRA: adapters as a transformation of the tree, and a run that trains nothing else."""

import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests import tiny, worlds
from unifluid_jax import checkpoint, inference, lora, parts, sharding, tasks, train, trees
from unifluid_jax.errors import UserError

TARGET = r"backbone/layers/(q|o|gate)|vision/blocks/(query|attention_out|mlp_in)/kernel"
LORA = {"rank": 2, "alpha": 4.0, "target": TARGET}
RULES = (("lora/.*", {}), (".*", {"freeze": True}))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny.build(folder)
    return folder


def make_config(world, **changes):
    config = tiny.unifluid(world).unlock()
    config.lora = dict(LORA)
    config.optim.rules = RULES
    config.update_from_flattened_dict(changes)
    return config.lock()


@pytest.fixture(scope="module")
def both(world):
    """The parts of a config with adapters, and random parameters of base and adapters."""
    made = parts.assemble(make_config(world))
    return made, worlds.make_params(made.trained)


@pytest.fixture(scope="module")
def fresh(both):
    """Fresh parameters of seed 0."""
    return jax.jit(both[0].trained.init)(jax.random.key(0))


# --- the tree ---


def test_adapters_have_the_sides_of_their_matrices(both):
    made, params = both
    shapes = {name: leaf.shape for name, leaf in trees.flatten(params[lora.BRANCH]).items()}
    assert shapes == {
        "backbone/layers/q/a": (1, 16, 2),
        "backbone/layers/q/b": (1, 2, 4, 4),
        "backbone/layers/o/a": (1, 4, 4, 2),
        "backbone/layers/o/b": (1, 2, 16),
        "backbone/layers/gate/a": (1, 16, 2),
        "backbone/layers/gate/b": (1, 2, 32),
        "vision/blocks/query/kernel/a": (1, 16, 2),
        "vision/blocks/query/kernel/b": (1, 2, 2, 8),
        "vision/blocks/attention_out/kernel/a": (1, 2, 8, 2),
        "vision/blocks/attention_out/kernel/b": (1, 2, 16),
        "vision/blocks/mlp_in/kernel/a": (1, 16, 2),
        "vision/blocks/mlp_in/kernel/b": (1, 2, 32),
    }
    axes = made.trained.axes
    assert axes["lora"]["backbone"]["layers"]["o"] == {
        "a": ("layers", "heads", "head_dim_in", None),
        "b": ("layers", None, "embed_out"),
    }
    assert lora.base(axes) == made.model.axes


def test_every_adapter_has_its_place_on_a_mesh(both):
    made, params = both
    sizes = ConfigDict({"data": 1, "fsdp": 2, "tensor": 2})
    mesh = sharding.make_mesh(sizes, jax.devices()[:4])
    where = trees.flatten(sharding.shardings(made.trained.axes, params, mesh))
    assert where.keys() == trees.flatten(params).keys()
    spec = {name: where[f"lora/backbone/layers/{name}"].spec for name in ("q/a", "q/b", "o/a")}
    assert spec["q/a"] == jax.P(None, "fsdp", None)
    assert spec["q/b"] == jax.P(None, None, "tensor", None)
    assert spec["o/a"] == jax.P(None, "tensor", "fsdp", None)


def test_merged_weights_are_what_the_papers_formula_says(both):
    """Layer by layer, as plain matrices."""
    made, params = both
    merged = trees.flatten(made.trained.merge(params))
    base, adapters = (trees.flatten(tree) for tree in (lora.base(params), params["lora"]))
    assert merged.keys() == base.keys()
    for name, w in base.items():
        expected = np.array(w)
        if f"{name}/a" in adapters:
            a, b = (np.asarray(adapters[f"{name}/{side}"]) for side in "ab")
            for i in range(len(w)):
                low = a[i].reshape(-1, 2) @ b[i].reshape(2, -1)
                expected[i] += 4.0 / 2 * low.reshape(expected[i].shape)
            assert not np.allclose(expected, w), name
        np.testing.assert_allclose(merged[name], expected, atol=1e-5, err_msg=name)


def test_a_fresh_adapter_changes_nothing(both, fresh):
    jax.tree.map(np.testing.assert_array_equal, both[0].merged(fresh), lora.base(fresh))
    for name, leaf in trees.flatten(fresh["lora"]).items():
        if name.endswith("/b"):
            np.testing.assert_array_equal(leaf, 0)
        else:  # A x has about the size of x
            inputs = np.prod(leaf.shape[1:-1])
            assert 0.5 < np.std(leaf) * np.sqrt(inputs) < 1.5, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "backbone/layer/q"}, '"backbone/layer/q" matches no parameter; they are like'),
        ({"target": "backbone/(q"}, r"target \"backbone/\(q\" is no regular expression"),
        ({"target": "backbone/.*"}, r"matches backbone/final_norm/scale \[16\], which is no matri"),
        ({"target": "vision/.*/bias"}, r"target matches vision/.*/bias .*no matrix: leave it out"),
        ({"rank": 0}, "config.lora.rank is 0: set it to 1 or more"),
        ({"alpha": 0.0}, "config.lora.alpha is 0.0: set it above 0"),
    ],
)
def test_a_wrong_config_is_named(world, changes, message):
    changes = {f"lora.{name}": value for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        tasks.make(make_config(world, **changes))


def test_a_misspelt_option_is_named(world):
    config = make_config(world).unlock()
    config.lora.rnak = 3
    with pytest.raises(UserError, match='config.lora has no option "rnak".*"rank"'):
        tasks.make(config)


def test_an_image_tokenizer_takes_no_adapters(world):
    config = tiny.tokenizer(world).unlock()
    config.lora = dict(LORA)
    with pytest.raises(UserError, match="config.lora is for the task"):
        tasks.make(config)


# --- a run ---


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """Four steps of LoRA with a checkpoint after two: workdir, config, last state, the base."""
    runs = tmp_path_factory.mktemp("runs")
    _, base = worlds.save_checkpoint(runs / "base", tiny.unifluid(world))
    config = make_config(
        world,
        **{"init_from": str(runs / "base"), "mesh.data": 1, "mesh.fsdp": -1},
        **{"train.steps": 4, "train.checkpoint_every": 2},
    )
    workdir = runs / "whole"
    return workdir, config, jax.device_get(train.train(config, workdir)), base


def test_only_adapters_are_trained_averaged_and_kept(run):
    workdir, _, state, _ = run
    names = set(trees.flatten(state["frozen"]))
    assert names and not [name for name in names if name.startswith("lora/")]
    for part in ("params", "ema"):
        assert set(state[part]) == {"lora"}
    moments = [n for n in trees.flatten(state["opt_state"]) if "/mu/" in n or "/nu/" in n]
    assert len(moments) == 2 * 12 and all("/lora/" in name for name in moments)
    # B has left zero, and with it A has begun to move.
    for name, leaf in trees.flatten(state["params"]).items():
        assert np.any(leaf), name
    folders = (workdir / "checkpoints").iterdir()
    assert sorted(path.name for path in folders) == ["2", "4", "frozen"]


def test_the_base_stands_still_bit_for_bit(run):
    """What the run began with, the averaged weights of the checkpoint, is what it still has."""
    _, _, state, base = run
    jax.tree.map(np.testing.assert_array_equal, state["frozen"], base)


def test_an_interrupted_run_goes_on_bit_for_bit(run, tmp_path):
    workdir, config, expected, _ = run
    shutil.copytree(workdir, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "4")
    state = jax.device_get(train.train(config, tmp_path / "copy"))
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.parametrize("which", ["ema", "params"])
def test_a_checkpoint_is_read_merged(run, which):
    """What inference reads is a plain model, and computes what the adapted one does."""
    workdir, _, state, _ = run
    model = inference.load(workdir, which)
    whole = jax.device_put({**state["frozen"], **state[which]})
    expected = model.parts.trained.merge(whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), model.params, expected)
    batch = jax.device_put(tiny.batch(model.parts.sequencer.layout, rows=2))
    latents = batch["latent_mean"]
    adapted = model.parts.trained.bind(whole).hidden(batch, latents)
    merged = model.parts.model.bind(model.params).hidden(batch, latents)
    np.testing.assert_allclose(merged, adapted, atol=1e-5)
    untouched = model.parts.model.bind(lora.base(whole)).hidden(batch, latents)
    assert not np.allclose(untouched, adapted, atol=1e-3)


def test_the_adapters_of_another_rank_do_not_fit(run):
    workdir, *_ = run
    wider = checkpoint.stored_config(workdir).unlock()
    wider.lora.rank = 3
    with pytest.raises(UserError, match=r"does not fit: ema/lora/.*/a is .*2\], wanted .*3\]"):
        inference.load(workdir, "ema", config=wider)
