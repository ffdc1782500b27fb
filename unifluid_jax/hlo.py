"""What a compiled program does, from the text of its optimized HLO.

XLA's own cost analysis counts the body of a loop once and knows no kernel; here loops count as
often as they run. Read are the TPU compiler's estimated cycles of each operation, the FLOPs of the
matrix products really issued (recomputation included), the kernels, and the collectives: their
kind, the axes of the mesh they go over and the bytes that one device sends.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
_BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8}
SLICES = "slices"
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute".
        axes: of the mesh, "data,fsdp"; `SLICES` for what goes over the network between slices.
        asynchronous: whether other operations run beside it.
    """

    kind: str
    axes: str
    asynchronous: bool


@dataclasses.dataclass
class Cost:
    """Sums over a program or a part of it.

    Attributes:
        cycles: estimated by the compiler, by part of the model; collectives and kernels have none.
        flops: of matrix products and convolutions, by part of the model.
        kernels: calls of each kernel (Pallas).
        sent: bytes that one device sends, by collective.
        calls: how often each collective runs.
    """

    cycles: Counter = dataclasses.field(default_factory=Counter)
    flops: Counter = dataclasses.field(default_factory=Counter)
    kernels: Counter = dataclasses.field(default_factory=Counter)
    sent: Counter = dataclasses.field(default_factory=Counter)
    calls: Counter = dataclasses.field(default_factory=Counter)

    def add(self, other: "Cost", times: int = 1) -> None:
        for field in dataclasses.fields(self):
            mine = getattr(self, field.name)
            for key, value in getattr(other, field.name).items():
                mine[key] += times * value


