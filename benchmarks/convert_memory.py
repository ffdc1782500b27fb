"""Memory of conversions at the true sizes of Gemma-2, and whether they are exact.

    python -m benchmarks.convert_memory --size=2b              # 17 GB of disk
    python -m benchmarks.convert_memory --size=9b --load=false # 57 GB of disk

Writes a synthetic Hugging Face checkpoint of bfloat16 noise (several files and their index, 256,000
rows of vocabulary), converts it in (256,128 rows), loads it onto 8 fake devices, converts it out
and compares every file with what went in. Each of the steps is a process of its own; its peak is
the largest resident set that the kernel saw (`ru_maxrss`), and what it had when the modules were
imported is given beside it. When a checkpoint is loaded, a CPU's "device memory" is host memory
too: the parameters themselves are subtracted, and what remains is the host's share.

The bound is 1.3 x the largest tensor of the files + 1 GB; Python's and JAX's own megabytes count.
--depth cuts layers off where disk or patience are short: docs/conversion.md has what was measured.
"""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import rich.console
import rich.table
from absl import app, flags, logging

_SIZE = flags.DEFINE_enum("size", "2b", ["2b", "9b", "tiny"], "Gemma-2 of this size")
_FOLDER = flags.DEFINE_string("folder", "convert_memory", "scratch folder, removed at the end")
_LOAD = flags.DEFINE_bool("load", True, "load onto 8 devices too: needs the memory for all of it")
_STEP = flags.DEFINE_string("step", None, "one step alone, in this process")
_DEPTH = flags.DEFINE_integer("depth", None, "layers, where the disk is too small for all")

_ROWS, _OFFICIAL_ROWS = 256_000, 256_128


def _model():
    """The backbone, beside a vision tower and a head that are next to nothing."""
    from unifluid_jax.models.functional import Functional
    from unifluid_jax.models.gemma import GemmaConfig
    from unifluid_jax.models.head import HeadConfig
    from unifluid_jax.models.presets import GEMMA
    from unifluid_jax.models.siglip import SiglipConfig
    from unifluid_jax.models.unifluid import UniFluid, UniFluidConfig

    sizes = dict(GEMMA["gemma2_2b" if _SIZE.value == "tiny" else f"gemma2_{_SIZE.value}"])
    if _SIZE.value == "tiny":
        sizes |= {"width": 64, "depth": 3, "mlp_dim": 96, "heads": 4, "head_dim": 16}
    if _DEPTH.value:
        sizes["depth"] = _DEPTH.value
    text = GemmaConfig(vocab_size=_OFFICIAL_ROWS, **sizes)
    vision = SiglipConfig(image_size=32, patch_size=16, width=64, depth=1, heads=8, mlp_dim=64)
    head = HeadConfig(token_dim=16, cond_dim=text.width, width=64, depth=1, out_dim=16)
    config = UniFluidConfig(backbone=text, vision=vision, head=head, image_tokens=4)
    return Functional(lambda rngs: UniFluid(config, rngs=rngs)), text, vision


def make(folder: Path) -> dict:
    """The synthetic checkpoint, a tensor at a time."""
    import jax

    from unifluid_jax.interop import hf_gemma, rules, safetensors
    from unifluid_jax.interop.rules import Leaf, Span
    from unifluid_jax.interop.tensors import BFLOAT16, leaves_of

    model, _, _ = _model()
    leaves = leaves_of(jax.eval_shape(model.init, jax.random.key(0)))
    below = "backbone/"
    leaves = {k.removeprefix(below): v for k, v in leaves.items() if k.startswith(below)}
    plan = rules.bind(
        hf_gemma.GEMMA2, leaves, rows=dict.fromkeys(["model.embed_tokens.weight"], _ROWS)
    )
    written = {name: Leaf(shape, BFLOAT16) for name, shape in plan.theirs.items()}
    (folder / "hf").mkdir()
    rng = np.random.default_rng(0)
    # Exponents of numbers around 2^-8 to 2^7: none is infinite, none is NaN.
    noise = (rng.integers(0, 1 << 16, rules.PIECE, np.uint16) & 0x87FF) | 0x3800
    with safetensors.Writer(folder / "hf", written) as writer:
        for name, leaf in written.items():
            for at, rows in rules.split(leaf):
                shape = leaf.shape if rows is None else (rows[1] - rows[0], *leaf.shape[1:])
                # The same noise everywhere, from another place and with other bits flipped.
                start = rng.integers(len(noise) - math.prod(shape) + 1)
                bits = noise[start:][: math.prod(shape)] ^ np.uint16(rng.integers(1 << 11))
                writer.write(Span(name, at, rows), bits.reshape(shape).view(BFLOAT16))
    largest = max(written.items(), key=lambda item: item[1].nbytes)
    return {
        "tensors": len(written),
        "bytes": sum(leaf.nbytes for leaf in written.values()),
        "largest": [largest[0], largest[1].nbytes],
        "files": len(list((folder / "hf").glob("*.safetensors"))),
    }


def bring_in(folder: Path) -> dict:
    """Hugging Face files to a checkpoint."""
    from unifluid_jax.interop import files, initial

    model, _, vision = _model()
    parts, report = initial.write(
        model,
        {"gemma": files.open_source(folder / "hf")},
        folder / "ours",
        seed=0,
        patch=vision.patch_size,
        meta={"config": {}},
    )
    return {"notes": report.notes, "bytes": parts[0].nbytes}


