"""The shipped experiments: complete, documented, and accepted by what reads them."""

import ast
import inspect
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import tiny, worlds
from unifluid_jax import config as configs
from unifluid_jax import evals, image_tokenizer, losses, optim, sharding, tasks
from unifluid_jax.errors import UserError
from unifluid_jax.input import pipeline
from unifluid_jax.models.vae import VaeConfig
from unifluid_jax.samplers import sampler_from

FOLDER = Path("experiments")
LOSSES = {
    "unifluid": losses.unified,
    "tokenizer": losses.autoencoder,
    "siglip": losses.contrastive,
}
SWITCHES = ("debug",)
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem[0] != "_")


def load(name, arg=""):
    """The config; one for finetuning finetunes the quickstart's model, as `base` provides it."""
    if name.startswith("finetune"):
        arg = ",".join(filter(None, [arg, f"base={load.base}"]))
    return configs.load(f"{FOLDER / name}.py" + (f":{arg}" if arg else ""))


@pytest.fixture(scope="module", autouse=True)
def base(tmp_path_factory):
    """A checkpoint of the quickstart's small model, its weights random."""
    load.base = tmp_path_factory.mktemp("runs") / "quickstart"
    worlds.save_checkpoint(load.base, load("quickstart", "debug"))
    return load.base


def doc(name):
    return ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text()))


def documented(name):
    """Every argument of the docstring with values to try: those in quotes, or its kind's."""
    paragraph = re.search(r"^Arguments: (.*?)(\n\n|\Z)", doc(name), re.DOTALL | re.MULTILINE)[1]
    found = {}
    for argument, _, remark in re.findall(r"`(\w+)`( \(([^)]*)\))?", paragraph):
        found[argument] = re.findall(r'"(\w+)"', remark)
    return found


def arguments():
    for name in NAMES:
        yield name, ""
        for argument, values in documented(name).items():
            if argument == "base":
                continue  # no case can do without
            if values:
                yield from ((name, f"{argument}={value}") for value in values)
            else:
                yield name, argument if argument in SWITCHES else f"{argument}=123"


CASES = list(arguments())
# What needs files that are no part of the code (test_plan.py compiles it), or not.
RECIPES = {case for case in CASES if case[0].startswith("unifluid_") and case[1] != "debug"}


def test_the_cases_below_are_no_empty_list():
    assert {"quickstart", "tokenizer_small"} <= set(NAMES)
    assert ("quickstart", "process=flow") in CASES and ("tokenizer_small", "debug") in CASES


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_has_command_expectation_and_every_argument(name, monkeypatch):
    first, *_ = doc(name).split("\n\n")
    assert "\n" not in first and first.endswith(".")
    launch = rf"^ +unifluid train --config=experiments/{name}.py --workdir=runs/{name}$"
    assert re.search(launch, doc(name), re.MULTILINE)
    assert re.search(r"^Expected: .+", doc(name), re.MULTILINE)
    calls = []
    parse = configs.parse_arg
    monkeypatch.setattr(
        configs, "parse_arg", lambda arg, **kw: calls.append(kw) or parse(arg, **kw)
    )
    load(name)
    known = calls[0]  # those of a config that it builds on may follow
    assert set(documented(name)) == set(known)
    assert known["debug"] is False
    assert known.get("base", "runs/quickstart") == "runs/quickstart"
    for argument, values in documented(name).items():
        assert not values or known[argument] in values


