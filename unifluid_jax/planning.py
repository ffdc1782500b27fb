"""The training step of a config on devices that are not there: described, compiled, accounted for.

`unifluid plan` prints what is made here; it says what memory, times and MFU mean.
"""

import copy
import dataclasses
import importlib.metadata
import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import rich.table
from ml_collections import ConfigDict

from unifluid_jax import estimate, hlo, sharding, tasks, topology
from unifluid_jax.errors import UserError
from unifluid_jax.input.examples import encodes_in_step
from unifluid_jax.parts import Blueprint, blueprint
from unifluid_jax.step import describe as describe_state
from unifluid_jax.step import describe_constants, train_step
from unifluid_jax.topology import Chip

PARTS = ("siglip", "vae", "backbone", "logits", "head", "optimizer")
# What a step is given; its constants count as parameters.
_GIVEN = ("parameters", "ema", "optimizer", "batch")
_GIB = 2**30
# What an attention kernel is priced at: share of peak, and its backward pass in forward passes.
_KERNEL_RATE, _KERNEL_BACKWARD = 0.4, 2.5

Plan = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step described, not built.

    Attributes:
        plan: the model, and the config.
        mesh: of the devices to compile for.
        state, batch, constants: abstract arrays with shardings.
        function: (state, batch, constants) -> (state, scalars), jitted.
    """

    plan: Blueprint
    mesh: jax.sharding.Mesh
    state: Any
    batch: Any
    constants: Any
    function: Any

    def lower(self) -> Any:
        with jax.set_mesh(self.mesh):
            return self.function.lower(self.state, self.batch, self.constants)


def describe(config: ConfigDict, devices: list[Any]) -> Step:
    """The step of a config on these devices, as `train` makes it.

    Raises:
        UserError: mesh, batch or model do not fit; known before anything is compiled.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_batch(config.input.batch_size, config.train.accumulate, mesh)
    plan = blueprint(config)
    task = tasks.UniFluidTask(config, plan)
    optimizer, state = describe_state(config, task, mesh)
    function = jax.jit(
        lambda *arguments: train_step(config, task, optimizer, *arguments),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh)),
    )
    batch = abstract_batch(plan, sharding.batch_sharding(mesh))
    return Step(plan, mesh, state, batch, describe_constants(task, mesh), function)


def abstract_batch(plan: Blueprint, where: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """A packed batch as the input pipeline makes it, but for ids that the step does not read."""
    c, rows = plan.config.input, plan.config.input.batch_size
    row = (rows, c.seq_len)
    whole = ("tokens", "modality", "position", "step", "text_target", "segment")
    whole += ("behind", "content_position", "target_position")
    shapes = {name: (row, jnp.int32) for name in whole}
    shapes |= {name: (row, jnp.float32) for name in ("text_weight", "image_weight")}
    side = plan.sizes.vision.image_size
    shapes["images"] = ((rows, c.max_images, side, side, 3), jnp.uint8)
    if encodes_in_step(c):
        side = plan.vae.image_size
        shapes["pictures"] = ((rows, c.max_encoded_images, side, side, 3), jnp.uint8)
    else:
        latent = (*row, plan.vae.token_dim)
        shapes |= {name: (latent, jnp.float32) for name in ("latent_mean", "latent_std")}
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
        for name, (shape, dtype) in shapes.items()
    }


def make(config: ConfigDict, name: str) -> Plan:
    """The plan of a config on a topology: JSON values.

    Raises:
        UserError: the config does not fit itself or the topology.
    """
    chip, devices = topology.describe(name)
    return of_step(describe(config, devices), chip, name)


