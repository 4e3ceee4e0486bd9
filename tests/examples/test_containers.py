"""The container recipes, read without building: what they copy suffices, and what they run is accepted.

No image was built: that needs Docker or Apptainer and a registry.
"""

import re
import shlex
import shutil
import subprocess

import pytest

from tests.conftest import ROOT, environment
from tests.examples.scripts import SCRIPTS, command, printed
from tests.test_install import install, pip_commands

FOLDER = ROOT / "examples_scaling" / "containers"


def docker_instructions() -> list[tuple[str, str]]:
    """Return (instruction, arguments) of the Dockerfile, with continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (FOLDER / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


def apptainer_sections() -> dict[str, list[str]]:
    """Return the lines of every section of the Apptainer recipe; "" is the header."""
    sections: dict[str, list[str]] = {"": []}
    for line in (FOLDER / "apptainer.def").read_text().splitlines():
        if line.startswith("%"):
            sections[line[1:]] = []
        elif line.strip() and not line.strip().startswith("#"):
            list(sections.values())[-1].append(line.strip())
    return sections


def copied() -> list[str]:
    """Return the files and folders of the project that the Dockerfile copies, each to the place it has here."""
    sources = []
    for instruction, arguments in docker_instructions():
        if instruction == "COPY":
            *names, target = arguments.split()
            assert target == "./" if len(names) > 1 else target == names[0]
            sources += names
    return sources


@pytest.fixture
def image(tmp_path):
    """A folder with what the images hold below /workspace, and the environment of this clone."""
    for name in copied():
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    return tmp_path


def test_both_recipes_copy_the_same_tracked_files():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in copied():
        assert name in tracked or any(path.startswith(f"{name}/") for path in tracked), name
    files = [line.split() for line in apptainer_sections()["files"]]
    assert [source for source, _ in files] == copied() and {target for _, target in files} == {"/workspace/"}


def test_both_recipes_run_the_same_commands():
    instructions = docker_instructions()
    (base,) = [arguments for name, arguments in instructions if name == "FROM"]
    header = dict(line.split(": ") for line in apptainer_sections()[""])
    assert header == {"Bootstrap": "docker", "From": base}
    (default,) = [arguments.partition("=")[2].strip('"') for name, arguments in instructions if name == "ARG"]
    docker = [arguments.replace("$INSTALL", default) for name, arguments in instructions if name == "RUN"]
    docker = [part for line in docker for part in re.split(r"\s*&& ", line)]
    own = ("mkdir -p /workspace/data", "cd /workspace")  # WORKDIR; Docker makes the folders of its volumes
    assert [line for line in apptainer_sections()["post"] if not line.startswith(own)] == docker


@pytest.mark.parametrize("flags", ["--cuda --with-eval --with-wandb", "--cpu"])
def test_the_install_line_is_accepted(flags, tmp_path):
    line = apptainer_sections()["post"][-1]
    assert line == "PIP_NO_CACHE_DIR=1 bash install.sh --cuda --with-eval --with-wandb"
    result = install(tmp_path, *flags.split())
    assert result.returncode == 0, result.stderr
    assert pip_commands(tmp_path)[-1].endswith("--editable .[eval,wandb]" if "eval" in flags else "--editable .")


def test_the_cpu_build_is_refused_over_one_for_cuda(tmp_path):
    assert install(tmp_path, "--cuda").returncode == 0
    for _ in range(2):
        result = install(tmp_path, "--cpu")
        assert result.returncode == 2 and result.stderr == (
            "error: install.sh --cpu: .venv has torch for CUDA; remove .venv, and run this again\n"
        )
    assert install(tmp_path, "--cuda", "--with-wandb").returncode == 0


def test_without_the_index_of_cpu_builds_one_line_names_the_replacement(tmp_path):
    """A virtual environment whose pip does not reach that index; the same command may be repeated."""
    assert install(tmp_path, "--cpu").returncode == 0
    for name in ("torch", ".venv/installed"):
        (tmp_path / name).unlink()
    python = tmp_path / ".venv" / "bin" / "python"
    refusal = "case $* in *whl/cpu*) echo retrying; echo 'ERROR: no route' >&2; exit 1 ;; esac"
    python.write_text(python.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\n{refusal}\n"))
    result = install(tmp_path, "--cpu")
    assert result.returncode == 0 and result.stderr == (
        "https://download.pytorch.org/whl/cpu: pip failed (ERROR: no route); "
        "installing the larger torch of PyPI instead\n"
    )
    assert (tmp_path / "torch").read_text() == "13.0\n"
    assert install(tmp_path, "--cpu", "--with-wandb").returncode == 0


def test_shell_sections_are_valid():
    for name in ("post", "environment", "runscript"):
        script = "\n".join(apptainer_sections()[name])
        subprocess.run(["sh", "-n", "-c", script], check=True)


@pytest.mark.parametrize("name", ["training/chinchilla.sh", *(name for name in SCRIPTS if "downstream/ar" in name)])
def test_the_scripts_of_an_image_print_their_commands(name, image):
    assert command(printed(image, name))[0] == ".venv/bin/python"


@pytest.mark.slow
def test_what_an_image_holds_suffices_to_plan_a_run(image):
    """With nothing but the copied files on the path."""
    words = shlex.split("--model-size 140M --train-epochs 1 --train-data-path none --save runs/x --dry-run")
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [".venv/bin/python", "pretrain_mdm.py", *words], cwd=image, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "none.idx" in done.stderr


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is not installed")
def test_hadolint_finds_nothing():
    done = subprocess.run(["hadolint", FOLDER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
