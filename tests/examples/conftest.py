"""A clone of the project whose scripts can be run, without data and with a toy replacement of C4."""

import json
import shutil

import pytest

from megatron.data.indexed import IndexedDatasetWriter
from megatron.data.tokenizer import GPT2BPETokenizer, train_tokenizer
from tests.conftest import ROOT

TEXT = ["the quick brown fox jumps over the lazy dog and the bear " * 20, "def f(x):\n    return x\n" * 20]
OUT_OF_DOMAIN = ("oscar", "tinystories", "wikitext", "industrycorpus2")


@pytest.fixture
def clone(tmp_path):
    """A copy of the project without data and runs."""
    shutil.copytree(ROOT / "examples_scaling", tmp_path / "examples_scaling")
    for name in ("megatron", "pretrain_gpt.py", "pretrain_mdm.py", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture
def with_data(clone):
    """The same with the files of download.sh, C4 and the texts of other domains: a small vocabulary, 4000 tokens."""
    data = clone / "data"
    data.mkdir()
    train_tokenizer(TEXT, 300, data / "tokenizer.json")
    model = json.loads((data / "tokenizer.json").read_text())["model"]
    (data / "gpt2-vocab.json").write_text(json.dumps(model["vocab"]))
    (data / "gpt2-merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]) + "\n")
    tokenizer = GPT2BPETokenizer(data / "gpt2-vocab.json", data / "gpt2-merges.txt")
    encoded = [[*ids, tokenizer.eod] for ids in tokenizer.encode_batch(TEXT)]

    def write(prefix: str, copies: int) -> None:
        (data / prefix).parent.mkdir(exist_ok=True)
        with IndexedDatasetWriter(data / prefix, tokenizer.vocabulary_size) as writer:
            for ids in encoded * copies:
                writer.add_document(ids)

    for prefix, list_name, copies in (("100", "train_c4_100m.txt", 8), ("val", "val_c4.txt", 4)):
        write(f"gpt2tok_c4_{prefix}_text_document", copies)
        (data / list_name).write_text(f'"1.0 data/gpt2tok_c4_{prefix}_text_document"\n')
    write("c4/train", 16)
    for name in OUT_OF_DOMAIN:
        write(f"{name}/validation", 4)
    return clone
