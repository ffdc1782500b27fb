"""What a path holds: finds the format of files and opens them."""

from pathlib import Path

from unifluid_jax.errors import UserError
from unifluid_jax.interop import npz, orbax, safetensors, torch_zip
from unifluid_jax.interop.rules import Leaf
from unifluid_jax.interop.tensors import RawTensors, Source

# In a folder, the first of these that is there.
_PREFERRED = (
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
_TORCH = (".bin", ".ckpt", ".pt", ".pth")
_SUFFIXES = (".safetensors", ".npz", *_TORCH)


def open_source(path: str | Path) -> Source:
    """The tensors of a file or folder, whatever its format.

    A folder may be Orbax's; else it has one file of weights, or an index of several.

    Raises:
        UserError: there is none, several, or a damaged one.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no weights at {path}: no such file or folder")
    if path.is_dir():
        return _open_folder(path)
    if path.name.endswith(".safetensors.index.json"):
        return safetensors.open_index(path)
    if path.name.endswith(".bin.index.json"):
        return _open_torch_index(path)
    if path.suffix == ".safetensors":
        return safetensors.open_file(path)
    if path.suffix == ".npz":
        return npz.open_file(path)
    if path.suffix in _TORCH:
        return torch_zip.open_file(path)
    raise UserError(
        f"{path} is of no known format: give one of {', '.join(_SUFFIXES)}, an index of several, "
        "or a folder"
    )


def _open_folder(path: Path) -> Source:
    if orbax.is_folder(path):
        return orbax.OrbaxSource(path)
    if orbax.is_folder(path / "default"):  # as Orbax's CheckpointManager nests a single item
        return orbax.OrbaxSource(path / "default")
    for name in _PREFERRED:
        if (path / name).is_file():
            return open_source(path / name)
    found = [file for suffix in _SUFFIXES for file in sorted(path.glob(f"*{suffix}"))]
    if len(found) == 1:
        return open_source(found[0])
    if not found:
        raise UserError(f"no weights in {path}: no file of {', '.join(_SUFFIXES)}, nor Orbax's")
    names = ", ".join(file.name for file in found[:4])
    raise UserError(f"{path} has {len(found)} files of weights ({names}): name one of them")


def _open_torch_index(path: Path) -> RawTensors:
    leaves: dict[str, Leaf] = {}
    places = {}
    for file in safetensors.weight_files(path):
        shard = torch_zip.open_file(path.parent / file)
        leaves |= shard.leaves
        places |= shard.places
    return RawTensors(path.parent, leaves, places)
