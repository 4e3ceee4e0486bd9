"""Exported models compute in stock transformers what ours compute; others are refused with the reason."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from megatron.config.sections import ModelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.convert.huggingface import extra_rows, family_of, hugging_face_config, hugging_face_model
from megatron.errors import ConfigurationError
from megatron.model.initialise import initialise
from megatron.model.transformer import Transformer

MODELS = {
    "tied": {},
    "untied": {"untie_embeddings_and_output_weights": True},
    "grouped": {"group_query_attention": True, "num_query_groups": 2},
    "free head width": {"kv_channels": 10, "group_query_attention": True, "num_query_groups": 1},
    "biases": {"add_bias_linear": True, "untie_embeddings_and_output_weights": True},
    "QK-norm": {"qk_layernorm": True, "norm_epsilon": 1e-3, "kv_channels": 6},
    "QK-norm, odd width": {"qk_layernorm": True, "num_attention_heads": 3, "kv_channels": 10},
    "CompleteP": {"parametrization": "completep", "base_hidden_size": 12, "base_num_layers": 1, "base_kv_channels": 3},
    "muP, QK-norm": {"parametrization": "mup", "base_hidden_size": 12, "base_kv_channels": 3, "qk_layernorm": True},
    "CompleteP, biases": {
        **{"parametrization": "completep", "base_hidden_size": 12, "base_num_layers": 1, "base_kv_channels": 3},
        **{"add_bias_linear": True, "untie_embeddings_and_output_weights": True},
    },
}
CLASSES = {True: "EuroBertForMaskedLM", False: "LlamaForCausalLM"}


def nontrivial_model(vocabulary_size: int = 97, **settings) -> Transformer:
    """Return a model with nontrivial values in all parameters, including norms and biases."""
    config = ModelConfig(
        **{"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "rotary_base": 5000.0, **settings}
    )
    model = Transformer(config, Vocabulary(vocabulary_size))
    initialise(model, config, seed=3)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


CASES = [(name, masked, 97) for name in MODELS for masked in (False, True) if not (masked and "QK" in name)]
# with 127 ids [MASK] is the last row of 128; with 128 ids it is the first row of the second 128
CASES += [(name, masked, size) for name in ("tied", "untied") for masked in (False, True) for size in (127, 128)]


@pytest.mark.parametrize("name, masked, size", CASES)
@torch.no_grad()
def test_logits_survive_the_disk(name, masked, size, tmp_path):
    model = nontrivial_model(size, **MODELS[name])
    num_rows = size + int(masked)
    config = hugging_face_config(model.config, vocabulary_rows=num_rows, max_positions=24, bidirectional=masked)
    hugging_face_model(model, config).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    # transformers before 5 reads only rope_theta, and defaults to 10000
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == model.config.rotary_base == 5000.0
    theirs = (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_pretrained(tmp_path)
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if model.config.qk_layernorm else CLASSES[masked])
    tokens = torch.randint(num_rows, (2, 24), generator=torch.Generator().manual_seed(1))
    logits = theirs(tokens).logits
    assert logits.shape[-1] == num_rows
    torch.testing.assert_close(logits[..., :size], model.logits(tokens, causal=not masked), rtol=1e-5, atol=1e-5)
    # the extra rows complete embedding and head, bit for bit
    extra = extra_rows(model, num_rows)
    table = torch.cat([theirs.get_input_embeddings().weight, extra["embed_tokens.weight"]])
    assert torch.equal(table, model.embed_tokens.weight)
    assert ("lm_head.weight" in extra) == model.config.untie_embeddings_and_output_weights
    head = [theirs.get_output_embeddings().weight, extra.get("lm_head.weight", extra["embed_tokens.weight"])]
    assert torch.equal(torch.cat(head), model.lm_weight())


@torch.no_grad()
def test_a_wrong_reading_would_be_noticed():
    """The comparison can fail: another attention direction, rotary base or epsilon exceeds its tolerance."""
    model = nontrivial_model()
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    settings = {"vocabulary_rows": 97, "max_positions": 24}
    right = hugging_face_config(model.config, **settings)
    wrong_base, wrong_epsilon = (hugging_face_config(model.config, **settings) for _ in range(2))
    wrong_base.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    wrong_epsilon.rms_norm_eps = 1e-3
    for config in (wrong_base, wrong_epsilon, hugging_face_config(model.config, **settings, bidirectional=True)):
        logits = hugging_face_model(model, config)(tokens).logits
        assert (logits - model.logits(tokens, causal=True)).abs().max() > 1e-3
    assert (hugging_face_model(model, right)(tokens).logits - model.logits(tokens, causal=True)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "settings, masked, message",
    [
        ({"normalization": "layernorm"}, False, "--normalization layernorm: the transformers classes"),
        ({"swiglu": False}, False, "--no-swiglu: the transformers classes"),
        ({"add_bias_linear": True, "qk_layernorm": True}, False, "--add-bias-linear: "),
        ({"qk_layernorm": True}, True, "--qk-layernorm: EuroBertForMaskedLM"),
        ({"num_attention_heads": 3, "kv_channels": 10}, False, "--num-attention-heads 3: does not divide"),
        ({"num_attention_heads": 3, "kv_channels": 10}, True, "--num-attention-heads 3: does not divide"),
    ],
)
def test_what_stock_classes_cannot_express_is_refused(settings, masked, message):
    config = ModelConfig(**{"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, **settings})
    with pytest.raises(ConfigurationError) as caught:
        family_of(config, masked)
    assert str(caught.value).startswith(message) and "cannot be exported" in str(caught.value)


def test_transformers_itself_refuses_heads_that_do_not_divide_the_width():
    """The reason in our message is true; if this test fails, the refusal can be removed."""
    from huggingface_hub.errors import StrictDataclassClassValidationError
    from transformers import LlamaConfig

    with pytest.raises(StrictDataclassClassValidationError, match="not a multiple"):
        LlamaConfig(hidden_size=32, num_attention_heads=3, head_dim=10)
