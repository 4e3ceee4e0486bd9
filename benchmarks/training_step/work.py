"""The work of a training step of the benchmark model: FLOPs, matrix products by shape, memory traffic in bytes.

A block in a loop works once for each of its uses.
"""

from collections.abc import Iterator

from benchmarks.training_step.implementations import Shape
from megatron.config.sizes import block_shapes, flops_per_token, parameter_count

BEFORE_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def palm_flops(shape: Shape) -> float:
    """Return 6N + 12LHQT, the FLOPs per token in the convention of most published tables (PaLM, 2204.02311, B).

    The embedding counts once, attention is not halved for causal masks, the head runs at every position.
    """
    model = shape.model.unrolled
    attention = 12 * model.num_layers * model.num_attention_heads * model.head_size * shape.seq_length
    return flops_per_token(model, shape.vocabulary, shape.seq_length)["6nd"] + attention


def required_flops(shape: Shape, positions: int, num_scored: float, causal: bool) -> float:
    """Return the FLOPs that a micro-batch requires, without recomputation and without outputs that are never used.

    `positions` counts all positions of the micro-batch, `num_scored` the scored ones.
    """
    products = sum(6 * count * inputs * outputs for count, inputs, outputs in linears(shape, positions, num_scored))
    return products + attention_flops(shape, positions, causal)


def linears(shape: Shape, positions: int, num_scored: float) -> Iterator[tuple[float, int, int]]:
    """Yield (positions, inputs, outputs) of the linear layers, the head last.

    The head, and in the last block the layers after attention, run at the `num_scored` scored positions only.
    """
    for layer in range(shape.model.depth):
        for name, sizes in block_shapes(shape.model).items():
            if len(sizes) == 2:
                scored_only = layer == shape.model.depth - 1 and not name.startswith(BEFORE_ATTENTION)
                yield num_scored if scored_only else positions, sizes[1], sizes[0]
    yield num_scored, shape.model.hidden_size, shape.vocabulary.padded_size


def attention_flops(shape: Shape, positions: int, causal: bool) -> float:
    """Return the FLOPs of the two attention products and their gradients in all blocks; causal attention takes half."""
    model = shape.model
    full = 12.0 * model.num_attention_heads * model.head_size * shape.seq_length * positions
    return model.depth * full / (2 if causal else 1)


def bytes_moved(shape: Shape, positions: int, num_scored: float, micro_batches: int) -> float:
    """Return the bytes that a step moves outside its matrix products and attention, with every fusible op fused.

    1. Per position and block, in bf16 elements: a norm fused with the residual addition before it reads two vectors
       and writes two, its gradient reads three and writes one. The rotary embedding reads and writes queries and keys,
       in both passes. SwiGLU reads two vectors and writes one, its gradient reads three and writes two.
    2. The final norm is one more norm, at scored positions. The softmax of the head reads the logits twice and
       overwrites them once.
    3. Per parameter and micro-batch: a bf16 gradient is added to an fp32 one (6 bytes); those of further uses of a
       block in a loop are added to it before, in bf16 (6).
    4. Per parameter and step: the gradient norm reads all gradients (4), AdamW reads four values and writes three
       (28), and the weights are cast to bf16 (6).
    """
    model = shape.model.unrolled
    heads = (model.num_attention_heads + model.key_value_heads) * model.head_size
    # elements per position
    norm = 8 * model.hidden_size
    rotary = 4 * heads
    swiglu = 8 * model.mlp_size
    before_attention = norm + rotary
    after_attention = norm + swiglu  # in the last block at scored positions only
    activations = (
        model.num_layers * positions * before_attention
        + ((model.num_layers - 1) * positions + num_scored) * after_attention
        + num_scored * norm
    )
    head = 3 * num_scored * shape.vocabulary.padded_size
    accumulated = 6 * micro_batches * parameter_count(model, shape.vocabulary)
    updated = (4 + 28 + 6) * parameter_count(shape.model, shape.vocabulary)
    return 2 * micro_batches * (activations + head) + accumulated + updated
