#!/usr/bin/env python3
"""Time greedy generation: ours against transformers' `generate` with the same weights, and MDM by number of steps.

    python benchmarks/generation/run.py
    python benchmarks/generation/run.py --model-size 35M --batch-size 16 --rounds 5 --output generation.json

A model of the ladder with random weights, in fp32, on one CPU thread. All implementations continue the same prompts by
the same number of tokens; no end-of-document token stops them. Before anything is timed, transformers must give our
logits and our tokens, or the benchmark fails. Every round times each implementation once, in a rotating order. Time is
CPU time of the process, which is less sensitive to other load. Ratios are taken within a round; the table gives their
median, smallest and largest.
"""

import os

# before torch is imported: one thread, no accelerator
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from benchmarks.harness import (
    environment,
    interleave,
    markdown_table,
    output_flag,
    publish,
    ratios,
    read_options,
    refuse,
    require_positive,
    spread,
)
from benchmarks.training_step import peers
from benchmarks.training_step.implementations import Shape
from megatron.config.flags import flag
from megatron.config.sizes import GPT2_VOCABULARY, ladder_model
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.generation.generate import generate
from megatron.generation.sampling import Sampling
from megatron.model.transformer import Transformer

OURS, THEIRS = "ours AR", "transformers AR"
CPU = torch.device("cpu")
NO_EOD = -1  # not a token id: nothing ends a sequence

Generate = Callable[[], list[list[int]]]  # returns the new tokens of each sequence


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of this benchmark."""

    model_size: str = flag("7M", "a size of the ladder", metavar="NAME")
    prompt_length: int = flag(64, "tokens of each prompt")
    max_new_tokens: int = flag(
        64, "new tokens of each sequence; masked diffusion is timed with as many steps, half as many, ... and 1"
    )
    batch_size: int = flag(8, "sequences generated at once")
    rounds: int = flag(5, "how often each implementation is timed")
    output: str | None = output_flag()

    def __post_init__(self):
        require_positive(self, ("prompt_length", "max_new_tokens", "batch_size", "rounds"))


def main() -> None:
    """Run the benchmark from the command line."""
    options = read_options(Options, __doc__)
    torch.set_num_threads(1)
    try:
        generators = build(options)
    except ConfigurationError as error:
        refuse(error)
    check_tokens(generators)
    contestants = {name: partial(_generate, generator) for name, generator in generators.items()}
    report = {
        "settings": asdict(options),
        "environment": environment(CPU, "transformers"),
        "seconds": interleave(contestants, options.rounds, CPU).seconds,
    }
    publish(report, table(report), options.output)


def _generate(generator: Generate, turn: int) -> None:
    generator()


def build(options: Options) -> dict[str, Generate]:
    """Return the implementations by name; transformers only if it is installed."""
    vocabulary = Vocabulary(GPT2_VOCABULARY)
    length = options.prompt_length + options.max_new_tokens
    shape = Shape(ladder_model(options.model_size), vocabulary, length)
    model = shape.ours().eval()
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(vocabulary.size, (options.batch_size, options.prompt_length), generator=generator)  # [B, P]

    def ours(objective: str, **sampling_settings) -> Generate:
        sampling = Sampling(max_new_tokens=options.max_new_tokens, **sampling_settings)
        settings = {"eod": NO_EOD, "batch_size": options.batch_size}
        return lambda: generate(model, objective, prompts.tolist(), sampling, **settings)

    generators = {OURS: ours("ar")}
    missing = peers.missing("transformers")
    if missing:
        print(f"transformers: skipped, {missing}")
    else:
        theirs = peers.transformers_model(shape).eval()
        check_logits(model, theirs, prompts)
        generators[THEIRS] = transformers(theirs, shape, prompts, options.max_new_tokens)
    steps = options.max_new_tokens
    while steps:
        generators[f"ours MDM, {steps} step{'s' if steps > 1 else ''}"] = ours("mdm", steps=steps)
        steps //= 2
    return generators


def transformers(model: nn.Module, shape: Shape, prompts: torch.Tensor, new_tokens: int) -> Generate:
    """Return transformers' greedy generation with its KV cache."""
    padded_rows = list(range(shape.vocabulary.size, shape.vocabulary.padded_size))
    with torch.no_grad():  # a padded vocabulary row must never have the highest logit
        model.get_output_embeddings().weight[padded_rows] = 0
    attention_mask = torch.ones_like(prompts)
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 0}

    def generate_new_tokens() -> list[list[int]]:
        sequences = model.generate(prompts, attention_mask=attention_mask, use_cache=True, **settings)
        return sequences[:, prompts.shape[1] :].tolist()

    return generate_new_tokens


@torch.no_grad()
def check_logits(ours: Transformer, theirs: nn.Module, prompts: torch.Tensor) -> None:
    """Exit if transformers' logits differ from ours; greedy tokens of random weights may not show it."""
    expected = ours.logits(prompts, causal=True)
    logits = theirs(prompts).logits[..., : ours.vocabulary.size]
    if not torch.allclose(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
        sys.exit("transformers AR computes something else: its logits differ from ours")


def check_tokens(generators: dict[str, Generate]) -> None:
    """Exit if transformers generates other tokens."""
    if THEIRS not in generators:
        return
    if generators[THEIRS]() != generators[OURS]():
        sys.exit("transformers AR computes something else: its greedy tokens differ from ours")
    print("check passed: the same logits and greedy tokens\n")


def table(report: dict) -> str:
    """Return the report as a Markdown table."""
    settings = report["settings"]
    seconds = report["seconds"]
    tokens = settings["batch_size"] * settings["max_new_tokens"]
    base = THEIRS if THEIRS in seconds else OURS
    title = f"greedy, {settings['model_size']}"
    rows = []
    for name, times in seconds.items():
        speeds = [tokens / cpu_seconds for cpu_seconds in times]
        rows.append((name, *spread(speeds, ".0f"), *spread(ratios(seconds[base], times))))
    return markdown_table((title, "tokens per CPU second", "min - max", f"speed / {base}", "min - max"), rows)


if __name__ == "__main__":
    main()
