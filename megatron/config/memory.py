"""Peak memory of a rank, by formula: a sum for each moment of a training step that may be the peak.

Weights, gradients and optimizer states follow from the shapes of the parameters and from how FSDP2 shards them;
activations from what autograd saves for each operator of `megatron/model`. The largest sum is the peak. Sizes are bytes
of live tensors, for uncompiled blocks (compiled blocks save fewer activations). CUDA, NCCL and the fragmentation of the
allocator come on top.

    forward pass, head  | backward of the last block ... of the first  | reduction of the embedding | update
    activations grow    | activations are freed, gradients appear      | (and of the head, if tied) |

`benchmarks/memory.py` compares this with measured peaks, for FSDP2 and the pipeline schedules of torch 2.13.
Activations are counted as by Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models
(2205.05198), section 4; here attention saves no [S, S] matrix and the head no logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from megatron.config.capabilities import Capabilities
from megatron.config.sections import Config, Vocabulary
from megatron.config.sizes import COLUMNS, ROWS, block_shapes, layers_of

FP32 = 4  # bytes
BATCH_BYTES = 28  # per token of a micro-batch: ids, targets and scored positions int64, weights fp32
# as in megatron/model/linear_cross_entropy.py: positions per chunk of logits, and elements in fp32 at a time
HEAD_POSITIONS = {"cpu": 256, "cuda": 8192}
HEAD_ELEMENTS = {"cpu": 800_000}
HEAD_IN_PLACE = {"cuda"}  # kernels need no fp32 copy of logits
ACTIVE_CHUNKS = 3  # whole stages that torch's interleaved 1F1B lets a rank hold


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a rank at its peak, on its device except `host`."""

    stage: int  # pipeline rank, from 0
    moment: str
    master_weights: int  # fp32, this rank's shard
    optimizer_states: int  # of this rank's shard: two moments of AdamW, one of Muon, and averaged weights
    gradients: int  # shards, and what is not reduced yet
    compute_weights: int  # weights gathered by FSDP2, in the compute dtype
    activations: int
    head: int  # workspace of head and loss
    communication: int  # buffers of FSDP2's all-gathers and reduce-scatters, and of what a pipeline receives
    host: int  # in the host's memory, with --cpu-offload

    @property
    def parts(self) -> dict[str, int]:
        """The bytes on the device by kind."""
        names = [field.name for field in fields(self) if field.name not in ("stage", "moment", "host")]
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """The bytes on the device."""
        return sum(self.parts.values())


