"""The plan of the house, checked: which way imports run, what lies in the tree, what no file may do."""

import ast
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

LAYERS = {
    "megatron": 0, "stop_signals": 0, "errors": 0, "randomness": 0, "log": 0, "batch": 0, "figures": 0,
    "config": 1,
    "data": 2, "model": 2, "objectives": 2,
    "parallel": 3,
    "validation": 4,
    "training": 5,
    "evaluation": 6, "convert": 6, "reporting": 6, "check": 6,
}  # fmt: skip
STRANGERS = {frozenset({"parallel", "objectives"})}  # they meet in training
TOP_LEVEL = {
    "megatron", "tools", "examples_scaling", "tests", "benchmarks", "docs", "results", ".ci",
    "pretrain_gpt.py", "pretrain_mdm.py", "install.sh", "download.sh", "setup.py", "pyproject.toml", "constraints.txt",
    "README.md", "LICENSE", ".gitignore",
}  # fmt: skip
MODULES = sorted((ROOT / "megatron").rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "tools").rglob("*.py")), *sorted(ROOT.glob("pretrain_*.py"))]


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """Return what stands in LAYERS for a dotted name: `megatron.data.indexed` lies in `data`."""
    return (module.split(".") + ["megatron"])[1]


def imports(module: str, source: str, is_package: bool = False) -> list[tuple[int, str]]:
    """Return (line, dotted name) of every import of this package, wherever in the file it stands."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*above, *filter(None, [node.module])])
            # `from megatron import data` names a room, `from megatron import __version__` does not
            names = [alias.name for alias in node.names if base == "megatron" and alias.name in LAYERS]
            found += [(node.lineno, ".".join([base, *name])) for name in [[name] for name in names] or [[]]]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found += [(node.lineno, part.value) for part in node.args if isinstance(part, ast.Constant)]
    return [(line, name) for line, name in found if name.split(".")[0] == "megatron"]


def forbidden_imports(module: str, source: str, is_package: bool = False) -> list[str]:
    """Return the imports that run upwards, sideways into another room, or between strangers."""
    own, faults = room(module), []
    for line, name in imports(module, source, is_package):
        other = room(name)
        downwards = LAYERS[other] < LAYERS[own] and frozenset({own, other}) not in STRANGERS
        if other != own and other != "megatron" and not downwards:
            faults.append(f"{module}:{line} imports {name}")
    return faults


def test_every_room_has_a_layer():
    assert {room(dotted(path)) for path in MODULES} <= set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_run_downwards(path):
    assert forbidden_imports(dotted(path), path.read_text(), path.name == "__init__.py") == []


def test_nothing_in_the_package_imports_tools_or_tests():
    for path in MODULES:
        names = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        assert not {(name or "").split(".")[0] for name in names} & {"tools", "tests"}, path


@pytest.mark.parametrize(
    "module, planted",
    [
        ("megatron.config.sizes", "from megatron.model.transformer import Transformer"),
        ("megatron.data.indexed", "def f():\n    import megatron.training.main"),
        ("megatron.model.block", "from megatron.objectives import build_objective"),
        ("megatron.model.block", "from ..training import main"),
        ("megatron.parallel.apply", "from megatron.objectives.base import EvaluationNoise"),
        ("megatron.objectives.base", "from megatron import parallel"),
        ("megatron.training.main", "from megatron.reporting import report"),
        ("megatron.training.main", "importlib.import_module('megatron.reporting.report')"),
        ("megatron.errors", "from megatron.log import configure_logging"),
        ("megatron.evaluation.score", "from megatron.convert import huggingface"),
    ],
)
def test_a_planted_upward_import_is_found(module, planted):
    assert len(forbidden_imports(module, planted)) == 1


@pytest.mark.parametrize(
    "module, allowed",
    [
        ("megatron.training.main", "from megatron.objectives import build_objective"),
        ("megatron.training.step", "from . import checkpoint\nfrom megatron.training import device_info"),
        ("megatron.training.environment", "import megatron\nfrom megatron import __version__"),
        ("megatron.data.corpus", "import json, torch\nfrom numpy import load"),
    ],
)
def test_a_downward_import_is_allowed(module, allowed):
    assert forbidden_imports(module, allowed) == []


def test_nothing_else_lies_in_the_tree():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in done.stdout.splitlines()} <= TOP_LEVEL


UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNPICKLING_CALLS = {"torch.load", "torch.jit.load", "dcp.FileSystemReader", "FileSystemReader", "pandas.read_pickle"}


def unsafe_reads(source: str) -> list[str]:
    """Return what could execute a file that it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in UNPICKLERS else []
            found += [alias.name for alias in node.names if f"{node.module}.{alias.name}" in UNPICKLING_CALLS]
        elif isinstance(node, ast.Call):
            given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            tensors_alone = ast.unparse(node.func) == "torch.load" and given.get("weights_only") is True
            found += [name for name in [ast.unparse(node.func)] if name in UNPICKLING_CALLS and not tensors_alone]
            found += ["weights_only=False"] if given.get("weights_only", True) is not True else []
            found += ["allow_pickle=True"] if given.get("allow_pickle", False) is not False else []
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_that_is_read_can_execute(path):
    assert unsafe_reads(path.read_text()) == []


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "from pickle import loads",
        "def f(p):\n    return torch.load(p)",
        "from torch import load",
        "torch.load(p, weights_only=wanted)",
        "f(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "np.load(p, allow_pickle=wanted)",
        "reader = FileSystemReader(p)",
    ],
)
def test_a_planted_unsafe_read_is_found(planted):
    assert unsafe_reads(planted)
    assert not unsafe_reads("torch.load(p, weights_only=True)")
    assert not unsafe_reads("import json\nnp.load(p)\nnp.load(p, allow_pickle=False)\njson.load(file)")


