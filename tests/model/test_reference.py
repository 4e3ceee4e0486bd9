"""Logits equal Hugging Face's Llama and Qwen3 with the same weights, causal and bidirectional."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron.config.sections import ModelConfig, Vocabulary
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer

VOCABULARY = Vocabulary(97)
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
LAYOUTS = {
    "plain": {},
    "grouped": {"group_query_attention": True, "num_query_groups": 2},
    "free head width": {"kv_channels": 10, "group_query_attention": True, "num_query_groups": 1},
    "biases": {"add_bias_linear": True},
}


def ours(config):
    model = Transformer(config, VOCABULARY)
    initialise(model, config, seed=3)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # norms and biases too must not be trivial
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def theirs(model, family):
    config = model.config
    settings, language_model = FAMILIES[family]
    biases = {"attention_bias": config.add_bias_linear}
    if family == "llama":
        biases["mlp_bias"] = config.add_bias_linear
    twin = language_model(
        settings(
            vocab_size=VOCABULARY.padded_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.key_value_heads,
            head_dim=config.head_size,
            rms_norm_eps=config.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": config.rotary_base},
            tie_word_embeddings=not config.untie_embeddings_and_output_weights,
            **biases,
        )
    )
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    weights["lm_head.weight"] = model.lm_weight()
    twin.load_state_dict(weights)
    return twin.eval()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("untied", [True, False])
@pytest.mark.parametrize(
    "family, layout",
    [("llama", layout) for layout in LAYOUTS] + [("qwen3", layout) for layout in LAYOUTS if layout != "biases"],
)
@torch.no_grad()
def test_logits_equal_hugging_face(family, layout, untied, causal):
    config = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        rotary_base=5000.0,
        qk_layernorm=family == "qwen3",
        untie_embeddings_and_output_weights=untied,
        **LAYOUTS[layout],
    )
    model = ours(config)
    tokens = torch.randint(VOCABULARY.size, (2, 12), generator=torch.Generator().manual_seed(1))
    visible = torch.ones(12, 12, dtype=torch.bool)
    mask = (visible.tril() if causal else visible).expand(2, 1, 12, 12)
    expected = theirs(model, family)(tokens, attention_mask=mask).logits[..., : VOCABULARY.size]
    torch.testing.assert_close(model.logits(tokens, causal), expected, rtol=1e-5, atol=1e-5)
