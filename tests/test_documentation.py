"""What the documents and examples tell a user to type, typed: scripts exist, flags parse. No training starts."""

import os
import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from megatron.config.compatibility import TABLE
from megatron.errors import ConfigurationError
from megatron.training.command_line import parse, parser
from tests.conftest import ROOT

OBJECTIVES = {"pretrain_gpt.py": "ar", "pretrain_mdm.py": "mdm"}
NETWORK = "--num-layers 2 --hidden-size 32 --num-attention-heads 2".split()
# commands that are not ours: their arguments are not checked
FOREIGN = {
    "python3",
    "cd",
    "git",
    "source",
    "export",
    "ls",
    "cat",
    "head",
    "tail",
    "mkdir",
    "kill",
    "pip",
    "sbatch",
    "scontrol",
    "sleep",
    "touch",
    "grep",
    "if",
    "then",
    "fi",
    "exit",
    "xdg-open",
}
# flags of torchrun, srun, sbatch and pip
FOREIGN_FLAGS = {
    "--no-deps",
    "--standalone",
    "--nproc-per-node",
    "--nnodes",
    "--node-rank",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--rdzv-id",
    "--rdzv-conf",
    "--max-restarts",
    "--nodes",
    "--ntasks-per-node",
    "--gpus-per-node",
    "--kill-on-bad-exit",
    "--job-name",
    "--output",
    "--open-mode",
    "--cpus-per-task",
    "--mem",
    "--time",
    "--signal",
    "--requeue",
    "--signals-to-handle",
    "--shutdown-timeout",
    "--rdzv",
}
DOCUMENTS = [
    ROOT / "README.md",
    *(path for name in ("docs", "benchmarks", "results") for path in (ROOT / name).rglob("*.md")),
]
EXAMPLES = [path for path in sorted((ROOT / "examples_scaling").rglob("*.sh")) if "lib" not in path.parts]


def scripts() -> list[Path]:
    """Return every shell script of the project."""
    inside = [path for path in sorted(ROOT.rglob("*.sh")) if ".venv" not in path.parts]
    return inside + [path for path in (ROOT / ".ci").glob("*") if path.read_text().startswith("#!/usr/bin/env bash")]


def commands(block: str) -> list[list[str]]:
    """Return the words of each command of a shell block, without comments and variables in front."""
    lines = re.sub(r"\\\n\s*", " ", block).splitlines()
    parts = [part for line in lines for part in re.split(r" && | \| |; ", line)]
    split = [shlex.split(part, comments=True) for part in parts]
    split = [
        words[next((i for i, word in enumerate(words) if not re.match(r"[A-Za-z_]+=", word)), len(words)) :]
        for words in split
    ]
    return [words for words in split if words]


def documented() -> list[tuple[str, list[str]]]:
    """Return (document, command) of every ```bash block."""
    return [
        (path.name, words)
        for path in DOCUMENTS
        for block in re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
        for words in commands(block)
    ]


