"""Every recipe compiled for every topology it has a layout for, as docs/plans.md.

    unifluid benchmark plans

Writes docs/plans.json and, made of it, docs/plans.md. A compilation takes minutes: what is in the
file already, of the same config and versions, is kept, and each plan is written when it is done.
Until then a plan of an earlier config stays, and the page says so.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from unifluid_jax import cli, planning
from unifluid_jax import config as configs
from unifluid_jax.errors import UserError

_ONLY = flags.DEFINE_string("only", "", "Compile only the cases whose name contains this.")

RECIPES = ("unifluid_1b", "unifluid_2b", "unifluid_9b")
# Names of the layouts, as the compiler calls the topologies.
TOPOLOGIES = {
    "v5e_64": "v5e:8x8",
    "v5e_256": "v5e:16x16",
    "v5p_128": "v5p:4x4x4",
    "v5p_512": "v5p:4x8x8",
    "v6e_256": "v6e:16x16",
    "v6e_256x2": "v6e:16x16*2",
}
# What the compiled step does not depend on, or in its constants alone.
_APART = {
    "": ("data_dir", "evals", "init_from", "sampling", "seed"),
    "input": (
        "max_corrupt",
        "mixture",
        "order",
        "parallel",
        "source_drop",
        "streams",
        "text_drop",
        "workers",
    ),
    "train": ("checkpoint_every", "keep", "keep_best", "keep_every", "log_every", "steps"),
}
_DOCS = Path("docs")
_GIB = 2**30
_OLD = "(earlier)"

_HEAD = """# What the recipes need

Made by `unifluid benchmark plans`: every recipe's whole training step, batch 2048 at 256 px,
compiled for each topology by the TPU compiler, without the hardware. Memory is the compiler's
figure for one device. Times are **estimates, not measurements**: the compiler's cycles at the
chip's clock, attention kernels at 40 % of peak, collectives at nominal link rates (between slices
200 Gbit/s for the host of four chips, an assumption), hidden behind other work (low) or not (high)
where they are asynchronous. MFU counts three forward passes of what is trained and one of what is
frozen; recomputation does not count. `unifluid plan` prints the same for any config.
"""


def cases() -> Iterator[tuple[str, str]]:
    """(recipe, layout) of all."""
    for name in RECIPES:
        spec = importlib.util.spec_from_file_location(name, f"experiments/{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield from ((name, layout) for layout in module.LAYOUTS)


def main(argv: list[str]) -> None:
    cli.positional(argv)
    run(_ONLY.value, _DOCS / "plans.json")


def run(only: str, file: Path) -> None:
    """Compiles what is missing and writes the file, and the page beside it."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    versions = planning.versions()
    if "libtpu" not in versions:
        raise UserError("compiling for TPUs needs libtpu: pip install -e .[tpu]")
    for name, layout in cases():
        key = f"{name} {layout}"
        config = load(name, layout)
        mark = fingerprint(config)
        old = kept.get(key, {})
        same = old.get("fingerprint") == mark and old.get("versions") == versions
        if only not in key or same:
            continue
        print(f"{key}: compiling", flush=True)
        kept[key] = {"fingerprint": mark, **planning.make(config, TOPOLOGIES[layout])}
        file.write_text(json.dumps(kept, indent=1) + "\n")
        file.with_suffix(".md").write_text(page(kept))
    file.with_suffix(".md").write_text(page(kept))
    print(f"{file.with_suffix('.md')} is up to date")


def load(name: str, layout: str) -> ConfigDict:
    """The config of a case."""
    return configs.load(f"experiments/{name}.py:topology={layout}")


def fingerprint(config: ConfigDict) -> str:
    """Changes with every field of the config that the compiled step depends on."""
    fields = configs.to_json(config)
    for section, names in _APART.items():
        part = fields[section] if section else fields
        for name in names:
            del part[name]
    text = json.dumps(fields, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def page(kept: dict[str, Any]) -> str:
    """The page of all plans."""
    lines = [_HEAD]
    old = {k for k, found in kept.items() if found["fingerprint"] != fingerprint(load(*k.split()))}
    for name in RECIPES:
        rows = [(layout, kept.get(f"{name} {layout}")) for n, layout in cases() if n == name]
        lines.append(f"\n## {name}\n")
        lines.append(
            "| layout | topology | data x fsdp x tensor | remat | HBM GiB of limit | state | "
            "temp | step s | MFU | TFLOP model / issued | GB sent |"
        )
        lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
        lines += [_row(layout, found, f"{name} {layout}" in old) for layout, found in rows]
    if old:
        lines.append(f"\n{_OLD} of the recipe as it was before the last change of its config.")
    used = sorted({json.dumps(found["versions"]) for found in kept.values()})
    if used:
        names = [", ".join(f"{k} {v}" for k, v in json.loads(text).items()) for text in used]
        lines.append(f"\nCompiled with {'; '.join(names)}.")
    return "\n".join(lines) + "\n"


def _row(layout: str, found: dict[str, Any] | None, old: bool) -> str:
    if found is None:
        return f"| {layout} | {TOPOLOGIES[layout]} | not compiled yet | | | | | | | | |"
    hbm, parts = found["hbm"], found["batch"]["accumulate"]
    state = sum(hbm[name] for name in ("parameters", "ema", "optimizer", "batch")) / _GIB
    cells = [
        f"{layout} {_OLD}" if old else layout,
        found["topology"],
        " x ".join(str(size) for size in found["mesh"].values()) + f", {parts} part(s)",
        found["remat"],
        f"{hbm['total'] / _GIB:.2f} of {hbm['limit'] / _GIB:.2f}",
        f"{state:.2f}",
        f"{hbm['temp'] / _GIB:.2f}",
    ]
    timed = found.get("estimate")
    if not found["fits"] or not timed:
        return (
            "| " + " | ".join([*cells, "does not fit" if not found["fits"] else "?"]) + " | | | |"
        )
    model, issued = planning.flops_of(found)
    sent = sum(c["bytes"] for c in found["program"]["collectives"])
    cells += [
        "-".join(f"{t:.2f}" for t in timed["step_s"]),
        "-".join(f"{x:.2f}" for x in timed["mfu"]),
        f"{model / 1e12:.1f} / {issued / 1e12:.1f}",
        f"{sent / 1e9:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    cli.run(main)
