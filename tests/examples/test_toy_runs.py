"""Every script of examples_scaling trains, evaluates or scores for a few steps at toy size."""

import json
import socket
import time
from pathlib import Path

import pytest

from tests.conftest import records
from tests.examples.conftest import OUT_OF_DOMAIN, TEXT
from tests.examples.scripts import SCRIPTS, run, start

TOY = "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --kv-channels 16 --seq-length 32 --fp32 --no-compile"
TOY += " --micro-batch-size 4 --global-batch-size 16 --eval-interval 4 --eval-samples 8 --save-interval 4"
EPOCHS, FLOPS = "--train-epochs 0.5", "--train-flops 4e8"  # 5 steps
# script -> flags at toy size in addition to TOY, and the folder of its run
TRAINING = {
    "training/epochs.sh": (EPOCHS, "ar_217M_100_epochs"),
    "training/chinchilla.sh": (FLOPS, "chinchilla_ar_217M_1e19"),
    "training/data_value.sh": (f"{FLOPS} --train-unique-tokens 1000", "data_value_ar_1e19_4_epochs"),
    "training/learning_rate.sh": (f"{EPOCHS} --lr-warmup-samples 16", "mdm_lr_4e-4_warmup_5_50_epochs"),
    "training/attention_dropout.sh": (EPOCHS, "ar_attention_dropout_0.25"),
    "training/token_masking.sh": (EPOCHS, "ar_token_masking_0.25"),
    "training/token_orders.sh": (EPOCHS, "ar_16_orders"),
    "training/left_to_right_masking.sh": (EPOCHS, "mdm_left_to_right_0.5"),
}


def finished(folder) -> dict:
    """Return the configuration of a run that finished."""
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert 4 <= records(folder, "valid")[-1]["iteration"] <= 10
    return json.loads((folder / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_a_training_script_trains(name, with_data):
    flags, folder = TRAINING[name]
    run(with_data, name, *TOY.split(), *flags.split())
    assert finished(with_data / "runs" / folder)["recipe"] == "published"


def toy_run(clone, objective: str) -> None:
    """Train the run that evaluation and downstream scripts read by default."""
    flags = f"{TOY} {EPOCHS} --lr 1e-2 --save runs/{objective}_best_on_100m"
    run(clone, "training/epochs.sh", *flags.split(), OBJECTIVE=objective)


@pytest.mark.slow
@pytest.mark.parametrize("name, objective", [("validation", "mdm"), ("validation", "ar"), ("out_of_domain", "mdm")])
def test_an_evaluation_script_evaluates(name, objective, with_data):
    toy_run(with_data, objective)
    result = run(with_data, f"evaluation/{name}.sh", "--eval-samples", "8", OBJECTIVE=objective)
    evaluated = [json.loads(line) for line in result.stdout.splitlines()[1:]]
    assert len(evaluated) == (len(OUT_OF_DOMAIN) if name == "out_of_domain" else 1)
    for record in evaluated:
        assert 0 < record["loss"] < 7 and record["num_mc"] == (32 if objective == "mdm" else 1)


@pytest.mark.slow
def test_two_nodes_train_with_offloaded_optimizer_states(with_data):
    """The nodes are two launchers on this machine. Without a GPU, DeepSpeed offloads."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"{TOY} {EPOCHS} --train-unique-tokens 5000 --deepspeed".split()
    variables = {"NNODES": "2", "NPROC": "1", "RDZV_ENDPOINT": f"localhost:{port}"}
    nodes = [start(with_data, "training/multi_node.sh", *flags, **variables) for _ in range(2)]
    try:
        deadline = time.monotonic() + 60
        for node in nodes:  # the launcher replaces the script, so that SLURM's signals reach it
            while "torch.distributed.run" not in Path(f"/proc/{node.pid}/cmdline").read_text():
                assert node.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        errors = [node.communicate(timeout=300)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(error[-2000:] for error in errors)
    config = finished(with_data / "runs" / "mdm_2298M_363_epochs")
    assert config["processes"] == 2 and config["parallel"]["cpu_offload"] and config["parallel"]["zero_stage"] == 1


def task(folder, name: str, documents: list[dict], kind: str, extra: str) -> None:
    """Write a task of lm-eval as files."""
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    validation: {folder / name}.jsonl\n"
        f"validation_split: validation\noutput_type: {kind}\ndoc_to_text: '{{{{context}}}}'\n{extra}"
        "metric_list:\n  - metric: acc\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name.startswith("downstream/")])
def test_a_downstream_script_scores(name, with_data):
    """The named tasks are on a hub; toy tasks of the same two kinds replace them."""
    objective = "ar" if name == "downstream/ar.sh" else "mdm"
    toy_run(with_data, objective)
    tasks = with_data / "tasks"
    tasks.mkdir()
    documents = [
        {"context": TEXT[0][start : start + 20], "choices": ["quick", " dog"], "label": 0} for start in (0, 20)
    ]
    task(tasks, "toy_choices", documents, "multiple_choice", "doc_to_choice: '{{choices}}'\ndoc_to_target: label\n")
    words = [{"context": "the quick brown fox jumps over the lazy", "answer": "dog"}]
    task(tasks, "toy_words", words, "loglikelihood", "doc_to_target: ' {{answer}}'\n")
    chosen = "toy_words" if name == "downstream/mdm_generate.sh" else "toy_choices"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    run(with_data, name, "--include_path", "tasks", TASKS=chosen, **offline)
    (results,) = (with_data / "runs" / "downstream").glob("*_20*.json")
    assert 0 <= json.loads(results.read_text())["results"][chosen]["acc,none"] <= 1


def test_every_script_has_a_toy_run():
    others = {"training/multi_node.sh", "evaluation/validation.sh", "evaluation/out_of_domain.sh"}
    downstream = {name for name in SCRIPTS if name.startswith("downstream/")}
    assert set(SCRIPTS) == set(TRAINING) | others | downstream
