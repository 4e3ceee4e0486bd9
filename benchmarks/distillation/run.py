#!/usr/bin/env python3
"""Time a training step with teachers relative to one without, and compare with the ratio of FLOPs.

    python benchmarks/distillation/run.py --output distillation.json

Teachers have the model of the student and new weights. Every round times one step of each case, in a rotating order;
the table gives the median of the ratios within a round. "explained" is (3 + K) / 3 for K teachers: a step computes the
matrix products of three forward passes, and a teacher those of one. What exceeds it are elementwise passes over logits:
each teacher and the divergence take about as many as the head without teachers.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.harness import environment, interleave, markdown_table, publish, ratios, read_options, spread, summary
from benchmarks.objectives.run import VOCABULARY, WARM_UP, Case, Options
from megatron.model.distillation import Distillation
from megatron.parallel.mesh import ParallelContext, destroy_parallel, initialize_parallel
from megatron.parallel.teachers import build_teacher
from megatron.training.environment import choose_precision

OBJECTIVES, TEACHERS = ("ar", "mdm"), (0, 1, 2, 4)


def distilled(objective: str, num_teachers: int, options: Options, ranks: ParallelContext) -> Case:
    """Return a case with `num_teachers` teachers."""
    case = Case(f"--objective {objective}", options, ranks)
    bf16 = choose_precision(case.config, ranks.device) == "bf16"
    layout = {"parallel": case.config.parallel, "dtype": torch.bfloat16 if bf16 else torch.float32}
    teachers = [build_teacher(case.config.model, VOCABULARY, ranks, **layout) for _ in range(num_teachers)]
    if teachers:
        states = tuple(teacher.teacher_states for teacher in teachers)
        case.engine.models[0].distillation = Distillation(states, weight=0.5, temperature=1.0)
    return case


def compete(options: Options, ranks: ParallelContext) -> dict:
    """Return the report: the time of every case, and its ratio to the same objective without teachers."""
    names = {f"{name}, {count} teachers": (name, count) for name in OBJECTIVES for count in TEACHERS}
    cases = {key: distilled(*which, options, ranks) for key, which in names.items()}
    contestants = {key: case.step for key, case in cases.items()}
    seconds = interleave(contestants, options.rounds, ranks.device, warm_up=WARM_UP).seconds
    plain = {key: seconds[f"{name}, 0 teachers"] for key, (name, _) in names.items()}
    return {
        "environment": environment(ranks.device),
        "settings": vars(options),
        "results": {
            key: {
                "seconds": seconds[key],
                "times_plain": summary(ratios(seconds[key], plain[key])),
                "spread": spread(ratios(seconds[key], plain[key])),
                "explained": (3 + count) / 3,
            }
            for key, (_, count) in names.items()
        },
    }


def table(report: dict) -> str:
    """Return the report as a Markdown table."""
    rows = [(key, *result["spread"], f"{result['explained']:.2f}") for key, result in report["results"].items()]
    return markdown_table(("student", "time / without", "min - max", "explained"), rows)


def main() -> None:
    """Run the benchmark from the command line."""
    options = read_options(Options, __doc__)
    ranks = initialize_parallel()
    try:
        report = compete(options, ranks)
    finally:
        destroy_parallel()
    publish(report, table(report), options.output)


if __name__ == "__main__":
    main()
