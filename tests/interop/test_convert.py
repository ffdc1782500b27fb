"""`unifluid convert` on the goldens: in, loaded, and out again, tensor by tensor."""

import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import tiny, worlds
from tests.interop.conftest import GOLDEN, golden_config
from unifluid_jax import checkpoint, image_tokenizer, inference, sharding, tasks, train, trees
from unifluid_jax import config as configs
from unifluid_jax.errors import UserError
from unifluid_jax.interop import export, files, gemma_package, hf_gemma, hf_paligemma, initial
from unifluid_jax.interop import unifluid as unifluid_format
from unifluid_jax.interop.rules import Span
from unifluid_jax.parts import assemble

PALIGEMMA = GOLDEN / "paligemma2"
VAE = GOLDEN / "sd_vae" / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def convert():
    program = worlds.Program("convert")
    yield program
    program.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory, convert):
    """A folder with a config and the checkpoint that `unifluid convert` made of goldens."""
    folder = tmp_path_factory.mktemp("convert")
    config = golden_config(folder)
    (folder / "config.json").write_text(json.dumps(configs.to_json(config)))
    code, out, err = convert(
        f"--config={folder / 'config.json'}",
        f"--paligemma={PALIGEMMA}",
        f"--vae={VAE}",
        "--vae_size=32",
        f"--out={folder / 'initial'}",
    )
    assert (code, err) == (0, ""), err
    (folder / "said.txt").write_text(out)
    return folder


@pytest.fixture(scope="module")
def exported(world, convert):
    """exported(format): the folder of the converted checkpoint in this format."""

    @functools.cache
    def make(to):
        rows = [] if to == "unifluid" else ["--vocab_rows=64"]
        out = world / f"out_{to}"
        code, said, err = convert(
            f"--checkpoint={world / 'initial'}", f"--to={to}", f"--out={out}", *rows
        )
        assert (code, err) == (0, ""), err
        assert said.startswith("step 0: ") and said.endswith(f"{out}\n")
        return out

    return make


def tensors(path, table):
    source = files.open_source(path)
    return {table.canonical(name): source.read(Span(name)) for name in source.leaves}