def dry_run(script: Path, *arguments: str, **variables) -> list[list[str]]:
    """Return the commands that an example prints instead of running them."""
    environment = os.environ | {"DRY_RUN": "1", "NPROC": "1"} | variables
    done = subprocess.run(
        ["bash", str(script), *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return commands(done.stdout)


@lru_cache
def help_of(*tool: Path | str) -> str:
    done = subprocess.run([sys.executable, *tool, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    ways = re.match(r"usage: \S+ \[-h\] \{([\w,-]+)\} \.\.\.", done.stdout)  # of a tool that has several
    return done.stdout + "".join(help_of(*tool, way) for way in (ways[1].split(",") if ways else ()))


def extras() -> list[str]:
    """Return the flags of install.sh that name an extra of setup.py."""
    told = re.search(r"extras_require=\{(.*?)\}", (ROOT / "setup.py").read_text(), re.DOTALL)[1]
    return [f"--with-{extra}" for extra in re.findall(r'"([\w-]+)":', told)]


def flags(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)]


def check(words: list[str]) -> None:
    """Check one command as far as that is possible without running it."""
    names = [word for word in words if word.endswith((".py", ".sh"))]
    place = words.index("-m") + 1 if words[0] in ("python", "torchrun") and "-m" in words else len(words)
    if place < len(words) and words[place].startswith("megatron."):
        told = help_of("-m", words[place])  # fails where there is no such module
        missing = [name for name in flags(words[place + 1 :]) if not re.search(rf"{name}(?![\w-])", told)]
        assert not missing, f"{words[place]} has no {missing}"
        return
    if not names or words[0] in FOREIGN:
        assert words[0] in FOREIGN, f"{shlex.join(words)}: this test does not know how to check it"
        return
    path, arguments = ROOT / names[0], words[words.index(names[0]) + 1 :]
    assert path.is_file(), f"{names[0]} does not exist"
    if path.name in OBJECTIVES:
        # an excerpt says ..., and --skip-train takes the network from the run's folder
        rest = NETWORK if "..." in arguments or "--skip-train" in arguments else []
        parse(OBJECTIVES[path.name], [*rest, *(word for word in arguments if word != "...")])
    elif path.suffix == ".py":
        missing = [name for name in flags(arguments) if not re.search(rf"{name}(?![\w-])", help_of(path))]
        assert not missing, f"{names[0]} has no {missing}"
    elif path in EXAMPLES:
        for printed in dry_run(path, *arguments):
            check(printed)
    else:
        known = path.read_text() + " ".join(extras() if path.name == "install.sh" else ())
        missing = [name for name in flags(arguments) if name not in known]
        assert not missing, f"{names[0]} has no {missing}"


@pytest.mark.parametrize(
    "document, words", documented(), ids=lambda part: part if isinstance(part, str) else "-".join(part[:2])
)
def test_a_documented_command_is_one_that_works(document, words):
    check(words)


def test_documents_have_commands():
    assert {words[-1] for _, words in documented()} >= {"examples_scaling/quickstart/run.sh", "tests/run.sh"}


@pytest.mark.parametrize("script", scripts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_is_valid_bash(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_example_prints_commands_that_parse(script, processes):
    printed = dry_run(script, NPROC=processes)
    for words in printed:
        check(words)
    trainings = [words for words in printed if any(word in OBJECTIVES for word in words)]
    assert trainings and all(("torch.distributed.run" in words) == (processes == "2") for words in trainings)


def test_the_benchmark_of_a_gpu_prints_commands_that_parse(tmp_path):
    script, places = ROOT / "benchmarks" / "gpu.sh", {"PYTHON": "python", "PUBLISHED": str(tmp_path)}
    printed = dry_run(script, **places)
    assert {words[words.index("--model-size") + 1] for words in printed if "--model-size" in words} == {
        "140M", "425M", "1018M", "2283M"
    }  # fmt: skip
    for words in printed:
        if "pytest" not in words:
            check(words)
    assert dry_run(script, "140M", **places) == printed[1:2]
    alone = dry_run(script, **places | {"PUBLISHED": str(tmp_path / "none")})
    assert len(alone) < len(printed) and not any("published" in word for words in alone for word in words)
    done = subprocess.run(["bash", script, "140M", "14M"], capture_output=True, text=True, env=os.environ | places)
    assert done.returncode == 2 and "gpu.sh 14M" in done.stderr and not done.stdout


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_given_to_an_example_reach_every_training(script):
    for words in dry_run(script, "--seed", "77"):
        if any(word in OBJECTIVES for word in words):
            name = next(word for word in words if word in OBJECTIVES)
            rest = NETWORK if "--skip-train" in words else []  # which takes the network from the run's folder
            assert parse(OBJECTIVES[name], [*rest, *words[words.index(name) + 1 :]]).training.seed == 77


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_that_a_document_names_exists(document):
    known = FOREIGN_FLAGS | set(parser("ar")._option_string_actions) | set(TABLE)
    tools = [*(ROOT / "tools").glob("*.py"), ROOT / "benchmarks" / "train_step.py"]
    tools += [ROOT / "benchmarks" / "scoring.py"]
    tools += [ROOT / "tests" / "training" / "kill_loop.py"]
    texts = [help_of(tool) for tool in tools] + [
        help_of("-m", name) for name in ("megatron.check", "megatron.evaluation.harness")
    ]
    texts += [path.read_text() for path in scripts()]
    known |= {name for text in texts for name in re.findall(r"--[a-z][\w-]*", text)}
    known |= set(extras())
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", document.read_text()))
    assert named <= known, f"unknown: {sorted(named - known)}"


@pytest.mark.parametrize(
    "command",
    [
        "bash examples_scaling/none.sh",
        "bash tests/run.sh --every",
        "bash examples_scaling/quickstart/run.sh --num-layer 3",
        "python tools/report.py runs/a --outptu x",
        "python tools/none.py",
        "python -m megatron.none",
        "python -m megatron.check --time-limits 3",
        "python pretrain_gpt.py --num-layers 2",
        "python pretrain_mdm.py ... --load runs/a --sav runs/b",
        "rm -rf data",
    ],
)
def test_a_planted_wrong_command_is_found(command):
    with pytest.raises((AssertionError, ConfigurationError)):
        check(shlex.split(command))


def test_an_excerpt_and_comments_are_understood():
    check(shlex.split("python pretrain_mdm.py ... --load runs/a --save runs/b"))
    check(shlex.split("torchrun --nproc_per_node 2 pretrain_gpt.py ... --save runs/b"))
    assert commands("OUT=x bash a.sh \\\n  --b  # why\n# no\n\ncd a && ls") == [
        ["bash", "a.sh", "--b"],
        ["cd", "a"],
        ["ls"],
    ]
