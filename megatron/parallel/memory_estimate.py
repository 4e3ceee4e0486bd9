"""Peak memory of a rank, by formula: a sum for each moment of a training step that may be the peak.

The largest sum is the peak. `rank_sizes.py` has the terms. Sizes are bytes of live tensors, for uncompiled blocks
(compiled blocks save fewer activations). CUDA, NCCL and the fragmentation of the allocator come on top.

    forward pass, head  | backward of the last block ... of the first  | reduction of the embedding | update
    activations grow    | activations are freed, gradients appear      | (and of the head, if tied) |

`benchmarks/memory/run.py` compares this with measured peaks, for FSDP2 and the pipeline schedules of torch 2.13.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from megatron.config.capabilities import Capabilities
from megatron.config.sections import Config, ModelConfig
from megatron.config.vocabulary import Vocabulary
from megatron.parallel.rank_sizes import FP32, RankSizes

BATCH_BYTES = 28  # per token of a micro-batch: ids, targets and scored positions int64, weights fp32


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a rank at its peak, on its device except `host`."""

    stage: int  # pipeline rank, from 0
    moment: str
    master_weights: int  # fp32, this rank's shard
    optimizer_states: int  # of this rank's shard: two moments of AdamW, one of Muon, and averaged weights
    gradients: int  # shards, and what is not reduced yet
    compute_weights: int  # weights gathered by FSDP2, and those of teachers, in the compute dtype
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


def peak_memory(
    config: Config,
    vocabulary: Vocabulary,
    capabilities: Capabilities,
    *,
    world_size: int,
    precision: str,
    device: str = "cuda",
    teachers: Sequence[ModelConfig] = (),
) -> Memory:
    """Return the peak memory of the rank that needs most; the layout must have passed `check_layout`.

    `capabilities` are those of the objective, `precision` is "bf16" or "fp32". On a CPU, where the formula is measured,
    RMSNorm saves fp32 copies and the head uses smaller chunks. `teachers` are the models of a distillation's teachers.
    """
    moments = []
    for stage in range(config.parallel.pipeline_model_parallel_size):
        rank = RankSizes(
            config,
            vocabulary,
            capabilities,
            world_size=world_size,
            precision=precision,
            device=device,
            stage=stage,
            teachers=teachers,
        )
        moments += _Moments(rank).moments()
    return max(moments, key=lambda memory: memory.total)


