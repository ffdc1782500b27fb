"""A model as a folder of its own: what is written, what is read back, what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import unifluid_jax
from tests import worlds
from unifluid_jax import config as configs
from unifluid_jax import inference, pretrained
from unifluid_jax.errors import UserError
from unifluid_jax.parts import assemble


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A config, its parameters, and the folder "model" with both in it."""
    folder = tmp_path_factory.mktemp("world")
    config = worlds.make_config(folder)
    params = worlds.make_params(assemble(config).model)
    about = {"step": 7, "weights": "ema"}
    pretrained.save(folder / "model", config, params, dtype="float32", about=about, card="# Card\n")
    return folder, config, params


@pytest.fixture
def copy(world, tmp_path):
    """A folder that may be damaged."""
    return shutil.copytree(world[0] / "model", tmp_path / "copy")


def test_what_was_saved_is_loaded(world):
    folder, config, params = world
    model = unifluid_jax.load(folder / "model")
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    assert model.origin == inference.Origin(str(folder / "model"), 7, "ema")
    stored = configs.to_json(config)
    read = configs.to_json(model.config)
    inside = folder / "model"
    assert read.pop("tokenizer") == {"path": str(inside / "tokenizer.model")}
    assert read.pop("image_tokenizer") == {"path": str(inside / "image_tokenizer")}
    assert read == {k: v for k, v in stored.items() if k not in ("tokenizer", "image_tokenizer")}
    assert model.parts.images.fingerprint == assemble(config).images.fingerprint


def test_a_folder_needs_nothing_outside_of_it(world, tmp_path):
    folder, config, params = world
    moved = shutil.copytree(folder / "model", tmp_path / "moved")
    written = json.loads((moved / "config.json").read_text())
    assert written["format"] == "unifluid"
    assert written["config"]["tokenizer"]["path"] == "tokenizer.model"
    assert written["config"]["image_tokenizer"]["path"] == "image_tokenizer"
    assert str(moved) in pretrained.read_config(moved).image_tokenizer.path
    assert sorted(path.name for path in moved.iterdir()) == [
        "README.md", "config.json", "image_tokenizer", "model.safetensors", "tokenizer.model"
    ]  # fmt: skip


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 10), ("bfloat16", 7)])
def test_weights_are_kept_in_half_the_size_and_used_in_full_precision(world, tmp_path, dtype, bits):
    _, config, params = world
    pretrained.save(tmp_path / "half", config, params, dtype=dtype, about={}, card="")
    abstract = jax.eval_shape(assemble(config).model.init, jax.random.key(0))
    read = pretrained.read_params(tmp_path / "half", abstract)

    def check(found, wanted):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=2.0**-bits, atol=1e-7)

    jax.tree.map(check, read, params)
    sizes = [(folder / "model.safetensors").stat().st_size
             for folder in (tmp_path / "half", world[0] / "model")]  # fmt: skip
    assert sizes[0] < 0.7 * sizes[1]
    assert pretrained.read_about(tmp_path / "half") == {"dtype": dtype}


def test_shipped_models_are_known_by_name(world, monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "_ASSETS", tmp_path)
    shutil.copytree(world[0] / "model", tmp_path / "unifluid-tiny")
    (tmp_path / "tokenizer_small").mkdir()
    assert pretrained.names() == ["unifluid-tiny"]
    assert pretrained.find("unifluid-tiny") == tmp_path / "unifluid-tiny"
    assert inference.origin("unifluid-tiny").step == 7
    with pytest.raises(UserError, match='"unifluid-tinny": no such folder.*mean "unifluid-tiny"'):
        unifluid_jax.load("unifluid-tinny")
    # A folder of this name goes first, and one without weights is taken for a run.
    monkeypatch.chdir(world[0])
    (tmp_path / "run").mkdir()
    assert pretrained.find(tmp_path / "run") is None
    assert str(pretrained.find("model")) == "model"


def test_other_weights_than_it_has_are_refused(world):
    path = world[0] / "model"
    for asked in ({"which": "params"}, {"step": 8}):
        with pytest.raises(UserError, match='holds the weights "ema" of step 7 alone, not'):
            inference.origin(path, **asked)
    assert inference.origin(path, which="ema", step=7).step == 7