def same(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert x.dtype == b[name].dtype and x.tobytes() == b[name].tobytes(), name


def test_the_report_says_what_came_from_where(world):
    said = (world / "said.txt").read_text()
    assert f"paligemma: 74 tensors, 0.000 GB of {PALIGEMMA} (Hugging Face PaliGemma 2)" in said
    assert f"vae: 244 tensors, 0.000 GB of {VAE} (diffusers AutoencoderKL)" in said
    assert "note: backbone/embedding: 1,472 rows of zeros after 64" in said
    assert "fresh from config.seed: head/token_in/kernel (in no file given)" in said
    report = json.loads((world / "initial" / "conversion.json").read_text())
    assert report["leaves"]["backbone/layers/q"] == "float32[3, 24, 4, 8], paligemma"
    assert report["leaves"]["latent_in/bias"] == "float32[24], fresh"
    model = inference.load(world / "initial")
    assert report["leaves"].keys() == trees.flatten(model.params).keys()


def test_the_checkpoint_has_the_numbers_of_the_files(world):
    model = inference.load(world / "initial")
    params = trees.flatten(model.params)
    theirs = tensors(PALIGEMMA, hf_paligemma.PALIGEMMA2)
    embedding = params["backbone/embedding"]
    assert (embedding[:64] == theirs["model.language_model.embed_tokens.weight"]).all()
    assert not embedding[64:].any()
    for i in range(3):
        o = theirs[f"model.language_model.layers.{i}.self_attn.o_proj.weight"]
        assert (params["backbone/layers/o"][i].reshape(-1, 24) == o.T).all()
    projection = theirs["model.multi_modal_projector.linear.weight"]
    assert (params["vision_proj/kernel"] == projection.T).all()


def test_what_no_file_holds_is_that_of_the_seed(world):
    model = inference.load(world / "initial")
    fresh = jax.jit(model.parts.model.init)(jax.random.key(model.config.seed))
    params, fresh = trees.flatten(model.params), trees.flatten(fresh)
    report = json.loads((world / "initial" / "conversion.json").read_text())
    assert len(report["fresh"]) == 24
    for name in report["fresh"]:
        np.testing.assert_array_equal(params[name], fresh[name])
    assert (params["vision/positions"] != fresh["vision/positions"]).all()


def test_the_image_tokenizer_normalises_as_sd_does(world):
    tokenizer = image_tokenizer.load(world / "initial" / "image_tokenizer")
    assert tokenizer.config.image_size == 32 and tokenizer.config.groups == 2
    np.testing.assert_allclose(tokenizer.channel_std, 1 / 0.18215, rtol=1e-7)
    assert not tokenizer.channel_mean.any()
    model = inference.load(world / "initial")
    assert model.config.image_tokenizer.path == str(world / "initial" / "image_tokenizer")


@pytest.mark.parametrize(
    ("file", "scale", "levels"), [("kl16.ckpt", 0.2325, 5), ("sd_vae_ldm/model.ckpt", 0.18215, 4)]
)
def test_autoencoders_of_latent_diffusion(convert, tmp_path, file, scale, levels):
    path = GOLDEN / ("mar_kl16/" + file if "/" not in file else file)
    size = "64" if levels == 5 else "32"
    code, said, err = convert(
        f"--vae={path}", f"--vae_size={size}", "--vae_groups=2", f"--out={tmp_path / 'out'}"
    )
    assert (code, err) == (0, "") and said.endswith(f"image tokenizer in {tmp_path / 'out'}\n")
    tokenizer = image_tokenizer.load(tmp_path / "out")
    np.testing.assert_allclose(tokenizer.channel_std, 1 / scale, rtol=1e-7)
    assert len(tokenizer.config.multipliers) == levels
    assert tokenizer.config.encoder_attention == ((4,) if levels == 5 else ())


def test_out_as_paligemma_is_what_went_in(exported):
    folder = exported("paligemma")
    table = hf_paligemma.PALIGEMMA2
    same(tensors(folder, table), tensors(PALIGEMMA, table))
    ours = json.loads((folder / "config.json").read_text())
    theirs = json.loads((PALIGEMMA / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        for name, value in theirs[part].items():
            # Newer names of the same; what transformers writes beside them.
            if name not in ("rope_parameters", "use_cache", "use_bidirectional_attention"):
                assert ours[part].get(name, "absent") in (value, "absent"), name
    assert ours["projection_dim"] == 24 and ours["architectures"] == theirs["architectures"]


def test_out_as_hugging_face_gemma_and_in_again(exported):
    theirs = tensors(PALIGEMMA, hf_paligemma.PALIGEMMA2)
    ours = tensors(exported("hf_gemma"), hf_gemma.GEMMA2)
    below = "model.language_model."
    wanted = {f"model.{n.removeprefix(below)}": x for n, x in theirs.items() if below in n}
    same(ours, wanted)
    assert json.loads((exported("hf_gemma") / "config.json").read_text())["sliding_window"] == 64


def test_out_as_the_gemma_package_lays_it_out(exported):
    ours = tensors(exported("gemma"), gemma_package.TABLES[1])
    theirs = tensors(PALIGEMMA, hf_paligemma.PALIGEMMA2)
    layer = "model.language_model.layers.1."
    q = theirs[layer + "self_attn.q_proj.weight"].reshape(4, 8, 24)
    assert (ours["layer_1/attn/q_einsum/w"] == q.transpose(0, 2, 1)).all()
    gate = ours["layer_1/mlp/gating_einsum"][0]
    np.testing.assert_array_equal(gate.T, theirs[layer + "mlp.gate_proj.weight"])


def test_the_whole_model_is_read_back(world, exported):
    folder = exported("unifluid")
    model = inference.load(world / "initial")
    back = inference.load(folder)
    same(
        {name: np.asarray(x) for name, x in trees.flatten(back.params).items()},
        {name: np.asarray(x) for name, x in trees.flatten(model.params).items()},
    )
    # It needs nothing but itself.
    assert Path(back.config.tokenizer.path).parent == folder
    assert Path(back.config.image_tokenizer.path).parent == folder
    fingerprint = model.parts.images.fingerprint
    assert back.parts.images.fingerprint == fingerprint


def test_training_starts_from_either(world, exported):
    model = inference.load(world / "initial")
    mesh = sharding.make_mesh(configs.from_json({"data": 2, "fsdp": 2, "tensor": 2}))
    abstract = jax.eval_shape(model.parts.model.init, jax.random.key(0))
    where = sharding.shardings(model.parts.model.axes, abstract, mesh)
    for path in (world / "initial", exported("unifluid")):
        params = train.pretrained(str(path), sharding.abstract(abstract, where))
        assert params["backbone"]["layers"]["q"].sharding == where["backbone"]["layers"]["q"]
        jax.tree.map(np.testing.assert_array_equal, params, model.params)


def test_narrow_weights_stay_narrow_and_are_read_exactly(world, tmp_path):
    config = configs.load(str(world / "config.json"))
    given = {"paligemma": str(PALIGEMMA), "vae": str(VAE)}
    bfloat16 = initial.DTYPES["bfloat16"]
    initial.convert(config, given, tmp_path / "narrow", vae={"image_size": 32}, dtype=bfloat16)
    folder, _ = checkpoint.locate(tmp_path / "narrow", None)
    stored = export.Stored(folder, "ema")
    assert {leaf.dtype for leaf in stored.leaves.values()} == {bfloat16}
    wide = trees.flatten(inference.load(world / "initial").params)
    for name, x in trees.flatten(inference.load(tmp_path / "narrow").params).items():
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, np.asarray(wide[name]).astype(bfloat16), name)


def test_damage_of_what_was_converted_is_found(world, tmp_path):
    """By whoever reads it: training, `load`, and the way out."""
    shutil.copytree(world / "initial", tmp_path / "initial")
    folder, _ = checkpoint.locate(tmp_path / "initial", None)
    (file,) = Path(folder).glob("state/params.backbone.final_norm.scale/0")
    data = bytearray(file.read_bytes())
    data[5] ^= 4
    file.write_bytes(data)
    message = "is damaged .*checksums differ.*final_norm/scale"
    with pytest.raises(UserError, match=message):
        inference.load(tmp_path / "initial")
    stored = checkpoint.stored_config(folder)
    with pytest.raises(UserError, match="state is damaged at backbone/final_norm/scale"):
        export.convert(folder, stored, "hf_gemma", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_are_merged_on_the_way_out(world, tmp_path):
    config = configs.load(str(world / "config.json")).copy_and_resolve_references()
    with config.unlocked():
        config.lora = {"rank": 2, "alpha": 3.0, "target": "backbone/(layers/(q|down)|embedding)"}
        config.image_tokenizer.path = str(world / "initial" / "image_tokenizer")
    config.lock()
    params = worlds.make_params(assemble(config).trained, 1)
    with checkpoint.Checkpointer(tmp_path / "run", keep=1) as checkpoints:
        checkpoints.save(3, {"ema": params}, {}, {"config": configs.to_json(config)})
    folder, _ = checkpoint.locate(tmp_path / "run", None)
    model = inference.load(tmp_path / "run")
    export.convert(folder, config, "unifluid", tmp_path / "out")
    back = inference.load(tmp_path / "out")
    assert "lora" not in back.config
    found = trees.flatten(back.params)
    for name, x in trees.flatten(model.params).items():
        np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-6)


def test_a_siglip_of_ours_goes_out_and_in_again(convert, tmp_path):
    """The tower that the task "siglip" trained is that of the model made from its files."""
    params = worlds.make_params(tasks.make(tiny.siglip(tmp_path)).model)
    values = configs.to_json(tiny.siglip(tmp_path))
    with checkpoint.Checkpointer(tmp_path / "run", keep=1) as checkpoints:
        checkpoints.save(3, {"params": params}, {}, {"config": values})
    out, initial = tmp_path / "out", tmp_path / "initial"
    code, said, err = convert(f"--checkpoint={tmp_path / 'run'}", "--to=siglip", f"--out={out}")
    assert (code, err) == (0, "") and said.startswith("step 3: "), err
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    worlds.save_image_tokenizer(tmp_path / "image_tokenizer")
    (tmp_path / "config.json").write_text(json.dumps(configs.to_json(tiny.unifluid(tmp_path))))
    config = tmp_path / "config.json"
    code, said, err = convert(f"--config={config}", f"--siglip={out}", f"--out={initial}")
    assert (code, err) == (0, ""), err
    read = trees.flatten(inference.load(initial).params["vision"])
    assert read.keys() == trees.flatten(params["vision"]).keys()
    for name, x in trees.flatten(params["vision"]).items():
        np.testing.assert_array_equal(read[name], x, name)
    code, _, err = convert(f"--checkpoint={tmp_path / 'run'}", "--to=gemma", f"--out={out}2")
    assert code == 2 and 'of the task "siglip": --to=gemma takes unifluid' in err


def test_raw_and_averaged_weights(world, tmp_path):
    config = configs.load(str(world / "config.json")).copy_and_resolve_references()
    with config.unlocked():
        config.image_tokenizer.path = str(world / "initial" / "image_tokenizer")
    params, ema = worlds.save_checkpoint(tmp_path / "run", config.lock())
    folder, _ = checkpoint.locate(tmp_path / "run", None)
    for which, wanted in (("ema", ema), ("params", params)):
        export.convert(folder, config, "hf_gemma", tmp_path / which, which=which)
        written = tensors(tmp_path / which, hf_gemma.GEMMA2)
        scale = np.asarray(wanted["backbone"]["final_norm"]["scale"])
        assert (written["model.norm.weight"] == scale).all()


def test_an_interrupted_conversion_leaves_nothing(world, tmp_path):
    config = configs.load(str(world / "config.json"))

    class Stop(Exception):
        pass

    def stop(done, total=None):
        assert list(tmp_path.glob(".out.partial/*"))
        raise Stop

    given = {"paligemma": str(PALIGEMMA), "vae": str(VAE)}
    with pytest.raises(Stop):
        initial.convert(config, given, tmp_path / "out", vae={"image_size": 32}, advance=stop)
    folder, _ = checkpoint.locate(world / "initial", None)
    stored = checkpoint.stored_config(folder)
    with pytest.raises(Stop):
        export.convert(folder, stored, "unifluid", tmp_path / "out", advance=stop)
    assert not list(tmp_path.iterdir())
    # What a killed one leaves is in nobody's way.
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "rest").touch()
    export.convert(folder, stored, "hf_gemma", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_positions_of_another_size_are_resized_when_asked(world, tmp_path):
    config = configs.load(str(world / "config.json"))
    config.model.vision.image_size = 42  # 6 x 6 patches instead of 4 x 4
    given = {"paligemma": str(PALIGEMMA), "vae": str(VAE)}
    with pytest.raises(UserError, match=r"position_embedding.weight .*\[16, 24\], wanted \[36, 24"):
        initial.convert(config, given, tmp_path / "out", vae={"image_size": 32})
    report = initial.convert(config, given, tmp_path / "out", vae={"image_size": 32}, resize=True)
    assert any("vision/positions: resized from float32[16, 24]" in n for n in report.notes)
    params = inference.load(tmp_path / "out").params
    theirs = tensors(PALIGEMMA, hf_paligemma.PALIGEMMA2)
    table = theirs["model.vision_tower.embeddings.position_embedding.weight"]
    np.testing.assert_allclose(params["vision"]["positions"].mean(0), table.mean(0), atol=0.15)


README = (
    Path("README.md").read_text().partition("## From pretrained weights")[2].partition("\n## ")[0]
)
COMMANDS = [line.split() for line in README.splitlines() if line.startswith("    unifluid ")]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_the_readmes_commands(convert, world, exported, tmp_path, command):
    names = {
        "=experiments/unifluid_2b.py": f"={world / 'config.json'}",
        "=sd-vae-ft-mse": f"={VAE}",
        "=paligemma2-3b-pt-224": f"={PALIGEMMA}",
        "=gemma-2-2b": f"={exported('hf_gemma')}",
        "=siglip-so400m-patch14-224": f"={GOLDEN / 'siglip'}",
        "=runs/unifluid_2b": f"={world / 'initial'}",
        "=pretrained/": f"={tmp_path}/",
        "=exported/": f"={tmp_path}/",
    }
    arguments = command[2:]
    for name, path in names.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    if command[1] == "train":
        config = configs.load(str(world / "config.json"))
        assert configs.apply_overrides(config, arguments[1:]) == arguments[2:]
        assert config.init_from == f"{tmp_path}/initial"
        return
    arguments += ["--vae_size=32"] if "--vae" in str(arguments) else []
    if "--config" in str(arguments):
        tokenizer = world / "initial" / "image_tokenizer"
        arguments.append(f"--config.image_tokenizer.path={tokenizer}")
    code, _, err = convert(*arguments)
    assert (code, err) == (0, "")
    (out,) = tmp_path.iterdir()
    if command[-1].startswith("--out=pretrained/sd_vae"):
        image_tokenizer.load(out)
    elif command[-1].startswith("--out=pretrained/"):
        checkpoint.locate(out, None)
    else:
        files.open_source(out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("give either --checkpoint and --to",)),
        (("--checkpoint=x", "--gemma=y"), ("give either",)),
        (("--checkpoint=x",), ("--to is missing",)),
        (("--checkpoint=x", "--to=gguf"), ("gguf",)),
        (("--checkpoint=/nowhere", "--to=gemma"), ("no checkpoint in /nowhere",)),
        (("--gemma=/nowhere",), ("no weights at /nowhere",)),
        (("--vae={golden}/paligemma2",), ("holds no KL autoencoder",)),
        (
            ("--siglip={golden}/paligemma2", "--paligemma={golden}/paligemma2", "--vae={vae}"),
            ("holds nothing of a Hugging Face SigLIP",),
        ),
        (
            ("--gemma={golden}/gemma2", "--vae={vae}"),
            ("{golden}/gemma2/model.safetensors does not fit the config", "layers.3."),
        ),
        (("--gemma={golden}/gemma1", "--vae={vae}"), ("has no place in it", "post_mlp_norm")),
        (("--paligemma={golden}/paligemma1", "--vae={vae}"), ("model.safetensors does not fit",)),
        (
            ("--paligemma={golden}/paligemma2", "--vae={vae}", "--vae_size=33"),
            ("33 do not divide",),
        ),
    ],
)
def test_mistakes_are_one_line(convert, world, tmp_path, arguments, words):
    names = {"golden": GOLDEN, "vae": VAE}
    arguments = [argument.format(**names) for argument in arguments]
    if not any("--vae_size" in a for a in arguments):
        arguments.append("--vae_size=32")
    code, out, err = convert(
        f"--config={world / 'config.json'}", f"--out={tmp_path / 'out'}", *arguments
    )
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word.format(**names) in err
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(convert, world, exported):
    code, _, err = convert(
        f"--checkpoint={world / 'initial'}", "--to=gemma", f"--out={exported('gemma')}"
    )
    assert code == 2 and "exists already" in err


def test_a_damaged_export_is_named(world, exported, tmp_path):
    folder = exported("unifluid")
    for name in (unifluid_format.CONFIG, "model.safetensors"):
        copy = tmp_path / name.replace(".", "_")
        copy.mkdir()
        for path in folder.iterdir():
            (copy / path.name).symlink_to(path)
        (copy / name).unlink()
        (copy / name).write_text('{"format": "unifluid", "config": {}}')
        with pytest.raises(UserError, match=str(copy / name)):
            inference.load(copy)
