import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unifluid_jax import checkpoint, trees
from unifluid_jax.checkpoint import Checkpointer
from unifluid_jax.errors import UserError

META = {"config": {"model": {"width": 8}, "betas": [0.9, 0.95]}}


def make_state(value: float = 0.0):
    """A train state with everything that bends checkpoints: masked moments, scalars, bfloat16."""
    params = {
        "backbone": {"w": jnp.arange(64.0).reshape(8, 8) + value, "b": jnp.full(8, value)},
        "head": {"w": jnp.full((8, 16), value, jnp.bfloat16)},
    }
    train = {"backbone": {"w": True, "b": True}, "head": {"w": False}}
    return {
        "step": jnp.asarray(7, jnp.int32),
        "params": params,
        "ema": jax.tree.map(lambda x: x + 1, params),
        "opt_state": optax.masked(optax.adam(1e-3), train).init(params),
    }


def place(tree, devices: int, axis: str = "fsdp"):
    """Abstract leaves, matrices cut over so many devices."""
    mesh = jax.make_mesh(
        (devices,), (axis,), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )

    def leaf(x):
        spec = jax.P(axis) if x.ndim == 2 else jax.P()
        sharding = jax.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, tree)


def put(tree, abstract):
    return jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), tree, abstract)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def saved(tmp_path):
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        checkpointer.save(7, make_state(), {"0": {"next": 70}}, META)
    return tmp_path


def test_a_step_comes_back_as_it_was(saved):
    with Checkpointer(saved, keep=3) as checkpointer:
        assert checkpointer.latest_step() == 7
        restored = checkpointer.restore(place(make_state(), 1))
    assert_equal(restored.state, make_state())
    assert (restored.step, restored.iterator) == (7, {"0": {"next": 70}})
    assert {name: x for name, x in restored.meta.items() if name != "leaves"} == META


def test_restore_onto_other_meshes(tmp_path):
    """8 -> 4 -> 1 -> 8 devices, each restoring what the one before saved."""
    state = make_state(0.5)
    previous = put(state, place(state, 8))
    for i, devices in enumerate([4, 1, 8]):
        with Checkpointer(tmp_path / str(i), keep=1) as checkpointer:
            checkpointer.save(1, previous, {}, {})
            abstract = place(state, devices)
            previous = checkpointer.restore(abstract).state
        assert_equal(previous, state)
        for leaf, want in zip(jax.tree.leaves(previous), jax.tree.leaves(abstract), strict=True):
            assert leaf.sharding == want.sharding


def test_the_saved_state_may_be_donated_at_once(tmp_path):
    add = jax.jit(lambda x: jax.tree.map(lambda a: a + 1, x), donate_argnums=0)
    state = {"w": jnp.zeros(1 << 22)}
    with Checkpointer(tmp_path, keep=10) as checkpointer, jax.transfer_guard("disallow"):
        for step in range(4):
            checkpointer.save(step, state, {}, {})
            state = add(add(state))
        for step in range(4):
            read = checkpointer.restore(place(state, 1), step).state["w"]
            assert np.unique(read) == [2 * step]