def absent_from_torch(source: str) -> list[str]:
    """Return what a file names of torch, as `torch.a.b`, that torch does not have: no GPU runs every line here."""
    absent = []
    for node in ast.walk(ast.parse(source)):
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if re.fullmatch(r"torch(\.\w+)+", name):
            try:
                operator.attrgetter(name.removeprefix("torch."))(torch)
            except AttributeError:
                absent.append(name)
    return absent


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_named_of_torch_exists(path):
    assert absent_from_torch(path.read_text()) == []


def test_a_planted_slip_is_found():
    assert absent_from_torch("torch.cuda.getdevice_name(0)") == ["torch.cuda.getdevice_name"]
    assert not absent_from_torch("torch.cuda.get_device_name(0)\nother.torch.x\ntorch.ops.aten.mm.default")


def test_entry_points_are_a_dozen_lines():
    for path in ROOT.glob("pretrain_*.py"):
        assert len(path.read_text().splitlines()) <= 15, path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_is_for(path):
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree)


# ------------------------------------------------------------------ other packages named megatron


def python(code: str, path: list, **variables) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))} | variables
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True, check=True
    )


@pytest.fixture
def megatron_core(tmp_path):
    """What the wheel of megatron-core installs: a portion of a namespace and its metadata."""
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    (tmp_path / "megatron" / "core" / "__init__.py").write_text("")
    (tmp_path / "megatron_core-0.99.0.dist-info").mkdir()
    (tmp_path / "megatron_core-0.99.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.99.0\n"
    )
    return tmp_path


@pytest.mark.parametrize("ours_first", [True, False])
def test_megatron_core_is_noticed_and_explained_once(ours_first, megatron_core):
    path = [ROOT, megatron_core] if ours_first else [megatron_core, ROOT]
    code = (
        "import megatron, megatron.errors, importlib.util as u; print(megatron.__file__, u.find_spec('megatron.core'))"
    )
    done = python(code, path)
    # what the warning says is true: ours wins wherever it stands, and the other cannot be imported
    assert done.stdout.split() == [str(ROOT / "megatron" / "__init__.py"), "None"]
    (line,) = done.stderr.splitlines()
    assert "megatron-core 0.99.0" in line and str(ROOT / "megatron") in line and "separate environments" in line
    assert python("import megatron", path, RANK="1").stderr == ""


def test_without_megatron_core_nothing_is_said():
    assert python("import megatron", [ROOT]).stderr == ""


def test_an_entry_point_finds_its_own_package(tmp_path):
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").write_text("raise SystemExit('the foreign package was imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, ROOT / "pretrain_gpt.py", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "--num-layers" in done.stdout, done.stderr
