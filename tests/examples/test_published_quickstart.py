"""The scripts of the published quickstart: with a toy replacement of C4, and without data."""

import json
import math
import os
import subprocess

import pytest

from tests.conftest import ROOT, records
from tests.examples.scripts import run

TOY = "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --kv-channels 16 --seq-length 32 --train-epochs 2"
TOY += " --global-batch-size 16 --eval-interval 4 --eval-samples 8 --save-interval 4 --fp32 --no-compile --lr 1e-2"
SCRIPTS = ("train_ar.sh", "eval_ar.sh", "train_mdm.sh", "eval_mdm.sh")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ar", "mdm"])
def test_training_is_stopped_resumed_and_evaluated(objective, with_data):
    toy, folder = TOY.split(), with_data / "runs" / f"{objective}_best_on_100m"
    run(with_data, f"quickstart/train_{objective}.sh", *toy, "--exit-interval", "5")
    assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
    run(with_data, f"quickstart/train_{objective}.sh", *toy, NPROC="2")
    config = json.loads((folder / "config.json").read_text())
    assert config["recipe"] == "published" and config["processes"] == 2
    assert config["data"]["epoch_order"] == "megatron" and config["model"]["hidden_dropout"] == 0.1
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    last = records(folder, "valid")[-1]
    assert last["alignment"] == "published" and last["loss"] < math.log(300)
    result = run(with_data, f"quickstart/eval_{objective}.sh")
    (record,) = map(json.loads, result.stdout.splitlines()[1:])
    assert (record["iteration"], record["num_mc"]) == (last["iteration"], 8 if objective == "mdm" else 1)
    assert record["mc_se"] is None if objective == "ar" else 0 < record["mc_se"] < 1
    assert record["loss"] == pytest.approx(last["loss"], abs=0.5)


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_the_data_one_line_names_what_fetches_it(name, clone):
    result = run(clone, f"quickstart/{name}", code=2)
    assert result.stderr == "error: data/train_c4_100m.txt: does not exist; bash download.sh fetches it\n"
    assert not result.stdout and not (clone / "runs").exists()


def test_an_evaluation_without_its_run_names_what_trains_it(with_data):
    result = run(with_data, "quickstart/eval_mdm.sh", code=2)
    message = "error: runs/mdm_best_on_100m: does not exist; bash examples_scaling/quickstart/train_mdm.sh trains it\n"
    assert result.stderr == message


@pytest.mark.parametrize(
    "devices, visible, world_size",
    [
        *[(0, None, 1), (1, None, 1), (2, None, 2), (3, None, 2), (5, None, 4), (8, None, 8)],
        *[(8, "0,3,5", 2), (8, "GPU-8932f937", 1), (8, "", 1), (2, "0,1,2,3", 2)],
    ],
)
def test_the_world_size_is_the_largest_power_of_two_of_the_devices(devices, visible, world_size, clone, tmp_path):
    (tmp_path / "bin").mkdir()
    listing = tmp_path / "bin" / "nvidia-smi"
    listing.write_text("#!/bin/sh\n" + "".join(f"echo 'GPU {number}: a device'\n" for number in range(devices)))
    listing.chmod(0o755)
    variables = {"PATH": f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}", "DRY_RUN": "1"}
    variables |= {"CUDA_VISIBLE_DEVICES": visible} if visible is not None else {}
    command = ["bash", "examples_scaling/quickstart/train_ar.sh"]
    done = subprocess.run(command, cwd=clone, env=variables, capture_output=True, text=True, check=True)
    line, cost = done.stdout.splitlines()
    assert cost.startswith("# N 144.8M")
    assert (f"--nproc_per_node={world_size} " if world_size > 1 else ".venv/bin/python pretrain_gpt.py ") in line


def test_every_script_is_short_and_cites_the_paper():
    for name in SCRIPTS:
        lines = (ROOT / "examples_scaling" / "quickstart" / name).read_text().splitlines()
        assert 8 <= len(lines) <= 15 and "2507.15857" in "".join(lines[1:5])