def test_only_the_last_steps_stay_and_none_is_saved_twice(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.latest_step() is None
        for step in (1, 2, 3):
            checkpointer.save(step, {"w": jnp.full(2, step)}, {}, {})
        checkpointer.save(3, {"w": jnp.zeros(2)}, {}, {})
        checkpointer.wait()
        abstract = {"w": jax.ShapeDtypeStruct((2,), jnp.int32)}
        np.testing.assert_array_equal(checkpointer.restore(abstract).state["w"], 3)
        np.testing.assert_array_equal(checkpointer.restore(abstract, 2).state["w"], 2)
        with pytest.raises(UserError, match="no checkpoint of step 1 in .*: it has 2, 3"):
            checkpointer.restore(abstract, 1)


@pytest.mark.parametrize("which", ["ema", "params"])
@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/7"])
def test_parameters_alone_for_inference(saved, which, below):
    params = make_state()["params"]
    abstract = jax.eval_shape(lambda: params)
    read = checkpoint.restore_params(saved / below, abstract, which)
    assert_equal(read, make_state()[which])
    assert read["backbone"]["w"].devices() == {jax.devices()[0]}
    assert checkpoint.stored_meta(saved / below)["config"] == META["config"]
    assert checkpoint.stored_config(saved / below).model.width == 8


@pytest.fixture
def partly_frozen(tmp_path):
    """Two steps of a run that does not train the backbone; its states."""
    states = []
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        for step in (1, 2):
            full = make_state(step)
            trained = {"head": full["params"]["head"]}
            state = {
                "params": trained,
                "ema": jax.tree.map(lambda x: x + 1, trained),
                "frozen": {"backbone": make_state()["params"]["backbone"]},
            }
            checkpointer.save(step, state, {}, META)
            states.append(state)
    return tmp_path, states


def test_frozen_parameters_are_written_once_and_read_with_every_step(partly_frozen):
    workdir, (_, last) = partly_frozen
    folder = workdir / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["2", "frozen"]
    with Checkpointer(workdir, keep=1) as checkpointer:
        assert_equal(checkpointer.restore(place(last, 4)).state, last)
    for which in ("params", "ema"):
        whole = {**last[which], **last["frozen"]}
        abstract = jax.eval_shape(lambda whole=whole: whole)
        for path in (workdir, folder, folder / "2"):
            assert_equal(checkpoint.restore_params(path, abstract, which), whole)


def test_frozen_parameters_that_are_gone_or_unlike_are_named(partly_frozen):
    workdir, (_, last) = partly_frozen
    folder = workdir / "checkpoints"
    abstract = place(last, 1)
    wider = change(abstract, "frozen/backbone/w", ((8, 4), jnp.float32))
    with Checkpointer(workdir, keep=1) as checkpointer:
        with pytest.raises(UserError, match=r"frozen does not fit: backbone/w is float32\[8, 8\]"):
            checkpointer.restore(wider)
        (folder / "frozen" / "_METADATA").write_text("{")
        with pytest.raises(UserError, match="frozen, .* is damaged .* begin the run anew"):
            checkpointer.restore(abstract)
        shutil.rmtree(folder / "frozen")
        with pytest.raises(
            UserError, match="frozen, .* does not train, is missing; there is no older copy"
        ):
            checkpointer.restore(abstract)


@pytest.mark.parametrize("at", [0.2, 0.8])
def test_damaged_frozen_parameters_are_named_and_no_step_is_blamed(tmp_path, at):
    state = {
        "params": {"a": jnp.ones(4)},
        "frozen": {"b": jax.random.normal(jax.random.key(0), 512)},
    }
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state, {}, META)
    flip(largest(tmp_path / "checkpoints" / "frozen"), at)
    abstract = jax.eval_shape(lambda: {**state["params"], **state["frozen"]})
    message = r"checkpoints/frozen, .* is damaged .*; there is no older copy of it"
    with pytest.raises(UserError, match=message):
        checkpoint.restore_params(tmp_path, abstract, "params")
    with (
        Checkpointer(tmp_path, keep=2) as checkpointer,
        pytest.raises(checkpoint.Lost, match=message),
    ):
        checkpointer.restore(place(state, 1))
    assert checkpoint.saved_steps(tmp_path) == [1, 2] and not (tmp_path / "damaged").exists()


def test_a_damaged_step_with_frozen_parameters_gives_way_to_the_one_before(tmp_path):
    state = {"params": {"a": jnp.ones(4)}, "frozen": {"b": jnp.arange(8.0)}}
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state, {}, META)
    flip(largest(tmp_path / "checkpoints" / "2" / "state"))
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        restored = checkpointer.restore(place(state, 1))
    assert restored.step == 1
    assert_equal(restored.state, state)


def test_frozen_parameters_of_a_run_without_a_step_are_written_anew(tmp_path):
    """It was killed between the two; its initial checkpoint may be another one by now."""
    for value in (1.0, 2.0):
        state = {"params": {"a": jnp.ones(4)}, "frozen": {"b": jnp.full(8, value)}}
        with Checkpointer(tmp_path, keep=2) as checkpointer:
            checkpointer.save(1, state, {}, META)
        with Checkpointer(tmp_path, keep=2) as checkpointer:
            assert_equal(checkpointer.restore(place(state, 1)).state, state)
        shutil.rmtree(tmp_path / "checkpoints" / "1")


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="counts bytes as Linux does")
def test_parameters_alone_read_only_their_own_bytes(tmp_path):
    noise = jax.random.normal(jax.random.key(0), (3, 1 << 18))  # 3 x 1 MiB; does not compress
    state = {"ema": {"w": noise[0]}, "params": {"w": noise[1]}, "opt_state": {"w": noise[2]}}
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, state, {}, META)
    before = _bytes_read()
    read = checkpoint.restore_params(tmp_path, jax.eval_shape(lambda: state["ema"]), "ema")
    assert_equal(read, state["ema"])
    assert 0.9 * 2**20 < _bytes_read() - before < 1.2 * 2**20
    with pytest.raises(UserError, match='has no "raw": it has ema, opt_state, params'):
        checkpoint.restore_params(tmp_path, jax.eval_shape(lambda: state["ema"]), "raw")