@dataclasses.dataclass(frozen=True)
class _Op:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes; of a constant, its value

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found and found[1]

    @property
    def scope(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


def analyse(text: str, mesh: Mapping[str, int], parts: Sequence[str]) -> Cost:
    """The cost of one run of a program on one device.

    Args:
        text: `compiled.as_text()`.
        mesh: axes and sizes of the mesh that it was compiled for, in the order of its devices.
        parts: names of scopes (`jax.named_scope`) to tell apart; the rest is "other".

    Raises:
        ValueError: a loop whose trip count is no constant.
    """
    return _Program(text, mesh, parts).cost(None)


class _Program:
    def __init__(self, text: str, mesh: Mapping[str, int], parts: Sequence[str]):
        self._computations, self._entry = _parse(text)
        self._mesh, self._parts = dict(mesh), parts
        self._costs: dict[str, Cost] = {}

    def cost(self, name: str | None) -> Cost:
        name = self._entry if name is None else name
        if name not in self._costs:
            total = Cost()
            for op in self._computations[name].values():
                self._add(total, op, self._computations[name])
            self._costs[name] = total
        return self._costs[name]

    def _add(self, total: Cost, op: _Op, around: Mapping[str, _Op]) -> None:
        part = next((p for p in self._parts if re.search(rf"\b{p}\b", op.scope)), "other")
        if cycles := re.search(r'"estimated_cycles":"(\d+)"', op.rest):
            total.cycles[part] += int(cycles[1])
        if op.opcode == "while":
            total.add(self.cost(op.attribute("body")), self._trips(op))
        elif op.opcode == "conditional":
            branches = re.findall(r"%([\w.\-]+)", op.rest.partition("branch_computations")[2])
            names = branches or [
                op.attribute("true_computation"),
                op.attribute("false_computation"),
            ]
            costs = [self.cost(name) for name in names if name in self._computations]
            total.add(max(costs, key=lambda cost: cost.cycles.total()))
        elif op.opcode == "fusion":
            self._add_inside(total, op.attribute("calls"), part, op)
        elif op.opcode in ("call", "async-start"):
            total.add(self.cost(op.attribute("to_apply") or op.attribute("calls")))
        elif op.opcode in ("convolution", "dot"):
            total.flops[part] += _flops(op, around)
        elif op.opcode == "custom-call" and "tpu_custom_call" in op.rest:
            total.kernels[_kernel(op)] += 1
        elif op.opcode == "send":
            self._add_transfer(total, op, around)
        else:
            self._add_collective(total, op, around, asynchronous=False)

    def _add_inside(self, total: Cost, name: str, part: str, fusion: _Op) -> None:
        """A fusion's cycles are its own; what is inside adds products and collectives."""
        inside = self._computations[name]
        scattered = "all-reduce-scatter" in name
        # An asynchronous collective is written at its start, at its end, and in every fusion that
        # carries it along.
        started = fusion.name.startswith("async-collective-start")
        counts = started or not ("async_collective" in name or "async-collective" in fusion.name)
        for op in inside.values():
            if op.opcode == "fusion":
                self._add_inside(total, op.attribute("calls"), part, fusion)
            elif op.opcode in ("convolution", "dot"):
                total.flops[part] += _flops(op, inside)
            elif op.opcode == "custom-call" and "tpu_custom_call" in op.rest:
                total.kernels[_kernel(op)] += 1
            elif counts:
                kind = "reduce-scatter" if scattered else None
                self._add_collective(total, op, inside, started, kind)

    def _add_collective(self, total, op, around, asynchronous, kind=None) -> None:
        opcode = op.opcode.removesuffix("-start")
        if opcode not in _COLLECTIVES:
            return
        kind = kind or opcode
        axes, count = self._group(op)
        given = sum(_size(around[name].shape) for name in op.operands if name in around)
        made = _size(op.shape)
        if op.opcode.endswith("-start") and op.shape.startswith("("):
            made -= given  # the result is a pair of operands and results
        whole = max(given, made)
        found = Collective(kind, axes, asynchronous or op.opcode.endswith("-start"))
        total.sent[found] += _share(kind, count) * (given if kind == "all-reduce" else whole)
        total.calls[found] += 1

    def _add_transfer(self, total: Cost, op: _Op, around: Mapping[str, _Op]) -> None:
        """The part of a collective that goes between slices.

        The compiler cuts a collective over several slices up: inside of each over the fast links,
        between them through the hosts, where every device sends what it has after the former.
        """
        named = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.rest)
        if not named:
            return
        kind = named[1].lower().replace("_", "-")
        # Slices and devices in them, "{1,2}x{0:255}".
        target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', op.rest)
        ranges = [part.split(":") for part in target[1].split(",")] if target else []
        count = sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)
        given = _size(around[op.operands[0]].shape)
        found = Collective(kind, SLICES, True)
        whole = given * count if kind == "all-gather" else given
        total.sent[found] += _share(kind, count) * whole
        total.calls[found] += 1

    def _group(self, op: _Op) -> tuple[str, int]:
        """Axes of the mesh over which a collective goes, and the number of devices together."""
        sizes = list(self._mesh.values())
        text = op.rest.partition("replica_groups=")[2]
        if named := re.match(r"mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
            # Some passes name the devices' axes anew.
            shape = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
            over = re.findall(r"'(\w+)'", named[2])
            ids = np.arange(math.prod(shape.values())).reshape(list(shape.values()))
            first = tuple(slice(None) if axis in over else 0 for axis in shape)
            group = ids[first]
        elif iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
            shape, reshape, order = (
                [int(x) for x in part.split(",")] if part else None for part in iota.groups()
            )
            ids = np.arange(math.prod(reshape)).reshape(reshape)
            group = (ids.transpose(order) if order else ids).reshape(shape)[0]
        elif listed := re.match(r"\{\{([\d,]+)\}", text):
            group = np.asarray([int(x) for x in listed[1].split(",")])
        elif pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", op.rest):
            group = np.asarray([int(pairs[1]), int(pairs[2])])
        else:
            return ",".join(self._mesh), math.prod(sizes)
        places = np.stack(np.unravel_index(group.ravel(), sizes))
        varies = [len(set(row)) > 1 for row in places.tolist()]
        axes = [axis for axis, moves in zip(self._mesh, varies, strict=True) if moves]
        return ",".join(axes), group.size

    def _trips(self, op: _Op) -> int:
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.rest):
            return int(known[1])
        condition = self._computations[op.attribute("condition")]
        limits = [
            int(other.rest)
            for other in condition.values()
            if other.opcode == "constant" and re.fullmatch(r"\d+", other.rest)
        ]
        compares = [
            other
            for other in condition.values()
            if "direction=LT" in other.rest or other.opcode == "fusion"
        ]
        if len(limits) != 1 or not compares:
            raise ValueError(f"the loop {op.name} has no constant trip count")
        return limits[0]