def memory_per_process(
    config: Config,
    vocabulary: Vocabulary,
    capabilities: Capabilities,
    *,
    world_size: int,
    precision: str,
    device: str = "cuda",
) -> Memory:
    """Return the peak memory of the rank that needs most; the layout must have passed `check_layout`.

    `capabilities` are those of the objective, `precision` is "bf16" or "fp32". On a CPU, where the formula is measured,
    RMSNorm saves fp32 copies and the head uses smaller chunks.
    """
    num_stages = config.parallel.pipeline_model_parallel_size
    shape = (config, vocabulary, capabilities.positions_per_token)
    ranks = [
        _Rank(*shape, world_size=world_size, precision=precision, device=device, stage=stage)
        for stage in range(num_stages)
    ]
    return max((memory for rank in ranks for memory in rank.moments()), key=lambda memory: memory.total)


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
    if layer in COLUMNS:
        return (shape[0] // tp_size, *shape[1:])
    return (shape[0], shape[1] // tp_size) if layer in ROWS and kind == "weight" else shape


class _Rank:
    """One rank of a layout and its memory of each kind, in bytes unless a name or a comment says otherwise.

    `num_done` blocks of a chunk, counted from its end, have finished their backward pass. `accumulated`: gradients of
    earlier micro-batches of the step exist already. A `chunk` is a virtual pipeline stage.
    """

    def __init__(
        self,
        config: Config,
        vocabulary: Vocabulary,
        positions_per_token: int,
        *,
        world_size: int,
        precision: str,
        device: str,
        stage: int,
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
        self.num_layers = len(layers_of(stage, self.num_stages * self.num_chunks, model.num_layers))  # of one chunk
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
        self.state_elements = 2 * self.parameters.shard  # of the optimizer
        if config.optimizer.optimizer == "muon":
            matrices = [shape for shape in shapes if len(shape) == 2]
            self.state_elements -= _elements(matrices, num_shards).shard * self.num_layers * self.num_chunks
        self.state_elements += self.parameters.shard * config.optimizer.averages

        self.seq_length = config.data.seq_length * positions_per_token
        self.tokens = training.micro_batch_size * self.seq_length
        self.shard_tokens = self.tokens // self.tp_size  # between layers
        self.hidden_shard = self.size * self.shard_tokens * model.hidden_size  # hidden states [B, S/tp, H]
        self.hidden = self.size * self.tokens * model.hidden_size  # hidden states [B, S, H]
        self.queries = self.tokens * model.num_attention_heads // self.tp_size * model.head_size  # elements
        self.keys = self.tokens * model.key_value_heads // self.tp_size * model.head_size
        self.mlp = self.tokens * model.mlp_size // self.tp_size
        self.saved_per_layer = [self._saved_by_layer(layer) for layer in range(self.num_layers)]

    def _root_shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the parameters outside blocks; tied weights exist at both ends of a pipeline."""
        is_untied = self.model.untie_embeddings_and_output_weights
        tables = [(self.vocabulary_shard, self.model.hidden_size)] * self.is_first  # the embedding
        if self.is_last and (is_untied or not self.is_first):
            tables.append((self.vocabulary_shard, self.model.hidden_size))
        norm = [(self.model.hidden_size,)] * (1 if self.model.normalization == "rmsnorm" else 2)
        return tables + norm if self.is_last else tables

    def moments(self) -> Iterator[Memory]:
        """Yield candidate memory peaks, in bytes."""
        for in_flight, accumulated in self._passes():
            if self.is_last:
                yield self._at_head(in_flight, accumulated)
            for num_done in range(self.num_layers):
                yield self._within_block(in_flight, accumulated, num_done)
                yield self._after_block(in_flight, accumulated, num_done)
        yield from self._at_end()

    def _passes(self) -> list[tuple[int, bool]]:
        """Return the kinds of backward pass: (micro-batches x chunks in flight before it, accumulated)."""
        full, count = self.in_flight, self.micro_batches * self.num_chunks
        passes = [(full, False)]
        if count > full:
            passes.append((full, True))
        if full > 1:
            passes.append((full - 1, True))
        return passes

    @property
    def in_flight(self) -> int:
        """Micro-batches x chunks that have finished their forward pass when the first backward pass starts."""
        if self.num_chunks == 1:
            return min(self.micro_batches, self.num_stages - self.stage)
        round_size = self.micro_batches // max(1, self.micro_batches // self.num_stages)
        warm_up = (self.num_chunks - 1) * round_size + 2 * (self.num_stages - 1 - self.stage)
        return min(warm_up + 1, self.micro_batches * self.num_chunks)

    # ------------------------------------------------------------------ moments

    def _at_head(self, in_flight: int, accumulated: bool) -> Memory:
        """Return the memory while the loss is computed.

        If blocks had to be gathered for this forward pass, the buffer of the last all-gather still exists.
        """
        gathers = not accumulated or (self.parallel.fsdp_stage == 3 and self.num_stages == 1)
        buffer = self._gather_buffer if gathers else 0
        return self._memory("head", in_flight, accumulated, None, head=self._head(), communication=buffer)

    def _within_block(self, in_flight: int, accumulated: bool, num_done: int) -> Memory:
        """Return the memory during a block's backward pass, with all its activations, recomputed or saved."""
        layer = self.num_layers - 1 - num_done
        communication = 0
        if num_done > 0 and self._reduces(accumulated):
            communication += FP32 * self.block.gathered  # FSDP2 keeps the previous block's until then
        if self.parallel.fsdp_stage == 3:
            communication += self._gather_buffer  # prefetch of the next block
        return self._memory(
            f"backward of block {layer + 1} of {self.num_layers}",
            in_flight,
            accumulated,
            num_done,
            gradients=self._head_gradient,
            activations=self._in_backward(layer) - self.saved_per_layer[layer] + self._backward_workspace,
            communication=communication,
        )

    def _after_block(self, in_flight: int, accumulated: bool, num_done: int) -> Memory:
        """Return the memory after a block's backward pass.

        Its gradients are copied into an fp32 buffer and reduced, or accumulated.
        """
        gathered, shard = self.block.gathered, self.block.shard
        reduces = self._reduces(accumulated)
        if not reduces:
            unreduced = self.size * gathered if accumulated else 0
        elif accumulated and not self._reduces_every_micro_batch:
            unreduced = FP32 * gathered - self.resident * shard
        else:
            unreduced = max(0, self.size * gathered - self.resident * shard)
        return self._memory(
            f"reduction of block {self.num_layers - num_done} of {self.num_layers}",
            in_flight,
            accumulated,
            num_done + 1,
            gradients=self._head_gradient + unreduced,
            activations=self.hidden_shard,
            communication=FP32 * gathered if reduces else 0,
        )

    def _at_end(self) -> Iterator[Memory]:
        """Yield the memory when the parameters outside blocks, in a pipeline all, are reduced, and at the update."""
        has_fp32 = self.micro_batches > 1 and not self._reduces_every_micro_batch  # accumulated gradients, unsharded
        blocks = self.block * (self.num_layers * self.num_chunks)
        block_gradients = FP32 * blocks.gathered if self.num_stages > 1 else self.resident * blocks.shard
        root_gradients = FP32 * self.root.gathered if has_fp32 else 0
        if self._reduces_every_micro_batch and self.micro_batches > 1:
            root_gradients = self.resident * self.root.shard
        weights = self._compute_weights(1, True, self.num_layers)
        tables = 0  # gradients of embedding and head; with tied weights their sum as well
        if self.is_first:
            tables = 1
            if self.is_last:
                tables += 1 if self.model.untie_embeddings_and_output_weights else 2
        last_reduction = FP32 * self.block.gathered if self.num_stages == 1 else 0
        yield self._build(
            "gradient of the embedding",
            gradients=block_gradients + root_gradients + self.size * self.table * tables,
            compute_weights=weights,
            activations=self.hidden_shard,
            communication=last_reduction + self._pipeline_buffers,
        )
        unreduced = FP32 * self.root.gathered if has_fp32 else root_gradients + self.size * self.root.gathered
        yield self._build(
            "reduction of the embedding",
            gradients=block_gradients + max(unreduced, self.resident * self.root.shard),
            compute_weights=weights - self.size * self.root.gathered,
            communication=FP32 * self.root.gathered + self._pipeline_buffers,
        )
        shards = self.resident * self.parameters.shard
        yield self._build("update", gradients=shards, communication=self._pipeline_buffers)

    def _memory(self, moment: str, in_flight: int, accumulated: bool, num_done: int | None, **extra: int) -> Memory:
        """Return the memory at a moment of a backward pass, plus `extra`; `num_done` is None before the first block."""
        blocks_done = num_done or 0
        if not accumulated:
            per_block = self.resident * self.block.shard if self._reduces(False) else FP32 * self.block.gathered
            gradients = per_block * blocks_done
        elif self._reduces_every_micro_batch:
            gradients = self.resident * self.parameters.shard
        else:
            gradients = FP32 * self.parameters.gathered
            if self._reduces(True):
                gradients -= (FP32 * self.block.gathered - self.resident * self.block.shard) * blocks_done
        communication = self._pipeline_buffers
        if not self.is_first and self._norm_saves_input:
            communication -= in_flight * self.hidden_shard  # the first block's input is such a buffer
        batches = BATCH_BYTES * self.tokens * (self.micro_batches if self.num_stages > 1 else 1)
        activations = (in_flight - 1) * self._chunk() + self._chunk(blocks_done) + batches
        return self._build(
            moment,
            gradients=gradients + extra.get("gradients", 0),
            compute_weights=self._compute_weights(in_flight, accumulated, num_done),
            activations=activations + extra.get("activations", 0),
            head=extra.get("head", 0),
            communication=communication + extra.get("communication", 0),
        )

    def _build(self, moment: str, **sizes: int) -> Memory:
        shard = self.parameters.shard
        return Memory(
            stage=self.stage,
            moment=moment,
            master_weights=self.resident * shard,
            optimizer_states=self.resident * self.state_elements,
            host=(FP32 - self.resident) * (2 * shard + self.state_elements),
            **{"compute_weights": 0, "activations": 0, "head": 0, **sizes},
        )

    # ------------------------------------------------------------------ weights and gradients

    @property
    def _reduces_every_micro_batch(self) -> bool:
        """Whether gradients are reduced after every micro-batch; a pipeline reduces once per step."""
        return self.num_stages == 1 and self.parallel.fsdp_stage >= 2

    def _reduces(self, accumulated: bool) -> bool:
        """Return whether a backward pass reduces gradients block by block: the only one, the last one, or every one."""
        return self.num_stages == 1 and (accumulated or self.micro_batches == 1 or self._reduces_every_micro_batch)

    def _compute_weights(self, in_flight: int, accumulated: bool, num_done: int | None) -> int:
        """Return the gathered weights: of all blocks, of those still to come, or at ZeRO stage 3 of the current one."""
        gathered_blocks = self.num_layers * self.num_chunks
        is_zero3 = self.parallel.fsdp_stage == 3
        if self.num_stages == 1:
            if is_zero3:
                gathered_blocks = 0 if num_done is None else 1
            elif accumulated or self.micro_batches == 1:
                gathered_blocks -= num_done or 0
        elif self.num_chunks > 1:
            gathered_blocks = min(self.num_chunks, ACTIVE_CHUNKS) * self.num_layers
        elif is_zero3 and in_flight == self.in_flight:
            # in a pipeline the forward pass frees a block after use, the backward pass does not
            gathered_blocks = 0 if num_done is None else min(1 + num_done, gathered_blocks)
        return self.size * (self.root.gathered + self.block.gathered * gathered_blocks)

    @property
    def _gather_buffer(self) -> int:
        """The all-gather buffer of one block, before it is copied into the parameters."""
        return self.size * self.block.gathered if self.is_sharded else 0

    @property
    def _head_gradient(self) -> int:
        """The gradient of the head's weight, from the head's backward pass to the end."""
        return self.size * self.table if self.is_last else 0

    # ------------------------------------------------------------------ activations

    def _saved(self) -> int:
        """Return what autograd saves for a block, with its input if the first norm saves it."""
        model = self.model
        heads, groups = self.queries // model.head_size, self.keys // model.head_size  # x tokens
        hidden_elements = self.shard_tokens * model.hidden_size
        saved = 2 * self._norm(hidden_elements, self.shard_tokens) + 2 * self.hidden  # and inputs of the projections
        saved += self.size * (2 * self.queries + 2 * self.keys) + FP32 * heads  # q, k, v, output and log-sum-exp
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
    def _norm_saves_input(self) -> bool:
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

    def _in_backward(self, layer: int) -> int:
        """Return the activations of a block in its backward pass, after recomputation."""
        stored, saved = self.saved_per_layer[layer], self._saved()
        return saved if stored == saved or self._norm_saves_input else saved + self.hidden_shard

    @property
    def _backward_workspace(self) -> int:
        """The gradients at the peak of an MLP's backward pass: of gate and up, of the output, of one weight."""
        branches = self.size * (2 if self.model.swiglu else 1) * self.mlp
        weight = self.size * self.model.mlp_size // self.tp_size * self.model.hidden_size
        gathered = self.hidden if self.tp_size > 1 else 0
        return branches + self.hidden_shard + gathered + weight

    def _chunk(self, num_done: int = 0) -> int:
        """Return the activations of one micro-batch in a chunk with `num_done` blocks done."""
        stored = sum(self.saved_per_layer[: self.num_layers - num_done])
        stored += 2 * FP32 * self.seq_length * self.model.head_size  # the rotary table
        if self.is_last and num_done == 0:
            stored += self._norm(self.shard_tokens * self.model.hidden_size, self.shard_tokens)
        sends_output = self.num_stages > 1 and (not self.is_last or self.num_chunks > 1)
        return stored + self.hidden_shard if sends_output else stored  # the output, until the backward pass

    def _head(self) -> int:
        """Return the workspace of the fused head and loss: the maximum of both passes."""
        positions, width = HEAD_POSITIONS[self.device], self.model.hidden_size
        logits, weight = positions * self.vocabulary_shard, self.table
        fp32_elements = HEAD_ELEMENTS.get(self.device, logits + weight) if self.tp_size == 1 else logits + weight
        needs_copy = self.size != FP32 and self.device not in HEAD_IN_PLACE
        fp32_logits = FP32 * min(logits, fp32_elements) if needs_copy else 0
        forward = fp32_logits + self.size * (logits + weight + 2 * positions * width) + FP32 * weight + 2 * self.hidden
        scaled = FP32 * max(min(weight, fp32_elements), self.tokens * width)
        backward = scaled + (FP32 + self.size) * weight + self.hidden
        return max(forward, backward)

    # ------------------------------------------------------------------ between stages

    @property
    def _pipeline_buffers(self) -> int:
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