@pytest.mark.parametrize(("name", "arg"), CASES)
def test_every_documented_argument_works(name, arg):
    config = load(name, arg)
    assert config.is_locked
    with pytest.raises(AttributeError):
        config.train.stepz = 1
    values, plain = configs.to_json(config), configs.to_json(load(name))
    assert configs.to_json(configs.from_json(values)) == values
    argument, _, value = arg.partition("=")
    if argument == "steps":
        assert config.train.steps == 123
    elif argument and value not in documented(name)[argument][:1]:  # the first is the default
        assert values != plain, "changes nothing"


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("finetune")])
def test_finetuning_takes_the_model_as_it_is(name, base, tmp_path):
    config, stored = load(name), configs.to_json(load("quickstart", "debug"))
    kept = configs.to_json(config)
    for group in ("model", "tokenizer", "image_tokenizer", "diffusion", "sampling"):
        assert kept[group] == stored[group], group
    assert config.init_from == str(base)
    with pytest.raises(UserError, match='no model ".*nothing": no such folder'):
        configs.load(f"{FOLDER / name}.py:base={tmp_path / 'nothing'}")


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_argument_is_named(name):
    with pytest.raises(UserError, match='config argument "debugg" is unknown.*debug'):
        load(name, "debugg")


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    """An image tokenizer of the small experiment's sizes; weights do not matter here."""
    folder = tmp_path_factory.mktemp("image_tokenizer")
    vae = configs.make_part(VaeConfig, "config.model", load("tokenizer_small", "debug").model)
    abstract = jax.eval_shape(image_tokenizer.module(vae).init, jax.random.key(0))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    dim = vae.token_dim
    image_tokenizer.save(folder, vae, params, np.zeros(dim), np.ones(dim), {})
    return folder


@pytest.mark.parametrize(("name", "arg"), [case for case in CASES if case not in RECIPES])
def test_the_parts_of_the_trainer_accept_it(name, arg, tokenizer_files):
    """All that `train` checks before it begins, but for the data."""
    config = load(name, arg)
    if "image_tokenizer" in config:
        config.image_tokenizer.path = str(tokenizer_files)
    task = tasks.make(config)
    shapes = jax.eval_shape(task.model.init, jax.random.key(0))
    optim.make(config.optim, shapes, config.train.steps)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    sharding.check_batch(config.input.batch_size, config.train.accumulate, mesh)
    sharding.shardings(task.model.axes, shapes, mesh)
    # "every" of all evaluations divides the last step.
    made = {name: evals._make(name, fields) for name, fields in config.evals.items()}
    assert set(evals.due(made, 0, 1)) == {n for n, e in config.evals.items() if e["every"]}
    assert config.evals and pipeline.mixture(config)
    for field in ("log_every", "checkpoint_every", "keep"):
        assert config.train[field] > 0
    for name in ("ema_decay", "ema_warmup"):
        assert name in config.train

    loss = LOSSES[config.task]
    signature = inspect.signature(loss)
    wanted = {p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert set(config.get("loss", ())) == wanted - {"text_slots", "image_slots"}
    if config.task == "unifluid":
        sampler_from(task._parts.process, **config.sampling.sampler)
        for entry in pipeline.mixture(config):
            for cap, needed in task._parts.sequencer.largest(entry["task"]).items():
                assert needed <= config.input[cap], (entry["task"], cap)


@pytest.mark.parametrize("name", NAMES)
def test_debug_is_small(name):
    config, full = load(name, "debug"), load(name)
    assert config.train.steps <= 50 < full.train.steps
    assert config.train.checkpoint_every < config.train.steps
    assert config.input.batch_size <= full.input.batch_size
    assert all(0 < fields["limit"] <= 32 for fields in config.evals.values())


def test_the_tests_own_config_has_the_fields_of_the_experiments(tmp_path):
    """What the trainer is tested with is what the experiments say."""
    made = {
        "quickstart": tiny.unifluid,
        "tokenizer_small": tiny.tokenizer,
        "siglip_small": tiny.siglip,
    }
    for name, make in made.items():
        tested, shipped = configs.to_json(make(tmp_path)), configs.to_json(load(name))
        assert tested.keys() - {"sampling"} == shipped.keys() - {"sampling"}
        for group in {"input", "loss", "mesh", "optim", "train"} & tested.keys():
            assert tested[group].keys() == shipped[group].keys(), group
