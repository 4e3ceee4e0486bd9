"""AdamW: which parameters decay, and apex's kernel on local shards.

Apex runs on CUDA only. The code around it is tested here with a stand-in of its interface where it is capturable
(apex/optimizers/fused_adam.py): `state` by parameter, learning rate and step count as tensors of a group, and a
GradScaler that decides whether to skip.
"""

from dataclasses import replace

import pytest
import torch

from megatron.config.sections import ModelConfig, OptimizerConfig, ParallelConfig
from megatron.config.sizes import parameter_count
from megatron.config.vocabulary import Vocabulary
from megatron.parallel.apply import build_engine
from megatron.parallel.mesh import destroy_parallel, initialize_parallel
from megatron.training import optimizer as optimizers
from megatron.training.command_line import parse
from megatron.training.optimizer import (
    MOMENTS,
    ShardedApexAdam,
    build_optimizer,
    parameter_groups,
    parameter_table,
    start_state,
)

CONFIG = OptimizerConfig(lr=1e-2, weight_decay=0.3)


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the interface of apex.optimizers.FusedAdam."""

    def __init__(self, groups, lr, betas, eps, adam_w_mode, capturable):
        assert adam_w_mode and capturable
        super().__init__(groups, {"lr": torch.tensor(lr), "betas": betas, "eps": eps, "weight_decay": 0.0})
        for group in self.param_groups:
            group["lr"] = group["lr"].to(group["params"][0].device)

    @torch.no_grad()
    def step(self, grad_scaler):
        for group in self.param_groups:
            device = group["params"][0].device
            skip = grad_scaler._check_inf_per_device(self)[device]
            assert skip.shape == (1,) and group["step"].dtype == torch.int32
            group["step"] += 1
            (beta1, beta2), step = group["betas"], group["step"]
            for p in group["params"]:
                grad, (mean, square) = p.grad / grad_scaler._get_scale_async(), (self.state[p][m] for m in MOMENTS)
                new_mean = mean.lerp(grad, 1 - beta1)
                new_square = square * beta2 + (1 - beta2) * grad * grad
                denominator = (new_square / (1 - beta2**step)).sqrt() + group["eps"]
                decayed = p * (1 - group["lr"] * group["weight_decay"])
                updated = decayed - group["lr"] / (1 - beta1**step) * new_mean / denominator
                for old, new in ((mean, new_mean), (square, new_square), (p, updated)):
                    old.copy_(torch.where(skip == 1, old, new))


@pytest.fixture(scope="module")
def ranks():
    yield initialize_parallel()
    destroy_parallel()


def build_model(ranks, **changes):
    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, add_bias_linear=True, **changes)
    return build_engine(config, Vocabulary(20), ranks, ParallelConfig(), seed=1, bf16=False, compile=False)


def build(ranks, fused_adam=None, steps=0):
    model = build_model(ranks)
    optimizer = build_optimizer(model, CONFIG)
    if fused_adam:
        optimizer = ShardedApexAdam(
            fused_adam, parameter_groups(model, CONFIG), lr=CONFIG.lr, betas=(0.9, 0.95), eps=1e-8
        )
    start_state(optimizer, steps)
    return model, optimizer


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for parameter in model.parameters():
            full = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.distributed.tensor.distribute_tensor(
                full, parameter.device_mesh, parameter.placements
            )
        for group in optimizer.param_groups:
            group["lr"] = CONFIG.lr / (1 + step)
            group["weight_decay"] = 0.5 * step * group["decays"]
        optimizer.step()
        optimizer.zero_grad()


def test_apex_on_local_shards_equals_torch(ranks):
    """Also from a state of several steps, as after a resume."""
    expected, adamw = build(ranks, steps=3)
    model, apex = build(ranks, FusedAdam, steps=3)
    train(expected, adamw, 5)
    train(model, apex, 5)
    for (name, a), b in zip(expected.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(b.full_tensor(), a.full_tensor(), rtol=1e-5, atol=1e-6, msg=name)
        for moment in MOMENTS:  # part of a checkpoint
            torch.testing.assert_close(apex.state[b][moment].full_tensor(), adamw.state[a][moment].full_tensor())


def test_apex_skips_a_step_that_is_not_finite(ranks):
    model, apex = build(ranks, FusedAdam)
    train(model, apex, 1)
    before = [parameter.full_tensor().clone() for parameter in model.parameters()]
    apex.found_inf = torch.ones(())
    train(model, apex, 1)
    assert all(map(torch.equal, before, [parameter.full_tensor() for parameter in model.parameters()]))
    apex.found_inf = torch.zeros(())
    train(model, apex, 1)
    assert not any(map(torch.equal, before, [parameter.full_tensor() for parameter in model.parameters()]))


def test_the_apex_of_pypi_is_not_taken_for_nvidias(monkeypatch, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert optimizers.apex_adam() is None


DECAYING = {  # --weight-decay-parameters: whether a parameter decays, by its name in the model
    "hidden": lambda name: name.startswith("layers.") and "proj.weight" in name,
    "matrices": lambda name: "proj.weight" in name or "embed" in name or "head" in name,
    "all": lambda name: True,
}


@pytest.mark.parametrize("choice", DECAYING)
def test_what_decays_and_nothing_else(ranks, choice):
    model = build_model(ranks, untie_embeddings_and_output_weights=True)
    optimizer = build_optimizer(model, replace(CONFIG, weight_decay_parameters=choice))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    before = {name: parameter.full_tensor().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == DECAYING[choice](name), name
        shrunk = 1 - CONFIG.lr * CONFIG.weight_decay * DECAYING[choice](name)
        torch.testing.assert_close(parameter.full_tensor(), before[name] * shrunk, rtol=1e-6, atol=1e-8)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)


def test_the_table_counts_every_parameter_once():
    words = "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --weight-decay-parameters hidden --optimizer muon"
    words += " --weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.5"
    config, vocabulary = parse("ar", words.split()), Vocabulary(257)
    head, *lines = parameter_table(config, vocabulary)
    assert head.split() == ["parameters", "number", "optimizer", "weight", "decay"]
    assert [line[:24].strip() for line in lines] == ["matrices of the blocks", "embedding and head", "vectors"]
    assert [line[40:51].strip() for line in lines] == ["muon", "adamw", "adamw"]
    assert [line[51:].strip() for line in lines] == ["0 to 0.5, linear", "none", "none"]
    counts = [int(line[24:40].replace(",", "")) for line in lines]
    assert sum(counts) == parameter_count(config.model, vocabulary) and counts[1:] == [384 * 32, 5 * 32]
