"""The scripts of the published quickstart: with a toy replacement of C4, and without data."""

import json
import math
import os
import shutil
import subprocess

import pytest

from megatron.data.indexed import IndexedDatasetWriter
from megatron.data.tokenizer import GPT2BPETokenizer, train_tokenizer
from tests.conftest import ROOT, environment, records

FILES = ("train_c4_100m.txt", "val_c4.txt", "gpt2-vocab.json", "gpt2-merges.txt")
TOY = "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --kv-channels 16 --seq-length 32 --train-epochs 2"
TOY += " --global-batch-size 16 --eval-interval 4 --eval-samples 8 --save-interval 4 --fp32 --no-compile --lr 1e-2"
SCRIPTS = ("train_ar.sh", "eval_ar.sh", "train_mdm.sh", "eval_mdm.sh")


@pytest.fixture
def clone(tmp_path):
    """A copy of the project without data and runs."""
    shutil.copytree(ROOT / "examples_scaling", tmp_path / "examples_scaling")
    for name in ("megatron", "pretrain_gpt.py", "pretrain_mdm.py", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture
def with_data(clone):
    """The same with the files of download.sh: a small vocabulary, 4000 tokens."""
    data = clone / "data"
    data.mkdir()
    text = ["the quick brown fox jumps over the lazy dog and the bear " * 20, "def f(x):\n    return x\n" * 20]
    train_tokenizer(text, 300, data / "tokenizer.json")
    model = json.loads((data / "tokenizer.json").read_text())["model"]
    (data / "gpt2-vocab.json").write_text(json.dumps(model["vocab"]))
    (data / "gpt2-merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]) + "\n")
    tokenizer = GPT2BPETokenizer(data / "gpt2-vocab.json", data / "gpt2-merges.txt")
    for name, list_name, copies in (("100", "train_c4_100m.txt", 8), ("val", "val_c4.txt", 4)):
        with IndexedDatasetWriter(data / f"gpt2tok_c4_{name}_text_document", tokenizer.vocabulary_size) as writer:
            for ids in tokenizer.encode_batch(text * copies):
                writer.add_document([*ids, tokenizer.eod])
        (data / list_name).write_text(f'"1.0 data/gpt2tok_c4_{name}_text_document"\n')
    return clone


def script(clone, name, *flags, code=0, **variables):
    """Run a script and check its exit code."""
    command = ["bash", f"examples_scaling/quickstart/{name}", *flags]
    result = subprocess.run(
        command, cwd=clone, env=environment() | variables, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == code, result.stderr[-3000:]
    return result


@pytest.mark.parametrize("objective", ["ar", pytest.param("mdm", marks=pytest.mark.slow)])
def test_training_is_stopped_resumed_and_evaluated(objective, with_data):
    toy, run = TOY.split(), with_data / "runs" / f"{objective}_best_on_100m"
    script(with_data, f"train_{objective}.sh", *toy, "--exit-interval", "5")
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    script(with_data, f"train_{objective}.sh", *toy, NPROC="2")
    config = json.loads((run / "config.json").read_text())
    assert config["recipe"] == "published" and config["processes"] == 2
    assert config["data"]["epoch_order"] == "megatron" and config["model"]["hidden_dropout"] == 0.1
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    last = records(run, "valid")[-1]
    assert last["alignment"] == "published" and last["loss"] < math.log(300)
    result = script(with_data, f"eval_{objective}.sh")
    (record,) = map(json.loads, result.stdout.splitlines()[1:])
    assert (record["iteration"], record["num_mc"]) == (last["iteration"], 8 if objective == "mdm" else 1)
    assert record["mc_se"] is None if objective == "ar" else 0 < record["mc_se"] < 1
    assert record["loss"] == pytest.approx(last["loss"], abs=0.5)


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_the_data_one_line_names_what_fetches_it(name, clone):
    result = script(clone, name, code=2)
    assert result.stderr == "error: data/train_c4_100m.txt: does not exist; bash download.sh fetches it\n"
    assert not result.stdout and not (clone / "runs").exists()


def test_an_evaluation_without_its_run_names_what_trains_it(with_data):
    result = script(with_data, "eval_mdm.sh", code=2)
    message = "error: runs/mdm_best_on_100m: does not exist; bash examples_scaling/quickstart/train_mdm.sh trains it\n"
    assert result.stderr == message


@pytest.mark.parametrize("devices, world_size", [(0, 1), (1, 1), (2, 2), (3, 2), (5, 4), (8, 8)])
def test_the_world_size_is_the_largest_power_of_two_of_the_devices(devices, world_size, clone, tmp_path):
    (tmp_path / "bin").mkdir()
    listing = tmp_path / "bin" / "nvidia-smi"
    listing.write_text("#!/bin/sh\n" + "".join(f"echo 'GPU {number}: a device'\n" for number in range(devices)))
    listing.chmod(0o755)
    path = f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}"
    (line,) = script(clone, "train_ar.sh", DRY_RUN="1", PATH=path).stdout.splitlines()
    assert (f"--nproc_per_node={world_size} " in line) == (world_size > 1) and "nproc_per_node=1 " not in line


def test_every_script_is_short_and_cites_the_paper():
    for name in SCRIPTS:
        lines = (ROOT / "examples_scaling" / "quickstart" / name).read_text().splitlines()
        assert 8 <= len(lines) <= 15 and "2507.15857" in "".join(lines[1:5])