def damage(copy, kind):
    weights = copy / "model.safetensors"
    if kind == "no config":
        (copy / "config.json").unlink()
    elif kind == "config of nothing":
        (copy / "config.json").write_text('{"format": "unifluid", "config": {}}')
    elif kind == "config of another":
        (copy / "config.json").write_text('{"architectures": ["GemmaForCausalLM"]}')
    elif kind == "config cut":
        (copy / "config.json").write_text((copy / "config.json").read_text()[:99])
    elif kind == "config binary":
        (copy / "config.json").write_bytes(b"\xff\xfe\x00")
    elif kind == "weights cut":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif kind == "weights empty":
        weights.write_bytes(b"")
    else:
        tensors = load_file(weights)
        if kind == "missing":
            del tensors["backbone/embedding"]
        elif kind == "unknown":
            tensors["extra"] = tensors["backbone/embedding"]
        else:
            tensors["backbone/embedding"] = tensors["backbone/embedding"][:5]
        save_file(tensors, weights)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", "has no config.json: export or fetch it anew"),
        ("config of nothing", "config.json describes no UniFluid"),
        ("config of another", "config.json describes no UniFluid .no .format.: .unifluid."),
        ("config cut", "config.json is damaged"),
        ("config binary", "config.json is damaged"),
        ("weights cut", "model.safetensors is damaged"),
        ("weights empty", "model.safetensors is damaged"),
        ("missing", "tensor backbone/embedding is missing from .*model.safetensors"),
        ("unknown", "tensor extra is unknown in .*model.safetensors: it does not fit its config"),
        ("shape", r"tensor backbone/embedding .* has shape \[5, 16\], the config says \[1536, 16"),
    ],
)
def test_a_damaged_folder_is_named_in_one_line(copy, kind, message):
    damage(copy, kind)
    with pytest.raises(UserError, match=message) as error:
        unifluid_jax.load(copy)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


def test_nothing_is_half_written(world, tmp_path):
    folder, config, params = world
    with pytest.raises(UserError, match="model exists already: remove it or take another --out"):
        pretrained.save(folder / "model", config, params, dtype="float32", about={}, card="")
    large = jax.tree.map(lambda x: x * 1e6, params)
    with pytest.raises(UserError, match="holds values that float16 does not: take --dtype"):
        pretrained.save(tmp_path / "large", config, large, dtype="float16", about={}, card="")
    lost = configs.from_json(configs.to_json(config)).unlock()
    lost.tokenizer.path = str(tmp_path / "none.model")
    with pytest.raises(UserError, match="cannot write .*lost: No such file"):
        pretrained.save(tmp_path / "lost", lost.lock(), params, dtype="float32", about={}, card="")
    assert list(tmp_path.iterdir()) == []


def test_export_writes_a_folder_with_a_card(tmp_path):
    config = worlds.make_config(tmp_path).unlock()
    config.input.mixture = (
        {"dataset": "easy_vqa", "split": "train", "task": "vqa", "weight": 1.0},
    )
    config.input.update({"batch_size": 2, "seq_len": 32})
    _, ema = worlds.save_checkpoint(tmp_path / "run", config.lock())
    evals = tmp_path / "run" / "evals" / "3"
    evals.mkdir(parents=True)
    scores = {"scores": {"vqa/accuracy": 0.875}, "examples": {"vqa": 64}, "sampling": {"seed": 0}}
    (evals / "scores.json").write_text(json.dumps(scores))
    export = worlds.Program("export")
    try:
        arguments = (f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'small'}")
        code, said, err = export(*arguments, "--dtype=float32")
        assert (code, err) == (0, "") and said.startswith(f"step 3 in {tmp_path / 'small'}, ")
        code, _, err = export(*arguments)
        assert (code, err.count("\n")) == (2, 1) and "small exists already: remove it" in err
    finally:
        export.close()
    card = (tmp_path / "small" / "README.md").read_text()
    assert "| vqa/accuracy | 0.875 | 64 |" in card and 'load("small")' in card
    model = unifluid_jax.load(tmp_path / "small")
    jax.tree.map(np.testing.assert_array_equal, model.params, ema)
    assert model.origin.step == 3
