"""The parallel section."""

from dataclasses import dataclass

from megatron.config.flags import Section, flag, require

WITHOUT_DEEPSPEED = "leave it out, or --deepspeed and --deepspeed-config"


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """Parallel layout: how ranks share the model. It changes speed and memory, results only by rounding and dropout."""

    tensor_model_parallel_size: int = flag(
        1,
        "tensor-parallel ranks: they split each layer, and the sequence between layers; divides heads and --seq-length",
        within="[1, inf)",
    )
    pipeline_model_parallel_size: int = flag(
        1, "pipeline stages of consecutive layers; a step needs at least as many micro-batches", within="[1, inf)"
    )
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None,
        "layers of each of the several stages of a rank (interleaved 1F1B); default one stage a rank",
        within="[1, inf)",
        needs="pipeline_model_parallel_size",
    )
    zero_stage: int | None = flag(
        None,
        "what data-parallel ranks shard: 0 nothing, 1 optimizer states and master weights, 2 also gradients, 3 also "
        "the model weights; default 1, or the stage of --deepspeed-config",
        within="[0, 3]",
    )
    num_distributed_optimizer_instances: int = flag(
        1,
        "replicas of what --zero-stage shards (hybrid sharding), such as one a node; data-parallel size / N ranks "
        "share each",
        metavar="N",
        within="[1, inf)",
    )
    cpu_offload: bool = flag(
        False,
        "keep master weights, gradients and optimizer states in host memory (CUDA); with --deepspeed by its "
        "offload_optimizer, which --deepspeed-config can configure further",
    )
    deepspeed: bool = flag(
        False, "shard with DeepSpeed's ZeRO in place of FSDP2; to install it: bash install.sh --with-deepspeed"
    )
    deepspeed_config: str | None = flag(
        None, "DeepSpeed's JSON file; keys that repeat a flag must agree with it", metavar="FILE", needs="deepspeed"
    )
    recompute_granularity: str | None = flag(
        None,
        "activation checkpointing; full: recompute whole blocks in the backward pass; selective: all but matrix "
        "products and attention; default none",
        choices=("full", "selective"),
    )
    recompute_num_layers: int | None = flag(
        None,
        "blocks of each stage that are recomputed, from its first; default all",
        within="[1, inf)",
        needs="recompute_granularity",
    )
    distributed_timeout_minutes: float = flag(
        10.0,
        "timeout of the rendezvous and of collectives, after which all ranks exit",
        metavar="MINUTES",
        within="(0, inf)",
    )

    def __post_init__(self):
        super().__post_init__()
        stage, pipelined = self.zero_stage, self.pipeline_model_parallel_size > 1
        message = "reduces gradients at every micro-batch, and a pipeline once a step; give --zero-stage 1 or 3"
        require(not (pipelined and stage == 2), "zero_stage", stage, message)
        replicas = self.num_distributed_optimizer_instances
        message = "has no effect at --zero-stage 0, which shards nothing; leave one of them out"
        require(replicas == 1 or stage != 0, "num_distributed_optimizer_instances", replicas, message)
        if self.deepspeed:
            self._check_deepspeed()

    def _check_deepspeed(self) -> None:
        """Check that DeepSpeed's ZeRO, which is data-parallel only, supports the layout."""
        for name in (
            "num_distributed_optimizer_instances",
            "pipeline_model_parallel_size",
            "tensor_model_parallel_size",
        ):
            message = f"is not supported with --deepspeed, whose ZeRO is data-parallel only; {WITHOUT_DEEPSPEED}"
            require(getattr(self, name) == 1, name, getattr(self, name), message)
        message = "needs --zero-stage 1 or more with --deepspeed; leave one of them out"
        require(not (self.cpu_offload and self.zero_stage == 0), "cpu_offload", True, message)

    @property
    def fsdp_stage(self) -> int:
        """The ZeRO stage with FSDP2."""
        return 1 if self.zero_stage is None else self.zero_stage

    @property
    def compiles(self) -> bool:
        """Whether blocks can be compiled: torch 2.13 cannot compile tensor-parallel layers that are recomputed."""
        return self.tensor_model_parallel_size == 1 or self.recompute_granularity is None

    def chunks(self, num_layers: int) -> int:
        """Return how many stages of a model of `num_layers` layers each rank has."""
        virtual = self.num_layers_per_virtual_pipeline_stage
        return num_layers // (self.pipeline_model_parallel_size * virtual) if virtual else 1

    def replicas(self, data_size: int) -> int:
        """Return how many replicas of the sharded state `data_size` data-parallel ranks hold."""
        replicated = self.zero_stage == 0 and not self.deepspeed  # DeepSpeed groups its ranks itself
        return data_size if replicated else self.num_distributed_optimizer_instances

    @property
    def fewest_ranks(self) -> int:
        """The smallest world size of the layout."""
        groups = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        return groups * self.num_distributed_optimizer_instances

    def data_size(self, world_size: int) -> int:
        """Return the data-parallel size."""
        return world_size // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size)
