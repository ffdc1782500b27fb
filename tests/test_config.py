import json

import pytest
from ml_collections import ConfigDict, config_dict

from unifluid_jax import config as configs
from unifluid_jax.errors import UserError, nearest


def make() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,
            "train": {"steps": 100, "lr": 1e-3, "name": "x", "debug": False},
            "betas": (0.9, 0.95),
            "tasks": ("vqa", "caption"),
            "init": config_dict.placeholder(str),
            "untyped": None,
            "mixture": [{"weight": 1.0}, {"weight": 2.0}],
        }
    ).lock()


def write(tmp_path, text: str) -> str:
    path = tmp_path / "experiment.py"
    path.write_text(text)
    return str(path)


def test_parse_arg_converts_to_the_type_of_the_default():
    arg = configs.parse_arg(
        "size=2b, res=256,debug,rate=1e-2", size="tiny", res=64, debug=False, rate=1.0, n=3
    )
    assert arg.to_dict() == {"size": "2b", "res": 256, "debug": True, "rate": 0.01, "n": 3}
    assert type(arg.res) is int
    with pytest.raises(AttributeError):
        arg.other = 1


@pytest.mark.parametrize("arg", [None, "", ",", " "])
def test_parse_arg_without_items_gives_the_defaults(arg):
    assert configs.parse_arg(arg, debug=True).debug is True


def test_parse_arg_can_switch_off():
    assert configs.parse_arg("debug=false", debug=True).debug is False


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("sise=2b", r'"sise" is unknown \(did you mean "size"\?\)'),
        ("res=big", r'"res" must be of type int, got "big"'),
        ("res", r'"res" must be of type int, got "true"'),
        ("debug=maybe", r'"debug" must be of type bool, got "maybe"'),
        ("size=a,size=b", r'"size" is given twice'),
    ],
)
def test_parse_arg_names_what_is_wrong(arg, message):
    with pytest.raises(UserError, match=message):
        configs.parse_arg(arg, size="tiny", res=64, debug=False)


def test_nearest_offers_all_of_a_few_and_nothing_of_many():
    assert nearest("zzz", ["b", "a"]) == " (known: a, b)"
    assert nearest("zzz", [str(i) for i in range(100)]) == ""
    assert nearest("zzz", []) == ""


