"""Parameter counts, in one place."""

from megatron.config.sections import ModelConfig, Vocabulary


def parameter_count(model: ModelConfig, vocabulary: Vocabulary) -> int:
    """Return N: every parameter of the model, the embedding (padded rows included) counted once."""
    width, head = model.hidden_size, model.head_size
    query, key_value = model.num_attention_heads * head, model.key_value_heads * head
    vectors = 1 if model.normalization == "rmsnorm" else 2  # of one norm
    block = 2 * width * query + 2 * width * key_value  # q and o, k and v
    block += (3 if model.swiglu else 2) * width * model.mlp_size
    block += 2 * vectors * width
    if model.qk_layernorm:
        block += 2 * vectors * head
    if model.add_bias_linear:
        block += query + 2 * key_value + width  # q, k, v, o
        block += (2 if model.swiglu else 1) * model.mlp_size + width  # up (and gate), down
    tables = 2 if model.untie_embeddings_and_output_weights else 1
    return model.num_layers * block + vectors * width + tables * vocabulary.padded_size * width
