"""Exports loaded by transformers 4, which is installed into a folder of its own: the same logits and ids."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from megatron.convert.export import export
from megatron.convert.tokenizer import write_tokenizer
from megatron.training.launcher import main
from megatron.training.load_run import open_trained
from tests.conftest import environment
from tests.convert.test_converted_tokenizer import TEXTS, folder, our_tokenizer  # noqa: F401 (a fixture)
from tests.convert.test_sentence_piece import LLAMA, trained

PACKAGES = ["transformers==4.57.6", "huggingface_hub<1", "tokenizers<=0.23.0"]
READ = """\
import json, sys
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

models, tokenizers, texts = json.load(sys.stdin)
assert transformers.__version__ == "4.57.6"
for folder in models:
    expected = load_file(folder + ".safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(expected["ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)
    generated = model.generate(expected["ids"][:, :4], max_new_tokens=4, do_sample=False)
    assert 4 < generated.shape[1] <= 8
ids = [[AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for text in texts] for folder in tokenizers]
print(json.dumps(ids))
"""


@pytest.fixture(scope="module")
def transformers4(tmp_path_factory):
    """A folder with transformers 4; torch and its other dependencies come from this environment."""
    target = tmp_path_factory.mktemp("transformers4")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *PACKAGES]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if result.returncode:
        pytest.skip(f"pip cannot install {PACKAGES[0]}: {result.stderr.strip().splitlines()[-1]}")
    return target


@pytest.mark.slow
def test_transformers_4_computes_the_same_logits_and_ids(transformers4, tiny, folder, tmp_path):  # noqa: F811
    models, tokenizers = [], []
    for name, flags in (("llama", []), ("qwen3", ["--qk-layernorm"])):  # version 4 has no EuroBert
        run, output = tmp_path / f"{name}_run", tmp_path / name
        main("ar", [*tiny, "--rotary-base", "500000", *flags, "--save", str(run)])
        export(open_trained(str(run)), output)
        model = open_trained(str(run)).model()
        ids = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(0))
        logits = model.logits(ids, causal=True).detach().contiguous()
        save_file({"ids": ids, "logits": logits}, f"{output}.safetensors")
        models.append(str(output))
    ours = [
        our_tokenizer(name, folder) for name in ("hf", "gpt2", "bytes", "spm unigram", "spm bpe_bytes", "megatron bpe")
    ]
    ours.append(trained("bpe llama", LLAMA, tmp_path))
    for index, tokenizer in enumerate(ours):
        write_tokenizer(tmp_path / f"tokenizer{index}", tokenizer, masked=False, positions=4096)
        tokenizers.append(str(tmp_path / f"tokenizer{index}"))
    result = subprocess.run(
        [sys.executable, "-c", READ],
        input=json.dumps([models, tokenizers, TEXTS]),
        env=environment() | {"PYTHONPATH": str(transformers4), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    expected = [[tokenizer.encode(text) for text in TEXTS] for tokenizer in ours]
    assert json.loads(result.stdout.splitlines()[-1]) == expected
