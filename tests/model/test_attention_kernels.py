"""Which arguments and which kernels attention gets, where CUDA differs from a CPU; no device is needed."""

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from megatron.batch import Batch
from megatron.config.sections import ModelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.model import attention
from megatron.model.attention import needs_equal_heads
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer
from tests.steps import patched

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "device_type, dtype, has_mask, repeats",
    [
        ("cuda", BF16, False, False),  # FlashAttention and cuDNN take groups
        ("cuda", BF16, True, True),
        ("cuda", FP32, False, True),
        ("cuda", FP32, True, True),
        ("cpu", FP32, True, False),
        ("cpu", BF16, True, False),
    ],
)
def test_heads_are_repeated_where_no_fused_kernel_takes_groups(device_type, dtype, has_mask, repeats):
    assert needs_equal_heads(device_type, dtype, has_mask) == repeats


class AttentionCalls(TorchFunctionMode):
    """Records (query heads, key heads, enable_gqa) of every call of attention."""

    def __init__(self):
        self.heads = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            query, key, _ = args
            self.heads.append((query.shape[1], key.shape[1], kwargs["enable_gqa"]))
        return function(*args, **kwargs or {})


def test_rotation_acts_in_the_layout_of_the_projections():
    """After a transposition compiled code would write the gradients of queries and keys twice."""
    shapes = []
    config = ModelConfig(num_layers=1, hidden_size=32, num_attention_heads=4)

    def rotate(heads, table, original=attention.rotate):
        shapes.append(heads.shape)
        return original(heads, table)

    model = Transformer(config, Vocabulary(97))
    with patched(attention, "rotate", rotate):
        model.logits(torch.zeros(2, 11, dtype=torch.int64), causal=True)
    assert shapes == [(2, 11, 4, 8)] * 2


def test_repeated_heads_give_the_same_loss_and_gradients():
    config = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, group_query_attention=True, num_query_groups=2
    )
    model = Transformer(config, Vocabulary(97))
    initialise(model, config, 1)
    tokens = torch.randint(97, (3, 11), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(11).expand(3, -1) // 4
    batch = Batch(tokens, tokens, torch.ones(3, 11), torch.ones(3).numpy(), causal=True, documents=documents)
    losses, gradients, heads = [], [], []
    for repeats in (False, True):
        model.zero_grad()
        with patched(attention, "needs_equal_heads", lambda *_, repeats=repeats: repeats), AttentionCalls() as calls:
            loss = model(batch)
        loss.backward()
        losses.append(loss)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        heads.append(set(calls.heads))
    assert heads == [{(4, 2, True)}, {(4, 4, False)}]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
