"""Checks that the parallel layout divides the world size, the model and the batch of a step."""

from math import gcd

from megatron.config.capabilities import Capabilities
from megatron.config.flags import require
from megatron.config.sections import Config


def layers_of(stage: int, stages: int, num_layers: int) -> range:
    """Return the layers of a pipeline stage: even shares, with one layer more for the first stages if need be."""
    share, remainder = divmod(num_layers, stages)
    start = stage * share + min(stage, remainder)
    return range(start, start + share + (1 if stage < remainder else 0))


def check_layout(config: Config, size: int) -> None:
    """Check that the layout divides the world size `size`, and that it can divide the model.

    Raises: ConfigurationError if it does not.
    """
    parallel = config.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    require(
        size % (tensor * stages) == 0,
        "tensor_model_parallel_size" if tensor > 1 else "pipeline_model_parallel_size",
        tensor if tensor > 1 else stages,
        f"makes groups of {tensor * stages} ranks ({tensor} tensor-parallel x {stages} stages), and {size} "
        f"{'were' if size > 1 else 'was'} started; start a multiple of {tensor * stages}, or lower one of the two",
    )
    message = (
        "cannot compile layers that are tensor-parallel and recomputed; leave out --compile or --recompute-granularity"
    )
    require(parallel.compiles or not config.training.compile, "compile", True, message)
    _check_tensor_parallel(config, size)
    _check_stages(config)
    _check_meta_gradient(config)
    replicas, data_size = parallel.num_distributed_optimizer_instances, parallel.data_size(size)
    require(
        data_size % replicas == 0,
        "num_distributed_optimizer_instances",
        replicas,
        f"does not divide the {data_size} data-parallel rank{'s' if data_size > 1 else ''}; change one",
    )


def _check_tensor_parallel(config: Config, size: int) -> None:
    """Check that the tensor-parallel ranks can divide heads, MLP and sequence."""
    parallel, model = config.parallel, config.model
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dimensions = {
        "--num-attention-heads": model.num_attention_heads,
        "--num-query-groups": model.key_value_heads,
        "--ffn-hidden-size": model.mlp_size,
        "--seq-length": config.data.seq_length,
    }
    divisor = gcd(*dimensions.values())
    fits = [count for count in range(1, tensor) if size % (count * stages) == 0 and divisor % count == 0]
    for name, value in dimensions.items():
        message = f"does not divide {name} {value}; give {max(fits, default=1)}, or change {name}"
        require(value % tensor == 0, "tensor_model_parallel_size", tensor, message)


