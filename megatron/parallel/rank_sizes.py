"""Sizes of a rank's weights, gradients, activations and buffers, for the estimate of its peak memory.

Weights, gradients and optimizer states follow from the shapes of the parameters and from how FSDP2 shards them;
activations from what autograd saves for each operator of `megatron/model`, counted as by Korthikanti et al., Reducing
Activation Recomputation in Large Transformer Models (2205.05198), section 4; here attention saves no [S, S] matrix and
the head no logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron.config.capabilities import Capabilities, mask_flags
from megatron.config.layout_checks import layers_of
from megatron.config.sections import Config, ModelConfig
from megatron.config.sizes import block_shapes
from megatron.config.vocabulary import Vocabulary
from megatron.model.attention import needs_equal_heads
from megatron.parallel.apply import is_one_group
from megatron.parallel.tensor import REPLACEMENTS

FP32 = 4  # bytes
# as in megatron/model/linear_cross_entropy.py: positions per chunk of logits, of teachers' logits, and elements in fp32
HEAD_POSITIONS = {"cpu": 256, "cuda": 9216}
TEACHER_POSITIONS = {"cpu": 256, "cuda": 1024}
HEAD_ELEMENTS = {"cpu": 800_000}
HEAD_IN_PLACE = {"cuda"}  # kernels need no fp32 copy of logits
ACTIVE_CHUNKS = 3  # whole stages that torch's interleaved 1F1B lets a rank hold


@dataclass(frozen=True)
class _Elements:
    """Elements of some parameters on a rank: gathered, and of its shard. FSDP2 pads dim 0 to a multiple of shards."""

    gathered: int = 0
    shard: int = 0

    def __add__(self, other: "_Elements") -> "_Elements":
        return _Elements(self.gathered + other.gathered, self.shard + other.shard)

    def __mul__(self, count: int) -> "_Elements":
        return _Elements(self.gathered * count, self.shard * count)


def _elements(shapes: list[tuple[int, ...]], num_shards: int) -> _Elements:
    total = _Elements()
    for rows, *columns in shapes:
        shard = -(-rows // num_shards) * (columns[0] if columns else 1)
        total += _Elements(shard * num_shards, shard)
    return total


def _shard_shape(name: str, shape: tuple[int, ...], tp_size: int) -> tuple[int, ...]:
    """Return the shape of a block's parameter on each of `tp_size` tensor-parallel ranks."""
    layer, kind = name.split(".")[-2:]
    placement = REPLACEMENTS[layer].placements[kind]
    return tuple(size // tp_size if placement.is_shard(dim) else size for dim, size in enumerate(shape))


class RankSizes:
    """The sizes of one rank of a layout, in bytes unless a name or a comment says otherwise.

    `num_done` uses of blocks in a chunk, counted from its end, have finished their backward pass; without loops every
    block has one use. `accumulated`: gradients of earlier micro-batches of the step exist already. A `chunk` is a
    virtual pipeline stage; with loops every chunk of the rank counts as the one with the most uses.
    """

    def __init__(
        self,
        config: Config,
        vocabulary: Vocabulary,
        capabilities: Capabilities,
        *,
        world_size: int,
        precision: str,
        device: str,
        stage: int,
        teachers: Sequence[ModelConfig] = (),
    ):
        model, parallel, training = config.model, config.parallel, config.training
        self.model = model
        self.parallel = parallel
        self.device = device
        self.stage = stage
        self.size = {"bf16": 2, "fp32": 4}[precision]  # of an element in the compute dtype
        self.resident = 0 if parallel.cpu_offload else FP32  # of an element of a shard, on the device
        self.tp_size = parallel.tensor_model_parallel_size
        self.num_stages = parallel.pipeline_model_parallel_size
        self.is_first = stage == 0
        self.is_last = stage == self.num_stages - 1
        self.num_chunks = parallel.chunks(model.num_layers)
        self.num_layers, self.uses = self._chunk()
        data_size = parallel.data_size(world_size)
        self.micro_batches = training.global_batch_size // (training.micro_batch_size * data_size)

        num_shards = data_size // parallel.replicas(data_size)
        self.is_sharded = num_shards > 1
        self.vocabulary_shard = -(-vocabulary.padded_size // self.tp_size)
        self.table = self.vocabulary_shard * model.hidden_size  # elements of embedding or head
        shapes = [_shard_shape(*item, self.tp_size) for item in block_shapes(model).items()]
        self.block = _elements(shapes, num_shards)
        self.root = _elements(self._root_shapes(), num_shards)
        self.parameters = self.block * (self.num_layers * self.num_chunks) + self.root
        self.one_group = is_one_group(self.parameters.gathered, world_size, parallel)
        self.state_elements = 2 * self.parameters.shard  # of the optimizer
        if config.optimizer.optimizer == "muon":
            matrices = [shape for shape in shapes if len(shape) == 2]
            self.state_elements -= _elements(matrices, num_shards).shard * self.num_layers * self.num_chunks
        self.state_elements += self.parameters.shard * config.optimizer.averages
        self.moves_weights = config.optimizer.meta_gradient_norm is not None

        self.seq_length = config.data.seq_length * capabilities.positions_per_token
        self.tokens = training.micro_batch_size * self.seq_length
        self.shard_tokens = self.tokens // self.tp_size  # between layers
        self.hidden_shard = self.size * self.shard_tokens * model.hidden_size  # hidden states [B, S/tp, H]
        self.hidden = self.size * self.tokens * model.hidden_size  # hidden states [B, S, H]
        self.queries = self.tokens * model.num_attention_heads // self.tp_size * model.head_size  # elements
        self.keys = self.tokens * model.key_value_heads // self.tp_size * model.head_size
        # of the keys that attention stores, and of its values
        self.attended_keys = self.queries if self._repeats_heads(config, capabilities) else self.keys
        self.mlp = self.tokens * model.mlp_size // self.tp_size
        self.teachers = teachers
        shards = num_shards if parallel.fsdp_stage == 3 else 1
        self.teacher_weights = self.size * sum(self._teacher_elements(teacher, shards) for teacher in teachers)
        self.saved_per_use = [self._saved_by_layer(layer) for layer in self.uses]

    def _chunk(self) -> tuple[int, list[int]]:
        """Return the layers of a chunk, and the block of every use, in the order of computation."""
        count, schedule = self.num_stages * self.num_chunks, self.model.schedule
        indices = range(self.stage, count, self.num_stages)
        chunks = [layers_of(index, count, self.model.num_layers) for index in indices]
        uses = [[layer - chunk.start for layer in schedule if layer in chunk] for chunk in chunks]
        return len(chunks[0]), max(uses, key=len)

    def _root_shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the parameters outside blocks; tied weights exist at both ends of a pipeline."""
        is_untied = self.model.untie_embeddings_and_output_weights
        tables = [(self.vocabulary_shard, self.model.hidden_size)] * self.is_first  # the embedding
        if self.is_last and (is_untied or not self.is_first):
            tables.append((self.vocabulary_shard, self.model.hidden_size))
        norm = [(self.model.hidden_size,)] * (1 if self.model.normalization == "rmsnorm" else 2)
        return tables + norm if self.is_last else tables

    def _teacher_elements(self, model: ModelConfig, num_shards: int) -> int:
        """Return the elements of a teacher on this rank: shards of its blocks, and all parameters outside them."""
        blocks = _elements([_shard_shape(*item, self.tp_size) for item in block_shapes(model).items()], num_shards)
        tables = 2 if model.untie_embeddings_and_output_weights else 1
        norms = 1 if model.normalization == "rmsnorm" else 2
        return blocks.shard * model.num_layers + (tables * self.vocabulary_shard + norms) * model.hidden_size

    def _repeats_heads(self, config: Config, capabilities: Capabilities) -> bool:
        dtype = {2: torch.bfloat16, FP32: torch.float32}[self.size]
        return needs_equal_heads(self.device, dtype, bool(mask_flags(config, capabilities)))

    @property
    def in_flight(self) -> int:
        """Micro-batches x chunks that have finished their forward pass when the first backward pass starts."""
        if self.num_chunks == 1:
            return min(self.micro_batches, self.num_stages - self.stage)
        round_size = self.micro_batches // max(1, self.micro_batches // self.num_stages)
        warm_up = (self.num_chunks - 1) * round_size + 2 * (self.num_stages - 1 - self.stage)
        return min(warm_up + 1, self.micro_batches * self.num_chunks)

    # ------------------------------------------------------------------ weights and gradients

    def blocks_begun(self, num_done: int) -> int:
        """Return how many blocks have a use among the `num_done` that are done."""
        return len(set(self.uses[len(self.uses) - num_done :]))

    def blocks_done(self, num_done: int) -> int:
        """Return how many blocks have all their uses among the `num_done` that are done."""
        return self.num_layers - len(set(self.uses[: len(self.uses) - num_done]))

    @property
    def reduces_every_micro_batch(self) -> bool:
        """Whether gradients are reduced after every micro-batch; a pipeline and one group are reduced once per step."""
        return self.num_stages == 1 and self.parallel.fsdp_stage >= 2 and not self.one_group

    def reduces(self, accumulated: bool) -> bool:
        """Return whether a backward pass reduces gradients block by block: the only one, the last one, or every one."""
        return (
            self.num_stages == 1
            and not self.one_group
            and (accumulated or self.micro_batches == 1 or self.reduces_every_micro_batch)
        )

    def in_one_group(self, elements: _Elements, accumulated: bool) -> int:
        """Return the gradients of `elements` before the reduction: new ones, and in fp32 those of earlier passes."""
        if accumulated and self.size == FP32:
            return FP32 * elements.gathered  # new ones are added to them at once
        return (self.size + (FP32 if accumulated else 0)) * elements.gathered

    def compute_weights(self, in_flight: int, accumulated: bool, num_done: int | None) -> int:
        """Return the gathered weights: of all blocks, of those still to come, or at ZeRO stage 3 of the current one."""
        gathered_blocks = self.num_layers * self.num_chunks
        is_zero3 = self.parallel.fsdp_stage == 3
        if self.num_stages == 1:
            if is_zero3:
                gathered_blocks = 0 if num_done is None else 1
            elif not self.one_group and (accumulated or self.micro_batches == 1):
                gathered_blocks -= self.blocks_begun(num_done or 0)  # gathered again for the next use
        elif self.num_chunks > 1:
            gathered_blocks = min(self.num_chunks, ACTIVE_CHUNKS) * self.num_layers
        elif is_zero3 and in_flight == self.in_flight:
            # in a pipeline the forward pass frees a block after use, the backward pass does not
            gathered_blocks = 0 if num_done is None else min(1 + self.blocks_begun(num_done), gathered_blocks)
        return self.size * (self.root.gathered + self.block.gathered * gathered_blocks)

    @property
    def gather_buffer(self) -> int:
        """The all-gather buffer of one block, before it is copied into the parameters."""
        return self.size * self.block.gathered if self.is_sharded else 0

    @property
    def head_gradient(self) -> int:
        """The gradient of the head's weight, from the head's backward pass to the end."""
        return self.size * self.table if self.is_last else 0

    # ------------------------------------------------------------------ activations

    def _saved(self) -> int:
        """Return what autograd saves for a block, with its input if the first norm saves it."""
        model = self.model
        heads, groups = self.queries // model.head_size, self.keys // model.head_size  # x tokens
        hidden_elements = self.shard_tokens * model.hidden_size
        saved = 2 * self._norm(hidden_elements, self.shard_tokens) + 2 * self.hidden  # and inputs of the projections
        saved += (
            self.size * (2 * self.queries + 2 * self.attended_keys) + FP32 * heads
        )  # q, k, v, output and log-sum-exp
        if model.qk_layernorm:
            saved += self._norm(self.queries, heads) + self._norm(self.keys, groups)
        saved += self.size * (4 if model.swiglu else 2) * self.mlp  # gate, silu(gate), up, product; or up, gelu(up)
        saved += 2 * self._dropout(model.hidden_dropout, hidden_elements)
        return saved + self._dropout(model.mlp_dropout, self.mlp)

    def _norm(self, elements: int, vectors: int) -> int:
        """Return what autograd saves for a norm of `elements` elements in `vectors` vectors."""
        if self.model.normalization == "layernorm":
            return self.size * elements + 2 * FP32 * vectors
        if self.device == "cpu":  # several small operators there
            return 2 * FP32 * elements + FP32 * vectors
        return self.size * elements + FP32 * vectors

    @property
    def norm_saves_input(self) -> bool:
        """Whether a norm saves its input itself, which then costs nothing elsewhere."""
        return self.model.normalization == "layernorm" or self.device != "cpu"

    def _dropout(self, probability: float, elements: int) -> int:
        if not probability:
            return 0
        return elements if self.device == "cuda" else self.size * elements

    def _saved_by_layer(self, layer: int) -> int:
        """Return what a block of a chunk stores from its forward to its backward pass."""
        limit = self.parallel.recompute_num_layers
        if self.parallel.recompute_granularity is None or (limit is not None and layer >= limit):
            return self._saved()
        if self.parallel.recompute_granularity == "full":
            return self.hidden_shard
        # megatron/parallel/recompute.py stores the outputs of matrix products and of attention
        products = 2 * self.queries + 2 * self.keys + (2 if self.model.swiglu else 1) * self.mlp
        log_sums = FP32 * self.queries // self.model.head_size
        return self.hidden_shard + self.size * products + 2 * self.hidden + log_sums

    def in_backward(self, use: int) -> int:
        """Return the activations of a block in the backward pass of a use, after recomputation."""
        stored, saved = self.saved_per_use[use], self._saved()
        return saved if stored == saved or self.norm_saves_input else saved + self.hidden_shard

    @property
    def backward_workspace(self) -> int:
        """The gradients at the peak of an MLP's backward pass: of gate and up, of the output, of one weight."""
        branches = self.size * (2 if self.model.swiglu else 1) * self.mlp
        weight = self.size * self.model.mlp_size // self.tp_size * self.model.hidden_size
        gathered = self.hidden if self.tp_size > 1 else 0
        return branches + self.hidden_shard + gathered + weight

    def chunk(self, num_done: int = 0) -> int:
        """Return the activations of one micro-batch in a chunk with `num_done` uses done."""
        stored = sum(self.saved_per_use[: len(self.uses) - num_done])
        stored += 2 * FP32 * self.seq_length * self.model.head_size  # the rotary table
        if self.is_last and num_done == 0:
            stored += self._norm(self.shard_tokens * self.model.hidden_size, self.shard_tokens)
        sends_output = self.num_stages > 1 and (not self.is_last or self.num_chunks > 1)
        return stored + self.hidden_shard if sends_output else stored  # the output, until the backward pass

    def head(self) -> int:
        """Return the workspace of the fused head and loss: the maximum of both passes."""
        positions, width = HEAD_POSITIONS[self.device], self.model.hidden_size
        logits, weight = positions * self.vocabulary_shard, self.table
        fp32_elements = self._fp32_elements(logits + weight)
        needs_copy = self.size != FP32 and self.device not in HEAD_IN_PLACE
        fp32_logits = FP32 * min(logits, fp32_elements) if needs_copy else 0
        forward = (
            max(fp32_logits, self._teacher_slice())
            + self.size * (logits + weight + 2 * positions * width)
            + FP32 * weight
            + 2 * self.hidden
            + self.size * self.tokens * sum(teacher.hidden_size for teacher in self.teachers)
        )
        scaled = FP32 * max(min(weight, fp32_elements), self.tokens * width)
        backward = scaled + (FP32 + self.size) * weight + self.hidden
        return max(forward, backward)

    def _fp32_elements(self, elements: int) -> int:
        """Return how many of `elements` exist in fp32 at a time, where a whole head computes in slices."""
        return min(elements, HEAD_ELEMENTS.get(self.device, elements)) if self.tp_size == 1 else elements

    def _teacher_slice(self) -> int:
        """Return the workspace of the divergence from the teachers: their logits, and both sides' probabilities."""
        if not self.teachers:
            return 0
        logits = TEACHER_POSITIONS[self.device] * self.vocabulary_shard
        return self.size * len(self.teachers) * logits + 4 * FP32 * self._fp32_elements(logits)

    # ------------------------------------------------------------------ between stages

    @property
    def pipeline_buffers(self) -> int:
        """The receive buffers of torch's stages: one per micro-batch and neighbour that sends.

        Interleaved 1F1B waits for its sends at the end of the step only, so sent tensors stay alive too.
        """
        if self.num_stages == 1:
            return 0
        forward = self.num_chunks - self.is_last  # chunks here that send hidden states
        backward = self.num_chunks - self.is_first  # chunks here that send gradients
        buffers = self.micro_batches * (forward + backward)
        if self.num_chunks > 1:
            num_backward = self.micro_batches * self.num_chunks - self.in_flight
            buffers += (
                max(0, self.micro_batches * forward - self.in_flight) + num_backward * backward // self.num_chunks
            )
        return buffers * self.hidden_shard
