"""Sweep files: what they mean, and one clear line for each mistake."""

import pytest
import yaml

from megatron.errors import ConfigurationError
from megatron.sweeps.sweep_file import read_sweep
from megatron.sweeps.trials import draw_trials

GOOD = """
name: demo
description: what repetition does
flags: {num-layers: 2, seq_length: 32, lr: 1e-3}
parameters:
  train-epochs: {values: [1, 4]}
  model-size: [14M]
variants:
  ar: {flags: {objective: ar}}
  mdm:
    flags: {objective: mdm, lr: 2e-3}
    parameters: {train-epochs: [4, 16, 64]}
    tuning: {parameters: {mask-eps: {values: [0.001, 0.01]}}}
seeds: [1, 2]
stages:
  tune:
    seeds: [7]
    tuning: {trials: 4, parameters: {lr: {distribution: log_uniform_values, min: 1e-4, max: 1e-2}}}
  final: {best_of: tune, by: [train-epochs], variants: [mdm]}
resources:
  world_size: 8
  rules: [{where: {model-size: 1018M}, nodes: 2, world_size: 16}]
exclude: [{variant: mdm, train-epochs: 64}]
"""


def read(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return read_sweep(path)


def test_a_file_is_read_with_its_stages_variants_and_rules(tmp_path):
    sweep = read(tmp_path, GOOD)
    tune, final = sweep.stages
    assert (sweep.name, sweep.description) == ("demo", "what repetition does")
    assert tune.flags == {"num-layers": 2, "seq-length": 32, "lr": 0.001}
    assert tune.parameters == {"train-epochs": (1, 4), "model-size": ("14M",)}
    assert [variant.name for variant in tune.variants] == ["ar", "mdm"] and tune.seeds == (7,)
    assert tune.variants[1].parameters == {"train-epochs": (4, 16, 64)}
    assert tune.variants[1].tuned["mask-eps"].values == (0.001, 0.01)
    assert final.best_of == "tune" and final.by == ("train-epochs",) and final.tuning is None and final.seeds == (1, 2)
    assert [variant.name for variant in final.variants] == ["mdm"]
    assert final.resources.world_size == 8 and final.resources.rules[0][1] == {"nodes": 2, "world_size": 16}
    assert sweep.exclude == ({"variant": "mdm", "train-epochs": 64},)


def test_a_file_without_variants_stages_or_seeds_is_one_stage_of_one_variant(tmp_path):
    (stage,) = read(tmp_path, "flags: {num-layers: 2}\nparameters: {train-epochs: [1]}").stages
    assert (stage.name, stage.variants[0].name, stage.seeds) == ("main", "default", (1234,))


REFUSED = {
    "flags: {num-layrs: 2}": "flags.num-layrs: num-layrs: is an unknown flag; did you mean num-layers?",
    "flags: {save: x}": "flags.save: is not set in a sweep file: the sweep names the folder",
    "flags: {num_layers: 2, num-layers: 3}": "flags.num-layers: is given twice; drop one",
    "flags: {no-compile: true}": "flags.no-compile: is a negation; write `compile: false`",
    "flags: {lr: {values: [1]}}": "flags.lr: {'values': [1]}: is no value of a flag; axes are under `parameters`",
    "flags: [1]": "flags: [1]: is not a mapping",
    "flags: [1]\nstages: {a: {}}": "flags: [1]: is not a mapping",
    "variants: 3\nstages: {a: {variants: [x]}}": "variants: 3: is not a mapping",
    "false": "False: is not a mapping",
    "parameters: {lr: [1, 2]}\nvariants: {a: {}, b: {flags: {lr: 3}}}": "variants.b.flags.lr: is an axis of",
    "parameters: {lr: [1]}\ntuning: {trials: 2, parameters: {lr: {min: 1, max: 2}}}": "tuning.parameters.lr: "
    "is an axis of variant default; drop one",
    "variants: {a: {parameters: {lr: [1]}, tuning: {parameters: {lr: {values: [1]}}}}}\n"
    "tuning: {trials: 2, parameters: {}}": "tuning.parameters.lr: is an axis of variant a; drop one",
    "stages: {a: {tuning: {trials: 2, parameters: {lr: {min: 1, max: 2}}}}, "
    "b: {best_of: a, parameters: {lr: [1]}}}": "stages.b.best_of: a: tunes lr, which is an axis here; drop the axis",
    "flags: {seed: 1}": "flags.seed: is not set in a sweep file: give `seeds`",
    "paramters: {}": "paramters: paramters: is an unknown key; did you mean parameters?",
    "parameters: {train-epochs: []}": "parameters.train-epochs: has no values",
    "parameters: {lr: {value: [1]}}": "parameters.lr.value: value: is an unknown key; did you mean values?",
    "parameters: {train-epochs: 3}": "parameters.train-epochs: 3: is not a mapping",
    "parameters: {train-epochs: [1, 1.0]}": "parameters.train-epochs: 1.0: is given twice",
    "parameters: {lr: [1e-3, '0.001']}": "parameters.lr: 0.001: is given twice",
    "parameters: {model-size: [2024-02-03]}": "parameters.model-size: 2024-02-03: is neither text nor a number",
    "description: 2024-02-30": "is not YAML: day is out of range",
    "seeds: [.inf]": "seeds: inf: is not a number",
    "tuning: {trials: 2, parameters: {lr: {values: []}}}": "tuning.parameters.lr.values: is empty",
    "parameters: {train-epochs: [1]}\nexclude: [{train-epochs: 2}]": "exclude.train-epochs: 2: is no value of it (1)",
    "variants: {ar: {}}\nexclude: [{variant: mdm}]": "exclude.variant: mdm: is no value of it (ar)",
    "wsd_branches: 1": "wsd_branches: 1: is neither true nor false",
    "variants: {ar: {flag: {}}}": "variants.ar.flag: flag: is an unknown key; did you mean flags?",
    "seeds: []": "seeds: is empty",
    "seeds: [1, 1]": "seeds: [1, 1]: names a seed twice",
    "seeds: [1, 1.0]": "seeds: [1, 1]: names a seed twice",
    "seeds: [x]": "seeds: x: is not a number",
    "seeds: [1.5]": "seeds: 1.5: must be a whole number",
    "tuning: {trials: 2}": "tuning.parameters: is empty",
    "tuning: {trials: 0, parameters: {lr: {min: 1, max: 2}}}": "tuning.trials: 0: must be a whole number of at least 1",
    "tuning: {trials: 2, parameters: {lr: {distribution: normal, min: 1}}}": "normal: is an unknown distribution; "
    "the names are categorical, int_uniform",
    "tuning: {trials: 2, parameters: {lr: {min: 2, max: 1}}}": "parameters.lr: min 2 and max 1: uniform needs min",
    "tuning: {trials: 2, parameters: {num-layers: {distribution: int_uniform, min: 0.5, max: 4}}}": "num-layers: "
    "min 0.5 and max 4: int_uniform needs whole numbers",
    "tuning: {trials: 2, parameters: {lr: {distribution: [uniform]}}}": "['uniform']: is an unknown distribution",
    "tuning: {trials: 2, parameters: {lr: {min: 1}}}": "distribution uniform takes min and max",
    "stages: {a: {by: [lr]}}": "stages.a.by: does nothing without best_of",
    "stages: {a: {teachers_of: b}}": "stages.a.teachers_of: b: is not an earlier stage (none)",
    "stages: {a: {teacher_seeds: [1]}}": "stages.a.teacher_seeds: does nothing without teachers_of",
    "stages: {a: {tuning: {trials: 2, parameters: {lr: {min: 1e-3, max: 1e-2}}}}, b: {teachers_of: a}}": (
        "stages.b.teachers_of: a: has trials; name a stage that takes its best_of"
    ),
    "stages: {a: {seeds: [1]}, b: {teachers_of: a, teacher_seeds: [2]}}": "a: has no seed 2; correct teacher_seeds",
    "stages: {a: {variants: {x: {}, y: {}}}, b: {variants: {z: {}}, teachers_of: a}}": (
        "stages.b.teachers_of: a: has several variants, none named z; add it there"
    ),
    "stages: {a: {}, b: {flags: {teacher: x}, teachers_of: a}}": "sets the flag teacher, which is given as well",
    "stages: {a: {parameters: {lr: [1, 2]}}, b: {teachers_of: a}}": "a: has several values of lr; give both stages",
    "stages: {a: {parameters: {lr: [1]}}, b: {parameters: {lr: [2]}, teachers_of: a}}": "a: lacks lr 2; give both",
    "stages: {a: {best_of: b}}": "stages.a.best_of: b: is not an earlier stage (none)",
    "stages: {a: {}, b: {best_of: a}}": "stages.b.best_of: a: has no tuning",
    "stages: {a: {tuning: {trials: 2, parameters: {lr: {min: 1, max: 2}}}}, "
    "b: {best_of: a, by: [train-epochs], parameters: {train-epochs: [1]}}}": "train-epochs: is no axis of stage a",
    "stages: {a: {variants: [x]}}": "stages.a.variants: x: is an unknown variant",
    "stages: {a: {variants: [[x]]}}": "stages.a.variants: ['x']: is an unknown variant",
    "variants: {1: {}, '1': {}}": "variants.1: is given twice; drop one",
    "stages: {1: {}, '1': {}}": "stages.1: is given twice; drop one",
    "stages: {a: {best_of: b, by: [[lr]]}}": "stages.a.by.['lr']: ['lr']: is an unknown flag",
    "stages: {}": "stages: is empty",
    "exclude: [{train-epoch: 1}]": "exclude.train-epoch: train-epoch: is an unknown flag; did you mean train-epochs?",
    "exclude: [{train-epochs: 1}]": "exclude: train-epochs: is an unknown axis",
    "resources: {world_size: 0}": "resources.world_size: 0: must be a whole number of at least 1",
    "resources: {rules: [{nodes: 2}]}": "resources.rules[0]: has no `where`, so it holds for all points",
    "resources: {minutes: -1}": "resources.minutes: -1: must be positive",
    "resources: {rules: [{where: {lr: 1}, cores: 2}]}": "resources.rules[0].cores: cores: is an unknown key",
    "name: a/b": "name: a/b: names a folder and jobs",
    "- 1": "[1]: is not a mapping",
    "a: [": "is not YAML",
    "seeds: [1]\nseeds: [2]": "is not YAML: seeds is given twice",
    "flags: {num-layers: !!python/object/apply:os.system [ls]}": "is not YAML",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_mistake_is_one_line_with_file_and_key(text, tmp_path):
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "sweep.yaml")) and REFUSED[text] in message and "\n" not in message


