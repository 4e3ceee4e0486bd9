"""All pairs of training options: which work together, which are refused, and why.

    python -m tests.objectives.combinations > docs/combinations.md

A pair works if, with one of the objectives, a model takes a training step with it and is evaluated.
"""

from importlib.util import find_spec
from itertools import combinations

import numpy as np
import torch

from megatron.config.layout_checks import check_batch
from megatron.config.resolve import resolve
from megatron.config.sections import Config
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.model.distillation import Distillation
from megatron.objectives.base import EvaluationNoise
from megatron.objectives.input_noise import build_input_noise
from megatron.objectives.registry import OBJECTIVES, build_objective, capabilities, document_rules
from megatron.parallel.mesh import ParallelContext
from megatron.parallel.meta_gradient import MetaGradient
from megatron.parallel.teachers import build_teacher
from megatron.training.build_engine import start_engine
from megatron.training.command_line import parse
from megatron.training.step import reseed, train_step
from tests.distributed import joined

MODEL_FLAGS = "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --micro-batch-size 4 "
MODEL_FLAGS += "--global-batch-size 8 --train-iters 4 --train-data-path none --tokenizer-type ByteTokenizer --fp32"
VOCABULARY, EOD = Vocabulary(257), 256
HAS_DEEPSPEED = find_spec("deepspeed") is not None
OPTIONS = [f"--objective {name}" for name in OBJECTIVES] + [
    "--mask-times iid",
    "--mask-time-distribution window",
    "--mask-time-distribution bell --mask-time-weighting none",
    "--mdm-loss simple",
    "--ar-ratio 0.5",
    "--low-noise-samples 8",
    "--causal-ratio 1",
    "--diffusion-block-size 4",
    "--num-order-list 4",
    "--right-to-left-ratio 0.5",
    "--target-positions",
    "--target-offset-max 3 --target-positions",
    "--token-dropout 0.2",
    "--token-dropout-max 0.4",
    "--random-replacement 0.2",
    "--masked-input-weight 0.4",
    "--randmask-ratio 0.5",
    "--stochastic-depth 0.2",
    "--reset-attention-mask",
    "--reset-position-ids",
    "--eod-mask-loss",
    "--attention-dropout 0.1",
    "--hidden-dropout 0.1",
    "--mlp-dropout 0.1",
    "--embedding-dropout 0.1",
    "--label-smoothing 0.1",
    "--z-loss 1e-4",
    "--parametrization mup --base-hidden-size 8 --base-kv-channels 4",
    "--parametrization completep --base-hidden-size 8 --base-num-layers 1 --weight-decay-scaling sqrt-width",
    "--num-loops 3",
    "--optimizer muon",
    "--weight-decay-parameters hidden",
    "--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 1",
    "--lr-decay-style cyclic --lr-cycles 2",
    "--meta-gradient-norm 0.5",
    "--ema-decay 0.99",
    "--average-from-samples 8",
    "--teacher RUN",
    "--deepspeed",
]


def refusal(flags: str, ranks: ParallelContext | None) -> str | None:
    """Return why a command line is refused; None where a model takes a training step with it and is evaluated.

    Without `ranks` only the configuration is checked.
    """
    try:
        config = parse("ar", f"{MODEL_FLAGS} {flags}".split())
        rules = document_rules(config.data, config.objective, EOD)
        objective = build_objective(config.objective, VOCABULARY, 8, rules)
        plan = resolve(config, VOCABULARY, 1000, capabilities(config.objective.objective))
        check_batch(config, 1, capabilities(config.objective.objective))
    except ConfigurationError as error:
        return str(error)
    if ranks and (HAS_DEEPSPEED or not config.parallel.deepspeed):
        _step(config, objective, plan, ranks)
    return None


