#!/usr/bin/env python3
"""Show what a network reads, what it is asked and what it may see, under any flags of an objective.

    python tools/show_batch.py --objective mdm
    python tools/show_batch.py --token-dropout 0.3 --text "To be, or not to be"

Flags are those of pretrain_gpt.py. Each character is a token, | ends a document and _ is [MASK]. The picture is of one
training sample; --sample 1, 2, ... shows others, whose noise is another.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this megatron, whatever else bears the name

import numpy as np
import torch

from megatron.batch import Batch
from megatron.config.sections import Vocabulary
from megatron.errors import ConfigurationError
from megatron.objectives import build_input_noise, build_objective, document_rules
from megatron.training.command_line import parse

END, VOCABULARY, STRATIFIED = "|", Vocabulary(128), 4
NETWORK = "--num-layers 4 --hidden-size 8 --num-attention-heads 1 --train-data-path none --train-iters 1 --fp32"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--text", default="yes.|now ", help="what is read, of ASCII characters (default: %(default)r)")
    parser.add_argument("--sample", type=int, default=0, help="which sample of the run this is (default: %(default)s)")
    options, flags = parser.parse_known_args()
    try:
        print("\n\n".join(map(picture, batches(options.text, options.sample, flags))))
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def batches(text: str, sample: int, flags: list[str]) -> list[Batch]:
    """Return what is trained on at run position `sample` where it reads `text`: one batch of one sequence, or two."""
    if len(text) < 3 or not text.isascii():
        raise ConfigurationError(f"--text {text!r}: is not three or more ASCII characters; give some")
    if sample < 0:
        raise ConfigurationError(f"--sample {sample}: must not be negative")
    config = parse("ar", [*NETWORK.split(), "--seq-length", str(len(text) - 1), *flags])
    rules = document_rules(config.data, config.objective, ord(END))
    objective = build_objective(config.objective, VOCABULARY, STRATIFIED, rules)
    ids, positions = np.array([list(text.encode())], np.int64), np.array([sample])
    noise = build_input_noise(config.objective, VOCABULARY, config.model.num_layers)
    seed = config.training.seed
    return noise(objective.prepare(ids, positions, seed), positions, seed)


def picture(batch: Batch) -> str:
    """Return one sequence as lines: a column a position, then a row of the attention mask a position."""
    length = batch.tokens.shape[1]
    places = torch.arange(length)[None] if batch.position_ids is None else batch.position_ids
    scored = batch.weights[0] > 0
    rows = {
        "place": places[0].tolist(),
        "reads": map(_character, batch.tokens[0]),
        "says": [_character(target) if asked else "" for target, asked in zip(batch.targets[0], scored)],
        "weight": [f"{weight:.3g}" if asked else "" for weight, asked in zip(batch.weights[0], scored)],
    }
    if batch.target_positions is not None:
        rows["at place"] = [place if asked else "" for place, asked in zip(batch.target_positions[0].tolist(), scored)]
    lines = [f"{name:9}" + "".join(f"{value!s:>5}" for value in values) for name, values in rows.items()]
    if batch.residual_scales is not None:
        lines.append(f"{'blocks':9}" + "".join(f"{factor:5.3g}" for factor in batch.residual_scales[0].tolist()))
    lines = [line.rstrip() for line in lines]
    visible = batch.visible()
    if visible is None:
        visible = torch.ones(1, length, length, dtype=torch.bool)
        visible = visible.tril() if batch.causal else visible
    for position, row in enumerate(visible[0].tolist()):
        lines.append(f"{'sees' * (not position):9}" + "".join(f"{'#' if seen else '.':>5}" for seen in row))
    return "\n".join(lines)


def _character(token) -> str:
    token = int(token)
    return "_" if token == VOCABULARY.mask_id else repr(chr(token))[1:-1].replace(" ", "' '")


if __name__ == "__main__":
    main()