def test_load_runs_get_config_with_the_argument_and_locks(tmp_path):
    path = write(
        tmp_path,
        "from ml_collections import ConfigDict\n"
        "def get_config(arg=''):\n"
        "    return ConfigDict({'arg': arg})\n",
    )
    assert configs.load(path).arg == ""
    config = configs.load(f"{path}:size=2b,x=a:b")
    assert config.arg == "size=2b,x=a:b"
    assert config.is_locked


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", "line 1: SyntaxError"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError"),
        ("x = 1\n", "has no attribute 'get_config'"),
        ("def get_config(arg=''):\n    return {}\n", "must return a ConfigDict, got dict"),
        ("def get_config(arg=''):\n    return 1 / 0\n", "line 2: ZeroDivisionError"),
        (
            "from ml_collections import ConfigDict\n\n"
            "def get_config(arg=''):\n    return ConfigDict().lock().x\n",
            "line 4: AttributeError",
        ),
    ],
)
def test_load_says_where_a_config_file_fails(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        configs.load(write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_load_passes_on_the_error_of_an_argument(tmp_path):
    path = write(
        tmp_path,
        "from unifluid_jax.config import parse_arg\n"
        "def get_config(arg=''):\n    return parse_arg(arg, debug=False)\n",
    )
    with pytest.raises(UserError, match='did you mean "debug"'):
        configs.load(f"{path}:debgu")


def test_load_names_a_missing_or_unsuitable_file(tmp_path):
    with pytest.raises(UserError, match="no config file .*nowhere.py"):
        configs.load(str(tmp_path / "nowhere.py:debug"))
    with pytest.raises(UserError, match="no config file"):
        configs.load(str(tmp_path))
    (tmp_path / "config.yaml").write_text("a: 1")
    with pytest.raises(UserError, match="must be a .py file or a saved .json"):
        configs.load(str(tmp_path / "config.yaml"))
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(UserError, match="is not a saved config"):
        configs.load(str(tmp_path / "config.json"))


def test_json_round_trip_keeps_values_and_overrides(tmp_path):
    config = make()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(configs.to_json(config)))
    loaded = configs.load(str(path))
    assert not configs.differences(configs.to_json(config), configs.to_json(loaded))
    assert loaded.is_locked
    assert loaded.betas == (0.9, 0.95)
    configs.apply_overrides(loaded, ["--config.betas=(0.5,0.6)", "--config.mixture[1].weight=3"])
    assert loaded.betas == (0.5, 0.6)
    assert loaded.mixture[1]["weight"] == 3.0


def test_overrides_are_typed_and_leave_the_rest():
    config = make()
    rest = configs.apply_overrides(
        config,
        [
            "word",
            "--config.train.steps=7",
            "--other=1",
            "--config.train.lr",
            "2",
            "-config.train.debug",
            "--config.betas=(0.5, 1)",
            "--config.tasks=edit",
            "--config.tasks=vqa",
            "--config.init=there",
            "--config.mixture[0].weight=4",
            "--config.train.name=",
            "--",
            "--config.seed=1",
        ],
    )
    assert rest == ["word", "--other=1", "--", "--config.seed=1"]
    assert config.train.to_dict() == {"steps": 7, "lr": 2.0, "name": "", "debug": True}
    assert isinstance(config.train.lr, float)
    assert config.betas == (0.5, 1)
    assert config.tasks == ("edit", "vqa")
    assert config.init == "there"
    assert config.mixture[0]["weight"] == 4.0
    assert config.seed == 0
    configs.apply_overrides(config, ["--noconfig.train.debug"])
    assert config.train.debug is False


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.train.stesp=1", 'unknown "stesp" in config.train .did you mean "steps"'),
        ("--config.trian.steps=1", 'unknown "trian" in config .did you mean "train"'),
        ("--config.train.steps.more=1", "config.train.steps has no fields"),
        ("--config.train=1", "is a group of fields"),
        ("--config.train.steps=many", 'must be of type int .now 100., got "many"'),
        ("--config.train.steps=1.5", 'must be of type int .now 100., got "1.5"'),
        ("--config.train.steps=a: b", 'got "a: b"'),
        ("--config.train.lr=fast", 'must be of type float .now 0.001., got "fast"'),
        ("--config.train.debug=2", 'must be of type bool .now False., got "2"'),
        ("--config.train.steps", "Missing value"),
        ("--config.betas=(1,x)", "must be a tuple of float"),
        ("--config.betas=(1,'x')", "must be a tuple of float"),
        ("--config.tasks=(vqa,edit)", "must be a tuple of str"),
        ("--config.mixture=1", "is a list"),
        ("--config.mixture[2].weight=1", "config.mixture has 2 items"),
        ("--config.seed[0]=1", "config.seed is no list"),
        ("--config.untyped=1", "is None without a type"),
        ("--config..seed=1", "is no key"),
        ("--config.=1", "is no key"),
        ("--config.train.get=1", 'unknown "get"'),
    ],
)
def test_wrong_overrides_end_in_one_line(argument, message):
    config = make()
    with pytest.raises(UserError, match=message) as error:
        configs.apply_overrides(config, [argument])
    assert "\n" not in str(error.value)


def test_differences_name_leaves_by_their_path():
    old = {"a": {"b": 1, "c": [1, 2]}, "gone": 1}
    new = {"a": {"b": 2, "c": [1, 2]}, "new": None}
    assert configs.differences(old, new) == {
        "a.b": (1, 2),
        "gone": (1, "(absent)"),
        "new": ("(absent)", None),
    }
