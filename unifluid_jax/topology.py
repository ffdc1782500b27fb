"""TPU topologies to compile for where there is no TPU, and what their chips can do.

Names are those of Google's compiler: `v5e:4x4`, `v5p:4x4x8`; `v6e:16x16*2` are two slices. The
compiler is the package `libtpu`, which runs on any Linux machine.
"""

import dataclasses
import importlib.util
import os
import re
from typing import Any

from jax.experimental import topologies

from unifluid_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Chip:
    """Nominal figures of one device.

    Attributes:
        flops: peak of bfloat16 matrix products, per second.
        clock: cycles per second, to which the compiler's estimates refer; None where not known.
        hbm: memory that a program may use, bytes (the limit in the compiler's own messages).
        link: bytes per second that a device sends to the others of its slice, one way.
        dcn: the same between slices; an assumption, 200 Gbit/s a host of four chips.
    """

    flops: float
    clock: float | None
    hbm: float
    link: float
    dcn: float = 6.25e9


# By JAX's `device_kind`; peaks of GPUs are those of dense bfloat16 products.
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
}
_GPUS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}

_GIB = 2**30
CHIPS = {
    "v5e": Chip(197e12, 1.5e9, 15.75 * _GIB, 180e9),
    "v5p": Chip(459e12, 1.75e9, 95.73 * _GIB, 540e9),
    "v6e": Chip(918e12, 1.75e9, 31.24 * _GIB, 360e9),
    "tpu7x": Chip(1153.5e12, None, 94.74 * _GIB, 600e9),
}

# libtpu looks for a TPU, and locks it, unless told that there is none.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


# A gathered weight and its gradient are one collective each. Left to itself, the compiler splits
# the product beside it into as many steps as there are shards, at half the speed.
_TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def peak(kind: str) -> float | None:
    """Peak of bfloat16 matrix products per second of a device of this kind; None if not known."""
    if kind in _KINDS:
        return CHIPS[_KINDS[kind]].flops
    return next((flops for name, flops in _GPUS.items() if name in kind), None)


def compiler_options(platform: str) -> dict[str, str] | None:
    """Options that the training step is compiled with on devices of this platform."""
    return _TPU_OPTIONS if platform == "tpu" else None


def available() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def describe(name: str) -> tuple[Chip, list[Any]]:
    """The chip and the devices of a topology; the devices can be compiled for, not run on.

    Raises:
        UserError: no such topology, or no compiler for it.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*(\d+))?", name)
    if not found:
        raise UserError(
            f'topology "{name}": write chip, shape and number of slices like v5e:4x4, v5p:4x4x8 or '
            "v6e:16x16*2"
        )
    kind, shape, slices = found.groups()
    if kind not in CHIPS:
        raise UserError(
            f'topology "{name}": no chip "{kind}"{nearest(kind, CHIPS)}: {", ".join(CHIPS)} are '
            "known"
        )
    if not available():
        raise UserError("compiling for TPUs needs libtpu: pip install -e .[tpu]")
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    options = {"num_slices": int(slices)} if slices else {}
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{shape}", **options
        )
    except Exception as error:  # of no documented type
        reason = " ".join(str(error).split())
        raise UserError(f'topology "{name}" is unknown to the compiler: {reason}') from None
    return CHIPS[kind], list(topology.devices)