def _bytes_read() -> int:
    with open("/proc/self/io") as stream:
        return int(stream.read().split("rchar:")[1].split()[0])


def change(tree, name, leaf):
    """The abstract tree with one leaf replaced, or without it for None."""
    keys = name.split("/")
    copy = jax.tree.map(lambda x: x, tree)
    node = copy
    for key in keys[:-1]:
        node = node[key]
    if leaf is None:
        del node[keys[-1]]
    else:
        node[keys[-1]] = jax.ShapeDtypeStruct(*leaf)
    return copy


@pytest.mark.parametrize(
    ("name", "leaf", "message"),
    [
        (
            "params/backbone/w",
            ((8, 4), jnp.float32),
            r"params/backbone/w is float32\[8, 8\], wanted float32\[8, 4\]$",
        ),
        (
            "ema/head/w",
            ((8, 16), jnp.float32),
            r"ema/head/w is bfloat16\[8, 16\], wanted float32\[8, 16\]$",
        ),
        (
            "params/backbone/new",
            ((3,), jnp.float32),
            r"params/backbone/new float32\[3\] is missing$",
        ),
        ("params/backbone/b", None, r"params/backbone/b float32\[8\] is not part of this model$"),
        ("ema", None, r"ema/backbone/b .* not part .*; ema/head/w"),
        ("extra", ((3,), jnp.float32), r'has no "extra": it has ema, opt_state, params, step$'),
    ],
)
def test_a_leaf_that_does_not_fit_is_named(saved, name, leaf, message):
    abstract = change(place(make_state(), 1), name, leaf)
    with Checkpointer(saved, keep=3) as checkpointer, pytest.raises(UserError, match=message):
        checkpointer.restore(abstract)


def test_many_leaves_that_do_not_fit_are_counted(saved):
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*x.shape, 2), x.dtype), place(make_state(), 1)
    )
    count = len(trees.flatten(abstract))
    with (
        Checkpointer(saved, keep=3) as checkpointer,
        pytest.raises(UserError, match=f"; and {count - 5} more$"),
    ):
        checkpointer.restore(abstract)


def test_a_place_without_checkpoints_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"no checkpoint in {path}"):
            checkpoint.stored_meta(path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.stored_config(tmp_path)


def test_a_workdir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write checkpoints to .*: Not a dir"):
        Checkpointer(tmp_path / "file", keep=1)


@pytest.mark.parametrize("victim", ["meta/metadata", "iterator/metadata", "state/_METADATA"])
@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_a_damaged_checkpoint_is_named(saved, victim, damage):
    path = saved / "checkpoints" / "7" / victim
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:10])
    with (
        Checkpointer(saved, keep=3) as checkpointer,
        pytest.raises(UserError, match="checkpoints/7 is damaged") as error,
    ):
        checkpointer.restore(place(make_state(), 1))
    assert "\n" not in str(error.value)


def test_array_data_that_is_gone_is_named(saved):
    for folder in (saved / "checkpoints" / "7" / "state").glob("**/d"):
        shutil.rmtree(folder)
    with (
        Checkpointer(saved, keep=3) as checkpointer,
        pytest.raises(UserError, match="checkpoints/7 is damaged"),
    ):
        checkpointer.restore(place(make_state(), 1))


KILLED = """
import os, sys
import jax.numpy as jnp
from unifluid_jax.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1], keep=3)
state = {"w": jnp.zeros(1 << 25)}
checkpointer.save(1, state, {}, {})
checkpointer.wait()
print("saved", flush=True)
while True:
    checkpointer.save(2, state, {}, {})
"""


def test_a_process_killed_while_saving_leaves_the_last_good_step(tmp_path, caplog):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout.readline() == b"saved\n"
    unfinished = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    while not unfinished.exists():
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert unfinished.exists()
    assert checkpoint.stored_meta(tmp_path).keys() == {"leaves"}
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        assert checkpointer.latest_step() == 1
        read = checkpointer.restore({"w": jax.ShapeDtypeStruct((1 << 25,), jnp.float32)})
    assert not np.any(read.state["w"])
    assert not unfinished.exists()
    assert "removing the unfinished checkpoint" in caplog.text


