"""Commands in documents and examples: scripts exist and flags parse. Nothing is trained."""

import os
import re
import shlex
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest

from megatron.config.compatibility_table import TABLE
from megatron.errors import ConfigurationError
from megatron.training.command_line import parse, parser
from tests.conftest import ROOT, run_python

OBJECTIVES = {"pretrain_gpt.py": "ar", "pretrain_mdm.py": "mdm"}
MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 2".split()
# external commands, whose arguments are not checked
FOREIGN = {
    "apptainer",
    "docker",
    "apt-get",
    "dpkg",
    "trackio",
    "uvx",
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
# flags of torchrun, srun, sbatch, pip, docker, apptainer, trackio and mlflow, and the form of a negation
FOREIGN_FLAGS = {
    "--backend-store-uri",
    "--no-x",
    "--ntasks",
    "--project",
    "--bind",
    "--build-arg",
    "--file",
    "--gpus",
    "--ipc",
    "--nv",
    "--tag",
    "--volume",
    "--wrap",
    "--no-deps",
    "--standalone",
    "--exclusive",
    "--mem-per-cpu",
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
    paths = [path for path in sorted(ROOT.rglob("*.sh")) if ".venv" not in path.parts]
    return paths + [path for path in (ROOT / ".ci").glob("*") if path.read_text().startswith("#!/usr/bin/env bash")]


def commands(block: str) -> list[list[str]]:
    """Return the words of every command of a shell block, without comments and leading variable assignments."""
    lines = re.sub(r"\\\n\s*", " ", block).splitlines()
    sources = [source for line in lines for source in re.split(r" && | \| |; ", line)]
    split = [shlex.split(source, comments=True) for source in sources]
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
    """Return the commands that an example prints with DRY_RUN=1."""
    environment = os.environ | {"DRY_RUN": "1", "NPROC": "1"} | variables
    command = ["bash", str(script), *arguments]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return commands(result.stdout)


@lru_cache
def help_of(*tool: Path | str) -> str:
    """Return the --help of a tool and of its subcommands."""
    result = run_python(*tool, "--help")
    assert result.returncode == 0, result.stderr
    usage = re.match(r"usage: \S+ \[-h\]\s+\{([\w,-]+)\}\s+\.\.\.", result.stdout)  # matches tools with subcommands
    return result.stdout + "".join(help_of(*tool, subcommand) for subcommand in (usage[1].split(",") if usage else ()))


def extras() -> list[str]:
    """Return the flags of install.sh that name an extra of setup.py."""
    dictionary = re.search(r"extras_require=\{(.*?)\}", (ROOT / "setup.py").read_text(), re.DOTALL)[1]
    return [f"--with-{extra}" for extra in re.findall(r'"([\w-]+)":', dictionary)]


def flags(words: list[str]) -> list[str]:
    """Return the flags of a command, without values."""
    return [word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)]


def check(words: list[str]) -> None:
    """Check one command as far as possible without running it."""
    names = [word for word in words if word.endswith((".py", ".sh"))]
    modules = [index + 1 for index, word in enumerate(words) if word == "-m"]  # torch.distributed.run may be the first
    index = modules[-1] if modules and words[0] in ("python", "torchrun", ".venv/bin/python") else len(words)
    if index < len(words) and words[index].startswith("megatron."):
        help_text = help_of("-m", words[index])  # fails if there is no such module
        missing = [name for name in flags(words[index + 1 :]) if not re.search(rf"{name}(?![\w-])", help_text)]
        assert not missing, f"{words[index]} has no {missing}"
        return
    if not names or words[0] in FOREIGN:
        assert words[0] in FOREIGN, f"{shlex.join(words)}: this test does not know how to check it"
        return
    path, arguments = ROOT / names[0], words[words.index(names[0]) + 1 :]
    assert path.is_file(), f"{names[0]} does not exist"
    if path.name in OBJECTIVES:
        # an excerpt contains ..., and --skip-train takes the model from the run folder
        model = MODEL if "..." in arguments or "--skip-train" in arguments else []
        parse(OBJECTIVES[path.name], [*model, *(word for word in arguments if word != "...")])
    elif path.suffix == ".py":
        missing = [name for name in flags(arguments) if not re.search(rf"{name}(?![\w-])", help_of(path))]
        assert not missing, f"{names[0]} has no {missing}"
    elif path in EXAMPLES:
        for example_commands in dry_run(path, *arguments):
            check(example_commands)
    else:
        known = path.read_text() + " ".join(extras() if path.name == "install.sh" else ())
        missing = [name for name in flags(arguments) if name not in known]
        assert not missing, f"{names[0]} has no {missing}"


@pytest.mark.parametrize(
    "document, words", documented(), ids=lambda value: value if isinstance(value, str) else "-".join(value[:2])
)
def test_a_documented_command_works(document, words):
    check(words)


def test_documents_have_commands():
    assert {words[-1] for _, words in documented()} >= {"examples_scaling/quickstart/run.sh", "tests/run.sh"}


@pytest.mark.parametrize("script", scripts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_script_is_valid_bash(script):
    result = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("world_size", ["1", "2"])
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_example_prints_commands_that_parse(script, world_size):
    example_commands = dry_run(script, NPROC=world_size)
    for words in example_commands:
        check(words)
    programs = {*OBJECTIVES, "megatron.scoring.lm_eval_cli"}
    runs = [words for words in example_commands if programs.intersection(words)]
    prepares_data = "tools/preprocess_data.py" in example_commands[-1]
    assert runs or prepares_data or any("tools/sweep.py" in words for words in example_commands)
    several = [world_size == "2" or "--nnodes" in words for words in runs]
    assert ["torch.distributed.run" in words for words in runs] == several


def test_the_benchmark_of_a_gpu_prints_commands_that_parse(tmp_path):
    for words in dry_run(ROOT / "benchmarks" / "gpu.sh", PYTHON="python", PUBLISHED=str(tmp_path)):
        if "pytest" not in words:
            check(words)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_of_an_example_reach_every_run(script):
    for words in dry_run(script, "--seed", "77"):
        if any(word in OBJECTIVES for word in words):
            name = next(word for word in words if word in OBJECTIVES)
            model = MODEL if "--skip-train" in words else []  # --skip-train takes the model from the run folder
            assert parse(OBJECTIVES[name], [*model, *words[words.index(name) + 1 :]]).training.seed == 77


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_that_a_document_names_exists(document):
    known = FOREIGN_FLAGS | set(parser("ar")._option_string_actions) | set(TABLE)
    tools = [*(ROOT / "tools").glob("*.py"), *sorted((ROOT / "benchmarks").glob("*/run.py"))]
    tools.append(ROOT / "benchmarks" / "report_gpu.py")
    tools += [ROOT / "tests" / "training" / "kill_loop.py", ROOT / "tests" / "record_runs.py"]
    texts = [help_of(tool) for tool in tools] + [
        help_of("-m", name) for name in ("megatron.check", "megatron.scoring.lm_eval_cli")
    ]
    texts += [path.read_text() for path in scripts()]
    known |= {name for text in texts for name in re.findall(r"--[a-z][\w-]*", text)}
    known |= set(extras())
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", document.read_text()))
    assert mentioned <= known, f"unknown: {sorted(mentioned - known)}"


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
