"""Breaks training runs in every way a machine can, and compares them with an undisturbed one.

    python tests/faults.py --faults=100 --seed=0

A run is started again after every fault, each time with one, two or four processes. Faults, at
random moments: SIGKILL, SIGTERM, SIGKILL while a checkpoint is being written, SIGKILL and then a
file of the last checkpoint cut short or with a flipped bit, SIGKILL of one of several processes. At
the end, parameters, average, moments, every logged number and the examples of every step must be,
bit for bit, those of the run that nothing happened to.

The program is `unifluid train` with its real input; only the model is a smaller one, for most of a
start is tracing and compiling. Processes are forked from this one, which has imported everything
and used nothing: that saves seconds too, and a killed process is as dead as any other.
"""

import argparse
import atexit
import collections
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import types
from pathlib import Path

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

# An installed package brings a top-level "tests" of its own, which would go before this folder.
sys.modules["tests"] = types.ModuleType("tests")
sys.modules["tests"].__path__ = [str(Path(__file__).parent)]
sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny  # noqa: E402

from unifluid_jax import __main__, checkpoint, distributed, metrics, sharding, tasks, trees  # noqa: E402
from unifluid_jax import config as configs  # noqa: E402

KINDS = ("kill", "kill at once", "term", "kill while saving", "truncate", "flip", "kill one")
STEPS = 60
DEVICES = 8
PATIENCE = 400  # seconds; what takes longer hangs


class Small:
    """Next token and noised latent, from one token and one latent each."""

    axes = {"embed": ("vocab", None), "latent": ("embed", "mlp")}

    def init(self, key):
        shapes = {"embed": (512, 16), "latent": (32, 32)}
        return {name: 0.1 * jax.random.normal(key, shape) for name, shape in shapes.items()}


class SmallTask(tasks.UniFluidTask):
    """The unified model's input and randomness with a model of two matrices."""

    def __init__(self, config):
        super().__init__(config)
        self.model = Small()

    def loss(self, params, constants, batch, key_B, total):
        embed, latent = params["embed"], params["latent"]
        ids = batch["tokens"] % 512, batch["text_target"] % 512
        score = jnp.einsum("bld,vd->blv", embed[ids[0]], embed)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(score), ids[1][:, :, None], 2)[:, :, 0]
        x = batch["latent_mean"]
        noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(key_B)
        error = ((x + noise) @ latent - x) ** 2
        text = (nll * batch["text_weight"]).sum() / total["text"]
        visual = (error.mean(-1) * batch["image_weight"]).sum() / total["image"]
        return text + visual, {"loss": text + visual, "loss_text": text, "loss_visual": visual}


# --- processes ---


def fork(function, *arguments, log=None):
    """The pid of a new process that calls the function and ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        if log is not None:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
        function(*arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid, seconds=PATIENCE):
    """The exit code of a process, negative for a signal; one that does not end fails the test."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGABRT)
    raise AssertionError(f"process {pid} did not end within {seconds} s")


def build(folder):
    tiny.build(folder)
    changes = {
        "input.streams": DEVICES,
        "mesh": {"data": 1, "fsdp": DEVICES, "tensor": 1},
        "train.steps": STEPS,
        "train.checkpoint_every": 4,
        "train.keep": 2,
    }
    config = tiny.unifluid(folder, **changes)
    (folder / "config.json").write_text(json.dumps(configs.to_json(config)))


def unifluid_train(folder, workdir, number, numbers, port):
    """`unifluid train`, which also notes the examples of every step."""
    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    jax.config.update("jax_num_cpu_devices", DEVICES // numbers)
    tasks._TASKS["unifluid"] = SmallTask
    distributed._HEARTBEAT = 20  # seconds of silence: a hundred faults are not to wait for 100 each
    step = [0]
    begin, shard = metrics.Writer.__init__, sharding.shard_batch

    def noted_begin(self, workdir, start_step=0):
        step[0] = start_step
        begin(self, workdir, start_step)

    def noted_shard(batch, mesh):
        step[0] += 1
        rows = sharding.local_rows(mesh, DEVICES * len(batch["stop"]) // len(mesh.local_devices))
        ids = {row: batch["example_id"][i].tolist() for i, row in enumerate(rows)}
        line = json.dumps({"step": step[0], "rows": ids}) + "\n"
        with open(workdir / "examples.jsonl", "a", encoding="utf-8") as stream:
            stream.write(line)
        return shard(batch, mesh)

    metrics.Writer.__init__, sharding.shard_batch = noted_begin, noted_shard
    sys.argv = ["unifluid", "train", f"--config={folder / 'config.json'}", f"--workdir={workdir}"]
    # A single one too: only then it adds up as several do (docs/running.md).
    sys.argv += [f"--coordinator=localhost:{port}", f"--processes={numbers}"]
    sys.argv += [f"--process={number}", "--wait_seconds=120"]
    __main__.main()


def launch(folder, workdir, numbers):
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    workdir.mkdir(parents=True, exist_ok=True)
    return [
        fork(unifluid_train, folder, workdir, i, numbers, port, log=workdir / f"log.{i}.txt")
        for i in range(numbers)
    ]


# --- what a run leaves ---


def outcome(workdir, file):
    """Writes the last state, leaf by leaf."""
    folder, _ = checkpoint.locate(workdir, None)
    saved = checkpoint.ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), saved)
    with checkpoint.Checkpointer(workdir, keep=2) as checkpoints:
        state = checkpoints.restore(abstract).state
    np.savez(file, **{name: np.asarray(leaf) for name, leaf in trees.flatten(state).items()})


def lines(path):
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # cut short by a kill
    return found