def _step(config: Config, objective, plan, ranks: ParallelContext) -> None:
    noise = build_input_noise(config.objective, VOCABULARY, config.model.depth)
    engine, optimizer = start_engine(config, VOCABULARY, ranks, bf16=False, compile=False, steps=0)
    if config.distillation.teacher:  # a new model
        teacher = build_teacher(config.model, VOCABULARY, ranks, config.parallel, dtype=torch.float32)
        engine.models[0].distillation = Distillation((teacher.teacher_states,), weight=0.5, temperature=1.0)
    generator = np.random.default_rng(1)
    ids = np.where(generator.random((8, 17)) < 0.1, EOD, generator.integers(0, EOD, (8, 17)))
    reseed(1, 0, ranks)
    batches = []
    for start in (0, 4):
        sample_indices = np.arange(start, start + 4)
        batches += noise(objective.prepare(ids[sample_indices], sample_indices, 1), sample_indices, 1)
    rates = {"learning_rate": 1e-3, "weight_decay": 0.1, "meta_gradient": MetaGradient.at(config.optimizer, 1e-3)}
    result = train_step(engine, optimizer, batches, **rates, clip_grad=1.0)
    assert torch.isfinite(result.loss) and result.grad_norm > 0, "the step is not finite"
    engine.eval()
    for name, likelihood in objective.evaluations("validation"):
        batch = likelihood.evaluation(ids, EvaluationNoise(1, name, 0), np.arange(8), "common")
        loss = float((engine.nll(batch) * batch.weights).sum()) / batch.count
        assert abs(loss - np.log(VOCABULARY.size)) < 1, f"{name}: {loss}"


def pairs(ranks: ParallelContext | None) -> dict[tuple[int, int], str | None]:
    """Return the reason why each pair of options, by index, is refused; None where it works."""
    command_lines = {}  # by option: with each objective that has it
    for index, option in enumerate(OPTIONS):
        candidates = [f"--objective {name} {option}" for name in OBJECTIVES]
        if option.startswith("--objective"):
            candidates = [option]
        command_lines[index] = [flags for flags in candidates if refusal(flags, ranks) is None]
        assert command_lines[index], f"{option} works with no objective"
    return {pair: _pair_refusal(*pair, command_lines, ranks) for pair in combinations(range(len(OPTIONS)), 2)}


def _pair_refusal(
    first: int, second: int, command_lines: dict[int, list[str]], ranks: ParallelContext | None
) -> str | None:
    if OPTIONS[second].startswith("--objective"):
        return f"{OPTIONS[first]}: a run has one objective"
    reasons = []
    for flags in command_lines[first]:
        reason = refusal(f"{flags} {OPTIONS[second]}", ranks)
        if reason is None:
            return None
        reasons.append(reason)
    # "excludes each other" is a better reason than "the objective does not have it"
    return next((reason for reason in reasons if "excludes" in reason or "leave one" in reason), reasons[0])


def markdown(refusals: dict[tuple[int, int], str | None]) -> str:
    """Return the page docs/combinations.md."""
    # messages without the flag itself
    reasons = {pair: message.partition(": ")[2] for pair, message in refusals.items() if message}
    footnotes = {reason: str(number) for number, reason in enumerate(dict.fromkeys(reasons.values()), start=1)}
    lines = [
        "# Which options work together",
        "",
        "`+`: a model takes a training step with both and is evaluated. A number: refused, for the reason below.",
        "Generated by `python -m tests.objectives.combinations`; a test compares this page with the code.",
        "",
        f"| | option | {' | '.join(str(index) for index in range(1, len(OPTIONS) + 1))} |",
        "|---|---|" + "---|" * len(OPTIONS),
    ]
    for row, option in enumerate(OPTIONS):
        cells = []
        for column in range(len(OPTIONS)):
            reason = reasons.get((min(row, column), max(row, column)))
            cells.append("" if row == column else footnotes[reason] if reason else "+")
        lines.append(f"| {row + 1} | `{option}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in footnotes.items())]) + "\n"


if __name__ == "__main__":
    with joined() as ranks:
        print(markdown(pairs(ranks)), end="")