def of_step(step: Step, chip: Chip, name: str) -> Plan:
    """The plan of a step, compiled."""
    plan, config, mesh = step.plan, step.plan.config, step.mesh
    sizes = estimate.memory(plan, step.state, step.batch, step.constants, mesh)
    by_part = estimate.parts(plan, step.state["params"])
    rows = config.input.batch_size
    found: Plan = {
        "topology": name,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "batch": {
            "rows": rows,
            "accumulate": config.train.accumulate,
            "positions": rows * config.input.seq_len,
        },
        "remat": plan.sizes.backbone.remat,
        "versions": versions(),
        "model_flops": {
            n: {"forward": rows * p.forward, "step": rows * p.step} for n, p in by_part.items()
        },
    }
    lowered = step.lower()
    try:
        compiled = lowered.compile(topology.compiler_options(mesh.devices.flat[0].platform))
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error), sizes)
        if needed is None:
            raise
        found["hbm"] = _memory(sizes, chip, None, needed)
        found["fits"] = False
        found["would_fit"] = would_fit(step, chip, needed)
        return found
    stats = compiled.memory_analysis()
    needed = float(stats.argument_size_in_bytes + stats.temp_size_in_bytes)
    needed += max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0)
    found["hbm"] = _memory(sizes, chip, stats, needed)
    found["fits"] = needed <= chip.hbm
    cost = hlo.analyse(compiled.as_text(), mesh.shape, PARTS)
    found["program"] = program(cost)
    model = sum(part.step for part in by_part.values()) * rows / mesh.size
    found["estimate"] = timed(step, cost, chip, model)
    return found


def flops_of(plan: Plan) -> tuple[float, float]:
    """FLOPs of one device in a compiled step: the model's, and those of all products issued."""
    model = sum(part["step"] for part in plan["model_flops"].values()) / plan["devices"]
    return model, sum(plan["program"]["matmul_flops"].values())


def versions() -> dict[str, str]:
    """What decides about the compiled program besides the config."""
    packages = ["jax", "jaxlib", *(["libtpu"] if topology.available() else [])]
    return {package: importlib.metadata.version(package) for package in packages}


def _needed(message: str, sizes: estimate.Memory) -> float | None:
    """Bytes on one device, of the compiler's message that they are too many; None if it is none."""
    whole = re.search(r"Used ([\d.]+)([GMK]) of [\d.]+[GMK] hbm", message)
    temp = re.search(r"HLO temporaries \(([\d.]+)([GMK])\) exceeds available HBM", message)
    if not (whole or temp):
        return None
    number, unit = (whole or temp).groups()
    needed = float(number) * {"G": _GIB, "M": 2**20, "K": 2**10}[unit]
    return needed if whole else needed + sum(getattr(sizes, name) for name in _GIVEN)


def _memory(sizes: estimate.Memory, chip: Chip, stats: Any, needed: float) -> dict[str, float]:
    """Bytes on one device by class; state is exact, what is inside "temp" is by size."""
    classes = {name: getattr(sizes, name) for name in _GIVEN}
    inside = {name: getattr(sizes, name) for name in ("gradients", "activations", "logits")}
    temp = needed - sum(classes.values()) if stats is None else stats.temp_size_in_bytes
    # The classes live at different times, so that together they may be more than the peak.
    other = max(temp - sum(inside.values()), 0.0)
    return {
        **classes,
        "temp": float(temp),
        **{f"temp_{name}": value for name, value in inside.items()},
        "temp_other": other,
        "total": float(needed),
        "limit": chip.hbm,
    }


def program(cost: hlo.Cost) -> dict[str, Any]:
    """What one device does in a step, as JSON values."""
    return {
        "cycles": dict(cost.cycles),
        "matmul_flops": dict(cost.flops),
        "kernels": dict(cost.kernels),
        "collectives": [
            {
                "kind": c.kind,
                "axes": c.axes,
                "async": c.asynchronous,
                "calls": cost.calls[c],
                "bytes": cost.sent[c],
            }
            for c in sorted(cost.sent, key=lambda c: -cost.sent[c])
        ],
    }


def timed(step: Step, cost: hlo.Cost, chip: Chip, model_flops: float) -> dict[str, Any] | None:
    """Estimated seconds of a step and MFU, low and high; None where the clock is not known."""
    if chip.clock is None:
        return None
    config, c, mesh = step.plan.config, step.plan.sizes.backbone, step.mesh.shape
    rows = config.input.batch_size / config.train.accumulate / (mesh["data"] * mesh["fsdp"])
    one = 4.0 * rows * config.input.seq_len**2 * c.head_dim * c.heads / mesh["tensor"]
    return times(cost, chip, one, model_flops)


