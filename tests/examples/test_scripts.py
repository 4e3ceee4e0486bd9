"""The scripts of examples_scaling: their form, their cost, the configuration that they print, and their errors."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import yaml

from megatron.config.flags import spelling
from megatron.config.resolve import resolve
from megatron.config.sizes import parameter_count
from megatron.config.subsets import DATA_VALUE_TOKENS, UNIQUE_TOKENS
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.objectives.registry import capabilities
from megatron.scoring.lm_eval_arguments import read_arguments
from tests.config import published_lists as published
from tests.conftest import ROOT
from tests.examples.scripts import EXAMPLES, SCRIPTS, command, configuration, printed, run
from tests.test_documentation import scripts

TRAINING = [name for name in SCRIPTS if name.startswith("training/")]
DOWNSTREAM = [name for name in SCRIPTS if name.startswith("downstream/")]
GPT2 = Vocabulary(50257)


def shellcheck(*paths) -> subprocess.CompletedProcess:
    """Check shell scripts; sourced files are searched next to a script and in the project."""
    program = Path(sys.executable).with_name("shellcheck")
    assert program.exists(), "shellcheck is missing: bash install.sh --with-test installs it"
    command = [program, "--external-sources", "--source-path=SCRIPTDIR", f"--source-path={ROOT}", *paths]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_shellcheck_finds_nothing():
    result = shellcheck(*scripts())
    assert result.returncode == 0, result.stdout


def test_shellcheck_finds_a_planted_fault(tmp_path):
    fault = tmp_path / "fault.sh"
    fault.write_text((EXAMPLES / "training" / "epochs.sh").read_text().replace('"$size"', "$size"))
    assert "SC2086" in shellcheck(fault).stdout


# ------------------------------------------------------------------------------------ form and cost


def stated_cost(name: str) -> tuple[str, float]:
    """Return the arithmetic of a script's header and its result, in GPU-hours."""
    text = (EXAMPLES / name).read_text()
    (cost,) = re.findall(r"^# Cost: ([\d._e x()/]+) = ([\d.]+) GPU-hours of H100\b", text, re.MULTILINE)
    return cost[0], float(cost[1])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short_and_states_source_result_and_cost(name):
    lines = (EXAMPLES / name).read_text().splitlines()
    assert 8 <= len(lines) <= 15 and lines[0] == "#!/usr/bin/env bash" and max(map(len, lines)) <= 120
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert "2507.15857" in header and re.search(r"The paper|The authors|No result", header)
    arithmetic, hours = stated_cost(name)
    assert hours == pytest.approx(eval(arithmetic.replace("x", "*")), rel=0.02, abs=0.005)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_documentation_lists_a_script_with_its_cost(name):
    rows = (ROOT / "docs" / "experiments.md").read_text().splitlines()
    (row,) = [row for row in rows if row.startswith(f"| [{name}](../examples_scaling/{name}) |")]
    assert float(row.split("|")[4]) == stated_cost(name)[1]


def resolved(words: list[str]):
    """Return configuration and plan of a printed training command, on the published data."""
    config = configuration(words)
    unique_tokens = config.data.train_unique_tokens or (
        published.C4 if config.data.train_data_path else UNIQUE_TOKENS["100M"]
    )
    return config, resolve(config, GPT2, unique_tokens, capabilities(config.objective.objective))


COSTS = [(name, {}) for name in (*TRAINING, "quickstart/train_ar.sh", "quickstart/train_mdm.sh")]
COSTS += [("training/epochs.sh", {"OBJECTIVE": "mdm", "SIZE": "425M", "EPOCHS": "500"})]
COSTS += [("training/chinchilla.sh", {"FLOPS": "6e18", "SIZE": "57M"})]
COSTS += [("training/data_value.sh", {"FLOPS": "1e20", "EPOCHS": "100"})]