def _check_stages(config: Config) -> None:
    """Check that every pipeline stage has layers, in equal shares where ranks have several stages."""
    parallel, model = config.parallel, config.model
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.num_layers_per_virtual_pipeline_stage
    require(
        virtual is None or model.num_layers % (stages * virtual) == 0,
        "num_layers_per_virtual_pipeline_stage",
        virtual,
        f"times {stages} stages does not divide --num-layers {model.num_layers}; change one",
    )
    chunks = parallel.chunks(model.num_layers)
    message = "gives every rank one stage, as without the flag; leave it out or lower it"
    require(virtual is None or chunks > 1, "num_layers_per_virtual_pipeline_stage", virtual, message)
    blocks, longest = parallel.recompute_num_layers, -(-model.num_layers // (stages * chunks))
    message = (
        f"is more than the {longest} layer{'s' if longest > 1 else ''} of a stage; lower it, or leave it out for all"
    )
    require(blocks is None or blocks <= longest, "recompute_num_layers", blocks, message)
    require(
        model.num_layers >= stages * chunks,
        "pipeline_model_parallel_size",
        stages,
        f"is more than --num-layers {model.num_layers}: every stage has at least one; lower it",
    )
    loop = model.loop_range
    shares = [layers_of(stage, stages * chunks, model.num_layers) for stage in range(stages * chunks)]
    bounds = ", ".join(f"{share[0]}-{share[-1]}" for share in shares)
    require(
        model.num_loops == 1 or any(loop[0] in share and loop[-1] in share for share in shares),
        "loop_layers" if model.loop_layers else "num_loops",
        model.loop_layers or model.num_loops,
        f"repeats blocks {loop[0]}-{loop[-1]} of several pipeline stages, which hold the blocks {bounds}; give "
        "--loop-layers inside one of them",
    )


def _check_meta_gradient(config: Config) -> None:
    """Check that a rank has whole gradients and weights between the halves of a meta-gradient step."""
    parallel, norm = config.parallel, config.optimizer.meta_gradient_norm
    stages, stage = parallel.pipeline_model_parallel_size, parallel.fsdp_stage
    message = (
        f"moves weights between two halves of a step, and with --pipeline-model-parallel-size {stages} all its "
        "micro-batches are in flight at once; leave one of them out"
    )
    require(norm is None or stages == 1, "meta_gradient_norm", norm, message)
    message = (
        f"moves the gathered weights along gradients that are not reduced, and --zero-stage {stage} shards them after "
        "every micro-batch; give --zero-stage 0 or 1"
    )
    require(norm is None or stage <= 1, "meta_gradient_norm", norm, message)


def check_batch(config: Config, size: int, capabilities: Capabilities) -> None:
    """Check that a step divides into whole micro-batches over `size` ranks, enough of them for the pipeline.

    Raises: ConfigurationError if it does not.
    """
    training, parallel = config.training, config.parallel
    data_size, stages = parallel.data_size(size), parallel.pipeline_model_parallel_size
    samples = training.micro_batch_size * data_size  # of one micro-batch on every data-parallel rank
    steps, remainder = divmod(training.global_batch_size, samples)
    nearest = " or ".join(str(count * samples) for count in (steps, steps + 1) if count)
    kind = "data-parallel rank" if size > data_size else "rank"
    require(
        remainder == 0,
        "global_batch_size",
        training.global_batch_size,
        f"is not a multiple of --micro-batch-size {training.micro_batch_size} times {data_size} "
        f"{kind}{'s' if data_size > 1 else ''} = {samples}; take {nearest}",
    )
    _check_halves(config, data_size)
    causal, micro = config.objective.causal_samples(training.global_batch_size), training.micro_batch_size
    fits = [f"{count * micro / training.global_batch_size:.6g}" for count in (causal // micro, causal // micro + 1)]
    require(
        not capabilities.mixes_kinds or causal % micro == 0,
        "causal_ratio",
        config.objective.causal_ratio,
        f"is {causal} of the {training.global_batch_size} samples of a step, and all {micro} samples of a micro-batch "
        f"have one objective; take {' or '.join(fits)}, or another --micro-batch-size",
    )
    interleaved = parallel.chunks(config.model.num_layers) > 1
    needed = "a multiple of that" if interleaved else "at least as many"
    require(
        steps % stages == 0 if interleaved else steps >= stages,
        "global_batch_size",
        training.global_batch_size,
        f"makes {steps} micro-batch{'es' if steps > 1 else ''} a step, and --pipeline-model-parallel-size {stages} "
        f"needs {needed}; take {max(1, round(steps / stages)) * stages * samples}, or lower --micro-batch-size",
    )


def _check_halves(config: Config, data_size: int) -> None:
    """Check that the micro-batches of a rank are two halves of a meta-gradient step."""
    training, norm = config.training, config.optimizer.meta_gradient_norm
    micro, samples = training.micro_batch_size, training.global_batch_size // data_size  # of a rank in a step
    fits = [size for size in range(1, micro + 1) if samples % (2 * size) == 0]
    remedy = f"--micro-batch-size {fits[-1]}" if fits else f"--global-batch-size {(samples + 1) * data_size}"
    count = samples // micro
    message = (
        f"needs an even number of micro-batches, two halves, and a step has {count} on "
        f"{'each data-parallel' if data_size > 1 else 'the'} rank; give {remedy}"
    )
    require(norm is None or count % 2 == 0, "meta_gradient_norm", norm, message)
