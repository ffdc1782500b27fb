"""A model as a folder of its own: what is written, what is read back, what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import unifluid_jax
from tests import worlds
from unifluid_jax import checkpoint, inference, pretrained
from unifluid_jax import config as configs
from unifluid_jax.errors import UserError
from unifluid_jax.interop import initial, unifluid
from unifluid_jax.parts import assemble


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A config, the averages of its run at step 7, and the folder "model" with both in it."""
    folder = tmp_path_factory.mktemp("world")
    config = worlds.make_config(folder)
    _, params = worlds.save_checkpoint(folder / "run", config, step=7)
    worlds.export_checkpoint(folder / "run", folder / "model")
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
    folder, config, _ = world
    moved = shutil.copytree(folder / "model", tmp_path / "moved")
    written = json.loads((moved / "config.json").read_text())
    assert written["format"] == "unifluid"
    assert written["config"]["tokenizer"]["path"] == "tokenizer.model"
    assert written["config"]["image_tokenizer"]["path"] == "image_tokenizer"
    assert str(moved) in unifluid.read_config(moved).image_tokenizer.path
    assert unifluid.read_about(moved) == {"step": 7, "weights": "ema", "dtype": "float32"}
    assert sorted(path.name for path in moved.iterdir()) == [
        "README.md", "config.json", "image_tokenizer", "model.safetensors", "tokenizer.model"
    ]  # fmt: skip


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 10), ("bfloat16", 7)])
def test_weights_are_kept_in_half_the_size_and_used_in_full_precision(world, tmp_path, dtype, bits):
    folder, config, params = world
    half = tmp_path / "half"
    worlds.export_checkpoint(folder / "run", half, dtype=initial.DTYPES[dtype])
    read = inference.load(half).params

    def check(found, wanted):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=2.0**-bits, atol=1e-7)

    jax.tree.map(check, read, params)
    sizes = [(path / "model.safetensors").stat().st_size for path in (half, folder / "model")]
    assert sizes[0] < 0.7 * sizes[1]
    assert unifluid.read_about(half)["dtype"] == dtype


def test_shipped_models_are_known_by_name(world, monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "_ASSETS", tmp_path)
    shutil.copytree(world[0] / "model", tmp_path / "unifluid-tiny")
    (tmp_path / "tokenizer_small").mkdir()
    tower = shutil.copytree(world[0] / "model", tmp_path / "siglip")
    (tower / "config.json").write_text('{"model_type": "siglip_vision_model"}')
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
        ("no config", "has no config.json .*: export or fetch it anew"),
        ("config of nothing", "config.json describes no UniFluid"),
        ("config of another", "config.json describes no UniFluid .no .format.: .unifluid."),
        ("config cut", "config.json is damaged"),
        ("config binary", "config.json is damaged"),
        ("weights cut", "model.safetensors is cut short: .* fetch it anew"),
        ("weights empty", "model.safetensors is no safetensors file, or its header is cut short"),
        ("missing", "does not fit the config, .*: backbone/embedding is missing"),
        ("unknown", "extra in .*model.safetensors is not part of this model"),
        ("shape", r"backbone/embedding in .*safetensors is .*\[5, 16\], wanted \[1536, 16\]"),
    ],
)
def test_a_damaged_folder_is_named_in_one_line(copy, kind, message):
    damage(copy, kind)
    with pytest.raises(UserError, match=message) as error:
        unifluid_jax.load(copy)
    assert "\n" not in str(error.value) and str(copy) in str(error.value)


def test_values_that_float16_does_not_hold_are_refused_by_name(world, tmp_path):
    folder, config, params = world
    large = {**params, "latent_in": jax.tree.map(lambda x: x * 1e6, params["latent_in"])}
    with checkpoint.Checkpointer(tmp_path / "run", keep=1) as checkpoints:
        checkpoints.save(1, {"params": large}, {}, {"config": configs.to_json(config)})
    half = initial.DTYPES["float16"]
    message = "latent_in/bias in .* holds .* values that float16 does not: take another --dtype"
    with pytest.raises(UserError, match=message):
        worlds.export_checkpoint(tmp_path / "run", tmp_path / "large", dtype=half)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_cannot_be_copied_leaves_nothing(world, tmp_path):
    folder, config, _ = world
    lost = configs.from_json(configs.to_json(config)).unlock()
    lost.tokenizer.path = str(tmp_path / "none.model")
    step, _ = checkpoint.locate(folder / "run", None)
    with pytest.raises(UserError, match="a tokenizer .* cannot be copied: .*none.model: No such"):
        worlds.export.convert(step, lost.lock(), "unifluid", tmp_path / "lost")
    assert list(tmp_path.iterdir()) == []


def test_convert_writes_a_folder_with_a_card(world, tmp_path):
    folder, _, ema = world
    evals = folder / "run" / "evals" / "7"
    evals.mkdir(parents=True)
    scores = {"scores": {"vqa/accuracy": 0.875}, "examples": {"vqa": 64}, "sampling": {"seed": 0}}
    (evals / "scores.json").write_text(json.dumps({**scores, "weights": "ema"}))
    convert = worlds.Program("convert")
    try:
        arguments = (f"--checkpoint={folder / 'run'}", "--to=unifluid")
        code, said, err = convert(*arguments, f"--out={tmp_path / 'small'}")
        assert (code, err) == (0, "") and said.startswith("step 7: ")
        code, _, err = convert(*arguments, f"--out={tmp_path / 'small'}")
        assert (code, err.count("\n")) == (2, 1) and "small exists already: remove it" in err
        code, _, err = convert(*arguments, "--noema", f"--out={tmp_path / 'raw'}")
        assert (code, err) == (0, "")
        (evals / "scores.json").write_text('{"scores"')
        code, _, err = convert(*arguments, f"--out={tmp_path / 'none'}")
        assert (code, err.count("\n")) == (2, 1) and "scores.json is damaged" in err
    finally:
        convert.close()
        shutil.rmtree(folder / "run" / "evals")
    card = (tmp_path / "small" / "README.md").read_text()
    assert "| vqa/accuracy | 0.875 | 64 |" in card and 'load("small")' in card
    assert "| trained for | 7 steps of 2 packed rows of 32 positions |" in card
    assert "| begun from | fresh weights |" in card
    count = sum(leaf.size for leaf in jax.tree.leaves(ema))
    assert f"| parameters | {count:,} |" in card
    # Those are the scores of the averages.
    assert "accuracy" not in (tmp_path / "raw" / "README.md").read_text()
    assert inference.origin(tmp_path / "raw").weights == "params"
    assert not (tmp_path / "none").exists()
    model = unifluid_jax.load(tmp_path / "small")
    jax.tree.map(np.testing.assert_array_equal, model.params, ema)
    assert model.origin.step == 7