def drawn(tmp_path, trials, variant="ar", **parameters):
    """Return the values of each tuned flag over the trials of a variant; `b` of mdm only is its own."""
    own = {"mdm": {"tuning": {"parameters": {"mask-eps": {"values": [0.001, 0.01]}}}}}
    text = yaml.safe_dump({"tuning": {"trials": trials, "parameters": parameters}, "variants": {"ar": {}, **own}})
    (stage,) = read(tmp_path, text).stages
    (chosen,) = [item for item in stage.variants if item.name == variant]
    rows = draw_trials(stage.tuning, stage.tuned(chosen))
    return {name: [row[name] for row in rows] for name in rows[0]}


LR = {"distribution": "log_uniform_values", "min": "1e-4", "max": "1e-2"}


def test_trials_fill_their_range_evenly_on_its_scale(tmp_path):
    values = drawn(tmp_path, 64, lr=LR)["lr"]
    assert all(1e-4 <= value <= 1e-2 for value in values) and len(set(values)) == 64
    assert sum(value < 1e-3 for value in values) == 32  # a Sobol sequence halves each range exactly
    decays = drawn(tmp_path, 64, **{"weight-decay": {"min": 0, "max": 2}})["weight-decay"]
    assert sum(value < 1 for value in decays) == 32 and max(decays) < 2
    layers = drawn(tmp_path, 64, **{"num-layers": {"distribution": "int_uniform", "min": 1, "max": 4}})["num-layers"]
    assert {value: layers.count(value) for value in set(layers)} == dict.fromkeys((1, 2, 3, 4), 16)


def test_all_variants_have_as_many_trials_with_equal_values_of_the_shared_flags(tmp_path):
    own, other = drawn(tmp_path, 8, "mdm", lr=LR), drawn(tmp_path, 8, "ar", lr=LR)
    assert own["lr"] == other["lr"] and "mask-eps" not in other
    assert own["mask-eps"].count(0.001) == 4
