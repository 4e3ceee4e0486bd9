"""Muon against torch.optim.Muon and against a singular value decomposition, and its state."""

import numpy as np
import pytest
import torch

from megatron.config.sections import ModelConfig, OptimizerConfig, ParallelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.parallel.apply import build_engine
from megatron.training.muon import COEFFICIENTS, STEPS, orthogonalise
from megatron.training.optimizer import build_optimizer, start_state
from tests.distributed import joined
from tests.steps import patched

CONFIG = OptimizerConfig(optimizer="muon", lr=0.02, weight_decay=0.3)
MODEL = dict(num_layers=2, hidden_size=16, num_attention_heads=4, group_query_attention=True, num_query_groups=2)


@pytest.mark.parametrize("shape", [(16, 16), (8, 48), (48, 8), (1, 5)])
def test_singular_values_follow_the_polynomial_and_vectors_stay(shape):
    matrix = np.random.default_rng(0).normal(size=shape)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values /= np.linalg.norm(values)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        values = a * values + b * values**3 + c * values**5
    orthogonal = orthogonalise(torch.tensor(matrix, dtype=torch.float32)).numpy()
    np.testing.assert_allclose(orthogonal, left * values @ right, atol=1e-4)
    assert values.min() > 0.6 and values.max() < 1.3


def test_a_matrix_of_zeros_stays_zero():
    assert not orthogonalise(torch.zeros(3, 5)).any()


def test_five_steps_are_those_of_torch():
    """Equal to torch.optim.Muon (in fp32) on matrices of the blocks, and to torch's AdamW on other parameters."""
    before_2_15 = patched(torch.Tensor, "bfloat16", torch.Tensor.float)
    with joined() as ranks, before_2_15, patched(torch, "bfloat16", torch.float32):
        model, parallel = ModelConfig(**MODEL, untie_embeddings_and_output_weights=True), ParallelConfig()
        engine = build_engine(model, Vocabulary(20), ranks, parallel, seed=1, bf16=False, compile=False)
        optimizer = build_optimizer(engine, CONFIG)
        start_state(optimizer, 0)
        copies = {name: p.full_tensor().detach().clone().requires_grad_() for name, p in engine.named_parameters()}
        matrices = [name for name in copies if "proj" in name]
        decay = {"weight_decay": CONFIG.weight_decay}
        muon = torch.optim.Muon([copies[name] for name in matrices], adjust_lr_fn="match_rms_adamw", **decay)
        tables = [copies[name] for name in ("embed_tokens.weight", "lm_head.weight")]
        vectors = [copy for copy in copies.values() if copy.dim() == 1]
        groups = [{"params": tables, **decay}, {"params": vectors, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        generator = torch.Generator().manual_seed(0)
        for step in range(5):
            for name, parameter in engine.named_parameters():
                copies[name].grad = torch.randn(parameter.shape, generator=generator)
                parameter.grad = torch.distributed.tensor.distribute_tensor(
                    copies[name].grad, parameter.device_mesh, parameter.placements
                )
            for group in (*optimizer.param_groups, *muon.param_groups, *adamw.param_groups):
                group["lr"] = CONFIG.lr / (1 + step)
            for reference in (optimizer, muon, adamw):
                reference.step()
        for name, parameter in engine.named_parameters():
            torch.testing.assert_close(parameter.full_tensor(), copies[name], rtol=1e-5, atol=1e-6, msg=name)
        state = engine.tensors(optimizer)
    assert len(matrices) == 14 and len(copies) == 14 + 2 + 5
    for name in copies:
        state_names = {key.split(".")[1] for key in state if key.startswith("optimizer.") and key.endswith(f".{name}")}
        assert state_names == ({"momentum_buffer"} if name in matrices else {"exp_avg", "exp_avg_sq"})
