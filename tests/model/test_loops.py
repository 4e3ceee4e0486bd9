"""A model with weight-shared loops equals an unrolled model whose further blocks are copies of the looped ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron.batch import Batch
from megatron.config.sections import ModelConfig, ObjectiveConfig
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.model.initialise import initialise
from megatron.model.kv_cache import KVCache
from megatron.model.transformer import Transformer
from megatron.objectives.input_noise import build_input_noise
from megatron.objectives.registry import OBJECTIVES, build_objective

VOCABULARY, SEQ_LENGTH = Vocabulary(61), 64
SHAPE = {"num_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "init_method_std": 0.2}
LOOPS = {  # blocks in the order of computation
    "inner": ({"num_loops": 3, "loop_layers": "1-2"}, (0, 1, 2, 1, 2, 1, 2, 3)),
    "one": ({"num_loops": 2, "loop_layers": "1-1"}, (0, 1, 1, 2, 3)),
    "last": ({"num_loops": 2, "loop_layers": "2-3"}, (0, 1, 2, 3, 2, 3)),
    "all": ({"num_loops": 2}, (0, 1, 2, 3, 0, 1, 2, 3)),
}
every_loop = pytest.mark.parametrize("loops", LOOPS)


def build(loops: str) -> tuple[Transformer, Transformer, tuple[int, ...]]:
    """Return a model with loops, the same model unrolled by hand, and the block of each layer of the latter."""
    fields, order = LOOPS[loops]
    config = ModelConfig(**SHAPE, **fields)
    looped = Transformer(config, VOCABULARY)
    initialise(looped, config, seed=3)
    unrolled = Transformer(ModelConfig(**SHAPE | {"num_layers": len(order)}), VOCABULARY)
    weights = dict(looped.named_parameters())
    with torch.no_grad():
        for name, parameter in unrolled.named_parameters():
            parameter.copy_(weights[block_name(name, order)])
    return looped, unrolled, order


def block_name(name: str, order: tuple[int, ...]) -> str:
    """Return the looped model's name of a parameter of the unrolled one."""
    if not name.startswith("layers."):
        return name
    _, layer, rest = name.split(".", 2)
    return f"layers.{order[int(layer)]}.{rest}"


def training_batch(name: str, depth: int) -> Batch:
    """Return a training batch with stochastic depth over `depth` blocks."""
    settings = ObjectiveConfig(objective=name, stochastic_depth=0.5)
    objective = build_objective(settings, VOCABULARY, time_block=8)
    ids, indices = np.random.default_rng(0).integers(0, VOCABULARY.size, (4, SEQ_LENGTH + 1)), np.arange(4, 8)
    (batch,) = build_input_noise(settings, VOCABULARY, depth)(objective.prepare(ids, indices, 1), indices, 1)
    return batch


@every_loop
def test_blocks_run_in_the_stated_order(loops):
    fields, order = LOOPS[loops]
    config = ModelConfig(**SHAPE, **fields)
    assert config.schedule == order and config.depth == len(order)
    assert config.unrolled == ModelConfig(**SHAPE | {"num_layers": len(order)})


@every_loop
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_equal_those_of_the_unrolled_model(loops, name):
    looped, unrolled, order = build(loops)
    batch = training_batch(name, len(order))
    losses = [model(batch) for model in (looped, unrolled)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    expected = {name: torch.zeros_like(parameter) for name, parameter in looped.named_parameters()}
    for name, parameter in unrolled.named_parameters():
        expected[block_name(name, order)] += parameter.grad  # summed over the uses of a block
    for name, parameter in looped.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@every_loop
@pytest.mark.parametrize("causal", [True, False])
def test_logits_equal_those_of_the_unrolled_model(loops, causal):
    looped, unrolled, _ = build(loops)
    tokens = torch.randint(VOCABULARY.size, (2, 12), generator=torch.Generator().manual_seed(0))
    logits = looped.logits(tokens, causal)
    torch.testing.assert_close(logits, unrolled.logits(tokens, causal))
    without = Transformer(replace(looped.config, num_loops=1, loop_layers=None), VOCABULARY)
    without.load_state_dict(looped.state_dict())
    assert not torch.allclose(logits, without.logits(tokens, causal), rtol=0.01)  # the loops matter


@every_loop
@torch.no_grad()
def test_the_kv_cache_has_keys_and_values_of_every_pass(loops):
    looped, _, _ = build(loops)
    tokens = torch.randint(VOCABULARY.size, (3, 12), generator=torch.Generator().manual_seed(0))
    cache = KVCache()
    hidden = [looped.read(tokens[:, :7], cache)]
    hidden += [looped.read(tokens[:, index : index + 1], cache) for index in range(7, 12)]
    torch.testing.assert_close(looped.head(torch.cat(hidden, dim=1)), looped.logits(tokens, causal=True))
    selected = cache.select(torch.tensor([2, 0, 2]))
    last = looped.head(looped.read(tokens[[2, 0, 2], :1], selected))[:, 0]
    longer = torch.cat((tokens[[2, 0, 2]], tokens[[2, 0, 2], :1]), dim=1)
    torch.testing.assert_close(last, looped.logits(longer, causal=True)[:, -1])


def test_initial_weights_count_every_use():
    """Projections into the residual stream get std / sqrt(2 * depth); all other weights are those without loops."""
    plain, config = ModelConfig(**SHAPE), ModelConfig(**SHAPE, num_loops=3)
    models = [Transformer(plain, VOCABULARY), Transformer(config, VOCABULARY)]
    for model in models:
        initialise(model, model.config, seed=3)
    for (name, weight), looped in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
        torch.testing.assert_close(looped, weight / 3**0.5 if is_output else weight, msg=name)


@pytest.mark.parametrize("bounds", ["1", "2-1", "1-4", "-1-2", "1-2-3", "a-b"])
def test_wrong_bounds_are_refused(bounds):
    message = f"--loop-layers {bounds}: must be A-B with 0 <= A <= B <= 3"
    with pytest.raises(ConfigurationError, match=message):
        ModelConfig(**SHAPE, num_loops=2, loop_layers=bounds)


def test_a_range_without_loops_is_refused():
    with pytest.raises(ConfigurationError, match="--loop-layers 1-2: does nothing without --num-loops"):
        ModelConfig(**SHAPE, loop_layers="1-2")