@pytest.mark.parametrize(
    "name, variables", COSTS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_the_printed_cost_is_6nd_over_the_speed(name, variables):
    text = printed(ROOT, name, **variables)
    config, plan = resolved(command(text))
    parameters, tokens = parameter_count(config.model, GPT2), plan.train_samples * 2048
    hours = 6 * parameters * tokens / (0.4 * 989e12) / 3600
    (line,) = [line for line in text.splitlines() if line.startswith("# N ")]
    numbers = re.fullmatch(r"# N (\S+)M, D (\S+) tokens, 6ND = (\S+) FLOPs: (\S+) GPU-hours of H100 at 40% of .*", line)
    assert numbers
    expected = (parameters / 1e6, tokens, 6 * parameters * tokens, hours)
    assert [float(number.replace(",", "")) for number in numbers.groups()] == pytest.approx(expected, rel=0.005)
    if name in TRAINING and not variables:
        assert stated_cost(name)[1] == pytest.approx(hours, rel=0.02)


@cache
def cost_line(*flags: str) -> str:
    """Return the cost of training/epochs.sh with further flags, computed in this process."""
    module = runpy.run_path(str(EXAMPLES / "lib" / "published.py"))
    words = command(printed(ROOT, "training/epochs.sh"))
    return module["cost_line"]("ar", UNIQUE_TOKENS["100M"], [*words[words.index("pretrain_gpt.py") + 1 :], *flags])


# other layers, a width given by its own flag, a budget in samples of another length, and two passes of every sample
OVERRIDES = [("--num-layers 36", 1), ("--ffn-hidden-size=16384", 1), ("--seq-length 1024", 1)]
OVERRIDES += [("--masked-input-weight 0.5", 2), ("--seed 7", 1)]


@pytest.mark.parametrize("flags, passes", OVERRIDES)
def test_the_cost_is_that_of_the_flags_that_override(flags, passes):
    line = cost_line(*flags.split())
    config, plan = resolved([*command(printed(ROOT, "training/epochs.sh")), *flags.split()])
    parameters = parameter_count(config.model, GPT2)
    flops = plan.flops(plan.train_samples, config.data.seq_length)
    assert flops == pytest.approx(passes * 6 * parameters * UNIQUE_TOKENS["100M"] * 100, rel=1e-4)
    assert f"# N {parameters / 1e6:.1f}M" in line and f"6ND = {flops:.3g} FLOPs" in line


def test_the_cost_of_other_data_is_unknown():
    line = cost_line("--train-data-path-file", "mine.txt")
    assert line == "# N 217.5M; D and cost are unknown: --train-data-path-file replaces the data of the script\n"


def test_the_cost_of_flags_that_training_refuses_is_an_error():
    with pytest.raises(ConfigurationError, match="^--train-epochs 100.0 and --train-samples 5: a run has one budget"):
        cost_line("--train-samples", "5")


# ------------------------------------------------------------------------------------ the published lists

# published list -> script, variables
SAME = {
    "quickstart/train_ar": ("quickstart/train_ar.sh", {}),
    "quickstart/train_mdm": ("quickstart/train_mdm.sh", {}),
    "training/arm/example": ("training/epochs.sh", {}),
    "training/mdm/example": ("training/epochs.sh", {"OBJECTIVE": "mdm"}),
    "training/arm/chinchilla": ("training/chinchilla.sh", {"FLOPS": "6e18", "SIZE": "117M"}),
    "training/mdm/chinchilla": ("training/chinchilla.sh", {"OBJECTIVE": "mdm", "FLOPS": "6e18", "SIZE": "117M"}),
    "training/arm/data_value": ("training/data_value.sh", {}),
    "training/mdm/data_value": ("training/data_value.sh", {"OBJECTIVE": "mdm"}),
    "training/arm/multi_node": ("training/multi_node.sh", {"OBJECTIVE": "ar"}),
    "training/mdm/multi_node": ("training/multi_node.sh", {}),
}
# how the same budget is spelled, where files are, and what changes no result
SPELLED = {
    "train_samples",
    "train_epochs",
    "train_flops",
    "lr_warmup_samples",
    "lr_decay_samples",
    "min_lr",
    "model_size",
}
SPELLED |= {
    "train_data_path",
    "train_data_path_file",
    "valid_data_path_file",
    "vocab_file",
    "merge_file",
    "save",
    "load",
}
SPELLED |= {"train_unique_tokens", "deepspeed", "deepspeed_config", "zero_stage", "kill_switch_file", "log_interval"}
SPELLED |= {
    "tensorboard_dir",
    "tensorboard_queue_size",
    "wandb_project",
    "wandb_exp_name",
    "wandb_group",
    "wandb_save_dir",
}


def differences(config, script: published.Script, folder) -> dict:
    """Return the values of a configuration that are not those of a published list, `SPELLED` fields left out."""
    expected = published.published_configuration(script, folder) | published.ABSENT
    values = {field: value for section in asdict(config).values() for field, value in section.items()}
    assert set(values) == set(expected)
    return {field: value for field, value in values.items() if field not in SPELLED and value != expected[field]}


@pytest.mark.parametrize("name", SAME)
def test_a_script_trains_what_the_published_list_trains(name, tmp_path):
    script, (path, variables) = published.SCRIPTS[name], SAME[name]
    config, plan = resolved(command(printed(ROOT, path, **variables)))
    assert differences(config, script, tmp_path) == {} and config.optimizer.final_lr == 2e-5
    # a budget in FLOPs counts the parameters of the padded vocabulary here
    tolerance = 0 if script.flops is None else 1e-3
    assert plan.train_samples == plan.lr_decay_samples == pytest.approx(script.samples, rel=tolerance)
    assert plan.lr_warmup_samples == pytest.approx(script.warmup, rel=tolerance)
    assert plan.unique_tokens == script.unique_tokens


def test_every_training_list_has_its_script():
    assert set(SAME) == {name for name, script in published.SCRIPTS.items() if not script.evaluates}


BASE = published.QUICKSTART["ar"]
# script -> variables, the published run that it changes, and what it changes (TRAIN.md of the published system)
ABLATIONS = {
    "training/attention_dropout.sh": ({"DROPOUT": "0.75"}, BASE, {"attention_dropout": 0.75}),
    "training/token_masking.sh": ({"RATIO": "0.5"}, BASE, {"randmask_ratio": 0.5}),
    "training/token_orders.sh": (
        {"ORDERS": "4"},
        published.Script("ar", "278M"),
        {"num_order_list": 4, "use_predefined_order": True},
    ),
    "training/left_to_right_masking.sh": (
        {"RATIO": "0.25"},
        published.Script("mdm", "140M", epochs=50),
        {"ar_ratio": 0.25},
    ),
    "training/learning_rate.sh": ({"OBJECTIVE": "ar", "LR": "8e-4", "WARMUP": "0.5"}, BASE, {"lr": 8e-4}),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_nothing_else(name, tmp_path):
    variables, script, changes = ABLATIONS[name]
    config, plan = resolved(command(printed(ROOT, name, **variables)))
    assert differences(config, script, tmp_path) == changes
    assert plan.train_samples == script.samples
    percent = float(variables.get("WARMUP", "1"))
    assert plan.lr_warmup_samples == int(script.samples * percent / 100)
    assert config.optimizer.final_lr == pytest.approx(config.optimizer.lr / 10)


def test_budgets_of_one_learning_rate_are_runs_of_their_own():
    words = [command(printed(ROOT, "training/learning_rate.sh", EPOCHS=epochs)) for epochs in ("10", "50")]
    assert len({configuration(line).checkpoint.save for line in words}) == 2


@pytest.mark.parametrize("name", ["chinchilla", "data_value"])
def test_a_sweep_reads_the_data_of_its_script(name):
    script = configuration(command(printed(ROOT, f"training/{name}.sh"))).data
    flags = yaml.safe_load((EXAMPLES / "sweeps" / f"{name}.yaml").read_text())["flags"]
    data = {field: getattr(script, field) for field in asdict(script) if spelling(field)[2:] in flags}
    stated = {field: flags[spelling(field)[2:]] for field in data}
    assert stated | {"train_data_path": (stated["train_data_path"],)} == data
    assert {"train_data_path", "valid_data_path_file", "vocab_file", "merge_file"} == set(data)
    assert "docs/experiments.md#c4" in (EXAMPLES / "sweeps" / f"{name}.yaml").read_text()


def test_every_training_script_is_compared_with_a_published_run():
    assert set(TRAINING) == {path for path, _ in SAME.values() if path.startswith("training/")} | set(ABLATIONS)


# the script of each published evaluation, and its Monte-Carlo samples, 32 in the paper
EVALUATIONS = {
    "quickstart/eval_ar": ("quickstart/eval_ar.sh", 1),
    "quickstart/eval_mdm": ("quickstart/eval_mdm.sh", 8),
    "evaluation/arm/example": ("evaluation/validation.sh", 1),
    "evaluation/mdm/example": ("evaluation/validation.sh", 32),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_script_evaluates_what_the_published_list_evaluates(name, tmp_path):
    script, (path, num_mc) = published.SCRIPTS[name], EVALUATIONS[name]
    words = command(printed(ROOT, path, OBJECTIVE=script.objective))
    # --skip-train takes everything else from the run folder
    recorded = f"--recipe published --model-size {script.size} --vocab-file v --merge-file m"
    config = configuration(words, *recorded.split())
    expected = published.published_configuration(script, tmp_path)
    validation = asdict(config.validation)
    for field in ("eval_samples", "eval_alignment", "skip_train"):
        assert validation[field] == expected[field]
    assert (config.objective.objective, config.validation.num_mc) == (script.objective, num_mc)


DOWNSTREAM_LISTS = {
    "downstream/ar.sh": "downstream/downstream_arm",
    "downstream/mdm_chain.sh": "downstream/downstream_mdm",
    "downstream/mdm_bound.sh": "downstream/downstream_mdm_mc",
    "downstream/mdm_generate.sh": "downstream/downstream_mdm_onlygen",
}


@pytest.mark.parametrize("world_size", ["1", "2"])
@pytest.mark.parametrize("name", DOWNSTREAM)
def test_a_script_scores_what_the_published_list_scores(name, world_size, tmp_path, monkeypatch):
    from megatron.scoring.lm_eval_cli import read  # imports lm-eval

    monkeypatch.setattr(sys, "argv", ["lm-eval"])
    script = published.DOWNSTREAM[DOWNSTREAM_LISTS[name]]
    words = command(printed(ROOT, name, NPROC=world_size))
    assert ("torch.distributed.run" in words) == (world_size == "2")
    ours = read(words[words.index("megatron.scoring.lm_eval_cli") + 1 :])
    theirs = read(["--load", "runs/x", "--eval_fp32", "--task_list", script.tasks, *script.scorer.split()])
    assert ours.tasks == theirs.tasks
    (source, scoring), (_, expected) = read_arguments(ours.model_args), read_arguments(theirs.model_args)
    assert scoring == expected and source.dtype == "float32"
    assert source.pretrained == f"runs/{script.objective}_best_on_100m"


# ------------------------------------------------------------------------------------ variables and errors


def test_the_subset_of_data_value_is_the_published_one():
    words = command(printed(ROOT, "training/data_value.sh", OBJECTIVE="mdm", FLOPS="1e20", EPOCHS="100"))
    assert configuration(words).data.train_unique_tokens == DATA_VALUE_TOKENS["mdm", 1e20][-1]


def test_a_published_set_has_the_tokens_of_the_table():
    texts = [(EXAMPLES / name).read_text() for name in ("lib/c4_100m.sh", "training/multi_node.sh")]
    tokens = [int(re.search(r"unique_tokens=(\d+)", text)[1]) for text in texts]
    assert tokens == [UNIQUE_TOKENS["100M"], UNIQUE_TOKENS["500M"]]


def test_the_nodes_of_a_slurm_job_meet_at_its_first_node(tmp_path):
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'node-4\\nnode-5\\n'\n")
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node-[4-5]", "SLURM_JOB_ID": "30007"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    words = command(printed(ROOT, "training/multi_node.sh", NPROC="8", PATH=path, **slurm))
    values = {flag: words[words.index(flag) + 1] for flag in ("--nnodes", "--nproc-per-node", "--rdzv-endpoint")}
    assert values == {"--nnodes": "2", "--nproc-per-node": "8", "--rdzv-endpoint": "node-4:30007"}


@pytest.mark.parametrize("scontrol", ["exit 1", "exit 0", "absent"])
def test_without_scontrol_one_line_names_the_endpoint(scontrol, with_data, tmp_path):
    """As in a container: the nodes of the job are known, and nothing expands their names."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    if scontrol == "absent":
        if shutil.which("scontrol"):
            pytest.skip("this machine has SLURM")
    else:
        program.write_text(f"#!/bin/sh\necho 'slurm_load: Unable to contact' >&2\n{scontrol}\n")
        program.chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node-[4-5]", "SLURM_JOB_ID": "7"}
    result = run(with_data, "training/multi_node.sh", code=2, PATH=path, **slurm)
    assert result.stderr == (
        "error: SLURM_JOB_NODELIST=node-[4-5]: scontrol does not list its nodes (it is missing in containers); "
        "give RDZV_ENDPOINT=HOST:PORT, a free port of one node\n"
    )
    assert not result.stdout


TRAINED = "does not exist; train it, or name another run: LOAD=runs/NAME"
NO_DATA = "error: data/train_c4_100m.txt: does not exist; bash download.sh fetches it"
ERRORS = [
    ("training/epochs.sh", {}, "clone", NO_DATA),
    ("evaluation/validation.sh", {}, "clone", NO_DATA),
    ("evaluation/out_of_domain.sh", {}, "clone", f"error: runs/mdm_best_on_100m: {TRAINED}"),
    ("downstream/ar.sh", {"LOAD": "runs/other"}, "clone", f"error: runs/other: {TRAINED}"),
    (
        "training/epochs.sh",
        {"OBJECTIVE": "gpt"},
        "with_data",
        "error: OBJECTIVE=gpt: is neither ar nor mdm; give one of them",
    ),
    (
        "training/chinchilla.sh",
        {"FLOPS": "5e18"},
        "with_data",
        "error: FLOPS=5e18: no compute-optimal size is published for it; give SIZE, or one of 1e19, 3e19, 1e20",
    ),
    (
        "training/data_value.sh",
        {"FLOPS": "1e20", "EPOCHS": "50"},
        "with_data",
        "error: EPOCHS=50: no subset is published for it; give one of 1, 2, 4, 10, 20, 100",
    ),
    (
        "training/learning_rate.sh",
        {"WARMUP": "1%"},
        "with_data",
        "error: WARMUP=1%: is not a percentage of the budget; give a number, such as 0.5",
    ),
    (
        "training/multi_node.sh",
        {},
        "with_data",
        "error: NNODES=2: needs RDZV_ENDPOINT outside SLURM; give HOST:PORT, a free port of one node",
    ),
]


@pytest.mark.parametrize("name, variables, folder, message", ERRORS)
def test_a_mistake_is_one_line(name, variables, folder, message, request):
    result = run(request.getfixturevalue(folder), name, code=2, **variables)
    assert result.stderr == f"{message}\n" and not result.stdout


@pytest.mark.parametrize("name", ["training/epochs.sh", "training/chinchilla.sh"])
def test_without_an_installation_one_line_names_install(name, with_data):
    (with_data / ".venv").unlink()
    result = run(with_data, name, code=2)
    assert result.stderr == "error: .venv/bin/python: does not exist; bash install.sh creates it\n"


STUDY = """
flags: {num-layers: 1, hidden-size: 32, num-attention-heads: 2, seq-length: 32, train-epochs: 4,
  tokenizer-type: ByteTokenizer, train-data-path: data/quickstart/train, valid-data-path: data/quickstart/validation}
data: {unique_tokens: 1000, vocabulary_size: 257}
"""


def test_the_study_takes_data_of_any_name(clone):
    (clone / "tools").symlink_to(ROOT / "tools")
    (clone / "install.sh").write_text("")
    (clone / "mine.yaml").write_text(STUDY)
    (clone / "site.yaml").write_text("gpus: false")
    data = clone / "data" / "a#b & \\c"
    data.mkdir(parents=True)
    for name in ("train", "tuning", "validation"):
        (data / f"{name}.idx").touch()
    files = {"DATA": f"data/{data.name}", "SWEEP": "mine.yaml", "SITE": "site.yaml"}
    run(clone, "study/run.sh", "--dry-run", **files)
    flags = yaml.safe_load((clone / "runs" / "study.yaml").read_text())["flags"]
    assert flags["train-data-path"] == f"data/{data.name}/train"
