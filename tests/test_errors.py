"""User errors and machine faults: each gives one clear line, and no data is lost."""

import contextlib
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import CheckpointException, FileSystemReader

from megatron.data.index_file import HEADER, MAGIC
from megatron.errors import ConfigurationError
from megatron.training.checkpoint_store import damage, load_checkpoint
from megatron.training.command_line import parse
from megatron.training.launcher import main
from tests.conftest import environment, records, run
from tests.forked import run_script
from tests.training.runs import Run

NETWORK = "--num-layers 2 --hidden-size 32 --num-attention-heads 2".split()


def one_line(text: str, *parts) -> None:
    """Check that `text` is one line that contains all `parts`."""
    assert "\n" not in text.strip() and "Traceback" not in text
    for part in parts:
        assert str(part) in text, f"{part!r} is not in: {text}"


def check_error(stderr: str, *parts) -> None:
    """Check that stderr has exactly one error line, which contains all `parts`, and no traceback."""
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in stderr, stderr[-3000:]
    one_line(errors[0], *parts)


@pytest.fixture
def refused(capsys):
    """Run main in this process: it must exit with code 2 and one error line that contains all `parts`."""

    def check(objective, flags, *parts, expected_code=2):
        code = None
        try:
            main(objective, list(map(str, flags)))
        except SystemExit as caught:
            code = caught.code
        gc.collect()  # the lock of the run folder is released with the last frame that references it
        check_error(capsys.readouterr().err, *parts)
        assert code == expected_code

    return check


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """A finished run: checkpoints of steps 8 and 12."""
    folder = tmp_path_factory.mktemp("whole")
    run("ar", *tiny, "--save", folder)
    return folder


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return target


