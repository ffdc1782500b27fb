"""Plans: of a small model on the CPU's devices and, with the compiler, on those of a TPU."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import plans
from tests import tiny
from unifluid_jax import config as configs
from unifluid_jax import estimate, hlo, planning, tasks, topology
from unifluid_jax.errors import UserError
from unifluid_jax.models.presets import preset

CHIP = topology.CHIPS["v5e"]
needs_libtpu = pytest.mark.skipif(
    not topology.available(), reason="compiling for TPUs needs libtpu: pip install -e .[tpu]"
)


def recipe(name, layout=None):
    argument = f":topology={layout}" if layout else ""
    return configs.load(f"experiments/unifluid_{name}.py{argument}")


def small(**changes):
    """The 2B recipe with few and narrow layers, on 8 devices."""
    config = recipe("2b")
    base = {
        "model.backbone.width": 256,
        "model.backbone.depth": 2,
        "model.backbone.mlp_dim": 256,
        "model.backbone.heads": 2,
        "model.backbone.kv_heads": 1,
        "model.backbone.head_dim": 128,
        "model.vision.width": 32,
        "model.vision.depth": 1,
        "model.vision.heads": 2,
        "model.vision.mlp_dim": 64,
        "model.head.depth": 1,
        "model.head.width": 64,
        "tokenizer.vocab_size": 1024,
        "input.batch_size": 8,
        "train.accumulate": 1,
        "mesh.data": -1,
        "mesh.fsdp": 4,
    }
    return planning.changed(config, base | changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny.build(folder)
    return folder


@pytest.mark.parametrize("encoded", [0, 6])
def test_the_batch_is_that_of_the_pipeline(world, encoded):
    config = tiny.unifluid(world, **{"input.max_encoded_images": encoded})
    real = next(tasks.make(config).batches())
    planned = planning.describe(config, jax.devices()).batch
    assert {n: (x.shape, x.dtype) for n, x in planned.items()} == {
        n: (x.shape, x.dtype) for n, x in real.items() if n != "example_id"
    }


@pytest.fixture(scope="module")
def on_cpu():
    return planning.of_step(planning.describe(small(), jax.devices()), CHIP, "v5e:2x4")


def test_a_plan_accounts_for_the_memory_of_a_device(on_cpu):
    step = planning.describe(small(), jax.devices())
    hbm = on_cpu["hbm"]
    state = estimate.bytes_of(step.state) + estimate.bytes_of(step.batch)
    shares = sum(hbm[name] for name in ("parameters", "ema", "optimizer", "batch"))
    assert shares == pytest.approx(state, abs=16)  # the step's number is in no class
    # Frozen: the tower has neither moments nor an average.
    frozen = estimate.bytes_of(step.state["frozen"])
    assert frozen > 0 and hbm["parameters"] == hbm["ema"] + frozen
    assert hbm["optimizer"] == pytest.approx(2 * hbm["ema"], abs=16)
    assert hbm["temp"] > 0 and hbm["total"] >= shares + hbm["temp"] - 16
    assert on_cpu["fits"] and hbm["limit"] == 15.75 * 2**30


def test_a_plan_is_json_and_readable(on_cpu, capsys):
    assert json.loads(json.dumps(on_cpu)) == on_cpu
    import rich.console

    console = rich.console.Console(width=110)
    for table in planning.tables(on_cpu):
        console.print(table)
    for line in [planning.heading(on_cpu), *planning.remarks(on_cpu)]:
        console.print(line, soft_wrap=True)
    text = capsys.readouterr().out
    for word in ("parameters", "optimizer", "activations", "logits", "backbone", "head", "siglip"):
        assert word in text
    assert "v5e:2x4: 8 devices, data 2 x fsdp 4 x tensor 1; 8 rows in 1 part(s)" in text
    assert "Fits: " in text and "Estimated MFU" in text and "recomputation not counted" in text


@pytest.mark.parametrize(
    ("message", "held"),
    [
        ("Ran out of memory in memory space hbm. Used 19.26G of 15.75G hbm. Exceeded by 3.51G.", 0),
        (
            "E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO"
            " temporaries (19.26G) exceeds available HBM (15.75G). HLO module: jit__lambda.",
            1,
        ),
    ],
)
def test_what_does_not_fit_is_no_error(monkeypatch, message, held):
    """The compiler has two ways to say so, of which one leaves out what the step is given."""

    def refuse(self):
        class Lowered:
            def compile(self, options):
                raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

        return Lowered()

    monkeypatch.setattr(planning.Step, "lower", refuse)
    step = planning.describe(small(), jax.devices())
    plan = planning.of_step(step, CHIP, "v5e:2x4")
    hbm = plan["hbm"]
    given = sum(hbm[name] for name in ("parameters", "ema", "optimizer", "batch"))
    assert hbm["total"] == 19.26 * 2**30 + held * given and given > 0
    assert not plan["fits"] and plan["would_fit"] == []  # so small a step cannot save so much
    assert planning.remarks(plan)[0].startswith("Does not fit: 19.")
    message = "something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        planning.of_step(step, CHIP, "v5e:2x4")


def test_what_would_fit_is_said_and_true():
    step = planning.describe(small(), jax.devices())
    need = estimate.memory(step.plan, step.state, step.batch, step.constants, step.mesh)
    tight = topology.Chip(CHIP.flops, CHIP.clock, 0.8 * need.total, CHIP.link)
    options = planning.would_fit(step, tight, need.total)
    assert "--config.mesh.fsdp=8 --config.mesh.data=-1" in options
    other = planning.describe(small(**{"mesh.fsdp": 8}), jax.devices())
    then = estimate.memory(other.plan, other.state, other.batch, other.constants, other.mesh)
    assert then.total <= tight.hbm
    nothing = topology.Chip(CHIP.flops, CHIP.clock, 1.0, CHIP.link)
    assert planning.would_fit(step, nothing, need.total) == []


def test_what_is_kept_costs_memory_and_saves_time():
    by_remat = {}
    for remat in ("full", "attention", "qkv", "up", "mlp"):
        step = planning.describe(small(**{"model.backbone.remat": remat}), jax.devices())
        memory = estimate.memory(step.plan, step.state, step.batch, step.constants, step.mesh)
        seconds = estimate.seconds(step.plan, step.state, CHIP, step.mesh)
        by_remat[remat] = memory.activations, seconds
    kept, seconds = zip(*by_remat.values(), strict=True)
    assert list(kept) == sorted(kept) and list(seconds) == sorted(seconds, reverse=True)
    # One row a device: 384 positions, 2 layers, width 256 in 16 bits.
    assert by_remat["full"][0] == 384 * 2 * 256 * 2
    assert by_remat["mlp"][0] == 384 * 2 * 2 * (256 + 128 * 2 + 128 * 4 + 2 * 256)


def test_search_prints_what_it_compiles_and_returns_the_best(monkeypatch):
    monkeypatch.setattr(topology, "describe", lambda name: (CHIP, jax.devices()))
    said = []
    best = planning.search(small(), "v5e:2x4", 1, said.append)
    assert best["fits"] and len(said) == 1 and said[0].endswith(" s")
    assert best["changes"]["train.accumulate"] == 1  # it fits in one piece, which is faster
    assert best["mesh"]["fsdp"] == best["changes"]["mesh.fsdp"]
    tiny_chip = topology.Chip(CHIP.flops, CHIP.clock, 1.0, CHIP.link)
    monkeypatch.setattr(topology, "describe", lambda name: (tiny_chip, jax.devices()))
    with pytest.raises(UserError, match="nothing fits v5e:2x4"):
        planning.search(small(), "v5e:2x4", 1, said.append)


def test_times_by_hand():
    cost = hlo.Cost()
    cost.cycles["backbone"] = 3e9
    cost.kernels["splash_mha_fwd"] = 2
    cost.kernels["splash_mha_dkv"] = 1
    cost.sent[hlo.Collective("all-gather", "fsdp", True)] = 36e9
    cost.sent[hlo.Collective("all-reduce", hlo.SLICES, False)] = 6.25e9
    found = planning.times(cost, CHIP, 0.4 * 197e12, model_flops=197e12)
    assert found["cycles_s"] == 2.0 and found["kernels_s"] == 4.5
    assert found["collectives_sync_s"] == 1.0 and found["collectives_async_s"] == 0.2
    assert found["step_s"] == [7.5, 7.7]
    assert found["mfu"] == [pytest.approx(1 / 7.7), pytest.approx(1 / 7.5)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.data": 3}, "config.mesh .data=3, fsdp=4, tensor=1. does not fit 8 devices"),
        ({"input.batch_size": 12}, "batch_size = 12 does not divide by the 8 replicas"),
        ({"train.accumulate": 3}, "config.train.accumulate = 3"),
        ({"model.backbone.width": 2302, "model.backbone.mlp_dim": 4096}, "does not divide by"),
    ],
)
def test_what_does_not_fit_itself_is_said_before_compiling(changes, message):
    with pytest.raises(UserError, match=message):
        planning.describe(small(**changes), jax.devices())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("8x8", "write chip, shape and number of slices like v5e:4x4"),
        ("v5e", "write chip, shape"),
        ("v5r:4x4", 'no chip "v5r".*v5p'),
        pytest.param("v5e:3x5", "is unknown to the compiler", marks=needs_libtpu),
    ],
)
def test_a_topology_that_is_none_is_named(name, message):
    with pytest.raises(UserError, match=message):
        topology.describe(name)


def test_without_the_compiler_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs libtpu: pip install"):
        topology.describe("v5e:4x4")


@pytest.mark.parametrize(("name", "argument"), [("2b", None), ("9b", None), ("1b", None)])
def test_recipes_have_the_papers_batch_and_the_published_sizes(name, argument):
    config = recipe(name, argument)
    assert config.input.batch_size == 2048 and config.optim.lr == 1e-4
    assert config.loss.text_weight == 0.005 and config.input.seq_len >= 128 + 256
    sizes = {"2b": "gemma2_2b", "9b": "gemma2_9b", "1b": "gemma3_1b"}
    for field, value in preset(sizes[name]).items():
        assert config.model.backbone[field] == value
    with pytest.raises(UserError, match="no layout for the topology"):
        recipe(name, "v5e_65")


@pytest.mark.parametrize(
    ("kind", "flops"), [("TPU v5 lite", 197e12), ("NVIDIA H100 80GB HBM3", 989e12), ("cpu", None)]
)
def test_the_peak_of_a_device(kind, flops):
    assert topology.peak(kind) == flops


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_compilers_names_of_chips_are_those_of_the_peaks(name):
    chip, devices = topology.describe(name)
    assert topology.peak(devices[0].device_kind) == chip.flops


@needs_libtpu
def test_a_small_recipe_compiles_for_a_tpu():
    found = planning.make(small(), "v5e:2x4")
    assert found["fits"] and found["devices"] == 8
    program = found["program"]
    assert any("splash" in kernel and "fwd" in kernel for kernel in program["kernels"])
    # What is issued is at least what the model needs, and recomputation and padding are not all.
    model, issued = planning.flops_of(found)
    assert 0.8 * model < issued < 2.5 * model
    gathered = [c for c in program["collectives"] if c["kind"] == "all-gather"]
    assert any(c["axes"] == "fsdp" for c in gathered)
    low, high = found["estimate"]["step_s"]
    assert 0 < low <= high


LAYOUTS = list(plans.cases())


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_recipe_fits_by_size(name, layout):
    """No topology needs the compiler for this: as many stand-ins as it has chips."""
    chip, _, shape = plans.TOPOLOGIES[layout].partition(":")
    shape, _, slices = shape.partition("*")
    per_slice = int(np.prod([int(x) for x in shape.split("x")]))
    devices = [StandIn(i, per_slice) for i in range(per_slice * int(slices or 1))]
    config = recipe(name.removeprefix("unifluid_"), layout)
    mesh = planning.sharding.make_mesh(config.mesh, devices)
    planning.sharding.check_batch(config.input.batch_size, config.train.accumulate, mesh)
    print_ = planning.blueprint(config)
    shapes = jax.eval_shape(print_.model.init, jax.random.key(0))
    specs = jax.tree.leaves(planning.sharding.shardings(print_.model.axes, shapes, mesh))
    held = sum(
        np.prod(spec.shard_shape(x.shape))
        for spec, x in zip(specs, jax.tree.leaves(shapes), strict=True)
    )
    # Parameters, EMA and two moments in float32 leave room for the rest.
    assert 16 * held < 0.6 * topology.CHIPS[chip].hbm


class StandIn:
    """A device of a topology, as far as a mesh looks at it."""

    platform, device_kind, process_index = "stand-in", "stand-in", 0

    def __init__(self, number, per_slice):
        self.id, self.slice_index = number, number // per_slice


@needs_libtpu
@pytest.mark.plans
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_recipe_compiles_and_fits(name, layout):
    found = planning.make(recipe(name.removeprefix("unifluid_"), layout), plans.TOPOLOGIES[layout])
    assert found["fits"], planning.remarks(found)


def test_the_page_of_plans_is_made_of_the_file():
    """docs/plans.md says what docs/plans.json holds, no more, and what is of another config."""
    kept = json.loads(Path("docs/plans.json").read_text())
    page = Path("docs/plans.md").read_text()
    assert page == plans.page(kept)
    assert kept.keys() <= {f"{name} {layout}" for name, layout in LAYOUTS}
    name, layout = LAYOUTS[0]
    now = {**next(iter(kept.values())), "fingerprint": plans.fingerprint(plans.load(name, layout))}
    assert "earlier" not in plans.page({f"{name} {layout}": now})
    page = plans.page({f"{name} {layout}": {**now, "fingerprint": "of another config"}})
    assert f"| {layout} (earlier) |" in page and "before the last change of its config" in page


def test_a_plan_is_of_what_the_step_depends_on():
    name, layout = LAYOUTS[0]
    config, mark = plans.load(name, layout), plans.fingerprint(plans.load(name, layout))
    with config.unlocked():
        config.input.mixture, config.input.text_drop, config.train.keep = (), 0.2, 9
    assert plans.fingerprint(config) == mark
    for section, field in (("model", "bidirectional_prefix"), ("input", "seq_len")):
        other = plans.load(name, layout)
        other[section][field] = not other[section][field]
        assert plans.fingerprint(other) != mark