def numbers(workdir):
    """What metrics.jsonl says, but for speeds and times."""
    return [
        {name: x for name, x in line.items() if not name.endswith("/s") and "time/" not in name}
        for line in lines(workdir / "metrics.jsonl")
    ]


def examples(workdir):
    """{(step, row): examples}; a step that was done again must have had the same."""
    found = {}
    for line in lines(workdir / "examples.jsonl"):
        for row, ids in line["rows"].items():
            assert found.setdefault((line["step"], row), ids) == ids, (line["step"], row)
    return found


def compare(workdir, reference):
    assert wait(fork(outcome, workdir, workdir / "state.npz")) == 0, workdir
    with np.load(workdir / "state.npz") as a, np.load(reference / "state.npz") as b:
        assert set(a) == set(b) and any(name.startswith("ema/") for name in a)
        for name in a:
            assert a[name].tobytes() == b[name].tobytes(), f"{name} differs in {workdir}"
    assert numbers(workdir) == numbers(reference), workdir
    assert examples(workdir) == examples(reference), workdir


# --- faults ---


def steps_of(workdir):
    path = workdir / "checkpoints"
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit()) if path.exists() else []


def damage(workdir, kind, rng):
    """Harms one file of the last checkpoint; says which, or None where it is the only one."""
    if len(steps := steps_of(workdir)) < 2:
        return None
    folder = workdir / "checkpoints" / str(steps[-1])
    file = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size))
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data))
    if kind == "truncate":
        del data[at:]
    else:
        data[at] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return f"{file.relative_to(workdir)} at {at}"


def disturb(kind, pids, workdir, rng):
    """Waits for its moment and strikes; the victims' pids, none when the run was faster."""
    begun, before = time.monotonic(), len(lines(workdir / "metrics.jsonl"))
    started = time.time()
    delay, wanted = rng.uniform(0, 0.05), rng.randint(1, 6)
    if kind == "kill at once":
        moment = begun + rng.uniform(0, 4)
    while _alive(pids[0]):
        if kind == "kill at once":
            ready = time.monotonic() >= moment
        elif kind == "kill while saving":
            # One of an earlier life may still lie there.
            ready = any(
                path.stat().st_mtime > started
                for path in workdir.glob("checkpoints/*.orbax-checkpoint-tmp")
            )
        else:
            # A resumed run first cuts the log back to where it goes on.
            now = len(lines(workdir / "metrics.jsonl"))
            before = min(before, now)
            ready = now >= before + wanted
        if ready:
            time.sleep(delay if kind != "kill while saving" else delay / 5)
            victims = [rng.choice(pids)] if kind in ("kill one", "term") else pids
            for pid in victims:
                os.kill(pid, signal.SIGTERM if kind == "term" else signal.SIGKILL)
            return victims
        time.sleep(0.002)
        assert time.monotonic() < begun + PATIENCE, f"no moment for {kind} in {workdir}"
    return []


def _alive(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def check_codes(kind, codes, victims, pids):
    for pid, code in zip(pids, codes, strict=True):
        if not victims:
            assert code == 0, f"an undisturbed process ended with {code}"
        elif kind == "term":
            # 75: saved. -15: it came before there was anything to save. 0: after all was.
            assert code in (75, 0, -signal.SIGTERM) or len(pids) > 1, code
        elif pid in victims:
            assert code in (-signal.SIGKILL, 0), code
        else:
            assert code != 2, "a lost process is not the user's mistake"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments")
    parser.add_argument("--folder", help="where to work; by default a temporary folder")
    given = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    rng = random.Random(given.seed)
    folder = Path(given.folder or tempfile.mkdtemp(prefix="faults"))
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        assert wait(fork(build, folder)) == 0
    reference = folder / "undisturbed"
    if not (reference / "state.npz").exists():
        shutil.rmtree(reference, ignore_errors=True)
        assert wait(*launch(folder, reference, 1)) == 0, reference
        assert wait(fork(outcome, reference, reference / "state.npz")) == 0
    assert len(numbers(reference)) == STEPS
    print(f"undisturbed run in {reference}", flush=True)

    count, episode = collections.Counter(), 0
    while count.total() < given.faults:
        workdir = folder / f"run_{given.seed}_{episode:03d}"
        shutil.rmtree(workdir, ignore_errors=True)
        episode += 1
        while True:
            begun, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            kind = rng.choice(KINDS) if count.total() < given.faults else None
            processes = rng.choice((2, 2, 4) if kind == "kill one" else (1, 1, 1, 2, 4))
            pids = launch(folder, workdir, processes)
            victims = disturb(kind, pids, workdir, rng) if kind else []
            codes = [wait(pid) for pid in pids]
            check_codes(kind, codes, victims, pids)
            harmed = None
            if victims:
                count[kind] += 1
                if kind in ("truncate", "flip"):
                    harmed = damage(workdir, kind, rng)
            used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used
            print(
                f"{count.total():3d} run {episode}: {kind if victims else 'no fault'}"
                f"{f' ({harmed})' if harmed else ''}, {processes} processes, exit codes {codes}, "
                f"saved {steps_of(workdir)}, {time.monotonic() - begun:.1f} s "
                f"({used:.1f} of the processor)",
                flush=True,
            )
            if not any(codes) and steps_of(workdir)[-1:] == [STEPS] and not victims:
                break
        compare(workdir, reference)
        print(f"run {episode}: as if nothing had happened", flush=True)
    kinds = ", ".join(f"{n} x {kind}" for kind, n in sorted(count.items()))
    moved = len(list(folder.glob(f"run_{given.seed}_*/damaged/*")))
    print(f"{count.total()} faults ({kinds}) in {episode} runs, {moved} damaged checkpoints found")
    if given.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
