"""The page of `unifluid benchmark plan`, and that the step it compiles is one."""

import json
from pathlib import Path

import jax
import pytest

from benchmarks import plan

DOCS = Path("docs")


def kept():
    return json.loads((DOCS / "benchmark_plan.json").read_text())


def recipes():
    made = json.loads((DOCS / "plans.json").read_text())
    return {name: made[name] for name in plan.RECIPES}


def test_the_page_says_what_was_compiled():
    assert (DOCS / "benchmark_plan.md").read_text() == plan.page(kept(), recipes())


def test_a_topology_is_added_without_compiling_the_others(tmp_path, monkeypatch):
    asked = []
    row = kept()["v5e:4x4"]

    def compiled(case):
        asked.append(case.name)
        return {**row, "ratio": 0.125}

    monkeypatch.setattr(plan, "against_peer", compiled)
    out = tmp_path / "page"
    assert "**0.125**" not in plan.run("none", out, DOCS / "plans.json")
    out.with_suffix(".json").write_text(json.dumps({"v5e:4x4": row}))
    page = plan.run("v6e", out, DOCS / "plans.json")
    assert asked == ["v6e:16x16"] and "**0.125**" in page
    assert list(json.loads(out.with_suffix(".json").read_text())) == ["v5e:4x4", "v6e:16x16"]
    assert out.with_suffix(".md").read_text() == page


def test_other_versions_than_the_peers_are_named():
    row = kept()["v5e:4x4"]
    other = {**row, "versions": {**plan.PEER, "libtpu": "0.0.1"}}
    page = plan.page({"a": {**row, "versions": plan.PEER}, "b": other}, {})
    assert "for a: jax 0.12.0.1, libtpu 0.0.52.\n" in page
    assert "for b: jax 0.12.0.1, libtpu 0.0.1: **not the same**.\n" in page


@pytest.mark.parametrize("name", plan.RECIPES)
def test_the_parts_of_a_step_are_all_of_it(name):
    found = plan.bounds(recipes()[name])
    *parts, low, _, _ = found.values()
    assert sum(float(part.split()[0]) for part in parts) == pytest.approx(float(low), abs=3e-3)


def test_the_text_step_is_sharded_and_trains_the_whole_model():
    case = plan.Case("cpu", (2, 4, 1), "qkv", 16, 1.0, 1.0)
    small = {"depth": 2, "width": 64, "mlp_dim": 128, "heads": 4, "head_dim": 16}
    lowered, mesh = plan.text_step(case, jax.devices()[:8], vocab_size=256, **small)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    text = lowered.as_text()
    assert f"tensor<{plan.ROWS * 8}x{plan.LENGTH}xi32>" in text