def times(cost: hlo.Cost, chip: Chip, attention: float, model_flops: float) -> dict[str, Any]:
    """Estimated seconds of a program.

    Args:
        attention: FLOPs of one attention kernel's forward pass.
        model_flops: of a step and device.
    """
    passes = sum(
        times * (_KERNEL_BACKWARD if "dkv" in kernel or "dq" in kernel else 1.0)
        for kernel, times in cost.kernels.items()
        if "splash" in kernel
    )
    kernels = passes * attention / (_KERNEL_RATE * chip.flops)
    waits = {True: 0.0, False: 0.0}
    for collective, sent in cost.sent.items():
        rate = chip.dcn if collective.axes == hlo.SLICES else chip.link
        waits[collective.asynchronous] += sent / rate
    cycles = cost.cycles.total() / chip.clock
    low = cycles + kernels + waits[False]
    high = low + waits[True]
    return {
        "cycles_s": cycles,
        "kernels_s": kernels,
        "collectives_sync_s": waits[False],
        "collectives_async_s": waits[True],
        "step_s": [low, high],
        "mfu": [model_flops / (t * chip.flops) for t in (high, low)],
    }


def would_fit(step: Step, chip: Chip, needed: float) -> list[str]:
    """Switches that bring the step below the limit, by what they save; alone, or with full remat.

    By size: the compiler's figure for this step, less what the estimate says a switch saves.
    """
    config, plan, size = step.plan.config, step.plan, step.mesh.size
    now = estimate.memory(plan, step.state, step.batch, step.constants, step.mesh).total
    options: list[dict[str, Any]] = []
    for parts in (2, 4, 8, 16, 32):
        options.append({"train.accumulate": config.train.accumulate * parts})
    for remat in ("full", "offload_qkv"):
        if plan.sizes.backbone.remat != remat:
            options.append({"model.backbone.remat": remat})
            options.append(
                {"model.backbone.remat": remat, "train.accumulate": config.train.accumulate * 2}
            )
    options.append({"optim.mu_dtype": "bfloat16"})
    options.append({"optim.mu_dtype": "bfloat16", "optim.nu_dtype": "bfloat16"})
    fsdp = step.mesh.shape["fsdp"]
    while (fsdp := fsdp * 2) <= size // step.mesh.shape["tensor"]:
        options.append({"mesh.fsdp": fsdp, "mesh.data": -1})
    fitting = []
    for changes in options:
        try:
            other = describe(changed(config, changes), list(step.mesh.devices.flat))
        except UserError:
            continue
        then = estimate.memory(
            other.plan, other.state, other.batch, other.constants, other.mesh
        ).total
        if needed - now + then <= chip.hbm:
            fitting.append(" ".join(f"--config.{key}={value}" for key, value in changes.items()))
    return fitting


