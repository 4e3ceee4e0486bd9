"""The memory of one process, by formula: what it holds at those moments of a step when it may hold most.

Weights, gradients and optimizer states follow from the shapes of the parameters and from how FSDP2 shards them;
activations from what autograd keeps of each operator of `megatron/model`. The moment with the largest sum is the
answer. Sizes are bytes of live tensors, for blocks that are not compiled (compiled ones keep fewer activations); what
CUDA, NCCL and the gaps of the allocator take comes on top.

    forward pass, head | backward of the last block ... of the first | reduction of the embedding | update
    activations pile up  they go, and gradients come                   (and the head, where it is tied)

`benchmarks/memory.py` compares this with measured peaks, for FSDP2 and the pipeline schedules of torch 2.13.
Activations are counted as by Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models
(2205.05198), section 4; here attention keeps no [S, S] matrix and the head no logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from megatron.config.sections import Config, Vocabulary
from megatron.config.sizes import COLUMNS, ROWS, block_shapes, layers_of

FP32 = 4  # bytes
BATCH_BYTES = 28  # of a token of a micro-batch: ids, targets and rows int64, weights fp32
# megatron/model/linear_cross_entropy.py: rows of one chunk of logits, and how many numbers of it are fp32 at a time
HEAD_ROWS = {"cpu": 256, "cuda": 8192}
HEAD_NUMBERS = {"cpu": 800_000}
HEAD_IN_PLACE = {"cuda"}  # where kernels need no fp32 copy of logits
ACTIVE_CHUNKS = 3  # whole stages that torch's interleaved 1F1B lets a process hold


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process at the moment when it holds most: on its device, but for `host`."""

    stage: int  # its place in the pipeline, from 0
    moment: str
    master_weights: int  # fp32, this process's shard
    optimizer_states: int  # two moments of AdamW, likewise; one of Muon; and averaged weights
    gradients: int  # shards, and what is not reduced yet
    compute_weights: int  # what FSDP2 has gathered, in the compute dtype
    activations: int
    head: int  # workspace of head and loss
    communication: int  # what FSDP2 gathers into and reduces from, and what a pipeline receives into
    host: int  # in the host's memory, with --cpu-offload

    @property
    def parts(self) -> dict[str, int]:
        names = [field.name for field in fields(self) if field.name not in ("stage", "moment", "host")]
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory_per_process(
    config: Config, vocabulary: Vocabulary, world_size: int, precision: str, device: str = "cuda"
) -> Memory:
    """Return the memory of that of `processes` processes which needs most; `check_layout` has accepted the layout.

    `precision` is "bf16" or "fp32". On a CPU, where the formula is measured, RMSNorm keeps fp32 copies and the head
    works in smaller pieces.
    """
    stages = config.parallel.pipeline_model_parallel_size
    places = [_Process(config, vocabulary, world_size, precision, device, place) for place in range(stages)]
    return max((memory for process in places for memory in process.moments()), key=lambda memory: memory.total)


@dataclass(frozen=True)
class _Numbers:
    """How many numbers some parameters have here: gathered, and the share that stays. FSDP2 pads to whole rows."""

    whole: int = 0
    shard: int = 0

    def __add__(self, other: "_Numbers") -> "_Numbers":
        return _Numbers(self.whole + other.whole, self.shard + other.shard)

    def __mul__(self, count: int) -> "_Numbers":
        return _Numbers(self.whole * count, self.shard * count)


