"""AdamW: which parameters decay, and apex's kernel on local shards.

Apex runs on CUDA only. What is ours is the plumbing around it, tested here with a stand-in of the documented
interface: `state` by parameter, `step` counted in the group, moments made only where they are missing.
"""

import pytest
import torch
from torch import nn

from megatron.config.sections import ModelConfig, OptimizerConfig, ParallelConfig, Vocabulary
from megatron.parallel.apply import build_engine
from megatron.parallel.mesh import start_processes, stop_processes
from megatron.training import optimizer as optimizers
from megatron.training.optimizer import MOMENTS, ShardedApexAdam, build_optimizer, decays, start_state

CONFIG = OptimizerConfig(lr=1e-2, weight_decay=0.3)


class FusedAdam(torch.optim.Optimizer):
    """AdamW in five lines, behind the interface of apex.optimizers.FusedAdam."""

    def __init__(self, groups, lr, betas, eps, adam_w_mode):
        assert adam_w_mode
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (beta1, beta2), step = group["betas"], group["step"]
            for p in group["params"]:
                mean, square = (self.state[p][moment] for moment in MOMENTS)
                mean.lerp_(p.grad, 1 - beta1)
                square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                denominator = (square / (1 - beta2**step)).sqrt() + group["eps"]
                p.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**step))


@pytest.fixture(scope="module")
def processes():
    yield start_processes()
    stop_processes()


def build(processes, fused_adam=None, steps=0):
    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, add_bias_linear=True)
    model = build_engine(config, Vocabulary(20), 1, processes, ParallelConfig(), bf16=False, compile=False)
    optimizer = build_optimizer(model, CONFIG)
    if fused_adam:
        groups = [{k: group[k] for k in ("params", "weight_decay")} for group in optimizer.param_groups]
        optimizer = ShardedApexAdam(fused_adam, groups, lr=CONFIG.lr, betas=(0.9, 0.95), eps=1e-8)
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
        optimizer.step()
        optimizer.zero_grad()


def test_apex_on_local_shards_equals_torch(processes):
    """Also from a state that is some steps old, as after a resume."""
    (expected, one), (found, two) = build(processes, steps=3), build(processes, FusedAdam, steps=3)
    for optimizer in (one, two):
        train(expected if optimizer is one else found, optimizer, 5)
    for (name, a), b in zip(expected.named_parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(b.full_tensor(), a.full_tensor(), rtol=1e-5, atol=1e-6, msg=name)
        for moment in MOMENTS:  # what a checkpoint would hold
            torch.testing.assert_close(two.state[b][moment].full_tensor(), one.state[a][moment].full_tensor())


def test_the_apex_of_pypi_is_not_taken_for_nvidias(monkeypatch, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert optimizers.apex_adam() is None


def test_matrices_decay_and_vectors_do_not(processes):
    model, optimizer = build(processes)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.dim() == 2) == decays(parameter), name
    assert not decays(nn.Parameter(torch.zeros(3)))
    before = {name: parameter.full_tensor().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrunk = 1 - CONFIG.lr * CONFIG.weight_decay * (parameter.dim() == 2)
        torch.testing.assert_close(parameter.full_tensor(), before[name] * shrunk, rtol=1e-6, atol=1e-8)
