#!/usr/bin/env python3
"""Show inputs, targets, weights and attention mask of a training sample, for any flags of an objective.

    python tools/show_batch.py --objective mdm
    python tools/show_batch.py --token-dropout 0.3 --text "To be, or not to be"

Flags are those of pretrain_gpt.py, with a global batch of 4 samples by default. Each character is a token, | ends a
document and _ is [MASK]. --sample selects the sample index, which keys the noise.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import stop_signals

if __name__ == "__main__":
    stop_signals.install_in_tool()  # before the imports, which take seconds

import numpy as np
import torch

from megatron.batch import Batch
from megatron.config.flags import spelling, typed_flags
from megatron.config.resolve import BUDGETS, resolve
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.objectives.input_noise import build_input_noise
from megatron.objectives.registry import build_objective, capabilities, document_rules
from megatron.training.command_line import parse

END_OF_DOCUMENT = "|"
VOCABULARY = Vocabulary(128)
RUN_FLAGS = "--num-layers 4 --hidden-size 8 --num-attention-heads 1 --train-data-path none --global-batch-size 4 --fp32"
BUDGET = "--train-samples 1_000_000"  # if the flags give none


def main() -> None:
    """Print the batches of one sample."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--text", default="yes.|now ", help="text of the sample, in ASCII (default: %(default)r)")
    parser.add_argument("--sample", type=int, default=0, help="sample index (default: %(default)s)")
    options, flags = parser.parse_known_args()
    try:
        print("\n\n".join(map(picture, batches(options.text, options.sample, flags))))
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def batches(text: str, sample_index: int, flags: list[str]) -> list[Batch]:
    """Return the training batches of the sample `text` at `sample_index`: one, or two with a second pass; B = 1.

    Raises: ConfigurationError for a text or flags that cannot be used.
    """
    if len(text) < 3 or not text.isascii():
        raise ConfigurationError(f"--text {text!r}: is not three or more ASCII characters; give some")
    if sample_index < 0:
        raise ConfigurationError(f"--sample {sample_index}: must not be negative")
    budget = [] if typed_flags(flags) & set(map(spelling, BUDGETS)) else BUDGET.split()
    config = parse("ar", [*RUN_FLAGS.split(), *budget, "--seq-length", str(len(text) - 1), *flags])
    resolve(config, VOCABULARY, len(text), capabilities(config.objective.objective))
    rules = document_rules(config.data, config.objective, ord(END_OF_DOCUMENT))
    objective = build_objective(config.objective, VOCABULARY, config.training.global_batch_size, rules)
    noise = build_input_noise(config.objective, VOCABULARY, config.model.depth)
    seed = config.training.seed
    ids = np.array([list(text.encode())], np.int64)  # [1, S+1]
    sample_indices = np.array([sample_index])
    return noise(objective.prepare(ids, sample_indices, seed), sample_indices, seed)


def picture(batch: Batch) -> str:
    """Return a batch of one sequence as text: a column per position, and the attention mask with a row per query."""
    length = batch.tokens.shape[1]
    position_ids = torch.arange(length)[None] if batch.position_ids is None else batch.position_ids
    scored = (batch.weights[0] > 0).tolist()

    def at_scored(values) -> list[str]:
        return [str(value) if is_scored else "" for value, is_scored in zip(values, scored, strict=True)]

    rows = {
        "position": position_ids[0].tolist(),
        "input": map(_character, batch.tokens[0]),
        "target": at_scored(map(_character, batch.targets[0])),
        "weight": at_scored(f"{weight:.3g}" for weight in batch.weights[0]),
    }
    if batch.target_positions is not None:
        rows["target at"] = at_scored(batch.target_positions[0].tolist())
    lines = [f"{name:9}" + "".join(f"{value!s:>5}" for value in values) for name, values in rows.items()]
    if batch.residual_scales is not None:
        lines.append(f"{'blocks':9}" + "".join(f"{scale:5.3g}" for scale in batch.residual_scales[0].tolist()))
    lines = [line.rstrip() for line in lines]
    visible = batch.visible()
    if visible is None:
        visible = torch.ones(1, length, length, dtype=torch.bool)
        visible = visible.tril() if batch.causal else visible
    for query, keys in enumerate(visible[0].tolist()):
        label = "attends" if query == 0 else ""
        lines.append(f"{label:9}" + "".join(f"{'#' if attended else '.':>5}" for attended in keys))
    return "\n".join(lines)


def _character(token) -> str:
    token = int(token)
    return "_" if token == VOCABULARY.mask_id else repr(chr(token))[1:-1].replace(" ", "' '")


if __name__ == "__main__":
    stop_signals.run_tool(main)
