"""Writes PyTorch's zip files without PyTorch: the same pickle, by stand-ins of the same names."""

import io
import pickle
import sys
import types
import zipfile

import numpy as np

_STORAGES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "float64": "DoubleStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int8": "CharStorage",
}


def _rebuild_tensor_v2(*arguments):
    raise AssertionError("only its name is written")


class _Storage:
    def __init__(self, kind, key, count):
        self.id = ("storage", kind, key, "cpu", count)


class _Tensor:
    def __init__(self, *arguments):
        self._arguments = arguments

    def __reduce__(self):
        return _rebuild_tensor_v2, self._arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, item):
        return item.id if isinstance(item, _Storage) else None


def save(path, content, strides=None, root="archive"):
    """Writes `content`, nested dicts with numpy arrays, as `torch.save` does.

    Args:
        strides: of every tensor, in elements; C order by default.
    """
    kinds = {name: type(name, (), {"__module__": "torch"}) for name in _STORAGES.values()}
    torch = types.ModuleType("torch")
    torch.__dict__.update(kinds)
    utils = types.ModuleType("torch._utils")
    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = (
        "torch._utils",
        "_rebuild_tensor_v2",
    )
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    data = []

    def stand_in(node):
        if isinstance(node, dict):
            return {key: stand_in(value) for key, value in node.items()}
        if not isinstance(node, np.ndarray):
            return node
        storage = _Storage(kinds[_STORAGES[node.dtype.name]], str(len(data)), node.size)
        order = strides or tuple(s // node.itemsize for s in np.ascontiguousarray(node).strides)
        data.append(node)
        return _Tensor(storage, 0, node.shape, order, False, {})

    before = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules |= {"torch": torch, "torch._utils": utils}
    try:
        file = io.BytesIO()
        _Pickler(file, protocol=2).dump(stand_in(content))
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", file.getvalue())
        archive.writestr(f"{root}/byteorder", "little")
        for i, x in enumerate(data):
            archive.writestr(f"{root}/data/{i}", np.ascontiguousarray(x).tobytes())
        archive.writestr(f"{root}/version", "3\n")
