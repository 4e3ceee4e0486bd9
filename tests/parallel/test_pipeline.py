"""What a pipeline passes to its stages, on one rank; `test_layouts.py` compares pipelines with a whole model."""

import torch
from torch.distributed.fsdp import fully_shard

from megatron.config.sections import ModelConfig
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from megatron.parallel.pipeline import Pipeline, Stage, extract_stage
from tests.distributed import joined
from tests.steps import DATA_PARALLEL, MODEL, VOCABULARY, Case, batches_of_step, build


def test_the_first_stage_is_called_with_an_argument():
    """FSDP2 of torch 2.11 moves the arguments of its root to the device, on CUDA only, and fails if there are none."""
    inputs, options = [], {"untie_embeddings_and_output_weights": True}
    config = ModelConfig(**MODEL | options)
    with joined() as ranks:
        model = Transformer(config, VOCABULARY)
        initialise(model, config, 5)
        root = Stage(extract_stage(model, 0, 1))
        root.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
        fully_shard(root, mesh=ranks.mesh["shard"])
        pipeline = Pipeline([root], [root.model], ranks, zero_stage=1, dtype=torch.float32)
        engine, _, data = build(ranks, Case("ar", micro_batch=2, model=options), DATA_PARALLEL)
        batches = batches_of_step(data, 0)
        torch.testing.assert_close(pipeline.backward(batches, 100.0), engine.backward(batches, 100.0))
    assert len(inputs) == len(batches) and all(args or kwargs for args, kwargs in inputs)