def load(folder: Path) -> dict:
    """The checkpoint onto 8 devices, each parameter cut over all of them."""
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
    from ml_collections import ConfigDict

    from unifluid_jax import checkpoint, sharding
    from unifluid_jax.interop.orbax import OrbaxSource
    from unifluid_jax.trees import flatten

    model, _, _ = _model()
    mesh = sharding.make_mesh(ConfigDict({"data": 1, "fsdp": 2, "tensor": 4}))
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    stored = OrbaxSource(folder / "ours" / "checkpoints" / "0" / "state", "params").leaves
    where = sharding.shardings(model.axes, abstract, mesh)
    flat = {
        name: jax.ShapeDtypeStruct(x.shape, stored[name].dtype)
        for name, x in flatten(abstract).items()
    }
    abstract = jax.tree.unflatten(jax.tree.structure(abstract), list(flat.values()))
    params = checkpoint.restore_params(folder / "ours", sharding.abstract(abstract, where))
    jax.block_until_ready(params)
    held = sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
    q = params["backbone"]["layers"]["q"]
    return {"held": held, "devices": len(q.devices()), "q": str(q.sharding.spec)}


def take_out(folder: Path) -> dict:
    """The checkpoint to Hugging Face files."""
    import dataclasses

    from unifluid_jax import checkpoint
    from unifluid_jax.interop import export

    _, text, vision = _model()
    step, _ = checkpoint.locate(folder / "ours", None)
    (folder / "back").mkdir()
    text = dataclasses.replace(text, vocab_size=_ROWS)
    written = export.write(
        export.Stored(step, "ema"), text, vision, "hf_gemma", folder / "back", vocabulary=_ROWS
    )
    return {"bytes": sum(leaf.nbytes for leaf in written.values())}


def compare(folder: Path) -> dict:
    """Every tensor of both, bit for bit."""
    from unifluid_jax.interop import files, rules
    from unifluid_jax.interop.rules import Span

    a, b = files.open_source(folder / "hf"), files.open_source(folder / "back")
    differ = [] if a.leaves == b.leaves else ["names, shapes or types"]
    for name, leaf in a.leaves.items():
        for at, rows in rules.split(leaf):
            span = Span(name, at, rows)
            if not np.array_equal(a.read(span).view(np.uint16), b.read(span).view(np.uint16)):
                differ.append(name)
    return {"differ": differ, "tensors": len(a.leaves)}


STEPS = {"make": make, "in": bring_in, "load": load, "out": take_out, "compare": compare}


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    folder = Path(_FOLDER.value)
    if _STEP.value:
        print(json.dumps(_measured(STEPS[_STEP.value], folder)))
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    results = {}
    try:
        for step in STEPS:
            if step == "load" and not _LOAD.value:
                continue
            results[step] = _child(step)
            if step == "out":
                shutil.rmtree(folder / "ours")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _show(results)
    if results["compare"]["differ"]:
        sys.exit(f"not exact: {results['compare']['differ'][:3]}")


def _measured(function, folder: Path) -> dict:
    import jax  # noqa: F401  (its megabytes are not the conversion's)

    import unifluid_jax.interop.export  # noqa: F401

    before = _peak()
    began = time.monotonic()
    result = function(folder)
    return {**result, "seconds": time.monotonic() - began, "peak": _peak(), "before": before}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _child(step: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.convert_memory", f"--step={step}"]
    command += [f"--size={_SIZE.value}", f"--folder={_FOLDER.value}"]
    command += [f"--depth={_DEPTH.value}"] if _DEPTH.value else []
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    if done.returncode:
        sys.exit(f"step {step} failed")
    print(f"{step}: {done.stdout.strip()}", file=sys.stderr)
    return json.loads(done.stdout)


def _show(results: dict[str, dict]) -> None:
    made = results["make"]
    name, largest = made["largest"]
    bound = 1.3 * largest + 1e9
    console = rich.console.Console(soft_wrap=True, highlight=False)
    console.print(
        f"Gemma-2 {_SIZE.value}: {made['tensors']} tensors, {made['bytes'] / 1e9:.2f} GB in "
        f"{made['files']} files; largest {name}, {largest / 1e9:.3f} GB; "
        f"bound {bound / 1e9:.3f} GB; noted: {'; '.join(results['in']['notes'])}"
    )
    table = rich.table.Table(
        "step", "seconds", "peak RSS, GB", "imports, GB", "parameters held, GB", "host's share, GB",
        "within bound", box=None,
    )  # fmt: skip
    for step in ("in", "load", "out"):
        if step in results:
            r = results[step]
            held = r.get("held", 0)
            share = r["peak"] - held
            table.add_row(
                step,
                f"{r['seconds']:.0f}",
                f"{r['peak'] / 1e9:.3f}",
                f"{r['before'] / 1e9:.3f}",
                f"{held / 1e9:.3f}",
                f"{share / 1e9:.3f}",
                "yes" if share <= bound else "NO",
            )
    console.print(table)
    same = results["compare"]
    console.print(f"out equals in: {same['tensors'] - len(same['differ'])} of {same['tensors']}")


if __name__ == "__main__":
    app.run(main)
