"""Texts of a training run with their prompts and settings, one record per text."""

from collections.abc import Callable
from dataclasses import asdict

import torch

from megatron.data.tokenizer import Tokenizer
from megatron.generation.generate import generate, infill
from megatron.generation.requests import Prompt, Request
from megatron.generation.sampling import MASKED, Sampling
from megatron.objectives.registry import capabilities
from megatron.training.load_run import Trained

MASK_SYMBOL = "░"  # shows a masked position


def write_texts(
    trained: Trained,
    request: Request,
    prompts: list[Prompt],
    sampling: Sampling,
    *,
    advance: Callable[[int], None] = lambda tokens: None,
    show: Callable[[str], None] = print,
) -> list[dict]:
    """Generate all texts; return one record per text: prompt, new text, ids, whole text and all settings.

    `advance(n)` is called after n tokens, and with --show-steps `show(line)` after each step.
    """
    tokenizer = trained.tokenizer()
    mask_id = trained.vocabulary.mask_id
    model = trained.model(request.average, getattr(torch, request.dtype), request.torch_device)
    prompts = [prompt for prompt in prompts for _ in range(request.num_samples)]
    input_ids = [prompt.ids(tokenizer, mask_id) for prompt in prompts]

    def show_step(step: int, rows: list[int], tokens: torch.Tensor) -> None:
        show(f"step {step:4}: {visible(tokens[0].tolist(), tokenizer, mask_id)}")

    options = {
        "eod": tokenizer.eod,
        "batch_size": request.batch_size,
        "seq_length": trained.config.data.seq_length,
        "advance": advance,
        "on_step": show_step if request.show_steps else None,
    }
    function = infill if prompts[0].gaps else generate
    output_ids = function(model, trained.recorded["objective_name"], input_ids, sampling, **options)
    settings = _settings(trained, request, sampling, gaps=prompts[0].gaps)
    records = []
    for index, (prompt, inputs, outputs) in enumerate(zip(prompts, input_ids, output_ids, strict=True)):
        record = _filled(prompt, inputs, outputs, tokenizer) if prompt.gaps else _continued(inputs, outputs, tokenizer)
        kind = "infill" if prompt.gaps else "prompt"
        records.append({kind: prompt.text, "sample": index % request.num_samples, **record, "settings": settings})
    return records


def _settings(trained: Trained, request: Request, sampling: Sampling, *, gaps: bool) -> dict:
    """Return the settings that acted, for the records; with `gaps` their lengths replace --max-new-tokens."""
    objective = trained.recorded["objective_name"]
    no_ops = [
        *(() if capabilities(objective).generation == "masked" else MASKED),
        *(["max_new_tokens"] if gaps else ()),
    ]
    return {
        "run": trained.name,
        "checkpoint": str(trained.checkpoint),
        "iteration": trained.meta["iteration"],
        "objective": objective,
        "average": request.average,
        "dtype": request.dtype,
        "device": request.torch_device,
        **{name: value for name, value in asdict(sampling).items() if name not in no_ops},
    }


def _continued(inputs: list[int], outputs: list[int], tokenizer: Tokenizer) -> dict:
    """Return the new text, its ids, and the whole text with its prompt."""
    return {"text": tokenizer.decode(outputs), "ids": outputs, "whole": tokenizer.decode([*inputs, *outputs])}


def _filled(prompt: Prompt, inputs: list[int], outputs: list[int], tokenizer: Tokenizer) -> dict:
    """Return the text with its gaps filled, its ids, and the text of each gap, whose ids differ from the inputs."""
    filled = [token for token, before in zip(outputs, inputs, strict=True) if token != before]
    gaps = []
    for length in prompt.gap_lengths:
        gaps.append(tokenizer.decode(filled[:length]))
        filled = filled[length:]
    whole = tokenizer.decode(outputs)
    return {"text": whole, "ids": outputs, "whole": whole, "gaps": gaps}


def visible(ids: list[int], tokenizer: Tokenizer, mask_id: int) -> str:
    """Return a partly masked text in one line, with MASK_SYMBOL for [MASK]."""
    runs: list[list[int]] = [[]]  # of visible tokens, and each [MASK] alone
    for token in ids:
        if token == mask_id or (runs[-1] and runs[-1][-1] == mask_id):
            runs.append([])
        runs[-1].append(token)
    texts = [MASK_SYMBOL if run == [mask_id] else tokenizer.decode(run) for run in runs]
    return "".join(texts).replace("\n", "\\n")
