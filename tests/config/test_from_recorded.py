"""A run's config.json becomes its typed configuration again."""

import json
from dataclasses import asdict

import pytest

from megatron.config.sections import Config
from megatron.errors import ConfigurationError
from megatron.objectives.registry import capabilities
from megatron.training.command_line import parse

MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 2"
LINES = [
    MODEL,
    f"{MODEL} --train-data-path 0.3 a 0.7 b --valid-data-path tuning=c validation=d --train-epochs 1.5 --lr 1e-3",
    f"{MODEL} --group-query-attention --num-query-groups 1 --no-swiglu --kv-channels 6 --bf16 --no-compile",
    "--model-size 7M --recipe published --vocab-file v --merge-file m --train-samples 10 --save run --load other",
    f"{MODEL} --tensor-model-parallel-size 2 --lr-decay-style WSD --lr-wsd-decay-samples 5 --split 9,1",
    f"{MODEL} --deepspeed --deepspeed-config d.json --wandb-project p --wandb-group g --save s --wait-for-lock 3",
]


def recorded(line: str, objective: str = "ar") -> dict:
    """Return the sections of config.json of a run with this command line, as JSON holds them."""
    return json.loads(json.dumps(asdict(parse(objective, line.split()))))


@pytest.mark.parametrize("objective", ["ar", "mdm", "dual"])
@pytest.mark.parametrize("line", LINES)
def test_a_recorded_configuration_is_that_of_the_command_line(line, objective):
    document = {"objective_name": objective, "plan": {"steps": 3}, **recorded(line, objective)}
    config = Config.from_recorded(document)
    assert config == parse(objective, line.split())
    assert isinstance(config.data.train_data_path, tuple)


def test_fields_and_sections_that_an_older_run_lacks_have_their_defaults():
    older = recorded(f"{MODEL} --lr 0.5")
    del older["tracking"], older["optimizer"]["weight_decay_parameters"], older["model"]["z_loss"]
    assert Config.from_recorded(older) == parse("ar", f"{MODEL} --lr 0.5".split())
    older["objective_name"] = "mdm"
    del older["objective"]["objective"]
    assert Config.from_recorded(older).objective.objective == "mdm"


@pytest.mark.parametrize("section, name", [("model", "num_experts"), ("data", "lr")])
def test_a_key_that_no_section_has_is_refused_in_one_line(section, name):
    newer = recorded(MODEL)
    newer[section][name] = 1
    with pytest.raises(ConfigurationError) as caught:
        Config.from_recorded(newer)
    assert str(caught.value) == (
        f"config.json: {section}.{name} is no setting of this version; use the version that trained the run"
    )


def test_a_missing_field_without_a_default_is_named():
    damaged = recorded(MODEL)
    del damaged["model"]["num_layers"]
    with pytest.raises(ConfigurationError, match=r"^config.json: model.num_layers is missing; restore the file$"):
        Config.from_recorded(damaged)


def test_invalid_values_are_refused_as_on_the_command_line():
    damaged = recorded(MODEL)
    damaged["training"]["log_interval"] = 0
    with pytest.raises(ConfigurationError, match="^--log-interval 0: must be at least 1"):
        Config.from_recorded(damaged)


def test_a_value_or_objective_of_another_version_is_one_line():
    values = recorded(MODEL)
    values["model"]["normalization"] = "foo"
    with pytest.raises(
        ConfigurationError, match=r"config.json: model.normalization foo: is not one of rmsnorm, layernorm"
    ):
        Config.from_recorded(values)
    with pytest.raises(ConfigurationError, match="--objective xyz: is not one of ar, mdm"):
        capabilities("xyz")
