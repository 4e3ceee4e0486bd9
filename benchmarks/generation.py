#!/usr/bin/env python3
"""Time generation: next tokens beside transformers' `generate` on the same weights, and masked diffusion by its steps.

    python benchmarks/generation.py
    python benchmarks/generation.py --model-size 35M --batch-size 16 --rounds 5 --output generation.json

A network of the ladder with random weights, in fp32, on one thread of the CPU. All go on from the same prompts with the
same number of tokens, greedily; nothing ends a text. Before anything is timed transformers must give our logits and our
texts; the run ends where it does not. Every round times each once, in an order that rotates; time is CPU time of the
process, so that other load counts less; a ratio is taken within a round, and the table gives median, least and most.
"""

import os

# before torch is imported: one thread, and no accelerator
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from tqdm import tqdm

from benchmarks import contestants
from benchmarks.options import read_options, refuse
from megatron.config.flags import flag, require
from megatron.config.sections import Vocabulary
from megatron.config.sizes import GPT2_VOCABULARY, ladder_model
from megatron.errors import ConfigurationError
from megatron.evaluation.generate import generate
from megatron.evaluation.sampling import Sampling
from megatron.model.transformer import Transformer
from megatron.training.environment import device_name

OURS, THEIRS = "ours AR", "transformers AR"
NO_END = -1  # no id ends a text

Make = Callable[[], list[list[int]]]  # writes all texts, and returns the new tokens of each


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is generated."""

    model_size: str = flag("7M", "a size of the ladder", metavar="NAME")
    prompt_length: int = flag(64, "tokens of each prompt")
    max_new_tokens: int = flag(64, "new tokens of each text; masked diffusion takes as many steps, half of them, ... 1")
    batch_size: int = flag(8, "texts that are written at one time")
    rounds: int = flag(5, "how often each is timed")
    output: str | None = flag(None, "write the JSON to a file too", metavar="FILE")

    def __post_init__(self):
        for name in ("prompt_length", "max_new_tokens", "batch_size", "rounds"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")


def main() -> None:
    options = read_options(Options, __doc__)
    torch.set_num_threads(1)
    try:
        makes = build(options)
    except ConfigurationError as error:
        refuse(error)
    check_texts(makes)
    report = {
        "settings": asdict(options),
        "versions": {name: contestants.version(name) for name in ("torch", "transformers")},
        "python": platform.python_version(),
        "machine": device_name(torch.device("cpu")),
        "date": date.today().isoformat(),
        "seconds": measure(makes, options.rounds),
    }
    print(table(report))
    if options.output:
        Path(options.output).write_text(json.dumps(report, indent=1) + "\n")


def build(options: Options) -> dict[str, Make]:
    """Return all that are timed, by name; transformers only where it is installed."""
    length, vocabulary = options.prompt_length + options.max_new_tokens, Vocabulary(GPT2_VOCABULARY)
    shape = contestants.Shape(ladder_model(options.model_size), vocabulary, length)
    model = shape.ours().eval()
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(vocabulary.size, (options.batch_size, options.prompt_length), generator=generator)

    def ours(objective: str, **settings) -> Make:
        sampling = Sampling(max_new_tokens=options.max_new_tokens, **settings)
        return lambda: generate(model, objective, prompts.tolist(), sampling, NO_END, options.batch_size)

    makes = {OURS: ours("ar")}
    missing = contestants.missing("transformers")
    if missing:
        print(f"transformers: skipped, {missing}")
    else:
        theirs = contestants.transformers_model(shape).eval()
        check_logits(model, theirs, prompts)
        makes[THEIRS] = transformers(theirs, shape, prompts, options.max_new_tokens)
    steps = options.max_new_tokens
    while steps:
        makes[f"ours MDM, {steps} step{'s' * (steps > 1)}"] = ours("mdm", steps=steps)
        steps //= 2
    return makes


def transformers(model: nn.Module, shape: contestants.Shape, prompts: torch.Tensor, new_tokens: int) -> Make:
    """Return transformers' greedy generation, with its own cache."""
    never = list(range(shape.vocabulary.size, shape.vocabulary.padded_size))
    with torch.no_grad():  # it has logits for rows that are no tokens: none of them may be the highest
        model.get_output_embeddings().weight[never] = 0
    seen = torch.ones_like(prompts)
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 0}

    def make() -> list[list[int]]:
        made = model.generate(prompts, attention_mask=seen, use_cache=True, **settings)
        return made[:, prompts.shape[1] :].tolist()

    return make


@torch.no_grad()
def check_logits(ours: Transformer, theirs: nn.Module, prompts: torch.Tensor) -> None:
    """End the program where transformers computes something else; texts of random weights may hide it."""
    expected = ours.logits(prompts, causal=True)
    found = theirs(prompts).logits[..., : ours.vocabulary.size]
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
        sys.exit("transformers AR computes something else: its logits are not ours")


def check_texts(makes: dict[str, Make]) -> None:
    """End the program where transformers writes other texts."""
    if THEIRS in makes and makes[THEIRS]() != makes[OURS]():
        sys.exit("transformers AR computes something else: its greedy texts are not ours")
    if THEIRS in makes:
        print("check passed: the same logits and greedy texts\n")


def measure(makes: dict[str, Make], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each by round."""
    names, seconds = list(makes), {name: [] for name in makes}
    for turn in tqdm(range(rounds), unit="round", disable=None):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            begin = time.process_time()
            makes[name]()
            seconds[name].append(time.process_time() - begin)
    return seconds


def table(report: dict) -> str:
    """Return the report as a table in Markdown."""
    settings, seconds = report["settings"], report["seconds"]
    tokens = settings["batch_size"] * settings["max_new_tokens"]
    base = THEIRS if THEIRS in seconds else OURS
    lines = [
        f"| greedy, {settings['model_size']} | tokens a CPU second | min - max | times {base} | min - max |",
        "|---|---|---|---|---|",
    ]
    for name, times in seconds.items():
        speeds = [tokens / taken for taken in times]
        ratios = [other / taken for taken, other in zip(times, seconds[base], strict=True)]
        spread = f"{min(speeds):.0f} - {max(speeds):.0f} | {median(ratios):.2f} | {min(ratios):.2f} - {max(ratios):.2f}"
        lines.append(f"| {name} | {median(speeds):.0f} | {spread} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
