"""Muon against torch.optim.Muon, against a decomposition into singular values, and what it keeps."""

import numpy as np
import pytest
import torch

from megatron.config.sections import ModelConfig, OptimizerConfig, ParallelConfig, Vocabulary
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
    found = orthogonalise(torch.tensor(matrix, dtype=torch.float32)).numpy()
    np.testing.assert_allclose(found, left * values @ right, atol=1e-4)
    assert 0.6 < values.min() and values.max() < 1.3


def test_a_matrix_of_zeros_stays_one():
    assert not orthogonalise(torch.zeros(3, 5)).any()


def test_five_steps_are_those_of_torch():
    """On matrices of the blocks those of torch.optim.Muon, here in fp32; on the rest those of torch's AdamW."""
    with joined() as processes, patched(torch.Tensor, "bfloat16", torch.Tensor.float):
        network, parallel = ModelConfig(**MODEL, untie_embeddings_and_output_weights=True), ParallelConfig()
        engine = build_engine(network, Vocabulary(20), 1, processes, parallel, bf16=False, compile=False)
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
            for each in (optimizer, muon, adamw):
                each.step()
        for name, parameter in engine.named_parameters():
            torch.testing.assert_close(parameter.full_tensor(), copies[name], rtol=1e-5, atol=1e-6, msg=name)
        state = engine.tensors(optimizer)
    assert len(matrices) == 14 and len(copies) == 14 + 2 + 5
    for name in copies:
        kept = {key.split(".")[1] for key in state if key.startswith("optimizer.") and key.endswith(f".{name}")}
        assert kept == ({"momentum_buffer"} if name in matrices else {"exp_avg", "exp_avg_sq"})