def changed(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """A copy of the config with these fields, by dotted keys."""
    config = copy.deepcopy(config).unlock()
    for key, value in changes.items():
        *groups, field = key.split(".")
        node = config
        for group in groups:
            node = node[group]
        node[field] = value
    return config.lock()


def search(config: ConfigDict, name: str, tries: int, say: Any) -> Plan:
    """The fastest plan found among other parts of a batch, remat policies and meshes.

    Candidates are ranked by size (estimate.py); the first `tries` that should fit are compiled.

    Args:
        say: is told of each candidate.

    Raises:
        UserError: no candidate fits the topology.
    """
    chip, devices = topology.describe(name)
    ranked = []
    for mesh in _meshes(config, len(devices)):
        try:
            step = describe(changed(config, {**mesh, "train.accumulate": 1}), devices)
        except UserError:
            continue
        # State and batch lie the same whatever the layers keep.
        for remat, parts in itertools.product(_REMAT, _ACCUMULATE):
            changes = {**mesh, "model.backbone.remat": remat, "train.accumulate": parts}
            plan = blueprint(changed(config, changes))
            need = estimate.memory(plan, step.state, step.batch, step.constants, step.mesh).total
            replicas = parts * step.mesh.shape["data"] * step.mesh.shape["fsdp"]
            if need <= 0.9 * chip.hbm and config.input.batch_size % replicas == 0:
                seconds = estimate.seconds(plan, step.state, chip, step.mesh)
                ranked.append((seconds, len(ranked), changes))
    if not ranked:
        raise UserError(f"--search: nothing fits {name}: take a larger topology or a smaller model")
    best = None
    for _, _, changes in sorted(ranked)[:tries]:
        found = of_step(describe(changed(config, changes), devices), chip, name)
        found["changes"] = changes
        text = ", ".join(f"{key}={value}" for key, value in changes.items())
        if not found["fits"]:
            say(f"{text}: does not fit")
        elif found["estimate"] is None:
            say(f"{text}: fits")
        else:
            say(f"{text}: {found['estimate']['step_s'][1]:.3f} s")
        if best is None or _rank(found) < _rank(best):
            best = found
    return best


def _rank(plan: Plan) -> tuple[bool, float]:
    seconds = plan["estimate"]["step_s"][1] if plan.get("estimate") else math.inf
    return not plan["fits"], seconds


_REMAT = ("full", "attention", "qkv", "up", "mlp")
_ACCUMULATE = (1, 2, 4, 8, 16, 32)


def _meshes(config: ConfigDict, devices: int) -> list[dict[str, int]]:
    dcn = config.mesh.get("dcn") or {}
    slices = math.prod(abs(dcn[axis]) for axis in dcn)
    return [
        {"mesh.data": -1, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
        for fsdp, tensor in itertools.product((4, 8, 16, 32, 64, 128), (1, 2, 4))
        if fsdp * tensor <= devices // slices
    ]


def heading(plan: Plan) -> str:
    """What was compiled, in a line."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())
    batch = plan["batch"]
    return (
        f"{plan['topology']}: {plan['devices']} devices, {mesh}; {batch['rows']} rows in "
        f"{batch['accumulate']} part(s); remat {plan['remat']}"
    )


def tables(plan: Plan) -> list[rich.table.Table]:
    """The plan for people."""
    memory = rich.table.Table()
    memory.add_column("HBM of a device")
    memory.add_column("GiB", justify="right")
    for name, size in plan["hbm"].items():
        memory.add_row(name.replace("temp_", "  of it (by size): "), f"{size / _GIB:.2f}")
    work = rich.table.Table()
    for column in ("part", "model TFLOP a step", "issued TFLOP", "Mcycles"):
        work.add_column(column, justify="left" if column == "part" else "right")
    issued = plan.get("program", {"matmul_flops": {}, "cycles": {}})
    names = dict.fromkeys([*plan["model_flops"], *issued["matmul_flops"], *issued["cycles"]])
    for name in names:
        model = plan["model_flops"].get(name, {"step": 0})["step"] / plan["devices"]
        work.add_row(
            name,
            f"{model / 1e12:.3f}",
            f"{issued['matmul_flops'].get(name, 0) / 1e12:.3f}",
            f"{issued['cycles'].get(name, 0) / 1e6:.1f}",
        )
    if "program" not in plan:
        return [memory, work]
    traffic = rich.table.Table()
    for column in ("collective", "axes", "async", "calls", "GB sent"):
        traffic.add_column(column, justify="right" if column in ("calls", "GB sent") else "left")
    for c in plan["program"]["collectives"]:
        if c["bytes"] > 1e5:
            async_ = "yes" if c["async"] else ""
            traffic.add_row(
                c["kind"], c["axes"], async_, str(c["calls"]), f"{c['bytes'] / 1e9:.4f}"
            )
    return [memory, work, traffic]


def remarks(plan: Plan) -> list[str]:
    """The plan's conclusions, a line each."""
    lines = []
    limit, total = plan["hbm"]["limit"] / _GIB, plan["hbm"]["total"] / _GIB
    if plan["fits"]:
        lines.append(f"Fits: {total:.2f} of {limit:.2f} GiB.")
    else:
        lines.append(f"Does not fit: {total:.2f} of {limit:.2f} GiB.")
        options = plan.get("would_fit", [])
        lines += [f"  would fit: {option}" for option in options]
        if not options:
            lines.append("  no single switch is enough: try --search, or a larger topology")
    timed = plan.get("estimate")
    if timed:
        low, high = timed["step_s"]
        versions = " ".join(f"{name} {v}" for name, v in plan["versions"].items())
        lines.append(
            f"Estimated by the TPU compiler ({versions}): {low:.3f}-{high:.3f} s a step "
            f"({timed['cycles_s']:.3f} compute, {timed['kernels_s']:.3f} attention kernels, "
            f"{timed['collectives_sync_s']:.3f} collectives, {timed['collectives_async_s']:.3f} "
            f"beside other work)."
        )
        lines.append(
            f"Estimated MFU {timed['mfu'][0]:.3f}-{timed['mfu'][1]:.3f}: model FLOPs, 3 x forward "
            "of what is trained + 1 x of what is frozen, recomputation not counted."
        )
    elif plan["fits"]:
        lines.append("No time is estimated: this chip's clock is not known.")
    return lines
