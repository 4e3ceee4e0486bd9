"""Architecture rules: import direction between subpackages, top-level files, and calls that no file may make."""

import ast
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron.objectives.registry import OBJECTIVES
from tests.conftest import ROOT

LAYERS = {
    "megatron": 0, "parent_process": 0, "stop_signals": 0, "errors": 0, "randomness": 0, "log": 0, "batch": 0,
    "statistics": 0, "torch_private": 0,
    "config": 1,
    "data": 2, "model": 2, "objectives": 2, "laws": 2,
    "parallel": 3,
    "validation": 4,
    "training": 5,
    "generation": 6, "convert": 6, "check": 6, "sweeps": 6,
    "scoring": 7, "likelihoods": 7,
    "reporting": 8,
}  # fmt: skip
INDEPENDENT = {frozenset({"parallel", "objectives"})}  # only training imports both
TOP_LEVEL = {
    "megatron", "tools", "examples_scaling", "tests", "benchmarks", "docs", "results", ".ci",
    "pretrain_gpt.py", "pretrain_mdm.py", "install.sh", "download.sh", "setup.py", "pyproject.toml", "constraints.txt",
    "README.md", "LICENSE", ".gitignore",
}  # fmt: skip
MODULES = sorted((ROOT / "megatron").rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "tools").rglob("*.py")), *sorted(ROOT.glob("pretrain_*.py"))]
LIMITED = [*SOURCES, *sorted((ROOT / "benchmarks").rglob("*.py"))]
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
MAX_POSITIONAL = 4  # arguments of a call
# callables that take more, as patterns of the expression that is called
UNLIMITED = (
    r"(F|torch|np)\.\w+",  # PyTorch's and NumPy's own
    r"create_block_mask",
    r"\w+\.apply",  # of an autograd function: its arguments have no keywords
    r"\w+\[.+\]",  # a launch of a Triton kernel
    r"logger\.\w+",  # the values of a format string
    r"\w+\.pack",  # of struct
    r"one_table",  # takes any number of tables
)


def dotted(path: Path) -> str:
    """Return the module name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def subpackage(module: str) -> str:
    """Return the key of LAYERS for a module name: `data` for `megatron.data.indexed`."""
    return [*module.split("."), "megatron"][1]


def imports(module: str, source: str, is_package: bool = False) -> list[tuple[int, str]]:
    """Return (line, module name) of every import of this package, anywhere in the file."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*parent, *filter(None, [node.module])])
            # `from megatron import data` imports a subpackage, `from megatron import __version__` does not
            subpackages = [alias.name for alias in node.names if base == "megatron" and alias.name in LAYERS]
            names += [(node.lineno, f"{base}.{name}") for name in subpackages] or [(node.lineno, base)]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names += [(node.lineno, argument.value) for argument in node.args if isinstance(argument, ast.Constant)]
    return [(line, name) for line, name in names if name.split(".")[0] == "megatron"]


def forbidden_imports(module: str, source: str, is_package: bool = False) -> list[str]:
    """Return the imports of a higher layer, of another subpackage in the same layer, or between INDEPENDENT ones."""
    own = subpackage(module)
    faults = []
    for line, name in imports(module, source, is_package):
        other = subpackage(name)
        downwards = LAYERS[other] < LAYERS[own] and frozenset({own, other}) not in INDEPENDENT
        if other != own and other != "megatron" and not downwards:
            faults.append(f"{module}:{line} imports {name}")
    return faults


def test_the_layers_are_those_of_the_tree():
    """LAYERS has every module of the top level and every package folder, and nothing that is gone."""
    top_level = {subpackage(dotted(path)) for path in MODULES}
    folders = {
        path.relative_to(ROOT / "megatron").parts[0]
        for path in (ROOT / "megatron").rglob("*.py")
        if path.parent != ROOT / "megatron"
    }
    assert top_level | folders == set(LAYERS)
    assert all((ROOT / "megatron" / folder / "__init__.py").is_file() for folder in folders)