def shard(folder: Path, iteration: int) -> Path:
    return next((folder / "checkpoints" / f"iter_{iteration:07d}").glob("*.safetensors"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def without(flags: list[str], name: str) -> list[str]:
    """Return `flags` without one flag and its value."""
    index = flags.index(name)
    return flags[:index] + flags[index + 2 :]


# ------------------------------------------------------------------------------------------ flags

WRONG_FLAGS = {
    "--num-layer 3": ("unknown flag --num-layer", "did you mean --num-layers?"),
    "--num-layer=3": ("unknown flag --num-layer", "did you mean --num-layers?"),
    "--qqqq": ("unknown flag --qqqq", "--help"),
    "1e-3": ("1e-3", "belongs to no flag"),
    "--num-layers two": ("--num-layers two", "is not a number", "1e5"),
    "--num-layers 2.5": ("--num-layers 2.5", "is not a whole number"),
    "--seq-length nan": ("--seq-length nan", "finite"),
    "--lr inf": ("--lr inf", "finite"),
    "--train-samples 1e999": ("--train-samples 1e999", "finite"),
    "--lr": ("--lr", "not followed by a value"),
    "--valid-data-path": ("--valid-data-path", "not followed by a value"),
    "--save": ("--save", "not followed by a value"),
    "--skip-train=1": ("--skip-train", "takes no value"),
    "--bf16=1": ("--bf16", "takes no value"),
    "--normalization batchnorm": ("--normalization batchnorm", "rmsnorm, layernorm"),
    "--bf16 --fp32": ("--bf16", "--fp32", "give one"),
    "--token-dropout 0.1 --token-dropout-max 0.3": ("--token-dropout 0.1", "--token-dropout-max 0.3", "give one"),
    "--num-query-groups 1": ("--num-query-groups 1", "does nothing without --group-query-attention"),
    "--group-query-attention": ("--group-query-attention", "does nothing without --num-query-groups"),
}


@pytest.mark.parametrize("flags", WRONG_FLAGS)
def test_wrong_flags_are_named_with_value_and_remedy(flags):
    with pytest.raises(ConfigurationError) as caught:
        parse("ar", [*NETWORK, *flags.split()])
    one_line(str(caught.value), *WRONG_FLAGS[flags])


def test_missing_flags_are_named_all_at_once():
    with pytest.raises(ConfigurationError) as caught:
        parse("mdm", ["--num-layers", "2"])
    one_line(str(caught.value), "--hidden-size and --num-attention-heads", "required", "--help")


def test_an_entry_point_prints_one_line_and_exits_with_2():
    done = run("ar", *NETWORK, "--num-layer", 3, check=False)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "error: unknown flag --num-layer; did you mean --num-layers?\n"


def test_two_budgets_none_and_too_small_a_one(refused, tiny):
    refused("ar", [*tiny, "--train-epochs", 2], "--train-epochs 2.0", "--train-samples 93", "exactly one")
    refused("ar", without(tiny, "--train-samples"), "no budget", "exactly one", "--train-flops")
    less = [*without(tiny, "--train-samples"), "--train-flops", 1000]
    refused("ar", less, "--train-flops 1000.0", "less than one sample of 32 tokens", "raise it")


def test_what_an_objective_cannot_do(refused, tiny):
    refused("mdm", [*tiny, "--token-dropout", 0.1], "--token-dropout 0.1", "pretrain_gpt.py")


def test_a_batch_that_does_not_divide(refused, tiny):
    refused("ar", [*tiny, "--micro-batch-size", 3], "--global-batch-size 8", "--micro-batch-size 3", "take 6 or 9")


def test_a_batch_that_does_not_divide_over_two_processes_ends_them_both(tiny):
    start = time.monotonic()
    done = run("ar", *tiny, "--micro-batch-size", 8, processes=2, check=False)
    assert done.returncode != 0 and time.monotonic() - start < 60
    for line in [line for line in done.stderr.splitlines() if line.startswith("error:")]:
        one_line(line, "--global-batch-size 8", "--micro-batch-size 8 times 2 ranks = 16", "take 16")
    assert "error: --global-batch-size 8" in done.stderr


# ------------------------------------------------------------------------------------------- data


def test_a_corpus_smaller_than_a_sample(refused, tiny, corpus):
    refused("ar", [*tiny, "--seq-length", 1_000_000], "--seq-length 1000000", "shorten it or add text")
    split = [*tiny[: tiny.index("--valid-data-path")], "--split", "50,50", "--seq-length", 1_000_000]
    refused("ar", split, "--seq-length 1000000", "the share of", "by --split holds", "shorten it or add text")
    cut = [*split[:-2], "--train-unique-tokens", 10**9]
    refused("ar", cut, "--train-unique-tokens 1000000000: the share of", "by --split holds", "lower it or add text")
    unique = [*tiny, "--train-unique-tokens", 20]
    refused("ar", unique, "--seq-length 32", "20", "shorten it or add text")
    refused("ar", [*tiny, "--train-unique-tokens", 10**9], "--train-unique-tokens 1000000000", "lower it or add text")


DAMAGED_DATA = {
    "no index": (".idx", lambda path: path.unlink(), "no such file"),
    "no tokens": (".bin", lambda path: path.unlink(), "no such file"),
    "empty index": (".idx", lambda path: path.write_bytes(b""), "write it again"),
    "foreign index": (".idx", lambda path: path.write_bytes(b"PK" * 100), "write it again"),
    "cut index": (".idx", lambda path: os.truncate(path, path.stat().st_size // 2), "truncated"),
    "no documents": (".idx", lambda path: path.write_bytes(HEADER.pack(MAGIC, 1, 8, 0, 0)), "holds no tokens"),
    "empty tokens": (".bin", lambda path: path.write_bytes(b""), "truncated"),
    "cut tokens": (".bin", lambda path: os.truncate(path, path.stat().st_size // 2), "truncated"),
    "more tokens": (".bin", lambda path: path.write_bytes(path.read_bytes() * 2), "do not belong together"),
    "broken description": (".json", lambda path: path.write_text("{"), "is not JSON"),
}


@pytest.mark.parametrize("damage", DAMAGED_DATA)
@pytest.mark.parametrize("split", ["train", "tuning"])
def test_damaged_data_is_named_by_file(damage, split, refused, tiny, corpus, tmp_path):
    suffix, damage_file, message = DAMAGED_DATA[damage]
    data = copy(corpus, tmp_path)
    damage_file(data / f"{split}{suffix}")
    flags = [*tiny, "--train-data-path", data / "train", "--valid-data-path", f"tuning={data}/tuning"]
    refused("ar", flags, data / f"{split}{suffix}", message)


def test_data_of_another_tokenizer(refused, tiny, corpus):
    flags = [*tiny, "--tokenizer-type", "NullTokenizer", "--vocab-size", 100]
    refused("ar", flags, f"{corpus}/train", "257 ids", "101", "--tokenizer-type")
    model = [*tiny, "--tokenizer-type", "HFTokenizer", "--tokenizer-model", corpus / "none.json"]
    refused("ar", model, f"--tokenizer-model {corpus}/none.json", "no such file")


def test_no_data_and_two_sets_of_one_name(refused, tiny, corpus):
    refused("ar", without(tiny, "--train-data-path"), "--train-data-path", "required", "tools/preprocess_data.py")
    twice = [*tiny, "--valid-data-path", f"a={corpus}/tuning", f"a={corpus}/validation"]
    refused("ar", twice, f"--valid-data-path a={corpus}/tuning a={corpus}/validation", "share a name")


@pytest.mark.parametrize("workers", [0, 2])
def test_ids_beyond_the_vocabulary_are_named_where_they_are_read(workers, refused, tiny, corpus, tmp_path):
    data = copy(corpus, tmp_path)
    (data / "train.json").unlink()
    flags = [*tiny, "--train-data-path", data / "train", "--tokenizer-type", "NullTokenizer", "--vocab-size", 50]
    flags += ["--num-workers", workers]
    index = flags.index("--valid-data-path")
    refused("ar", flags[:index] + flags[index + 3 :], f"{data}/train.bin", "contains the token id", "ids 0 to 50")


def test_a_wrong_prefix_is_reported_before_its_tokenizer(refused, tiny, tmp_path):
    without_type = tiny[: tiny.index("--tokenizer-type")] + tiny[tiny.index("--tokenizer-type") + 2 :]
    refused("ar", [*without_type, "--train-data-path", tmp_path / "none"], f"{tmp_path}/none.idx: no such file")


def test_data_without_a_tokenizer_file_need_one_by_flags(refused, tiny, corpus):
    without_type = tiny[: tiny.index("--tokenizer-type")] + tiny[tiny.index("--tokenizer-type") + 2 :]
    refused("ar", without_type, f"{corpus}/train: no tokenizer file is next to the data", "--tokenizer-type")


@pytest.mark.parametrize(
    "code, message", [(6, "dtype code 6"), (7, "dtype code 7"), (9, "dtype code 9"), (0, "code 0")]
)
def test_a_wrong_dtype_is_refused(code, message, refused, tiny, corpus, tmp_path):
    data = copy(corpus, tmp_path)
    index = bytearray((data / "train.idx").read_bytes())
    index[17] = code
    (data / "train.idx").write_bytes(index)
    refused("ar", [*tiny, "--train-data-path", data / "train"], data / "train.idx", message, "write it again")


@pytest.mark.parametrize("order", ["documents", "windows", "megatron"])
@pytest.mark.parametrize("entry, offset", [(1, -(2**31)), (-1, 10**9)])
def test_pointers_that_do_not_follow_from_the_sizes_are_refused(order, entry, offset, refused, tiny, corpus, tmp_path):
    data = copy(corpus, tmp_path)
    index = bytearray((data / "train.idx").read_bytes())
    documents = HEADER.unpack(index[: HEADER.size])[3]
    start = HEADER.size + 4 * documents + 8 * (entry % documents)
    index[start : start + 8] = offset.to_bytes(8, "little", signed=True)
    (data / "train.idx").write_bytes(index)
    flags = [*tiny, "--train-data-path", data / "train", "--epoch-order", order]
    refused("ar", flags, data / "train.idx", f"document {entry % documents} at byte {offset}", "tools/rebuild_index.py")


def test_blends_and_splits_that_cannot_be(refused, tiny, corpus, tmp_path):
    blend = ["0.5", f"{corpus}/train", "nan", f"{corpus}/tuning"]
    refused("ar", [*tiny, "--train-data-path", *blend], f"the weight nan of {corpus}/tuning", "not a positive number")
    blend[2] = "0.5"
    unique = [*tiny, "--train-data-path", *blend, "--train-unique-tokens", 500]
    refused("ar", unique, "--train-unique-tokens 500", "blends 2", "drop it")
    refused("ar", [*tiny, "--blend-order", "megatron"], "--blend-order megatron", "one data set", "leave it out")
    path = tmp_path / "paths.txt"
    path.write_text('"0.5 a')
    held_in = without(tiny, "--train-data-path")
    refused("ar", [*held_in, "--train-data-path-file", path], f"--train-data-path-file {path}", "not of the form")
    index = tiny.index("--valid-data-path")
    flags = [*tiny[:index], *tiny[index + 3 :], "--split", "1,0.00001"]
    refused("ar", flags, "--split 1,0.00001", "leaves no tokens", f"{corpus}/train", "for validation")


# ------------------------------------------------------------------------------------ run folders


def test_a_run_folder_that_cannot_be(refused, tiny, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused("ar", [*tiny, "--save", tmp_path / "file"], f"--save {tmp_path}/file", "another folder")
    refused("ar", [*tiny, "--save", tmp_path / "file" / "run"], f"--save {tmp_path}/file/run", "another folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_to_load_or_to_evaluate(refused, tiny, whole, tmp_path):
    nothing = [*tiny, "--load", tmp_path, "--save", tmp_path / "branch"]
    refused("ar", nothing, f"--load {tmp_path}", "holds no run", "--save")
    assert not (tmp_path / "branch").exists()
    refused("ar", [*tiny, "--skip-train"], "--skip-train", "no checkpoint", "--load DIR")
    refused("ar", [*tiny, "--skip-train", "--save", tmp_path / "new"], f"{tmp_path}/new", "no checkpoint", "train it")
    index = tiny.index("--valid-data-path")
    blind = [*tiny[:index], *tiny[index + 3 :], "--skip-train"]
    refused("ar", blind, "--skip-train", "nothing to evaluate", "--valid-data-path")


def test_a_checkpoint_that_must_be_there(refused, tiny, whole, tmp_path):
    new, started, flag = tmp_path / "new", tmp_path / "started", "--exit-on-missing-checkpoint"
    remedy = f"holds no checkpoint; train it first, or leave out {flag}"
    refused("ar", [*tiny, "--save", new, "--load", f"{new}/", flag], f"--load {new}: {remedy}")
    refused("ar", [*tiny, "--save", new, flag], f"--save {new}: {remedy}")
    refused("ar", [*tiny, "--save", new, "--load", tmp_path / "other", flag], "holds no run")
    refused("ar", [*tiny, flag], f"{flag}: there is no checkpoint to start from", "--load DIR")
    started.mkdir()
    shutil.copy(whole / "config.json", started)  # like a run that was killed before its first checkpoint
    refused("ar", [*tiny, "--save", started, "--load", started, flag], f"--load {started}: {remedy}")
    refused("ar", [*tiny, "--save", new, "--load", started], f"--load {started}: holds no checkpoint; train it first")
    refused("ar", [*tiny, "--save", new, "--load", new, "--skip-train"], f"--load {new}: holds no checkpoint; train it")
    assert not new.exists() and [path.name for path in started.iterdir()] == ["config.json"]


def test_a_dry_run_refuses_what_the_start_refuses(refused, tiny, whole, tmp_path):
    """Without a device, a launcher or a lock, and without writing a file."""

    def dry(flags, *parts):
        refused("ar", [*tiny, "--dry-run", *flags], *parts)

    before, save = contents(whole), ["--save", tmp_path / "run"]
    settings = tmp_path / "deepspeed.json"
    settings.write_text(json.dumps({"train_batch_size": 9}))
    dry(
        ["--deepspeed", "--deepspeed-config", tmp_path / "none.json"],
        f"--deepspeed-config {tmp_path}/none.json: No such",
    )
    dry(["--deepspeed", "--deepspeed-config", settings], "train_batch_size 9 contradicts --global-batch-size 8")
    settings.write_text(json.dumps({"bf16": {"enabled": True}}))
    dry(["--deepspeed", "--deepspeed-config", settings], "bf16.enabled true contradicts computing in fp32")
    dry([*save, "--load", tmp_path / "none"], f"--load {tmp_path}/none: holds no run")
    dry([*save, "--load", whole, "--num-layers", 3], "a branch keeps the model")
    dry(["--save", whole, "--lr", 1e-3], "--lr 0.001", "--lr 0.01")
    dry(["--save", whole, "--bf16", "--no-fp32"], "the run in", "was started in fp32")
    dry(["--save", settings / "run"], f"--save {settings}/run: cannot be written to", "another folder")
    dry(["--global-batch-size", 6], "--global-batch-size 6", "is not a multiple of --micro-batch-size 4")
    dry(["--tensor-model-parallel-size", 3], "--tensor-model-parallel-size 3", "does not divide")
    dry(["--pipeline-model-parallel-size", 4], "--pipeline-model-parallel-size 4", "more than --num-layers 2")
    kernels = ["--flash-attention", "FA3", "--bf16", "--no-fp32", "--attention-dropout", 0.1]
    dry(kernels, "--flash-attention FA3: has no dropout and no masks")
    assert not (tmp_path / "run").exists() and contents(whole) == before


@pytest.mark.parametrize("ranks, refusal", [(2, None), (3, "3 were started"), (None, None)])
def test_a_dry_run_checks_the_layout_for_the_ranks_that_are_set(
    ranks, refusal, refused, tiny, tmp_path, capsys, monkeypatch
):
    flags = [*tiny, "--dry-run", "--tensor-model-parallel-size", 2, "--save", tmp_path / "run"]
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(ranks)} if ranks else {}
    monkeypatch.setattr(os, "_exit", sys.exit)  # called by ranks of a job
    if refusal:
        refused("ar", flags, "--tensor-model-parallel-size 2", refusal)
    else:
        with contextlib.suppress(SystemExit):
            main("ar", list(map(str, flags)))
        assert json.loads(capsys.readouterr().out)["objective_name"] == "ar"
    assert not (tmp_path / "run").exists()


def test_a_dry_run_leaves_to_the_device_and_the_launcher_what_they_decide(tiny, tmp_path, capsys):
    settings = tmp_path / "deepspeed.json"
    settings.write_text(json.dumps({"bf16": {"enabled": True}, "gradient_accumulation_steps": 16}))
    flags = [flag for flag in tiny if flag != "--fp32"]
    main("ar", [*flags, "--dry-run", "--deepspeed", "--deepspeed-config", str(settings)])
    assert json.loads(capsys.readouterr().out)["parallel"]["deepspeed"]


def test_what_is_typed_replaces_its_rivals_in_the_run_that_is_evaluated(whole):
    recorded = parse("ar", ["--skip-train", "--load", str(whole)]).training
    assert (recorded.train_samples, recorded.train_epochs, recorded.fp32, recorded.bf16) == (93, None, True, None)
    typed = parse("ar", ["--skip-train", "--load", str(whole), "--train-epochs", "1", "--bf16"]).training
    assert (typed.train_samples, typed.train_epochs, typed.fp32, typed.bf16) == (None, 1.0, None, True)
    assert typed.global_batch_size == 8


def test_a_run_of_another_kind_is_not_continued(refused, tiny, whole):
    before = {name: data for name, data in contents(whole).items() if name != "lock"}
    refused("mdm", [*tiny, "--save", whole], f"--save {whole}", "objective ar, not mdm", "give --objective ar")
    branch = f"--load {whole} --save"
    refused("ar", [*tiny, "--save", whole, "--train-samples", 94], "--train-samples 94", "started with 93", branch)
    decay = [*tiny, "--save", whole, "--lr-decay-samples", 90]
    refused("ar", decay, "--lr-decay-samples 90", "no --lr-decay-samples", branch)
    refused("ar", [*tiny, "--save", whole, "--lr", 1e-3], "--lr 0.001", "--lr 0.01", branch)
    unique = [*tiny, "--save", whole, "--train-unique-tokens", 9999]
    refused("ar", unique, "--train-unique-tokens 9999", "no --train-unique-tokens", branch)
    assert {name: data for name, data in contents(whole).items() if name != "lock"} == before


def test_a_branch_keeps_the_network(refused, tiny, whole, tmp_path):
    flags = [*tiny, "--load", whole, "--save", tmp_path / "branch"]
    refused("ar", [*flags, "--num-layers", 3], "--num-layers 3", "--num-layers 2", "a branch keeps the model")
    refused("ar", [*flags, "--no-swiglu"], "--no-swiglu", "started with --swiglu", "a branch keeps the model")
    refused("mdm", flags, f"--load {whole}", "objective ar, not mdm")
    recorded = json.loads((whole / "config.json").read_text())
    other = copy(whole, tmp_path / "other")
    (other / "config.json").write_text(json.dumps(recorded | {"vocabulary_size": 300}))
    flags = [*tiny, "--load", other, "--save", tmp_path / "branch"]
    refused("ar", flags, f"--load {other}", "300 token ids", "257", "same tokenizer")


def test_a_second_process_is_told_who_holds_the_run(refused, tiny, tmp_path):
    flags = [*tiny, "--train-samples", "1000000", "--eval-interval", "1000000", "--save", str(tmp_path)]
    with Run("ar", flags, tmp_path / "output") as first:
        first.wait_until((tmp_path / "status.json").exists)
        refused("ar", flags, f"--save {tmp_path}", f"process-{first.ranks[0].pid}", "wait for it", expected_code=75)


def test_a_layout_is_refused_before_anything_is_written(refused, tiny, tmp_path):
    flags = [*tiny, "--save", tmp_path / "a", "--tensor-model-parallel-size", 2]
    refused("ar", flags, "--tensor-model-parallel-size 2", "1 was started", "multiple of 2")
    assert not (tmp_path / "a").exists()


def test_offload_needs_a_gpu(refused, tiny):
    refused("mdm", [*tiny, "--cpu-offload"], "--cpu-offload", "there is no GPU", "leave it out")


# ---------------------------------------------------------------------------- faults of a machine


def limited(flags, size: int, processes: int = 1) -> subprocess.CompletedProcess:
    """Run with files limited to `size` bytes, which acts on large files like a full disk."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
    code = limit + "from megatron.training.launcher import main; main('ar')"
    return run_script(["-c", code, *map(str, flags)], environment(), 120, processes)


def test_a_full_disk_while_saving_loses_nothing(tiny, whole, tmp_path):
    run("ar", *tiny, "--save", tmp_path, "--exit-interval", 5)
    before = contents(tmp_path / "checkpoints")
    done = limited([*tiny, "--save", tmp_path, "--num-workers", 2], 100_000)  # must not wait for the workers
    assert done.returncode == 1
    check_error(
        done.stderr, tmp_path / "checkpoints" / "iter_0000008", "File too large", "older checkpoints", "free space"
    )
    assert contents(tmp_path / "checkpoints") == before
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("iter_*")) == ["iter_0000004", "iter_0000005"]
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed" and "iter_0000008" in status["reason"] and "\n" not in status["reason"]
    run("ar", *tiny, "--save", tmp_path)
    assert records(tmp_path) == records(whole)


def test_a_full_disk_while_recording_names_the_folder(tiny, whole, tmp_path):
    size = (whole / "config.json").stat().st_size + 500
    assert size < 1.8 * (whole / "metrics.jsonl").stat().st_size
    done = limited([*tiny, "--train-samples", 186, "--save", tmp_path, "--save-interval", 1000], size)  # twice as long
    assert done.returncode == 1
    check_error(done.stderr, tmp_path / "metrics.jsonl", "File too large", "free space")
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_a_full_disk_ends_both_processes(tiny, tmp_path):
    done = limited([*tiny, "--save", tmp_path, "--num-workers", 1], 100_000, processes=2)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert errors and all("iter_0000004" in line and "File too large" in line for line in errors), done.stderr[-3000:]
    assert not any((tmp_path / "checkpoints").glob("iter_*"))


def test_a_loss_that_is_not_a_number_stops_and_overwrites_nothing(tiny, tmp_path):
    flags = [*tiny, "--lr", "1e30", "--clip-grad", 0, "--save-interval", 1, "--eval-interval", 100]
    done = run("ar", *flags, "--save", tmp_path, check=False)
    assert done.returncode == 1
    remedy = f"lower --lr or clip harder (--clip-grad) in a branch (--load {tmp_path} --save ANOTHER_DIR)"
    check_error(done.stderr, "step 2", "not finite", "from step 1", remedy)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "failed" and "step 2" in status["reason"]
    assert [p.name for p in (tmp_path / "checkpoints").glob("iter_*")] == ["iter_0000001"]
    assert json.loads((tmp_path / "checkpoints" / "latest.json").read_text())["iteration"] == 1
    assert [record["iteration"] for record in records(tmp_path)] == [1]


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def cut(folder: Path, mark: Path) -> None:
    os.truncate(shard(folder, 12), shard(folder, 12).stat().st_size // 2)


def flip(folder: Path, mark: Path) -> None:
    path = shard(folder, 12)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def plant(folder: Path, mark: Path) -> None:
    """Put pickles where an unsafe reader would load them: in both checkpoints, and as meta.json of the newest."""
    for iteration in (8, 12):
        for name in (".metadata", "optimizer.pt", "shard-00002-model-00001-of-00001.distcp"):
            shard(folder, iteration).with_name(name).write_bytes(pickle.dumps(Payload(mark)))
    shard(folder, 12).with_name("meta.json").write_bytes(pickle.dumps(Payload(mark)))


def replace(folder: Path, mark: Path) -> None:
    """Replace the tensors of the newest checkpoint with a pickle."""
    shard(folder, 12).write_bytes(pickle.dumps(Payload(mark)))


def add(folder: Path, mark: Path) -> None:
    """Add a pickle to the newest checkpoint under a name that loading opens."""
    shard(folder, 12).with_name("shard-00002-model-00001-of-00001.safetensors").write_bytes(pickle.dumps(Payload(mark)))


@pytest.mark.parametrize("damage", [cut, flip, plant, replace, add], ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, tiny, whole, tmp_path):
    folder, mark = copy(whole, tmp_path / "run"), tmp_path / "executed"
    damage(folder, mark)
    done = run("ar", *tiny, "--save", folder)
    assert "iter_0000012 is damaged" in done.stderr and "falling back" in done.stderr
    assert "iter_0000008" in done.stderr and "error:" not in done.stderr
    assert records(folder) == records(whole)
    assert not mark.exists()


def test_the_planted_pickle_is_one_that_the_default_reader_executes(whole, tmp_path):
    folder, mark = copy(whole, tmp_path / "run"), tmp_path / "executed"
    plant(folder, mark)
    with contextlib.suppress(AttributeError):  # the unpickled object is not metadata
        FileSystemReader(str(shard(folder, 8).parent)).read_metadata()
    assert mark.exists()


def test_a_pickle_that_the_checksums_were_made_for_is_not_executed_either(whole, tmp_path):
    folder, mark = copy(whole, tmp_path / "run"), tmp_path / "executed"
    replace(folder, mark)
    path = shard(folder, 12)
    meta = json.loads(path.with_name("meta.json").read_text())
    meta["files"][path.name] = [path.stat().st_size, zlib.crc32(path.read_bytes())]
    path.with_name("meta.json").write_text(json.dumps(meta))
    assert damage(path.parent) is None
    with pytest.raises(CheckpointException, match="header too large|metadata is None"):  # the latter with torch 2.11
        load_checkpoint(path.parent, {"model.norm.weight": torch.zeros(1)})
    assert not mark.exists()


@pytest.mark.parametrize("nonsense", ["", "[1]", "{}", '{"files": 3}', '{"files": {"a": 1}}', "\ud83d"])
def test_a_meta_file_of_nonsense_is_damage(nonsense, refused, tiny, whole, tmp_path):
    folder = copy(whole, tmp_path / "run")
    for path in folder.glob("checkpoints/iter_*/meta.json"):
        path.write_bytes(nonsense.encode("utf-8", "surrogatepass"))
    refused("ar", [*tiny, "--save", folder], folder / "checkpoints", "every checkpoint is damaged", "another --save")


def test_a_run_whose_checkpoints_are_all_damaged_is_never_started_again(refused, tiny, whole, tmp_path):
    folder = copy(whole, tmp_path / "run")
    before = records(folder)
    for iteration in (8, 12):
        os.truncate(shard(folder, iteration), 100)
    for _ in range(2):  # the second start must not treat the folder as empty
        refused("ar", [*tiny, "--save", folder], folder / "checkpoints", "every checkpoint is damaged", "restore one")
    assert records(folder) == before


def test_a_damaged_configuration_of_a_run_is_named(refused, tiny, whole, tmp_path):
    folder = copy(whole, tmp_path / "run")
    (folder / "config.json").write_text("{")
    refused("ar", [*tiny, "--save", folder], folder / "config.json", "cannot be read as JSON", "restore it")
    (folder / "config.json").unlink()
    refused("ar", [*tiny, "--save", folder], f"--save {folder}", "checkpoints but no config.json", "restore it")


def test_a_damaged_pointer_is_written_again(tiny, whole, tmp_path):
    """Pointers are derived from checkpoints and records, even if the newest checkpoint is lost."""
    folder = copy(whole, tmp_path / "run")
    best = (folder / "checkpoints" / "best.json").read_text()
    (folder / "checkpoints" / "best.json").write_text("{")
    os.truncate(shard(folder, 12), 100)
    run("ar", *tiny, "--save", folder)
    assert (folder / "checkpoints" / "best.json").read_text() == best
