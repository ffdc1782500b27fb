"""Name tables: every format there and back, bit for bit, in its real layout and files."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from tests.interop import torch_file
from unifluid_jax import image_tokenizer, interop
from unifluid_jax.interop import (
    big_vision_paligemma,
    big_vision_siglip,
    diffusers_vae,
    files,
    gemma_package,
    hf_gemma,
    hf_paligemma,
    hf_siglip,
    ldm_vae,
    orbax,
    rules,
    transfer,
    unifluid,
)
from unifluid_jax.interop import safetensors as ours
from unifluid_jax.interop.rules import Leaf, Rule, Table
from unifluid_jax.interop.tensors import Memory, leaves_of
from unifluid_jax.models.functional import Functional
from unifluid_jax.models.gemma import Gemma, GemmaConfig
from unifluid_jax.models.siglip import Siglip, SiglipConfig
from unifluid_jax.models.vae import VaeConfig

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SIZES = {"vocab_size": 20, "width": 6, "depth": 3, "mlp_dim": 10, "heads": 4, "head_dim": 2}
GEMMA = {
    "1": GemmaConfig(**SIZES, kv_heads=1, post_norms=False),
    "1 mha": GemmaConfig(**SIZES, kv_heads=4, post_norms=False),
    "2": GemmaConfig(**SIZES, kv_heads=2),
    "3": GemmaConfig(**SIZES, kv_heads=2, qk_norm=True),
}
SIGLIP = SiglipConfig(image_size=9, patch_size=3, width=8, depth=2, heads=2, mlp_dim=10)
VAE = VaeConfig(
    image_size=16,
    channels=2,
    multipliers=(1, 2, 2),
    blocks=1,
    latent_channels=2,
    groups=1,
    encoder_attention=(2,),
    decoder_attention=(0,),
)


def shapes(build):
    return leaves_of(jax.eval_shape(Functional(build).init, jax.random.key(0)))


def gemma(name):
    return shapes(lambda rngs: Gemma(GEMMA[name], rngs=rngs))


def siglip():
    return shapes(lambda rngs: Siglip(SIGLIP, rngs=rngs))


def vae():
    return leaves_of(jax.eval_shape(image_tokenizer.module(VAE).init, jax.random.key(0)))


def paligemma(name):
    bias = {"vision_proj/bias": Leaf((6,), np.dtype(np.float32))}
    return {
        **{f"backbone/{path}": leaf for path, leaf in gemma(name).items()},
        **{f"vision/{path}": leaf for path, leaf in siglip().items()},
        "vision_proj/kernel": Leaf((8, 6), np.dtype(np.float32)),
        **bias,
    }


def drawn(leaves, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=leaf.shape).astype(dtype) for path, leaf in leaves.items()}


def write_safetensors(folder, arrays):
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")


def write_npz(folder, arrays):
    # As numpy stores what it has no name for.
    arrays = {k: x.view("V2") if x.dtype == BFLOAT16 else x for k, x in arrays.items()}
    np.savez(folder / "model.npz", **{f"params/{name}": x for name, x in arrays.items()})


def write_torch(folder, arrays):
    torch_file.save(folder / "model.ckpt", {"state_dict": arrays, "epoch": 3})


def write_orbax(folder, arrays):
    leaves = {name: Leaf(x.shape, x.dtype) for name, x in arrays.items()}
    with orbax.OrbaxSink(folder / "model", leaves) as sink:
        for name, x in arrays.items():
            sink.write(rules.Span(name), x)


CASES = {
    "hf gemma 1": (hf_gemma.GEMMA1, gemma("1"), write_safetensors),
    "hf gemma 2": (hf_gemma.GEMMA2, gemma("2"), write_safetensors),
    "hf gemma 3": (hf_gemma.GEMMA2, gemma("3"), write_safetensors),
    "gemma package 1": (gemma_package.written(gemma("1")), gemma("1"), write_orbax),
    "gemma package 1 mha": (gemma_package.written(gemma("1 mha")), gemma("1 mha"), write_orbax),
    "gemma package 2": (gemma_package.written(gemma("2")), gemma("2"), write_orbax),
    "gemma package 3": (gemma_package.written(gemma("3")), gemma("3"), write_orbax),
    "gemma package fused": (gemma_package.TABLES[2], gemma("1 mha"), write_orbax),
    "hf siglip": (hf_siglip.TABLE, siglip(), write_safetensors),
    "big_vision siglip": (big_vision_siglip.STACKED, siglip(), write_npz),
    "big_vision siglip apart": (big_vision_siglip.APART, siglip(), write_npz),
    "hf paligemma 1": (hf_paligemma.PALIGEMMA1, paligemma("1"), write_safetensors),
    "hf paligemma 2": (hf_paligemma.PALIGEMMA2, paligemma("2"), write_safetensors),
    "big_vision paligemma 1": (big_vision_paligemma.TABLE, paligemma("1"), write_npz),
    "big_vision paligemma 2": (big_vision_paligemma.TABLE, paligemma("2"), write_npz),
    "diffusers vae": (diffusers_vae.TABLES[0], vae(), write_safetensors),
    "diffusers vae .bin": (diffusers_vae.TABLES[1], vae(), write_torch),
    "ldm vae": (ldm_vae.TABLES[0], vae(), write_torch),
    "ldm vae linear": (ldm_vae.TABLES[1], vae(), write_torch),
    "unifluid": (unifluid.table(paligemma("2")), paligemma("2"), write_safetensors),
}


def taken_out(table, arrays):
    """The foreign tensors of our arrays."""
    sinks = []

    class Open(Memory):
        def __enter__(self):
            return self

        def __exit__(self, *unused):
            pass

    def make(leaves):
        sinks.append(Open.empty(leaves))
        return sinks[0]

    memory = Memory(arrays)
    transfer.take_out(table, memory, memory.leaves, make, sizes=interop.patch_sizes(3))
    return sinks[0].arrays


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_bit_for_bit(name, tmp_path, monkeypatch):
    # In pieces of two numbers or three, where formats allow it.
    cut = not name.startswith("gemma package")
    if cut:
        for module in (rules, orbax):
            monkeypatch.setattr(module, "PIECE", 12)
    table, leaves, write = CASES[name]
    dtype = BFLOAT16 if cut and "npz" not in name else np.dtype(np.float32)
    arrays = drawn(leaves, dtype)
    theirs = taken_out(table, arrays)
    assert {x.dtype for x in theirs.values()} == {dtype}
    assert sum(x.size for x in theirs.values()) == sum(x.size for x in arrays.values())
    write(tmp_path, theirs)
    source = files.open_source(next(tmp_path.iterdir()))
    assert {n.removeprefix("params/") for n in source.leaves} == theirs.keys()
    fitted = transfer.fit((table,), source, leaves, sizes=interop.patch_sizes(3))
    assert fitted.dtypes() == dict.fromkeys(leaves, dtype)
    back = Memory.empty({path: Leaf(x.shape, x.dtype) for path, x in arrays.items()})
    transfer.bring_in(fitted, back)
    for path, x in arrays.items():
        assert back.arrays[path].tobytes() == x.tobytes(), path


@pytest.mark.parametrize("flat", [True, False])
def test_checkpoints_that_orbax_wrote_for_the_gemma_package(flat, tmp_path):
    table, leaves, _ = CASES["gemma package 2"]
    arrays = drawn(leaves, BFLOAT16)
    tree = {}
    for name, x in taken_out(table, arrays).items():
        if flat:
            # As released: keys that hold "/", one level below them.
            name += "/w" if name.endswith(("mlp/linear", "mlp/gating_einsum")) else ""
            above, last = name.rsplit("/", 1)
            tree.setdefault(f"transformer/{above}", {})[last] = x
        else:
            node = tree
            for key in name.split("/")[:-1]:
                node = node.setdefault(key, {})
            node[name.split("/")[-1]] = x
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "gemma", jax.tree.map(jnp.asarray, tree))
    fitted = transfer.fit(interop.TABLES["gemma"], files.open_source(tmp_path / "gemma"), leaves)
    assert fitted.table is table
    back = Memory.empty({path: Leaf(x.shape, x.dtype) for path, x in arrays.items()})
    transfer.bring_in(fitted, back)
    for path, x in arrays.items():
        assert back.arrays[path].tobytes() == x.tobytes(), path


def test_the_right_table_is_found_among_all_of_a_part():
    for part, names in {
        "gemma": ("hf gemma 1", "hf gemma 2", "gemma package 1 mha", "gemma package 3"),
        "siglip": ("hf siglip", "big_vision siglip", "big_vision siglip apart"),
        "paligemma": ("hf paligemma 1", "big_vision paligemma 2"),
        "vae": ("diffusers vae", "diffusers vae .bin", "ldm vae", "ldm vae linear"),
    }.items():
        for name in names:
            table, leaves, _ = CASES[name]
            source = Memory(taken_out(table, drawn(leaves, np.float32)))
            fitted = transfer.fit(
                interop.TABLES[part], source, leaves, sizes=interop.patch_sizes(3)
            )
            assert fitted.table is table


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("hf gemma 2", r"model.", "language_model.model."),
        ("hf gemma 2", r"model.", ""),
        ("hf siglip", "", "vision_model."),
        ("hf paligemma 1", "model.language_model.", "language_model.model."),
        ("hf paligemma 1", "model.vision_tower.", "vision_tower.vision_model."),
        ("hf paligemma 1", "model.multi_modal_projector.", "multi_modal_projector."),
        ("gemma package 2", "", "transformer/"),
        ("gemma package 2", "mlp/linear", "mlp/linear/w"),
        ("big_vision siglip", "", "params/img/"),
        ("diffusers vae", ".to_q.", ".query."),
        ("diffusers vae", ".to_out.0.", ".proj_attn."),
        ("ldm vae", "", "first_stage_model."),
    ],
)
def test_other_spellings_are_read(name, old, new):
    table, leaves, _ = CASES[name]
    arrays = drawn(leaves, np.float32)
    theirs = {
        theirs.replace(old, new, 1) if old else new + theirs: x
        for theirs, x in taken_out(table, arrays).items()
    }
    assert theirs.keys() != taken_out(table, arrays).keys()
    fitted = transfer.fit((table,), Memory(theirs), leaves, sizes=interop.patch_sizes(3))
    back = Memory.empty(leaves)
    transfer.bring_in(fitted, back)
    assert all((back.arrays[path] == x).all() for path, x in arrays.items())


def test_what_is_not_ours_is_ignored_and_only_that():
    table, leaves, _ = CASES["hf siglip"]
    theirs = taken_out(table, drawn(leaves, np.float32))
    extra = {"vision_model.head.probe": np.zeros(3, np.float32)}
    transfer.fit((table,), Memory(theirs | extra), leaves, sizes=interop.patch_sizes(3))
    extra = {"encoder.layers.2.layer_norm1.weight": np.zeros(8, np.float32)}
    with pytest.raises(transfer.UserError, match="layers.2.layer_norm1.weight .* not part of this"):
        transfer.fit((table,), Memory(theirs | extra), leaves, sizes=interop.patch_sizes(3))


def test_hf_linears_are_transposed_and_heads_stay_together():
    q = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)  # [heads x head_dim, width]
    table = Table("t", (Rule("layers/q", "q.{layer}", "(H K) D -> D H K"),))
    leaves = {"layers/q": Leaf((1, 6, 4, 2), np.dtype(np.float32))}
    fitted = transfer.fit((table,), Memory({"q.0": q}), leaves)
    back = Memory.empty(leaves)
    transfer.bring_in(fitted, back)
    for d, h, k in np.ndindex(6, 4, 2):
        assert back.arrays["layers/q"][0, d, h, k] == q[2 * h + k, d]


def test_gate_and_up_are_the_first_and_the_second():
    table, leaves, _ = CASES["gemma package 3"]
    arrays = drawn(leaves, np.float32)
    theirs = taken_out(table, arrays)
    gating = theirs["layer_1/mlp/gating_einsum"]
    np.testing.assert_array_equal(gating[0].T, arrays["layers/gate"][1])
    np.testing.assert_array_equal(gating[1].T, arrays["layers/up"][1])
    # Gemma-1 and Gemma-2 2B keep [D, F].
    table, leaves, _ = CASES["gemma package 1"]
    arrays = drawn(leaves, np.float32)
    gating = taken_out(table, arrays)["layer_1/mlp/gating_einsum"]
    assert (gating[0] == arrays["layers/gate"][1]).all()


def test_levels_of_ldms_decoder_count_from_the_pictures_side():
    table, leaves, _ = CASES["ldm vae"]
    arrays = drawn(leaves, np.float32)
    theirs = taken_out(table, arrays)
    for i in range(3):
        conv = theirs[f"decoder.up.{2 - i}.block.0.conv1.weight"]
        assert (conv.transpose(2, 3, 1, 0) == arrays[f"decoder/up_{i}/resnet_0/conv1/kernel"]).all()
    assert "decoder.up.0.attn.0.q.weight" in theirs  # decoder_attention=(0,)
    assert "encoder.down.2.attn.0.q.weight" in theirs


@pytest.mark.parametrize("rows", [17, 25])
@pytest.mark.parametrize("piece", [rules.PIECE, 50])
def test_vocabularies_are_padded_and_cut(rows, piece, monkeypatch):
    monkeypatch.setattr(rules, "PIECE", piece)
    table, leaves, _ = CASES["hf gemma 2"]
    arrays = drawn(leaves, np.float32)
    theirs = taken_out(table, arrays)
    embedding = np.random.default_rng(1).normal(size=(rows, 6)).astype(np.float32)
    theirs["model.embed_tokens.weight"] = embedding
    fitted = transfer.fit((table,), Memory(theirs), leaves)
    assert len(fitted.notes) == 1 and "rows" in fitted.notes[0]
    back = Memory({"embedding": np.full((20, 6), 7, np.float32)})
    back.arrays |= {p: np.zeros(x.shape, np.float32) for p, x in leaves.items() if p != "embedding"}
    transfer.bring_in(fitted, back)
    common = min(rows, 20)
    assert (back.arrays["embedding"][:common] == embedding[:common]).all()
    assert (back.arrays["embedding"][common:] == 0).all()


def test_another_vocabulary_is_no_padding():
    table, leaves, _ = CASES["hf gemma 2"]
    theirs = taken_out(table, drawn(leaves, np.float32))
    theirs["model.embed_tokens.weight"] = np.zeros((20 + 2049, 6), np.float32)
    with pytest.raises(transfer.UserError, match="2,069 rows, the config's vocabulary 20"):
        transfer.fit((table,), Memory(theirs), leaves)


def test_output_embeddings_must_be_the_input_embeddings():
    table, leaves, _ = CASES["hf gemma 1"]
    theirs = taken_out(table, drawn(leaves, np.float32))
    theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"].copy()
    fitted = transfer.fit((table,), Memory(theirs), leaves)
    transfer.bring_in(fitted, Memory.empty(leaves))
    theirs["lm_head.weight"][3, 2] += 1
    fitted = transfer.fit((table,), Memory(theirs), leaves)
    with pytest.raises(transfer.UserError, match="lm_head.weight .* differs from model.embed_tok"):
        transfer.bring_in(fitted, Memory.empty(leaves))


def test_our_writer_writes_what_the_library_reads(tmp_path):
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(5).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 4), np.float16),
    }
    leaves = {name: Leaf(x.shape, x.dtype) for name, x in arrays.items()}
    with ours.Writer(tmp_path, leaves, file_bytes=24) as writer:
        for name, x in arrays.items():
            writer.write(rules.Span(name), x)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    read = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        read |= safetensors.numpy.load_file(path)
    assert all(read[n].dtype == x.dtype and (read[n] == x).all() for n, x in arrays.items())
    assert files.open_source(tmp_path).leaves == leaves


def test_a_writer_that_is_left_with_holes_says_so(tmp_path):
    leaves = {"x": Leaf((4, 2), np.dtype(np.float32))}
    part = rules.Span("x", rows=(0, 3)), np.zeros((3, 2), np.float32)
    with pytest.raises(ValueError, match="1 tensors .* like x"), ours.Writer(tmp_path, leaves) as w:
        w.write(*part)
    folder = tmp_path / "orbax"
    with (
        pytest.raises(ValueError, match="1 arrays .* like x"),
        orbax.OrbaxSink(folder, leaves) as w,
    ):
        w.write(*part)
