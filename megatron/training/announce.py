"""The log lines at the start of a run: no-op flags, what it resumes, its size, layout and regularised parameters."""

import logging
from dataclasses import asdict

from megatron.config.flags import typed
from megatron.config.resolve import no_op_flags
from megatron.config.sections import ParallelConfig
from megatron.training.build import RunParts
from megatron.training.optimizer import parameter_table
from megatron.training.resume import Origin
from megatron.training.resume_checks import changes

logger = logging.getLogger(__name__)


def announce(parts: RunParts) -> None:
    """Log what is about to run."""
    config = parts.config
    for line in no_op_flags(config, exact=all(likelihood.exact for likelihood in parts.objective.likelihoods)):
        logger.info(line)
    if not config.checkpoint.save and not config.validation.skip_train:
        logger.info("nothing is saved: no --save names a run folder")
    end = parts.progress.iteration + parts.data.steps
    late = [step for step in config.checkpoint.keep_iterations if step > end]
    if config.checkpoint.save and late:
        logger.info("%s: has no effect, the run ends at step %d", typed("keep_iterations", late), end)
    if parts.origin:
        _announce_origin(parts, parts.origin)
    _announce_size(parts)
    _announce_teachers(parts)
    for line in () if config.validation.skip_train else parameter_table(config, parts.run.vocabulary):
        logger.info(line)


def _announce_origin(parts: RunParts, origin: Origin) -> None:
    logger.info("continuing from %s at step %d", origin.checkpoint, origin.meta["iteration"])
    if parts.config.validation.skip_train:
        return
    recorded, config, ranks = origin.meta["config"], parts.config, parts.ranks
    changed = [
        f"{typed(name, value)} ({typed(name, before)} there)" for name, before, value in changes(recorded, config)
    ]
    if changed:  # a branch
        logger.info("settings that are not those of %s: %s", origin.run, ", ".join(changed))
    model, norm = config.model, config.optimizer.meta_gradient_norm
    dropout = (model.attention_dropout, model.hidden_dropout, model.mlp_dropout, model.embedding_dropout)
    before = (recorded["processes"], recorded.get("parallel"), recorded["training"]["micro_batch_size"])
    now = (ranks.size, asdict(config.parallel), config.training.micro_batch_size)
    if any(dropout) and (*before, recorded.get("compiled", parts.device.compiled)) != (*now, parts.device.compiled):
        logger.info(
            "the parallel layout, --micro-batch-size or compilation changed: dropout masks differ, and losses agree "
            "statistically"
        )
    if norm is None:
        return
    data_size = ParallelConfig(**recorded["parallel"]).data_size(recorded["processes"])
    if (data_size, before[-1]) != (ranks.data_size, now[-1]) and {data_size, ranks.data_size} != {1}:
        logger.info(
            "the data-parallel size or --micro-batch-size changed: the trial moves of %s follow the gradients of other "
            "samples, and losses differ",
            typed("meta_gradient_norm", norm),
        )


def _announce_size(parts: RunParts) -> None:
    config, plan, ranks, engine = parts.config, parts.plan, parts.ranks, parts.state.engine
    fp8_recipe, precision = config.training.fp8_recipe, parts.device.precision
    axes = {"tensor": "tp", "pipeline": "pp", "replicas": "replicate", "shards": "shard"}
    layout = [f"{ranks.along(axis)[1]} {name}" for name, axis in axes.items() if ranks.along(axis)[1] > 1]
    zero_stage = f"{'DeepSpeed ' if config.parallel.deepspeed else ''}ZeRO {engine.zero_stage}"
    logger.info(
        "%s: %.2fM parameters, %s unique tokens, %d samples of %d tokens in %d steps (%.1f epochs), %s%s on %s x%d%s",
        parts.objective.name, plan.parameters / 1e6, f"{plan.unique_tokens:,}", plan.train_samples,
        config.data.seq_length, plan.steps, parts.epoch(plan.train_samples),
        f"{precision} and {fp8_recipe} fp8" if fp8_recipe else precision, ", compiled" if parts.device.compiled else "",
        ranks.device.type, ranks.size,
        f" ({', '.join([*layout, zero_stage])})" if ranks.size > 1 else "",
    )  # fmt: skip


def _announce_teachers(parts: RunParts) -> None:
    teachers, settings = parts.description["teachers"], parts.config.distillation
    if teachers:
        logger.info(
            "distillation from %s, weight %g, temperature %g: forward passes of %.3g FLOPs in all, which the %.3g of "
            "6ND do not include",
            ", ".join(f"{teacher['checkpoint']} ({teacher['parameters'] / 1e6:.2f}M)" for teacher in teachers),
            settings.distill_weight, settings.distill_temperature, sum(teacher["flops"] for teacher in teachers),
            parts.plan.flops(parts.plan.train_samples, parts.config.data.seq_length),
        )  # fmt: skip
