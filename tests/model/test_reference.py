"""Logits equal Hugging Face's Llama and Qwen3 with the same weights, causal and bidirectional."""

import pytest
import torch

from megatron.config.sections import ModelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.convert.huggingface import hugging_face_config, hugging_face_model
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer

VOCABULARY = Vocabulary(97)
VARIANTS = {
    "plain": {},
    "grouped": {"group_query_attention": True, "num_query_groups": 2},
    "free head width": {"kv_channels": 10, "group_query_attention": True, "num_query_groups": 1},
    "biases": {"add_bias_linear": True},
}


def build(config):
    model = Transformer(config, VOCABULARY)
    initialise(model, config, seed=3)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # norms and biases must not be trivial either
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def hugging_face_twin(model, family):
    config = hugging_face_config(model.config, vocabulary_rows=VOCABULARY.padded_size, max_positions=64)
    twin = hugging_face_model(model, config)
    assert type(twin).__name__ == {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]
    return twin


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("untied", [True, False])
@pytest.mark.parametrize(
    "family, variant",
    [("llama", name) for name in VARIANTS] + [("qwen3", name) for name in VARIANTS if name != "biases"],
)
@torch.no_grad()
def test_logits_equal_hugging_face(family, variant, untied, causal):
    config = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        rotary_base=5000.0,
        qk_layernorm=family == "qwen3",
        untie_embeddings_and_output_weights=untied,
        **VARIANTS[variant],
    )
    model = build(config)
    tokens = torch.randint(VOCABULARY.size, (2, 12), generator=torch.Generator().manual_seed(1))
    visible = torch.ones(12, 12, dtype=torch.bool)
    mask = (visible.tril() if causal else visible).expand(2, 1, 12, 12)
    expected = hugging_face_twin(model, family)(tokens, attention_mask=mask).logits[..., : VOCABULARY.size]
    torch.testing.assert_close(model.logits(tokens, causal), expected, rtol=1e-5, atol=1e-5)
