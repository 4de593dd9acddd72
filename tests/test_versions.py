"""What earlier versions recorded stays readable."""

import copy
import json
from pathlib import Path

import pytest

from declip_jax import versions
from declip_jax.config import Config

RUNS = Path(__file__).parent / "runs"
NAMES = ("clip_vit", "declip_resnet")


def recorded(name):
    return json.loads((RUNS / name / "config.json").read_text())


def added(tree=versions._ADDED[0], prefix=()):
    """Paths of fields and of whole sections that came later; the outermost were always there."""
    for name, value in tree.items():
        if prefix or not isinstance(value, dict):
            yield prefix + (name,)
        if isinstance(value, dict):
            yield from added(value, prefix + (name,))


def without(config, path):
    config = copy.deepcopy(config)
    section = config
    for part in path[:-1]:
        section = section[part]
    section.pop(path[-1], None)
    return config


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_configuration_is_what_it_was(name):
    """And what is recorded of it now has a version, with which it reads the same."""
    config = Config.recorded(recorded(name), "the run")
    assert config.loss.mlm_capacity == recorded(name)["loss"]["mlm_places"]
    assert config.views["strong"].grayscale_prob == recorded(name)["views"]["strong"]["grey_prob"]
    record = json.loads(json.dumps(config.record()))
    assert record["version"] == versions.VERSION
    assert Config.recorded(record, "the run") == config


@pytest.mark.parametrize("path", list(added()), ids=".".join)
def test_a_run_from_before_a_field_existed(path):
    """Of a field with another name now, too."""
    names = {new: old for old, new in versions.RENAMED.items()}
    old = tuple(names.get(".".join(path), ".".join(path)).split("."))
    config = Config.recorded(without(recorded("declip_resnet"), old), "the run")
    expected, value = versions._ADDED[0], config
    for part in path:
        expected = expected[part]
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    if not isinstance(expected, dict):
        assert value == expected


def test_a_run_of_the_first_version_of_all():
    """Without all that came later, and with what has gone since."""
    first = recorded("clip_vit")
    for path in reversed(list(added())):
        first = without(first, path)
    del first["loss"]["mlm_places"], first["eval"]["preprocess"]
    first["eval"]["resize"] = 37  # 32 of 37, as 224 of 256
    config = Config.recorded(first, "the run")
    assert config.eval.preprocess == "declip"
    assert config.data.max_bad_fraction == 0 and config.data.token_lengths == ()
    first["eval"]["resize"] = 32
    assert Config.recorded(first, "the run").eval.preprocess == "train"
    first["eval"]["resize"] = 48
    with pytest.raises(ValueError, match="the run is of a version .*resize=48.*--preprocess"):
        Config.recorded(first, "the run")
    assert Config.recorded(first, "the run", "openai").eval.preprocess == "openai"


def test_a_limit_that_training_refuses_now_is_still_read():
    config = recorded("clip_vit")
    config["loss"]["logit_scale_range"] = json.loads("[3.0, Infinity]")
    assert Config.recorded(config, "the run").loss.logit_scale_range == (3.0, float("inf"))


@pytest.mark.parametrize(
    "section, field, value",
    [
        ("data", "eda", []),
        ("loss", "temperature", 0.0),
        ("loss", "support_set", dict(size=0, neighbours=1, young_steps=0)),
        ("optim", "b1", 1.0),
        ("checkpoint", "keep", 0),
    ],
)
def test_what_only_training_would_refuse_is_read(section, field, value):
    """The run was trained with it, by a program that did not look, or not there."""
    config = recorded("clip_vit")
    config[section][field] = value
    read = Config.recorded(config, "the run")
    assert read.total_steps == 4
    with pytest.raises(ValueError, match=f"^config.{section}"):
        Config.read(read.as_dict())


def test_what_cannot_be_mapped_is_named():
    config = recorded("clip_vit")
    with pytest.raises(ValueError, match=r"config\.optim has no field 'peek_lr'\. Did you mean 'p"):
        Config.recorded(config | {"optim": config["optim"] | {"peek_lr": 1.0}}, "the run")
    with pytest.raises(ValueError, match=r"config\.optim lacks the field 'peak_lr'"):
        Config.recorded(without(config, ("optim", "peak_lr")), "the run")
    with pytest.raises(ValueError, match="the run was written by a later version .* 9,.*update"):
        Config.recorded(config | {"version": 9}, "the run")


def test_old_names_in_a_configuration_of_today(caplog):
    from configs import common

    config = common.get_config("tiny").unlock()
    config.loss.mlm_places = 0.3
    with caplog.at_level("WARNING"):
        assert Config.read(config).loss.mlm_capacity == 0.3
    assert "config.loss.mlm_places is called config.loss.mlm_capacity now" in caplog.text