PROCESS = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_cpu_collectives_implementation", "gloo")
process, port, workdir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
from unifluid_jax.checkpoint import Checkpointer
mesh = jax.make_mesh((2,), ("fsdp",), (jax.sharding.AxisType.Auto,))
where = jax.NamedSharding(mesh, jax.P("fsdp"))
mine = np.full((1, 4), process, np.float32)
still = jax.make_array_from_process_local_data(where, mine + 5)
state = {"w": jax.make_array_from_process_local_data(where, mine), "frozen": {"v": still}}
kind = jax.ShapeDtypeStruct((2, 4), jnp.float32, sharding=where)
abstract = {"w": kind, "frozen": {"v": kind}}
iterator = {str(process): "x" * 3**process, "shared": 5}
with Checkpointer(workdir, keep=1) as checkpointer:
    checkpointer.save(1, state, iterator, {})
    restored = checkpointer.restore(abstract)
assert restored.iterator == {"0": "x", "1": "xxx", "shared": 5}
assert np.array_equal(restored.state["w"].addressable_shards[0].data, mine)
assert np.array_equal(restored.state["frozen"]["v"].addressable_shards[0].data, mine + 5)
"""


def test_two_processes_save_one_step_and_each_its_own_iterator(tmp_path):
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = str(server.getsockname()[1])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(i), port, str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()

    # One process goes on with what two have saved.
    kind = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        restored = checkpointer.restore({"w": kind, "frozen": {"v": kind}})
    assert restored.iterator == {"0": "x", "1": "xxx", "shared": 5}
    np.testing.assert_array_equal(restored.state["w"][:, 0], [0, 1])
    np.testing.assert_array_equal(restored.state["frozen"]["v"][:, 0], [5, 6])


# --- what is not what was saved ---


def several(folder, steps, **keep):
    with Checkpointer(folder, **{"keep": 9, **keep}) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(float(step)), {"0": step}, META)


def largest(folder):
    """The largest file; of arrays, one with values."""
    # Not those below ocdbt.process_0: only what does not compress is still read from there.
    values = [path for path in folder.glob("d/*") if path.is_file()]
    return max(values or [folder / "metadata"], key=lambda path: path.stat().st_size)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, os.unlink])
@pytest.mark.parametrize("victim", ["state", "iterator", "meta"])
def test_the_last_whole_step_is_taken_and_the_damaged_one_set_aside(
    tmp_path, caplog, damage, victim
):
    several(tmp_path, (1, 2, 3))
    damage(largest(tmp_path / "checkpoints" / "3" / victim))
    with Checkpointer(tmp_path, keep=9) as checkpointer:
        restored = checkpointer.restore(place(make_state(), 2))
        assert (restored.step, restored.iterator) == (2, {"0": 2})
        assert_equal(restored.state, make_state(2.0))
        assert checkpointer.latest_step() == 2
        assert "checkpoints/3 is damaged" in caplog.text
        assert (tmp_path / "damaged" / "3").is_dir()
        # The step may be done again, and damaged again.
        checkpointer.save(3, make_state(3.0), {"0": 3}, META)
    damage(largest(tmp_path / "checkpoints" / "3" / victim))
    with Checkpointer(tmp_path, keep=9) as checkpointer:
        assert checkpointer.restore(place(make_state(), 1)).step == 2
    assert [path.name for path in (tmp_path / "damaged").iterdir()] == ["3"]


@pytest.mark.parametrize("at", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_any_flipped_bit_of_the_values_is_found(saved, at):
    """Also when parameters alone are read, of those."""
    flip(largest(saved / "checkpoints" / "7" / "state"), at)
    with Checkpointer(saved, keep=3) as checkpointer, pytest.raises(UserError, match="is damaged"):
        checkpointer.restore(place(make_state(), 1), 7)
    abstract = jax.eval_shape(lambda: make_state()["params"])
    for which in ("ema", "params"):
        with contextlib.suppress(UserError):  # whole where the bit was not its own
            assert_equal(checkpoint.restore_params(saved, abstract, which), make_state()[which])


@pytest.mark.parametrize("at", [0.01, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_any_truncated_file_is_found(tmp_path, at):
    """Be it one of values, which lie apart where they are too many to compress, or of where."""
    state = {"w": jax.random.normal(jax.random.key(0), (64, 64)), "step": jnp.asarray(1)}
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, state, {"0": 1}, META)
    step, found = tmp_path / "checkpoints" / "1", set()
    for path in sorted(path for path in step.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        path.write_bytes(whole[: int(at * len(whole))])
        with Checkpointer(tmp_path, keep=1) as checkpointer:
            try:
                assert_equal(checkpointer.restore(place(state, 2), 1).state, state)
            except UserError as error:
                assert "is damaged" in str(error), error
                found.add(path.relative_to(step).parts[:-1])
        path.write_bytes(whole)
    # Orbax merges what the processes have written, but for the values.
    assert {("meta",), ("state", "d"), ("state", "ocdbt.process_0", "d")} <= found


def test_checksums_name_the_array(saved, monkeypatch):
    read = checkpoint._read_arrays

    def wrong(*arguments, **options):
        state = read(*arguments, **options)
        weight = state["ema"]["backbone"]["w"]
        state["ema"]["backbone"]["w"] = weight.at[3, 5].set(weight[3, 5] + 1e-6)
        return state

    monkeypatch.setattr(checkpoint, "_read_arrays", wrong)
    with (
        Checkpointer(saved, keep=3) as checkpointer,
        pytest.raises(UserError, match=r"7 is damaged \(checksums differ: ema/backbone/w\)"),
    ):
        checkpointer.restore(place(make_state(), 1), 7)


def test_where_no_step_is_whole_the_run_does_not_begin_anew(tmp_path):
    several(tmp_path, (1, 2))
    for step in ("1", "2"):
        truncate(largest(tmp_path / "checkpoints" / step / "meta"))
    for _ in range(2):
        with Checkpointer(tmp_path, keep=9) as checkpointer:
            assert checkpointer.latest_step() == 2
            message = "2 is damaged .*; and 1 older ones too: to begin the run anew, delete"
            with pytest.raises(UserError, match=message) as error:
                checkpointer.restore(place(make_state(), 1))
        assert "\n" not in str(error.value)


def test_another_model_is_no_damage(tmp_path):
    several(tmp_path, (1, 2))
    abstract = change(place(make_state(), 1), "params/backbone/b", ((9,), jnp.float32))
    with Checkpointer(tmp_path, keep=9) as checkpointer:
        with pytest.raises(
            UserError, match="2 does not fit: params/backbone/b is float32.8., want"
        ):
            checkpointer.restore(abstract)
        assert checkpointer.latest_step() == 2
    assert not (tmp_path / "damaged").exists()


# --- which steps stay ---


@pytest.mark.parametrize(
    ("keep", "stay"),
    [
        ({"keep": 2}, [6, 7]),
        ({"keep": 1, "keep_every": 3}, [3, 6, 7]),
        ({"keep": 1, "keep_best": "vqa/accuracy"}, [2, 7]),
        ({"keep": 1, "keep_best": "-vqa/accuracy"}, [4, 7]),
        ({"keep": 1, "keep_best": "none/such"}, [7]),
    ],
)
def test_the_last_those_of_a_period_and_the_best_stay(tmp_path, keep, stay):
    scores = {1: 0.5, 2: 0.9, 4: 0.1, 5: 0.3}
    for part in ((1, 2, 3), (4, 5, 6, 7)):  # the second process knows the scores of the first
        with Checkpointer(tmp_path, **keep) as checkpointer:
            for step in part:
                checkpointer.save(step, {"w": jnp.zeros(2)}, {}, {})
                assert not checkpointer.scored(step)
                if step in scores:
                    checkpointer.score(step, {"vqa/accuracy": scores[step]})
                    assert checkpointer.scored(step)
    assert checkpoint.saved_steps(tmp_path) == stay


# --- disks ---


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_named_and_loses_nothing(small_disk):
    noise = jax.random.normal(jax.random.key(0), (1 << 18,))  # 1 MiB; does not compress
    message = r"cannot write .*: No space left on device; step \d is the last one saved: make room"
    with (
        pytest.raises(UserError, match=message) as error,
        Checkpointer(small_disk, keep=9) as checkpointer,
    ):
        for step in range(1, 9):
            checkpointer.save(step, {"w": noise * step}, {}, {})
            checkpointer.wait() if step == 1 else checkpointer.check()
            time.sleep(0.05)
    assert "\n" not in str(error.value)
    with Checkpointer(small_disk, keep=9) as checkpointer:
        restored = checkpointer.restore({"w": jax.ShapeDtypeStruct((1 << 18,), jnp.float32)})
    last = checkpoint.saved_steps(small_disk)[-1]
    assert restored.step == last >= 1
    np.testing.assert_array_equal(restored.state["w"], noise * last)