def _parse(text: str) -> tuple[dict[str, dict[str, _Op]], str]:
    computations: dict[str, dict[str, _Op]] = {}
    current, entry, lines = "", "", []

    def close() -> None:
        # A line goes on below where an attribute has line breaks: those of Pallas kernels do.
        for line in lines:
            op = _parse_op(line)
            computations[current][op.name] = op
        lines.clear()

    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            close()
            current = header[2]
            computations[current] = {}
            entry = current if header[1] else entry
        elif re.match(r"  (ROOT )?%?[\w.\-]+ = ", line):
            lines.append(line)
        elif line == "}":
            close()
        elif lines:
            lines[-1] += line
    return computations, entry


def _parse_op(line: str) -> _Op:
    name, _, text = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].strip()
    opcode, _, _ = text.partition("(")
    close = _closing(text, len(opcode))
    inside = text[len(opcode) + 1 : close]
    rest = inside if opcode == "constant" else text[close + 1 :]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return _Op(name.removeprefix("%"), shape, opcode, operands, rest)


def _closing(text: str, start: int) -> int:
    """Place of the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"unbalanced: {text[:80]}")


def _share(kind: str, count: int) -> float:
    """What one of `count` devices sends, of all that a collective makes or is given."""
    share = (count - 1) / count if count else 1.0
    return {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)


def _dims(shape: str) -> list[int]:
    dims = _SHAPE.match(shape.lstrip("("))[2]
    return [int(x) for x in dims.split(",")] if dims else []


def _size(shape: str) -> int:
    """Bytes of a shape or of a tuple of them."""
    return sum(
        _BYTES.get(kind, 0) * math.prod(int(x) for x in dims.split(",") if x)
        for kind, dims in _SHAPE.findall(re.sub(r"\{[^}]*\}", "", shape))
    )


def _kernel(op: _Op) -> str:
    """The name of a Pallas kernel, which its calls carry."""
    return re.sub(r"\.\d+$", "", op.name)


def _flops(op: _Op, around: Mapping[str, _Op]) -> float:
    """Two for every multiply-add; those with padding or holes of a dilation do not count."""
    left, right = (_dims(around[name].shape) for name in op.operands[:2])
    if op.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)[1]
        inner = math.prod(left[int(i)] for i in contracted.split(",") if i)
        return 2.0 * math.prod(_dims(op.shape)) * inner
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    lhs, rhs, out = labels.groups()
    made = _dims(op.shape)
    window = _window(op.rest)
    total = 2.0 * made[out.index("b")] * right[rhs.index("i")] * right[rhs.index("o")]
    for i, label in enumerate(sorted(c for c in out if c.isdigit())):
        taps = _taps(
            left[lhs.index(label)],
            right[rhs.index(label)],
            made[out.index(label)],
            *(values[i] for values in window(len(out) - 2)),
        )
        total *= taps
    if groups := re.search(r"batch_group_count=(\d+)", op.rest):
        total /= int(groups[1])
    return total


def _window(rest: str):
    found = re.search(r"window=\{([^}]*)\}", rest)
    fields = dict(item.split("=") for item in found[1].split()) if found else {}

    def read(rank: int) -> list[list[int]]:
        def numbers(name: str, default: str) -> list[str]:
            return fields.get(name, "x".join([default] * rank)).split("x")

        return [
            [int(x) for x in numbers("stride", "1")],
            [int(x.split("_")[0]) for x in numbers("pad", "0_0")],
            [int(x) for x in numbers("lhs_dilate", "1")],
            [int(x) for x in numbers("rhs_dilate", "1")],
        ]

    return read


def _taps(
    given: int, kernel: int, made: int, stride: int, pad: int, holes: int, spread: int
) -> int:
    """Pairs of an output place and a tap of the kernel that meet an input, along one dimension."""
    place = np.arange(made)[:, None] * stride + np.arange(kernel)[None] * spread - pad
    return int(((place % holes == 0) & (place >= 0) & (place // holes < given)).sum())
