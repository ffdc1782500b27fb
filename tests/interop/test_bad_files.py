"""Damaged, wrong and malicious files: each is one line that names file and tensor."""

import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from tests.interop import torch_file
from unifluid_jax.errors import UserError
from unifluid_jax.interop import files, hf_gemma, transfer
from unifluid_jax.interop.rules import Leaf, Span
from unifluid_jax.interop.tensors import Memory

F32 = np.dtype(np.float32)
LAYER = "model.layers.{}.mlp.{}_proj.weight"
LEAVES = {
    "layers/gate": Leaf((2, 4, 6), F32),
    "layers/up": Leaf((2, 4, 6), F32),
    "layers/down": Leaf((2, 6, 4), F32),
}


def weights():
    rng = np.random.default_rng(0)
    shape = {"gate": (6, 4), "up": (6, 4), "down": (4, 6)}
    return {
        LAYER.format(i, name): rng.normal(size=shape[name]).astype(np.float32)
        for i in range(2)
        for name in shape
    }


def convert(path):
    fitted = transfer.fit((hf_gemma.GEMMA2,), files.open_source(path), LEAVES)
    memory = Memory.empty(LEAVES)
    transfer.bring_in(fitted, memory)
    return memory.arrays


def refused(path, *words):
    """The conversion ends in one line with all these words."""
    with pytest.raises(UserError) as caught:
        convert(path)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, text


@pytest.fixture
def sharded(tmp_path):
    """Two files and their index."""
    arrays = weights()
    names = sorted(arrays)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, part in parts.items():
        safetensors.numpy.save_file({n: arrays[n] for n in part}, tmp_path / file)
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


@pytest.fixture
def single(tmp_path):
    """single(name=array): one file, with these changes; None removes a tensor."""

    def write(changes):
        arrays = {n: x for n, x in (weights() | changes).items() if x is not None}
        safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return write


def test_whole_files_convert(sharded, single):
    wanted = weights()
    for arrays in (convert(sharded), convert(single({}))):
        for i in range(2):
            assert (arrays["layers/up"][i] == wanted[LAYER.format(i, "up")].T).all()


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_file_that_is_cut_short(single, cut):
    path = single({})
    os.truncate(path, path.stat().st_size - cut)
    refused(path, path, "cut short", "model.layers.")


def test_a_header_that_is_cut_short(single):
    path = single({})
    os.truncate(path, 40)
    refused(path, path, "header is cut short")
    path.write_bytes(b"")
    refused(path, path, "header is cut short")


def test_a_missing_file(sharded):
    (sharded / "b.safetensors").unlink()
    refused(sharded, sharded / "b.safetensors", "is missing", "model.layers.1.")


def test_a_file_that_lacks_what_the_index_says(sharded):
    shutil.copy(sharded / "a.safetensors", sharded / "b.safetensors")
    refused(sharded, sharded / "b.safetensors", "lacks model.layers.1.")


