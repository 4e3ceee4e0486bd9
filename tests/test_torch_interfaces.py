"""docs/contributing.md lists the private names of PyTorch, which one module of the package uses."""

import re

from tests.conftest import ROOT

# `torch.x._private`, `from torch.x._private import ...`, `from torch.x import _private`, and of DTensors
PRIVATE = re.compile(
    r"torch(?:\.\w+)*?\.(_[a-z]\w+)|from torch[\w.]* import .*\b(_[a-z]\w+)|[.\"](__tensor_unflatten__|_local_tensor)"
)


def private_names(text: str) -> set[str]:
    return {name for match in PRIVATE.finditer(text) for name in match.groups() if name}


def test_private_names_of_pytorch_are_listed_and_in_one_module():
    page = (ROOT / "docs" / "contributing.md").read_text().partition("## Private PyTorch")[2].partition("\n## ")[0]
    used = {}
    for path in sorted((ROOT / "megatron").rglob("*.py")):
        if names := private_names(path.read_text()) - {"_pytree"}:  # a logger's name
            used[str(path.relative_to(ROOT))] = names
    assert list(used) == ["megatron/torch_private.py"]
    assert used["megatron/torch_private.py"] <= set(re.findall(r"\w+", page))
