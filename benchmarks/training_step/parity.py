"""Whether all implementations compute the same, checked before anything is timed; and the batches of a run."""

import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import sqrt

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.training_step.implementations import Implementation, Shape
from benchmarks.training_step.options import CHECK_POSITIONS, Options
from megatron.batch import Batch
from megatron.config.sections import ObjectiveConfig
from megatron.objectives.registry import build_objective
from megatron.randomness import stream

CHECK_STEPS = 3
CHECK_MICRO_BATCHES = 2  # at most, of a step: more take time and check the same
TOLERANCE = {"loss": 1e-2, "gradient norm": 5e-2}  # relative, for bf16
EXACTNESS = {"loss": 1e-5, "cosine": 0.9999}  # in fp32, the head at scored positions only against all positions


def batches(options: Options, shape: Shape, steps: int, seed: int = 1) -> dict[str, list[list[Batch]]]:
    """Return the micro-batches of `steps` steps by `Implementation.batches`, all made of the same random text."""
    size = options.micro_batch_size
    num_micro_batches = options.micro_batches
    num_samples = steps * num_micro_batches * size
    by_kind = {}
    for name in ("ar", "mdm"):
        objective = build_objective(ObjectiveConfig(objective=name), shape.vocabulary, time_block=num_samples)
        micro_batches = []
        for sample_index in range(0, num_samples, size):
            random = stream(seed, "benchmark text", sample_index)
            ids = random.integers(0, shape.vocabulary.size, (size, shape.seq_length + 1))  # [B, S + 1]
            micro_batches.append(objective.prepare(ids, range(sample_index, sample_index + size), seed))
        by_kind[name] = [
            micro_batches[start : start + num_micro_batches]
            for start in range(0, len(micro_batches), num_micro_batches)
        ]
    by_kind["mdm full head"] = [[score_all(batch) for batch in step] for step in by_kind["mdm"]]
    if not torch.cuda.is_available():
        return by_kind
    # pinned, as the data loader returns them: copies from pageable memory block the host
    return {kind: [[batch.pin_memory() for batch in step] for step in steps] for kind, steps in by_kind.items()}


def score_all(batch: Batch) -> Batch:
    """Return the batch with every position in `scored_positions`, so that last block and head run at all of them."""
    return replace(batch, scored_positions=torch.arange(batch.weights.numel()))


def check_batches(options: Options, shape: Shape) -> dict[str, list[list[Batch]]]:
    """Return steps that score `CHECK_POSITIONS` positions of a micro-batch, with weight 1, by `Implementation.batches`.

    The mean loss over many positions of random text is nearly the same for every model; over a few it is not.
    """
    options = replace(options, micro_batches=min(options.micro_batches, CHECK_MICRO_BATCHES))
    by_kind = batches(options, shape, CHECK_STEPS, seed=2)
    sparse = {kind: [[_score_few(batch) for batch in step] for step in by_kind[kind]] for kind in ("ar", "mdm")}
    return sparse | {"mdm full head": [[score_all(batch) for batch in step] for step in sparse["mdm"]]}


def _score_few(batch: Batch) -> Batch:
    scored = torch.linspace(0, batch.weights.numel() - 1, CHECK_POSITIONS).long()
    weights = torch.zeros(batch.weights.numel()).index_fill(0, scored, 1.0).view_as(batch.weights)  # [B, S]
    counts = np.full(len(weights), CHECK_POSITIONS / len(weights))  # [B]
    return Batch(batch.tokens, batch.targets, weights, counts, causal=batch.causal)


def check_exactness(options: Options, shape: Shape, device: torch.device) -> dict[str, float]:
    """Return relative loss difference and gradient cosine of scored positions only against all positions.

    Our model in fp32, on one sample. Exits with an error if they exceed `EXACTNESS`.
    """
    single_sample = replace(options, micro_batch_size=1, micro_batches=1)
    ((batch,),) = batches(single_sample, shape, 1)["mdm"]
    model = shape.ours().to(device)
    losses = []
    gradients = []
    for variant in (batch, score_all(batch)):
        loss = model(variant.to(device)).sum() / variant.count
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        losses.append(loss.item())
    scored, full = gradients
    difference = abs(losses[0] - losses[1]) / abs(losses[1])
    cosine = _dot(scored, full) / sqrt(_dot(scored, scored) * _dot(full, full))
    if not (difference <= EXACTNESS["loss"] and cosine >= EXACTNESS["cosine"]):
        sys.exit(
            f"scored positions only and all positions differ in fp32: relative loss difference {difference:.2g}, "
            f"gradient cosine {cosine:.6f}"
        )
    return {"loss": difference, "cosine": cosine}


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum(torch.dot(x.flatten(), y.flatten()).item() for x, y in zip(left, right, strict=True))


def check(
    implementations: list[Implementation],
    batches: dict[str, list[list[Batch]]],
    is_late: Callable[[Implementation], bool] = lambda implementation: False,
) -> dict[str, dict[str, float] | None]:
    """Return the largest relative differences of loss and gradient norm, by name of the implementation.

    Each is compared with the first implementation of the same objective. Exits with an error if one exceeds
    `TOLERANCE`. Implementations with dropout are only warmed up: None. All but the first are skipped when it `is_late`
    for them, with a message, and are not in the result.
    """
    references = {}  # objective -> name of the first implementation, its (loss, gradient norm) by step
    parity = {}
    for implementation in tqdm(implementations, "check and warm up", leave=False):
        if parity and is_late(implementation):
            print(f"{implementation.name}: skipped, time limit", flush=True)
            continue
        results = [tuple(map(float, implementation.step(step, 0.0))) for step in batches[implementation.batches]]
        if implementation.dropout:
            parity[implementation.name] = None
            continue
        reference, expected = references.setdefault(implementation.objective, (implementation.name, results))
        parity[implementation.name] = differences = dict.fromkeys(TOLERANCE, 0.0)
        for expected_values, values in zip(expected, results, strict=True):
            for (quantity, tolerance), x, y in zip(TOLERANCE.items(), expected_values, values, strict=True):
                if not abs(x - y) <= tolerance * abs(x):
                    sys.exit(
                        f"{implementation.name} computes something else: its {quantity} is {y:.5g}, "
                        f"that of {reference} {x:.5g}"
                    )
                differences[quantity] = max(differences[quantity], abs(x - y) / abs(x))
        gc.collect()  # building a model leaves reference cycles
    losses = [
        f"{objective.upper()} {' '.join(f'{loss:.3f}' for loss, _ in results)}"
        for objective, (_, results) in references.items()
    ]
    print(f"check passed: same loss and gradient norm from the same weights ({', '.join(losses)})")
    return parity
