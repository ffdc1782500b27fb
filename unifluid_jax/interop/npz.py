"""numpy's .npz archives, as big_vision writes them, read by parts."""

import ast
import zipfile
from pathlib import Path

import numpy as np

from unifluid_jax.errors import UserError
from unifluid_jax.interop.rules import Leaf
from unifluid_jax.interop.tensors import BFLOAT16, Place, RawTensors


def open_file(path: Path) -> RawTensors:
    """The arrays of an archive.

    Raises:
        UserError: it is no archive, damaged, compressed, or holds Python objects.
    """
    leaves, places = {}, {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if info.compress_type != zipfile.ZIP_STORED:
                    raise UserError(
                        f"{path} is compressed and cannot be read by parts: "
                        "load it in numpy and write it again with np.savez"
                    )
                with archive.open(info) as member:
                    leaf, order, header = _header(member, f"{name} in {path}")
                if header + leaf.nbytes != info.file_size:
                    raise UserError(f"{path} is damaged: {name} has not the bytes of a {leaf}")
                leaves[name] = leaf
                places[name] = Place(path, member_offset(path, info) + header, order)
    except (zipfile.BadZipFile, ValueError, SyntaxError, EOFError) as error:
        raise UserError(f"{path} is no .npz archive, or damaged ({error}): fetch it anew") from None
    return RawTensors(path, leaves, places)


def member_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where the bytes of an uncompressed member begin.

    Raises:
        UserError: the archive ends before they do.
    """
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        local = file.read(30)
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise UserError(f"{path} is damaged at {info.filename}: fetch it anew")
        # The lengths of name and extra field differ from those of the central directory.
        offset = info.header_offset + 30 + int.from_bytes(local[26:28], "little")
        offset += int.from_bytes(local[28:30], "little")
        if offset + info.file_size > path.stat().st_size:
            raise UserError(f"{path} is cut short: {info.filename} is not whole; fetch it anew")
    return offset


def _header(member, where: str) -> tuple[Leaf, tuple[int, ...] | None, int]:
    """Shape and type, strides if not in C order, and the length of the header."""
    magic = member.read(8)
    if magic[:6] != b"\x93NUMPY":
        raise UserError(f"{where} is no numpy array")
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(member.read(width), "little")
    if length > 1 << 20:
        raise UserError(f"{where} has a damaged header")
    text = member.read(length).decode("latin1")
    fields = ast.literal_eval(text)
    shape, descr = tuple(fields["shape"]), fields["descr"]
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise UserError(f"{where} has a damaged shape: {shape}")
    dtype = np.dtype(descr)
    if dtype.hasobject:
        raise UserError(f"{where} is made of Python objects: it is no array of weights")
    # numpy has no name for bfloat16: big_vision's come as two bytes of anything.
    dtype = BFLOAT16 if dtype == np.dtype("V2") else dtype
    if not dtype.isnative:
        raise UserError(f"{where} is stored with the other byte order ({descr}): write it anew")
    strides = None
    if fields["fortran_order"] and len(shape) > 1:
        strides = tuple(int(np.prod(shape[:i])) for i in range(len(shape)))
    return Leaf(shape, dtype), strides, 8 + width + length
