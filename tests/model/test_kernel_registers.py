"""The kernels of the head's loss compile ahead of time for several generations of GPUs, and spill no registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs triton")

from megatron.model import softmax_kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CUOBJDUMP = shutil.which("cuobjdump", path=str(TOOLS)) or shutil.which("cuobjdump")
KERNELS = {
    "_statistics": ("max_logit", "sum_exp", "logit_at_index", "sum_logits"),
    "_write_gradient": ("max_logit", "scale", "at_index", "everywhere"),
}
CAPABILITIES = (80, 90, 100)
MAX_REGISTERS = 128  # four warps of a block then leave room for three more blocks


def resources(kernel: str, logits: str, capability: int, folder: Path) -> dict[str, int]:
    """Return registers, and bytes of stack and local memory, of a kernel compiled for a compute capability."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {"logits": f"*{logits}", "index": "*i64"} | dict.fromkeys(KERNELS[kernel], "*fp32")
    signature |= {"num_ids": "i32", "columns": "i32", "COLUMNS": "constexpr"}
    aligned = [number for number, name in enumerate(signature) if name not in ("num_ids", "COLUMNS")]
    source = ASTSource(
        fn=getattr(softmax_kernels, kernel),
        signature=signature,
        constexprs={"COLUMNS": softmax_kernels.COLUMNS},
        attrs={(number,): [["tt.divisibility", 16]] for number in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    command = [CUOBJDUMP, "--dump-resource-usage", folder / "kernel.cubin"]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert kernel in usage
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}


@pytest.mark.slow
@pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump, which triton and CUDA have")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("logits", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_compile_without_spills(kernel, logits, capability, tmp_path):
    used = resources(kernel, logits, capability, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0 and used["REG"] <= MAX_REGISTERS, used


@pytest.mark.slow
@pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump, which triton and CUDA have")
def test_a_spill_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(softmax_kernels, "COLUMNS", 65_536)  # more values than four warps have registers
    used = resources("_write_gradient", "fp32", 90, tmp_path)
    assert used["STACK"] or used["LOCAL"], used