def test_an_index_that_points_elsewhere(sharded):
    index = {"weight_map": {LAYER.format(0, "up"): "../../secret.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(sharded, "model.safetensors.index.json", "no index of weights")


def test_another_size(single):
    name = LAYER.format(1, "gate")
    path = single({name: np.ones((8, 4), np.float32)})
    refused(path, path, f"{name} in {path} is float32[8, 4], wanted [6, 4]")


def test_another_depth(single):
    more = {LAYER.format(2, "up"): np.ones((6, 4), np.float32)}
    refused(single(more), LAYER.format(2, "up"), "not part of this model", "model.safetensors")
    name = LAYER.format(1, "down")
    refused(single({name: None}), f"{name} (layers/down) is missing", "model.safetensors")


def test_a_transposed_kernel(single):
    name = LAYER.format(0, "down")
    path = single({name: np.ones((6, 4), np.float32)})
    refused(path, f"{name} in {path} is float32[6, 4], wanted [4, 6] (it looks transposed)")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numbers_that_are_none(single, value, dtype):
    name = LAYER.format(1, "up")
    x = weights()[name].astype(np.dtype(dtype) if dtype != "bfloat16" else transfer.BFLOAT16)
    x[3, 2] = value
    path = single({name: x})
    refused(path, f"{name} in {path} holds 1 values that are NaN or infinite")


@pytest.mark.parametrize("dtype", [np.int8, np.float64, np.uint8, bool])
def test_another_type(single, dtype):
    name = LAYER.format(0, "gate")
    path = single({name: np.ones((6, 4), dtype)})
    refused(path, f"{name} in {path} is {np.dtype(dtype).name}[6, 4]", "float32, bfloat16 or")


def test_a_number_too_large_for_the_wanted_type():
    memory = Memory(weights() | {LAYER.format(0, "up"): np.full((6, 4), 1e6, np.float32)})
    fitted = transfer.fit((hf_gemma.GEMMA2,), memory, LEAVES)
    half = {"layers/up": np.dtype(np.float16)}
    with pytest.raises(
        UserError, match=r"layers.0.mlp.up_proj.* holds 24 values that float16 does not: take"
    ):
        transfer.bring_in(fitted, Memory.empty(LEAVES), dtypes=half)


def test_what_may_be_missing_or_left_aside_is_allowed_by_pattern(single):
    path = single({LAYER.format(1, "down"): None, "extra.weight": np.ones(2, np.float32)})
    source = files.open_source(path)
    with pytest.raises(UserError, match="extra.weight .* not part"):
        transfer.fit((hf_gemma.GEMMA2,), source, LEAVES, allow=(r"layers/down",))
    fitted = transfer.fit((hf_gemma.GEMMA2,), source, LEAVES, allow=(r"layers/down", r"extra\..*"))
    assert list(fitted.fresh) == ["layers/down"]
    assert fitted.notes == ("extra.weight is left aside",)
    memory = Memory.empty(LEAVES)
    transfer.bring_in(fitted, memory)
    assert not memory.arrays["layers/down"].any()  # not even the layer that is there
    assert memory.arrays["layers/up"].all()


def test_files_of_something_else(tmp_path):
    safetensors.numpy.save_file({"conv.weight": np.ones(3)}, tmp_path / "model.safetensors")
    refused(tmp_path, "holds nothing of a Hugging Face Gemma", "conv.weight")
    path = tmp_path / "model.onnx"
    path.write_bytes(b"?")
    refused(path, path, "no known format")
    refused(tmp_path / "nowhere", "no such file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no weights in")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{ ",
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"x": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}',
        b"\xff\xfe",
    ],
)
def test_headers_that_make_no_sense(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    refused(path, "header of", path)


# --- .npz ---


def test_npz_that_is_damaged(tmp_path):
    path = tmp_path / "model.npz"
    np.savez(path, **weights())
    whole = path.read_bytes()
    for size in (len(whole) - 10, len(whole) // 2, 3, 0):
        path.write_bytes(whole[:size])
        refused(path, path, "damaged")
    np.savez_compressed(path, **weights())
    refused(path, path, "compressed", "np.savez")
    np.savez(path, x=np.array([print], object))
    refused(path, "x in", "Python objects")


# --- PyTorch's files ---


def test_torch_files_are_read(tmp_path):
    for root in ({"state_dict": weights(), "epoch": 3}, {"model": weights()}, weights()):
        torch_file.save(tmp_path / "model.ckpt", root, root="kl16")
        arrays = convert(tmp_path / "model.ckpt")
        assert (arrays["layers/up"][1] == weights()[LAYER.format(1, "up")].T).all()


def test_torch_files_with_an_index(tmp_path):
    arrays = weights()
    names = sorted(arrays)
    for file, part in (("a.bin", names[:2]), ("b.bin", names[2:])):
        torch_file.save(tmp_path / file, {n: arrays[n] for n in part})
    index = {"weight_map": {n: "a.bin" if n in names[:2] else "b.bin" for n in names}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert (convert(tmp_path)["layers/up"][1] == arrays[LAYER.format(1, "up")].T).all()
    (tmp_path / "b.bin").unlink()
    refused(tmp_path, tmp_path / "b.bin", "is missing", names[2])


def test_torch_tensors_that_do_not_lie_in_order(tmp_path):
    x = np.arange(12, dtype=np.float32)
    torch_file.save(tmp_path / "t.ckpt", {"x": x.reshape(3, 4)}, strides=(1, 3))
    source = files.open_source(tmp_path / "t.ckpt")
    wanted = x.reshape(4, 3).T
    assert (source.read(Span("x")) == wanted).all()
    assert (source.read(Span("x", (), (1, 3))) == wanted[1:3]).all()
    assert (source.read(Span("x", (2,))) == wanted[2]).all()


def pickled(path, payload, data=b"\0" * 400):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/data/0", data)


class Calls:
    def __init__(self, function, *arguments):
        self._call = function, arguments

    def __reduce__(self):
        return self._call


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {}",), "system"),
        (eval, ("open('{}', 'w')",), ".eval,"),
        (exec, ("open('{}', 'w')",), ".exec,"),
        (getattr, (str, "join"), ".getattr,"),
        (__import__, ("os",), ".__import__,"),
        (pickle.loads, (b"",), "pickle"),
        (shutil.rmtree, ("{}",), "shutil.rmtree"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_wants_to_run_something_is_refused(
    tmp_path, function, arguments, named, protocol
):
    trace = tmp_path / "trace"
    arguments = [a.format(trace) if isinstance(a, str) else a for a in arguments]
    payload = pickle.dumps({"state_dict": Calls(function, *arguments)}, protocol=protocol)
    pickled(tmp_path / "model.ckpt", payload)
    refused(tmp_path / "model.ckpt", tmp_path / "model.ckpt", named, "refused")
    assert not trace.exists()


def test_names_of_trainers_do_nothing(tmp_path):
    # What Lightning leaves: a class of its own, called with arguments, given state and items.
    payload = (
        b"\x80\x02}q\x00(X\x09\x00\x00\x00callbacks"
        b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n(K\x01tR}X\x01\x00\x00"
        b"\x00aK\x01sbX\x0a\x00\x00\x00state_dict}u."
    )
    pickled(tmp_path / "model.ckpt", payload)
    refused(tmp_path / "model.ckpt", "holds no dict of tensors")


def tensor_pickle(offset=0, shape="(K\x02K\x02t", strides="(K\x02K\x01t", count=4, key="0"):
    """The pickle of {"x": tensor}, by hand: each part can be made wrong."""
    name = f"X{chr(len(key))}\x00\x00\x00{key}".encode("latin1")
    return (
        b"\x80\x02}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n("
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + name + b"X\x03\x00\x00\x00cpu"
        b"K" + bytes([count]) + b"tQ"
        b"K" + bytes([offset]) + shape.encode("latin1") + strides.encode("latin1") + b"\x89}tRs."
    )


def test_the_pickle_made_by_hand_is_right(tmp_path):
    data = np.arange(4, dtype=np.float32)
    pickled(tmp_path / "model.pth", tensor_pickle(), data.tobytes())
    source = files.open_source(tmp_path / "model.pth")
    assert (source.read(Span("x")) == data.reshape(2, 2)).all()


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"offset": 1}, "larger than its storage"),
        ({"shape": "(K\x03K\x02t"}, "larger than its storage"),
        ({"shape": "(J\xff\xff\xff\xffK\x02t"}, "impossible sizes"),
        ({"strides": "(K\x09K\x01t"}, "larger than its storage"),
        ({"strides": "(K\x01t"}, "without storage"),
        ({"key": "7"}, "lacks the numbers of x"),
        ({"key": "../../etc/passwd"}, "lacks the numbers of x"),
        ({"count": 9}, "16 bytes of storage"),
    ],
)
def test_tensors_that_make_no_sense(tmp_path, wrong, word):
    path = tmp_path / "model.pth"
    pickled(path, tensor_pickle(**wrong), bytes(16))
    refused(path, path, word)


def test_torch_files_that_are_damaged(tmp_path):
    path = tmp_path / "model.bin"
    torch_file.save(path, weights())
    whole = path.read_bytes()
    for size in (0, 5, len(whole) // 2, len(whole) - 8):
        path.write_bytes(whole[:size])
        refused(path, path, "no file of PyTorch 1.6 or later, or is cut short")
    # The old format: a bare pickle.
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2))
    refused(path, path, "no file of PyTorch 1.6 or later")
    for payload in (b"", b"\x80\x02", b"garbage", b"\x80\x02}X\xff\xff\xff\x7fx.", b"K\x01."):
        pickled(path, payload)
        with pytest.raises(UserError) as caught:
            convert(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no weights")
    refused(path, path, "none that PyTorch wrote")
