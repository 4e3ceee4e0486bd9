#!/usr/bin/env python3
"""Measure tools/preprocess_data.py from .jsonl to .bin and .idx, next to what users of Megatron and datasets run.

    python benchmarks/preprocessing/run.py --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt
    python benchmarks/preprocessing/run.py --input text.jsonl --vocab-file ... --merge-file ... --output tokens.json

Every contestant is a whole process on one core (taskset), start and file writing included; start alone is measured with
one document and subtracted. Contestants take turns. Without --input the text is the source of Python's standard
library. The peers:

* datasets.map: Hugging Face's `datasets`, a fast GPT-2 tokenizer of `transformers`, batches of 1,000 documents;
* tokenizers: the `tokenizers` library in batches, without reading or writing (an upper bound for both);
* one by one: the same library document by document, what the tokenizers of Megatron's preprocess_data.py call;
* --megatron-command: the command line of another preprocess_data.py, INPUT and PREFIX in it are replaced.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import json
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.harness import (
    ROOT,
    environment,
    interleave,
    markdown_table,
    output_flag,
    publish,
    read_options,
    require_positive,
    spread,
)
from megatron.config.flags import flag, require
from megatron.data.sources.standard_library import standard_library

PACKAGES = ("tiktoken", "tokenizers", "transformers", "datasets")
PEERS = {
    "tokenizers": """
tokenizer = GPT2BPETokenizer({vocab!r}, {merges!r})
texts = [json.loads(line)["text"] for line in open({input!r})]
for start in range(0, len(texts), 1000):
    tokenizer.encode_batch(texts[start : start + 1000])
""",
    "one by one": """
tokenizer = GPT2BPETokenizer({vocab!r}, {merges!r})
for line in open({input!r}):
    tokenizer.encode(json.loads(line)["text"])
""",
    "datasets.map": """
import datasets, transformers
tokenizer = transformers.GPT2TokenizerFast({vocab!r}, {merges!r})
text = datasets.Dataset.from_json({input!r}, cache_dir={cache!r})
ids = text.map(lambda batch: tokenizer(batch["text"]), batched=True, remove_columns=text.column_names)
ids.save_to_disk({cache!r} + "/out")
""",
}
IMPORTS = f"import json, sys; sys.path.insert(0, {str(ROOT)!r}); from megatron.data.tokenizer import GPT2BPETokenizer"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    vocab_file: str = flag(help="GPT-2's vocab.json", metavar="FILE")
    merge_file: str = flag(help="GPT-2's merges.txt", metavar="FILE")
    input: str | None = flag(None, "text, as JSON lines; default the standard library's source", metavar="FILE")
    trained: int = flag(8192, "vocabulary size of the trained byte-level BPE")
    megatron_command: str | None = flag(None, "command line of another preprocess_data.py", metavar="COMMAND")
    rounds: int = flag(3, "repetitions of each measurement")
    output: str | None = output_flag()

    def __post_init__(self):
        for name in ("vocab_file", "merge_file", "input"):
            path = getattr(self, name)
            require(path is None or Path(path).is_file(), name, path, "no such file; give an existing one")
        require_positive(self, ("rounds",))


def main() -> None:
    """Run the benchmark from the command line."""
    options = read_options(Options, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        report = {
            "settings": asdict(options),
            "environment": environment(torch.device("cpu"), *PACKAGES),
            "results": measure(options, Path(folder)),
        }
    publish(report, table(report["results"]), options.output)


def measure(options: Options, folder: Path) -> dict:
    """Return the bytes of the text and the wall-clock seconds of each contestant by round, starts subtracted."""
    text = Path(options.input) if options.input else folder / "text.jsonl"
    if not options.input:
        text.write_text("".join(json.dumps({"text": record.text}) + "\n" for record in standard_library()))
    documents = [json.loads(line)["text"] for line in text.open()]
    (folder / "one.jsonl").write_text(json.dumps({"text": documents[0]}) + "\n")
    trained = folder / "trained"
    run(tool(f"--input {text} --output-dir {trained} --train-tokenizer {options.trained} --splits 1 0 0"))
    contestants = {}
    for name, commands in every_command(options, folder).items():
        contestants[name] = lambda turn, commands=commands: run(commands(text, turn))
        contestants[f"{name}: start"] = lambda turn, commands=commands: run(commands(folder / "one.jsonl", turn))
    timings = interleave(contestants, options.rounds, torch.device("cpu"), wall_clock=True)
    seconds = {
        name: [whole - start for whole, start in zip(timings.seconds[name], timings.seconds[f"{name}: start"])]
        for name in contestants
        if not name.endswith(": start")
    }
    return {"bytes": sum(len(document.encode()) for document in documents), "seconds": seconds}


def every_command(options: Options, folder: Path) -> dict:
    """Return, for each contestant, the function of text file and round that returns its command line."""
    gpt2 = f"--vocab-file {shlex.quote(options.vocab_file)} --merge-file {shlex.quote(options.merge_file)}"
    trained = f"--tokenizer-model {folder}/trained/tokenizer.json"

    def preprocess(name, tokenizer, workers):
        prefix = f"--output-prefix {folder}/{name}"
        return lambda text, turn: tool(
            f"--input {shlex.quote(str(text))} {prefix}-{turn} {tokenizer} --append-eod --workers {workers}"
        )

    def peer(name):
        def command(text, turn):
            cache = tempfile.mkdtemp(dir=folder)
            code = PEERS[name].format(vocab=options.vocab_file, merges=options.merge_file, input=str(text), cache=cache)
            return [sys.executable, "-c", f"{IMPORTS}\n{code}"]

        return command

    commands = {
        "GPT-2": preprocess("gpt2", gpt2, 1),
        "GPT-2, two workers": preprocess("two", gpt2, 2),
        "trained BPE": preprocess("trained", trained, 1),
        **{name: peer(name) for name in PEERS},
    }
    if options.megatron_command:
        words = shlex.split(options.megatron_command)
        commands["Megatron"] = lambda text, turn: [
            word.replace("INPUT", str(text)).replace("PREFIX", f"{folder}/megatron {turn}") for word in words
        ]
    return commands


def tool(flags: str) -> list[str]:
    """Return the command line of tools/preprocess_data.py."""
    return [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *shlex.split(flags)]


def run(command: list[str]) -> None:
    """Run a command, on one core unless it has two workers."""
    one_core = [] if command[-2:] == ["--workers", "2"] else ["taskset", "-c", "0"]
    done = subprocess.run([*one_core, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stderr}")


def table(results: dict) -> str:
    """Return the results as a Markdown table."""
    megabytes, ours = results["bytes"] / 1e6, results["seconds"]["GPT-2"]
    rows = []
    for name, seconds in results["seconds"].items():
        ratios = [other / own for other, own in zip(seconds, ours)]
        rows.append([name, *spread([megabytes / value for value in seconds], ".1f"), spread(ratios)[0]])
    return markdown_table(["", "MB of text per second", "range", "time / GPT-2"], rows)


if __name__ == "__main__":
    main()