def _numbers(shapes: list[tuple[int, ...]], shards: int) -> _Numbers:
    total = _Numbers()
    for rows, *columns in shapes:
        share = -(-rows // shards) * (columns[0] if columns else 1)
        total += _Numbers(share * shards, share)
    return total


def _part(name: str, shape: tuple[int, ...], tensor: int) -> tuple[int, ...]:
    """Return the shape that a parameter of a block has on one of `tensor` processes."""
    layer, kind = name.split(".")[-2:]
    if layer in COLUMNS:
        return (shape[0] // tensor, *shape[1:])
    return (shape[0], shape[1] // tensor) if layer in ROWS and kind == "weight" else shape


class _Process:
    """One process of a layout: what it holds of each kind, in bytes unless a name says otherwise.

    A micro-batch is "through" a block when its backward pass is; "accumulated" says that gradients of earlier
    micro-batches of the step are there already. `done` blocks of a chunk, from its end, are through.
    """

    def __init__(
        self, config: Config, vocabulary: Vocabulary, world_size: int, precision: str, device: str, place: int
    ):
        model, parallel, training = config.model, config.parallel, config.training
        self.model, self.parallel, self.device, self.place = model, parallel, device, place
        self.size = {"bf16": 2, "fp32": 4}[precision]  # of a number in the compute dtype
        self.resident = 0 if parallel.cpu_offload else FP32  # of a number of a shard, on the device
        self.tensor, self.stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        self.first, self.last = place == 0, place == self.stages - 1
        self.chunks = parallel.chunks(model.num_layers)
        self.layers = len(layers_of(place, self.stages * self.chunks, model.num_layers))  # of one chunk
        data_size = parallel.data_size(world_size)
        self.micro_batches = training.global_batch_size // (training.micro_batch_size * data_size)

        shards = data_size // parallel.replicas(data_size)
        self.shared = shards > 1
        self.table = -(-vocabulary.padded_size // self.tensor) * model.hidden_size  # numbers of embedding or head
        self.vocabulary_part = -(-vocabulary.padded_size // self.tensor)
        self.block = _numbers([_part(*item, self.tensor) for item in block_shapes(model).items()], shards)
        self.root = _numbers(self._root_shapes(), shards)
        self.parameters = self.block * (self.layers * self.chunks) + self.root
        self.moments_held = 2 * self.parameters.shard  # numbers
        if config.optimizer.optimizer == "muon":
            matrices = [_part(*item, self.tensor) for item in block_shapes(model).items() if len(item[1]) == 2]
            self.moments_held -= _numbers(matrices, shards).shard * self.layers * self.chunks
        self.moments_held += self.parameters.shard * config.optimizer.averages

        self.seq_length = config.objective.positions(config.data.seq_length)
        self.tokens = training.micro_batch_size * self.seq_length
        self.own_tokens = self.tokens // self.tensor  # between layers
        self.stream = self.size * self.own_tokens * model.hidden_size  # hidden states [B, S/tp, H]
        self.gathered = self.size * self.tokens * model.hidden_size  # hidden states [B, S, H]
        self.queries = self.tokens * model.num_attention_heads // self.tensor * model.head_size  # numbers
        self.keys = self.tokens * model.key_value_heads // self.tensor * model.head_size
        self.mlp = self.tokens * model.mlp_size // self.tensor
        self.kept = [self._kept(layer) for layer in range(self.layers)]

    def _root_shapes(self) -> list[tuple[int, ...]]:
        """The parameters outside blocks; tied ends of a pipeline have a copy of the table each."""
        untied = self.model.untie_embeddings_and_output_weights
        tables = max(self.first or self.last, self.first + self.last * untied)
        norm = [(self.model.hidden_size,)] * (1 if self.model.normalization == "rmsnorm" else 2)
        return [(self.vocabulary_part, self.model.hidden_size)] * tables + norm * self.last

    def moments(self) -> Iterator[Memory]:
        """Yield what is held at every moment that may be the worst."""
        for in_flight, accumulated in self._passes():
            if self.last:
                yield self._at_head(in_flight, accumulated)
            for done in range(self.layers):
                yield self._within_block(in_flight, accumulated, done)
                yield self._after_block(in_flight, accumulated, done)
        yield from self._at_end()

    def _passes(self) -> list[tuple[int, bool]]:
        """Return the kinds of backward pass: (micro-batches, times chunks, in flight before it, accumulated)."""
        full, count = self.in_flight, self.micro_batches * self.chunks
        return [(full, False)] + [(full, True)] * (count > full) + [(full - 1, True)] * (full > 1)

    @property
    def in_flight(self) -> int:
        """Micro-batches, times chunks, whose forward pass is over when the first backward pass begins."""
        if self.chunks == 1:
            return min(self.micro_batches, self.stages - self.place)
        a_round = self.micro_batches // max(1, self.micro_batches // self.stages)
        warm_up = (self.chunks - 1) * a_round + 2 * (self.stages - 1 - self.place)
        return min(warm_up + 1, self.micro_batches * self.chunks)

    # ------------------------------------------------------------------ moments

    def _at_head(self, in_flight: int, accumulated: bool) -> Memory:
        """The loss is computed. The last gathered block's buffer is there, where blocks had to be gathered."""
        fresh = not accumulated or (self.parallel.fsdp_stage == 3 and self.stages == 1)
        return self._memory("head", in_flight, accumulated, None, head=self._head(), communication=fresh * self._buffer)

    def _within_block(self, in_flight: int, accumulated: bool, done: int) -> Memory:
        """A block is at work on its backward pass: its activations are there, again where it recomputes."""
        layer, ahead = self.layers - 1 - done, self.parallel.fsdp_stage == 3
        previous = FP32 * self.block.whole * (done > 0) * self._reduces(accumulated)  # FSDP2 keeps it so long
        return self._memory(
            f"backward of block {layer + 1} of {self.layers}",
            in_flight,
            accumulated,
            done,
            gradients=self._head_gradient,
            activations=self._again(layer) - self.kept[layer] + self._backward_workspace,
            communication=previous + ahead * self._buffer,
        )

    def _after_block(self, in_flight: int, accumulated: bool, done: int) -> Memory:
        """A block is through: its gradients are copied into a buffer in fp32, and reduced; or they are kept."""
        whole, shard = self.block.whole, self.block.shard
        if not self._reduces(accumulated):
            waiting = self.size * whole * accumulated
        elif accumulated and not self._reduces_each:
            waiting = FP32 * whole - self.resident * shard
        else:
            waiting = max(0, self.size * whole - self.resident * shard)
        return self._memory(
            f"reduction of block {self.layers - done} of {self.layers}",
            in_flight,
            accumulated,
            done + 1,
            gradients=self._head_gradient + waiting,
            activations=self.stream,
            communication=FP32 * whole * self._reduces(accumulated),
        )

    def _at_end(self) -> Iterator[Memory]:
        """The parameters outside blocks are reduced, in a pipeline all are; and the optimizer updates."""
        whole = self.micro_batches > 1 and not self._reduces_each  # are there in fp32
        blocks = self.block * (self.layers * self.chunks)
        gradients = FP32 * blocks.whole if self.stages > 1 else self.resident * blocks.shard
        earlier = FP32 * self.root.whole if whole else 0
        if self._reduces_each and self.micro_batches > 1:
            earlier = self.resident * self.root.shard
        weights = self._compute_weights(1, True, self.layers)
        # its own and the head's; where these are one matrix, their sum as well
        tables = 1 + self.last * (1 if self.model.untie_embeddings_and_output_weights else 2)
        yield self._put_together(
            "gradient of the embedding",
            gradients=gradients + earlier + self.size * self.table * tables * self.first,
            compute_weights=weights,
            activations=self.stream,
            communication=FP32 * self.block.whole * (self.stages == 1) + self._passed_on,
        )
        waiting = FP32 * self.root.whole if whole else earlier + self.size * self.root.whole
        yield self._put_together(
            "reduction of the embedding",
            gradients=gradients + max(waiting, self.resident * self.root.shard),
            compute_weights=weights - self.size * self.root.whole,
            communication=FP32 * self.root.whole + self._passed_on,
        )
        shards = self.resident * self.parameters.shard
        yield self._put_together("update", gradients=shards, communication=self._passed_on)

    def _memory(self, moment: str, in_flight: int, accumulated: bool, done: int | None, **more: int) -> Memory:
        """Put a moment of a backward pass together; `done` None says that it has not begun, `more` comes on top."""
        through = done or 0
        if not accumulated:
            ready = self.resident * self.block.shard if self._reduces(False) else FP32 * self.block.whole
            gradients = ready * through
        elif self._reduces_each:
            gradients = self.resident * self.parameters.shard
        else:
            gradients = FP32 * self.parameters.whole
            if self._reduces(True):
                gradients -= (FP32 * self.block.whole - self.resident * self.block.shard) * through
        communication = self._passed_on
        if not self.first and self._norm_keeps_input:
            communication -= in_flight * self.stream  # the first block's input is such a buffer
        batches = BATCH_BYTES * self.tokens * (self.micro_batches if self.stages > 1 else 1)
        return self._put_together(
            moment,
            gradients=gradients + more.get("gradients", 0),
            compute_weights=self._compute_weights(in_flight, accumulated, done),
            activations=(in_flight - 1) * self._chunk() + self._chunk(through) + batches + more.get("activations", 0),
            head=more.get("head", 0),
            communication=communication + more.get("communication", 0),
        )

    def _put_together(self, moment: str, **parts: int) -> Memory:
        shard = self.parameters.shard
        return Memory(
            stage=self.place,
            moment=moment,
            master_weights=self.resident * shard,
            optimizer_states=self.resident * self.moments_held,
            host=(FP32 - self.resident) * (2 * shard + self.moments_held),
            **{"compute_weights": 0, "activations": 0, "head": 0, **parts},
        )

    # ------------------------------------------------------------------ weights and gradients

    @property
    def _reduces_each(self) -> bool:
        """Whether gradients are reduced at every micro-batch; a pipeline does it once a step."""
        return self.stages == 1 and self.parallel.fsdp_stage >= 2

    def _reduces(self, accumulated: bool) -> bool:
        """Whether a backward pass reduces as it goes: the only one, the last one, or every one."""
        return self.stages == 1 and (accumulated or self.micro_batches == 1 or self._reduces_each)

    def _compute_weights(self, in_flight: int, accumulated: bool, done: int | None) -> int:
        """The gathered weights: of all blocks, of those that are not through, or with ZeRO 3 of that at work."""
        held = self.layers * self.chunks
        zero3 = self.parallel.fsdp_stage == 3
        if self.stages == 1:
            if zero3:
                held = 0 if done is None else 1
            elif accumulated or self.micro_batches == 1:
                held -= done or 0
        elif self.chunks > 1:
            held = min(self.chunks, ACTIVE_CHUNKS) * self.layers
        elif zero3 and in_flight == self.in_flight:
            # a pipeline's forward pass frees a block that it has used, its backward pass does not
            held = 0 if done is None else min(1 + done, held)
        return self.size * (self.root.whole + self.block.whole * held)

    @property
    def _buffer(self) -> int:
        """What one block is gathered into, before it is copied to its place."""
        return self.size * self.block.whole * self.shared

    @property
    def _head_gradient(self) -> int:
        """The gradient of the head's matrix, there from the head's backward pass to the end."""
        return self.size * self.table * self.last

    # ------------------------------------------------------------------ activations

    def _saved(self) -> int:
        """What autograd keeps of a block, its input included where the first norm keeps it."""
        model = self.model
        heads, groups = self.queries // model.head_size, self.keys // model.head_size  # times tokens
        own = self.own_tokens * model.hidden_size
        kept = 2 * self._norm(own, self.own_tokens) + 2 * self.gathered  # and what they give the projections
        kept += self.size * (2 * self.queries + 2 * self.keys) + FP32 * heads  # q, k, v, their mixture and log-sums
        if model.qk_layernorm:
            kept += self._norm(self.queries, heads) + self._norm(self.keys, groups)
        kept += self.size * (4 if model.swiglu else 2) * self.mlp  # gate, its silu, up, product; or up, its gelu
        return kept + 2 * self._dropout(model.hidden_dropout, own) + self._dropout(model.mlp_dropout, self.mlp)

    def _norm(self, numbers: int, vectors: int) -> int:
        """What autograd keeps of a normalisation of so many numbers in so many vectors."""
        if self.model.normalization == "layernorm":
            return self.size * numbers + 2 * FP32 * vectors
        if self.device == "cpu":  # made of small operators there
            return 2 * FP32 * numbers + FP32 * vectors
        return self.size * numbers + FP32 * vectors

    @property
    def _norm_keeps_input(self) -> bool:
        """Whether a normalisation keeps its input itself, which then costs nothing elsewhere."""
        return self.model.normalization == "layernorm" or self.device != "cpu"

    def _dropout(self, share: float, numbers: int) -> int:
        return (numbers if self.device == "cuda" else self.size * numbers) if share else 0

    def _kept(self, layer: int) -> int:
        """What a block of a chunk keeps from its forward to its backward pass."""
        limit = self.parallel.recompute_num_layers
        if self.parallel.recompute_granularity is None or (limit is not None and layer >= limit):
            return self._saved()
        if self.parallel.recompute_granularity == "full":
            return self.stream
        # what megatron/parallel/recompute.py keeps: the outputs of matrix products and of attention
        products = 2 * self.queries + 2 * self.keys + (2 if self.model.swiglu else 1) * self.mlp
        log_sums = FP32 * self.queries // self.model.head_size
        return self.stream + self.size * products + 2 * self.gathered + log_sums

    def _again(self, layer: int) -> int:
        """What a block holds in its backward pass, where all is there again."""
        kept, saved = self.kept[layer], self._saved()
        return saved if kept == saved or self._norm_keeps_input else saved + self.stream

    @property
    def _backward_workspace(self) -> int:
        """The gradients that the backward pass of an MLP holds at its widest: branches, output, a matrix."""
        branches = self.size * (2 if self.model.swiglu else 1) * self.mlp
        matrix = self.size * self.model.mlp_size // self.tensor * self.model.hidden_size
        return branches + self.stream + self.gathered * (self.tensor > 1) + matrix

    def _chunk(self, done: int = 0) -> int:
        """What one micro-batch keeps of a chunk of which `done` blocks are through."""
        kept = sum(self.kept[: self.layers - done])
        kept += 2 * FP32 * self.seq_length * self.model.head_size  # the rotary table
        if self.last and done == 0:
            kept += self._norm(self.own_tokens * self.model.hidden_size, self.own_tokens)
        sends = self.stages > 1 and (not self.last or self.chunks > 1)
        return kept + self.stream * sends  # which the stage keeps until its backward pass

    def _head(self) -> int:
        """The workspace of the fused head and loss: in its forward pass, or in its backward pass if that is more."""
        rows, width = HEAD_ROWS[self.device], self.model.hidden_size
        logits, matrix = rows * self.vocabulary_part, self.table
        at_a_time = HEAD_NUMBERS.get(self.device, logits + matrix) if self.tensor == 1 else logits + matrix
        copied = self.size != FP32 and self.device not in HEAD_IN_PLACE
        wide = FP32 * min(logits, at_a_time) * copied
        forward = wide + self.size * (logits + matrix + 2 * rows * width) + FP32 * matrix + 2 * self.gathered
        scaled = FP32 * max(min(matrix, at_a_time), self.tokens * width)
        backward = scaled + (FP32 + self.size) * matrix + self.gathered
        return max(forward, backward)

    # ------------------------------------------------------------------ between stages

    @property
    def _passed_on(self) -> int:
        """The buffers of torch's stages: one for each micro-batch and neighbour that sends.

        Interleaved 1F1B waits for what it sends only at the end of the step, so that too is kept.
        """
        if self.stages == 1:
            return 0
        forward, backward = self.chunks - self.last, self.chunks - self.first  # stages here that send this way
        buffers = self.micro_batches * (forward + backward)
        if self.chunks > 1:
            through = self.micro_batches * self.chunks - self.in_flight
            buffers += max(0, self.micro_batches * forward - self.in_flight) + through * backward // self.chunks
        return buffers * self.stream