def test_the_documented_layers_are_those_of_the_code():
    rows = re.findall(r"^\| (\d) \| (.*?) \|", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    documented = {name: int(layer) for layer, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert documented | {"megatron": 0} == LAYERS


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_run_downwards(path):
    assert forbidden_imports(dotted(path), path.read_text(), path.name == "__init__.py") == []


def test_nothing_in_the_package_imports_tools_or_tests():
    for path in MODULES:
        names = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        assert not {(name or "").split(".")[0] for name in names} & {"tools", "tests", "benchmarks"}, path


def imported_modules(module: str, source: str, modules: set[str], is_package: bool = False) -> set[str]:
    """Return which of `modules` a module imports, anywhere in the file; `from package import module` is the module."""
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            imported |= names if names <= modules else (names & modules) | {base}
    return imported & modules


def import_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of a cycle of imports, in order and the first one twice, or []."""
    done = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for imported in sorted(graph[module]):
                if cycle := search(imported, [*path, module]):
                    return cycle
            done.add(module)
        return []

    return next(filter(None, (search(module, []) for module in graph)), [])


def test_there_is_no_import_cycle():
    names = {dotted(path) for path in LIMITED}
    graph = {
        dotted(path): imported_modules(dotted(path), path.read_text(), names, path.name == "__init__.py")
        for path in LIMITED
    }
    assert import_cycle(graph) == []


def test_a_planted_import_cycle_is_found():
    modules = {"megatron", "megatron.a", "megatron.b", "megatron.c"}
    sources = {"a": "from megatron import b", "b": "def f():\n    from megatron.c import x", "c": "from . import a, y"}
    graph = {"megatron": set()}
    graph |= {f"megatron.{name}": imported_modules(f"megatron.{name}", text, modules) for name, text in sources.items()}
    assert graph["megatron.b"] == {"megatron.c"}
    assert import_cycle(graph) == ["megatron.a", "megatron.b", "megatron.c", "megatron.a"]
    assert import_cycle(graph | {"megatron.c": {"megatron"}}) == []


@pytest.mark.parametrize(
    "module, planted",
    [
        ("megatron.config.sizes", "from megatron.model.transformer import Transformer"),
        ("megatron.data.indexed", "def f():\n    import megatron.training.launcher"),
        ("megatron.model.block", "from megatron.objectives import build_objective"),
        ("megatron.model.block", "from ..training import main"),
        ("megatron.parallel.apply", "from megatron.objectives.base import EvaluationNoise"),
        ("megatron.objectives.base", "from megatron import parallel"),
        ("megatron.training.launcher", "from megatron.reporting import report"),
        ("megatron.training.launcher", "importlib.import_module('megatron.reporting.report')"),
        ("megatron.errors", "from megatron.log import configure_logging"),
        ("megatron.generation.generate", "from megatron.convert import huggingface"),
        ("megatron.scoring.score", "from megatron.reporting import runs"),
    ],
)
def test_a_planted_upward_import_is_found(module, planted):
    assert len(forbidden_imports(module, planted)) == 1


@pytest.mark.parametrize(
    "module, allowed",
    [
        ("megatron.training.launcher", "from megatron.objectives import build_objective"),
        ("megatron.training.step", "from . import checkpoint_store\nfrom megatron.training import device_info"),
        ("megatron.training.environment", "import megatron\nfrom megatron import __version__"),
        ("megatron.data.corpus", "import json, torch\nfrom numpy import load"),
    ],
)
def test_a_downward_import_is_allowed(module, allowed):
    assert forbidden_imports(module, allowed) == []


def test_the_tree_has_no_other_top_level_files():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in result.stdout.splitlines()} <= TOP_LEVEL


# ------------------------------------------------------------------ sizes


def size_violations(source: str) -> list[str]:
    """Return what exceeds a limit in a file: its lines, the lines of a function, the positional arguments of a call."""
    lines = len(source.splitlines())
    violations = [f"{lines} lines"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                violations.append(f"line {node.lineno}: {node.name} has {lines} lines")
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            arguments = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
            if function in ("partial", "functools.partial"):  # a call of its first argument
                function, arguments = ast.unparse(node.args[0]), arguments[1:]
            if len(arguments) > MAX_POSITIONAL and not any(re.fullmatch(pattern, function) for pattern in UNLIMITED):
                violations.append(f"line {node.lineno}: {function} is given {len(arguments)} positional arguments")
    return violations


@pytest.mark.parametrize("path", LIMITED, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_functions_and_calls_are_small(path):
    assert size_violations(path.read_text()) == []


@pytest.mark.parametrize(
    "planted",
    [
        "x = 1\n" * 451,
        "def f():\n" + "    x = 1\n" * 60,
        "class A:\n    async def f(self):\n" + "        x = 1\n" * 60,
        "f(1, 2, 3, 4, 5)",
        "self._score(1, 2, 3, 4, *rest, 5, x=6)",
        "partial(f, 1, 2, 3, 4, 5)",
        "apply(1, 2, 3, 4, 5)",
    ],
)
def test_a_planted_excess_is_found(planted):
    assert len(size_violations(planted)) == 1


@pytest.mark.parametrize(
    "allowed",
    [
        "x = 1\n" * 450,
        "def f():\n" + "    x = 1\n" * 59,
        "f(1, 2, 3, 4, *rest, x=5)",
        "partial(f, 1, 2, 3, 4)",
        "F.layer_norm(1, 2, 3, 4, 5)",
        "_LinearCrossEntropy.apply(1, 2, 3, 4, 5)",
        "kernel[rows,](1, 2, 3, 4, 5)",
    ],
)
def test_what_is_within_the_limits_is_allowed(allowed):
    assert size_violations(allowed) == []


# ------------------------------------------------------------------ calls


UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNPICKLING_CALLS = {"torch.load", "torch.jit.load", "dcp.FileSystemReader", "FileSystemReader", "pandas.read_pickle"}


def unsafe_reads(source: str) -> list[str]:
    """Return the imports and calls that can execute code from a file that they read."""
    unsafe = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            unsafe += [alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in UNPICKLERS:
                unsafe.append(node.module)
            unsafe += [alias.name for alias in node.names if f"{node.module}.{alias.name}" in UNPICKLING_CALLS]
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            tensors_only = function == "torch.load" and keywords.get("weights_only") is True
            if function in UNPICKLING_CALLS and not tensors_only:
                unsafe.append(function)
            if keywords.get("weights_only", True) is not True:
                unsafe.append("weights_only=False")
            if keywords.get("allow_pickle", False) is not False:
                unsafe.append("allow_pickle=True")
    return unsafe


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
        "torch.load(p, weights_only=flag)",
        "f(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "np.load(p, allow_pickle=flag)",
        "reader = FileSystemReader(p)",
    ],
)
def test_a_planted_unsafe_read_is_found(planted):
    assert unsafe_reads(planted)
    assert not unsafe_reads("torch.load(p, weights_only=True)")
    assert not unsafe_reads("import json\nnp.load(p)\nnp.load(p, allow_pickle=False)\njson.load(file)")


def objective_comparisons(source: str) -> list[str]:
    """Return the comparisons with an objective's name; what objectives can do is declared in the registry."""
    comparisons = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.match_case):
            operands = [node.pattern]
        else:
            continue
        constants = [part.value for operand in operands for part in ast.walk(operand) if isinstance(part, ast.Constant)]
        if set(OBJECTIVES) & {value for value in constants if isinstance(value, str)}:
            comparisons.append(ast.unparse(node))
    return comparisons


OUTSIDE_OBJECTIVES = [path for path in SOURCES if "objectives" not in path.relative_to(ROOT).parts]


@pytest.mark.parametrize("path", OUTSIDE_OBJECTIVES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_objectives_compare_the_name_of_an_objective(path):
    assert objective_comparisons(path.read_text()) == []


@pytest.mark.parametrize(
    "planted",
    [
        'if config.objective == "mdm": pass',
        'causal = "ar" == name',
        'masked = name not in ("ar", "dual")',
        'flags = [x for x in y if x.name != "block-diffusion"]',
        'match name:\n    case "mdm" | "dual":\n        pass',
    ],
)
def test_a_planted_comparison_with_an_objective_is_found(planted):
    assert len(objective_comparisons(planted)) == 1
    assert not objective_comparisons('parse("ar", words)\nx = {"ar": 1}\ny = name == "adam"\nz = z or "mdm"')


def absent_from_torch(source: str) -> list[str]:
    """Return the attributes `torch.a.b` of a file that torch does not have, since CPU tests do not run every line."""
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
def test_attributes_of_torch_exist(path):
    assert absent_from_torch(path.read_text()) == []


def test_a_planted_misspelling_is_found():
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
    """Run code in a new interpreter with a PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))} | variables
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True, check=True
    )


@pytest.fixture
def megatron_core(tmp_path):
    """What the megatron-core wheel installs: a namespace package portion and its metadata."""
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
    result = python(code, path)
    # as the warning says: ours is imported whatever the order on the path, and megatron.core is not importable
    assert result.stdout.split() == [str(ROOT / "megatron" / "__init__.py"), "None"]
    (line,) = result.stderr.splitlines()
    assert "megatron-core 0.99.0" in line and str(ROOT / "megatron") in line and "separate environments" in line
    assert python("import megatron", path, RANK="1").stderr == ""


def test_without_megatron_core_there_is_no_warning():
    assert python("import megatron", [ROOT]).stderr == ""


def test_an_entry_point_finds_its_own_package(tmp_path):
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "__init__.py").write_text("raise SystemExit('the foreign package was imported')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, ROOT / "pretrain_gpt.py", "--help"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and "--num-layers" in result.stdout, result.stderr
