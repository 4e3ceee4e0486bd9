"""The work of a training step of the benchmark's network: FLOPs, products by shape, bytes that have to move."""

from collections.abc import Iterator

from benchmarks.contestants import Shape
from megatron.config.sizes import block_shapes, flops_per_token, parameter_count

BEFORE_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def palm_flops(shape: Shape) -> float:
    """Return 6N + 12LHQT, the FLOPs of a token by the convention of most published tables (PaLM, 2204.02311, B).

    The embedding counts once, attention over the whole square, the head at every position.
    """
    model = shape.model
    attention = 12 * model.num_layers * model.num_attention_heads * model.head_size * shape.seq_length
    return flops_per_token(model, shape.vocabulary, shape.seq_length)["6nd"] + attention


def asked_flops(shape: Shape, positions: int, rows: float, causal: bool) -> float:
    """Return the FLOPs that a micro-batch asks for, recomputation and unread outputs left out."""
    products = sum(6 * count * inputs * outputs for count, inputs, outputs in linears(shape, positions, rows))
    return products + attention_flops(shape, positions, causal)


def linears(shape: Shape, positions: int, rows: float) -> Iterator[tuple[float, int, int]]:
    """Yield (rows, inputs, outputs) of the linear layers, the head last.

    The head, and in the last block what follows attention, is read at the `rows` scored positions only.
    """
    for layer in range(shape.model.num_layers):
        for name, sizes in block_shapes(shape.model).items():
            if len(sizes) == 2:
                unread = layer == shape.model.num_layers - 1 and not name.startswith(BEFORE_ATTENTION)
                yield rows if unread else positions, sizes[1], sizes[0]
    yield rows, shape.model.hidden_size, shape.vocabulary.padded_size


def attention_flops(shape: Shape, positions: int, causal: bool) -> float:
    """Return the FLOPs of the two products of attention and of their gradients, in all blocks; causal takes half."""
    model = shape.model
    square = 12.0 * model.num_attention_heads * model.head_size * shape.seq_length * positions
    return model.num_layers * square / (2 if causal else 1)


def bytes_moved(shape: Shape, positions: int, rows: float, micro_batches: int) -> float:
    """Return the bytes that a step moves outside of its matrix products and attention, if all that can be fused is.

    In bf16 numbers, by position and block: a norm together with the residual addition before it reads two vectors and
    writes two, and its gradient reads three and writes one; rotation reads and writes queries and keys, in both
    passes; SwiGLU reads two vectors and writes one, and its gradient reads three and writes two. The last norm is one
    more. The head's softmax reads logits twice and overwrites them once. By parameter and micro-batch, a bf16 gradient
    is added to an fp32 one (6 bytes); by parameter and step, the norm of all gradients reads them (4), AdamW reads
    four numbers and writes three (28), and weights are copied to bf16 (6).
    """
    model = shape.model
    heads = (model.num_attention_heads + model.key_value_heads) * model.head_size
    norm, rotation, swiglu = 8 * model.hidden_size, 4 * heads, 8 * model.mlp_size
    block = positions * (norm + rotation)
    finish = norm + swiglu
    activations = model.num_layers * block + ((model.num_layers - 1) * positions + rows) * finish + rows * norm
    head = 3 * rows * shape.vocabulary.padded_size
    per_parameter = 6 * micro_batches + 4 + 28 + 6
    return 2 * micro_batches * (activations + head) + per_parameter * parameter_count(model, shape.vocabulary)