class _Moments:
    """The moments of a step that may be the peak of one rank; `RankSizes` explains `num_done` and `accumulated`."""

    def __init__(self, rank: RankSizes):
        self.rank = rank

    def moments(self) -> Iterator[Memory]:
        """Yield candidate memory peaks, in bytes."""
        for in_flight, accumulated in self._passes():
            if self.rank.is_last:
                yield self._at_head(in_flight, accumulated)
            for num_done in range(len(self.rank.uses)):
                yield self._within_block(in_flight, accumulated, num_done)
                yield self._after_block(in_flight, accumulated, num_done)
        if self.rank.moves_weights:
            yield self._at_trial_move()
        yield from self._at_end()

    def _passes(self) -> list[tuple[int, bool]]:
        """Return the kinds of backward pass: (micro-batches x chunks in flight before it, accumulated)."""
        rank = self.rank
        full, count = rank.in_flight, rank.micro_batches * rank.num_chunks
        passes = [(full, False)]
        if count > full:
            passes.append((full, True))
        if full > 1:
            passes.append((full - 1, True))
        return passes

    def _at_head(self, in_flight: int, accumulated: bool) -> Memory:
        """Return the memory while the loss is computed.

        If blocks had to be gathered for this forward pass, the buffer of the last all-gather still exists.
        """
        rank = self.rank
        gathers = not accumulated or (rank.parallel.fsdp_stage == 3 and rank.num_stages == 1)
        buffer = rank.gather_buffer if gathers else 0
        return self._memory("head", in_flight, accumulated, None, head=rank.head(), communication=buffer)

    def _within_block(self, in_flight: int, accumulated: bool, num_done: int) -> Memory:
        """Return the memory during a block's backward pass, with all its activations, recomputed or saved."""
        rank = self.rank
        use = len(rank.uses) - 1 - num_done
        communication = 0
        if num_done > 0 and rank.reduces(accumulated):
            communication += FP32 * rank.block.gathered  # FSDP2 keeps the previous block's until then
        if rank.parallel.fsdp_stage == 3:
            communication += rank.gather_buffer  # prefetch of the next block
        return self._memory(
            f"backward of block {use + 1} of {len(rank.uses)}",
            in_flight,
            accumulated,
            num_done,
            gradients=rank.head_gradient,
            activations=rank.in_backward(use) - rank.saved_per_use[use] + rank.backward_workspace,
            communication=communication,
        )

    def _after_block(self, in_flight: int, accumulated: bool, num_done: int) -> Memory:
        """Return the memory after a block's backward pass.

        Its gradients are copied into an fp32 buffer and reduced, or accumulated, when the last of its uses is done.
        """
        rank = self.rank
        gathered, shard = rank.block.gathered, rank.block.shard
        is_whole = rank.blocks_done(num_done + 1) > rank.blocks_done(num_done)
        reduces = is_whole and rank.reduces(accumulated)
        if rank.one_group or not is_whole:
            unreduced = 0
        elif not reduces:
            unreduced = rank.size * gathered if accumulated else 0
        elif accumulated and not rank.reduces_every_micro_batch:
            unreduced = FP32 * gathered - rank.resident * shard
        else:
            unreduced = max(0, rank.size * gathered - rank.resident * shard)
        return self._memory(
            f"reduction of block {len(rank.uses) - num_done} of {len(rank.uses)}",
            in_flight,
            accumulated,
            num_done + 1,
            gradients=rank.head_gradient + unreduced,
            activations=rank.hidden_shard,
            communication=FP32 * gathered if reduces else 0,
        )

    def _at_trial_move(self) -> Memory:
        """Return the memory while a meta-gradient step moves a block; in bf16 its fp32 weights may be sharded."""
        rank = self.rank
        gathers = rank.is_sharded and rank.size != FP32
        return self._build(
            "trial move",
            gradients=FP32 * (rank.parameters.gathered + 2 * rank.block.gathered),  # and moves and moved weights
            compute_weights=rank.compute_weights(1, False, None),
            communication=FP32 * rank.block.gathered if gathers else 0,
        )

    def _at_end(self) -> Iterator[Memory]:
        """Yield the memory when the parameters outside blocks, in a pipeline all, are reduced, and at the update."""
        rank = self.rank
        has_fp32 = rank.micro_batches > 1 and not rank.reduces_every_micro_batch  # accumulated gradients, unsharded
        blocks = rank.block * (rank.num_layers * rank.num_chunks)
        block_gradients = FP32 * blocks.gathered if rank.num_stages > 1 else rank.resident * blocks.shard
        if rank.one_group:
            block_gradients = rank.in_one_group(blocks, has_fp32)
        root_gradients = FP32 * rank.root.gathered if has_fp32 else 0
        if rank.reduces_every_micro_batch and rank.micro_batches > 1:
            root_gradients = rank.resident * rank.root.shard
        weights = rank.compute_weights(1, True, len(rank.uses))
        tables = 0  # gradients of embedding and head; with tied weights their sum as well
        if rank.is_first:
            tables = 1
            if rank.is_last:
                tables += 1 if rank.model.untie_embeddings_and_output_weights else 2
        last_reduction = FP32 * rank.block.gathered if rank.num_stages == 1 and not rank.one_group else 0
        yield self._build(
            "gradient of the embedding",
            gradients=block_gradients + root_gradients + rank.size * rank.table * tables,
            compute_weights=weights,
            activations=rank.hidden_shard,
            communication=last_reduction + rank.pipeline_buffers,
        )
        unreduced = FP32 * rank.root.gathered if has_fp32 else root_gradients + rank.size * rank.root.gathered
        yield self._build(
            "reduction of the embedding",
            gradients=block_gradients + max(unreduced, rank.resident * rank.root.shard),
            compute_weights=weights - rank.size * rank.root.gathered,
            communication=FP32 * rank.root.gathered + rank.pipeline_buffers,
        )
        shards = rank.resident * rank.parameters.shard
        if rank.one_group:
            parameters = rank.parameters.gathered
            if has_fp32 and rank.micro_batches > 2 and rank.size != FP32:  # new ones, in fp32 as well, and the sums
                gradients, weights = (rank.size + 2 * FP32) * parameters, rank.size * parameters
                yield self._build("sum of gradients", gradients=gradients, compute_weights=weights, communication=0)
            unreduced = (FP32 if has_fp32 else rank.size) * parameters
            yield self._build("reduction", gradients=max(unreduced, shards), communication=FP32 * parameters)
        yield self._build("update", gradients=shards, communication=rank.pipeline_buffers)

    def _memory(self, moment: str, in_flight: int, accumulated: bool, num_done: int | None, **extra: int) -> Memory:
        """Return the memory at a moment of a backward pass, plus `extra`; `num_done` is None before the first block."""
        rank = self.rank
        blocks_done = rank.blocks_done(num_done or 0)
        # of a block with uses left, autograd sums the gradients of its uses before it accumulates them
        partial_gradients = rank.size * rank.block.gathered * (rank.blocks_begun(num_done or 0) - blocks_done)
        if rank.one_group:
            gradients = rank.in_one_group(rank.block * blocks_done, accumulated)
            if accumulated:
                gradients += FP32 * (rank.parameters.gathered - rank.block.gathered * blocks_done)
        elif not accumulated:
            per_block = rank.resident * rank.block.shard if rank.reduces(False) else FP32 * rank.block.gathered
            gradients = per_block * blocks_done
        elif rank.reduces_every_micro_batch:
            gradients = rank.resident * rank.parameters.shard
        else:
            gradients = FP32 * rank.parameters.gathered
            if rank.reduces(True):
                gradients -= (FP32 * rank.block.gathered - rank.resident * rank.block.shard) * blocks_done
        communication = rank.pipeline_buffers
        if not rank.is_first and rank.norm_saves_input:
            communication -= in_flight * rank.hidden_shard  # the first block's input is such a buffer
        batches = BATCH_BYTES * rank.tokens * (rank.micro_batches if rank.num_stages > 1 else 1)
        activations = (in_flight - 1) * rank.chunk() + rank.chunk(num_done or 0) + batches
        return self._build(
            moment,
            gradients=gradients + partial_gradients + extra.get("gradients", 0),
            compute_weights=rank.compute_weights(in_flight, accumulated, num_done),
            activations=activations + extra.get("activations", 0),
            head=extra.get("head", 0),
            communication=communication + extra.get("communication", 0),
        )

    def _build(self, moment: str, **sizes: int) -> Memory:
        rank = self.rank
        shard = rank.parameters.shard
        compute_weights = sizes.pop("compute_weights", 0) + rank.teacher_weights
        return Memory(
            stage=rank.stage,
            moment=moment,
            master_weights=rank.resident * shard,
            optimizer_states=rank.resident * rank.state_elements,
            host=(FP32 - rank.resident) * (2 * shard + rank.state_elements),
            compute_weights=compute_weights,
            **{"activations": 0, "head": 0, **sizes},
        )
