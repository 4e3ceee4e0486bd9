"""DeepSpeed as a second data-parallel engine: ZeRO stages 0 to 3 and offload, around the same plain model.

The model is initialised first and wrapped afterwards, so both engines start from the same weights. Checkpoints have the
same tensors under the same names, so a run can switch between the engines. Tensor and pipeline parallelism are not
available: DeepSpeed's ZeRO does not support DTensor parameters.
"""

import contextlib
import io
import logging
import os
import warnings
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from megatron.batch import Batch
from megatron.errors import ConfigurationError
from megatron.model.transformer import Transformer
from megatron.parallel.compiled import compile_blocks
from megatron.parallel.engine import MOMENTS, Engine, loss_scale
from megatron.parallel.mesh import ParallelContext

logger = logging.getLogger(__name__)


def import_deepspeed(device: torch.device):
    """Return the package, configured for `device`.

    On the CPU it would compile, at first use, a kernel for inference; that is switched off.
    Raises: ConfigurationError, if it is not installed or does not import with this version of torch.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # a machine may have a device that is not used
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # required, and not set without a launcher
    # it calls collectives by names that newer versions of torch warn about, once per process
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"--deepspeed: {error}; install it: bash install.sh --with-deepspeed") from None
    except Exception as error:  # one for other versions of torch can raise anything
        versions = f"DeepSpeed {metadata.version('deepspeed')} does not import with torch {torch.__version__}"
        remedy = "install the versions in constraints.txt, or leave it out for FSDP2"
        raise ConfigurationError(f"--deepspeed: {versions} ({_one_line(error)}); {remedy}") from None
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class DeepSpeedEngine(Engine):
    """A plain model and its AdamW, wrapped by DeepSpeed.

    `settings` come from `deepspeed_config`; the model must be on its device, with its initial weights. DeepSpeed clips,
    steps and clears gradients in one call, so a step is `backward`, then `update`.
    """

    _engine: Any  # a DeepSpeedEngine of DeepSpeed; the class of its optimizer depends on the ZeRO stage

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.AdamW,
        settings: dict,
        ranks: ParallelContext,
        *,
        compile: bool,
    ):
        super().__init__([model], [model], ranks, zero_stage=settings["zero_optimization"]["stage"])
        deepspeed = self._deepspeed = import_deepspeed(ranks.device)
        self.optimizer = optimizer
        self._limit = settings["gradient_clipping"]
        bf16 = settings["bf16"]["enabled"]
        if self.zero_stage == 0 and bf16:
            # DeepSpeed has no stage 0 with bf16 weights and fp32 sums
            logger.info("ZeRO stage 0 in bf16 runs as stage 1: optimizer states are sharded, results are the same")
            self.zero_stage = 1
            settings = settings | {"zero_optimization": settings["zero_optimization"] | {"stage": 1}}
        # stage 3 gathers parameters at every call of a layer: ranks with different selections would deadlock
        model.selects_scored_positions = self.zero_stage < 3
        if compile and self.zero_stage == 3:
            logger.info("ZeRO stage 3 of DeepSpeed runs uncompiled: its hooks gather parameters inside every block")
        elif compile:
            compile_blocks(model, ranks.device, torch.bfloat16 if bf16 else torch.float32)
        if self.zero_stage == 0:  # `update` clips already
            settings = settings | {"gradient_clipping": 0.0}
        # before stage 3 replaces parameters by shards
        self._named = dict(model.named_parameters())
        self._shapes = {name: parameter.shape for name, parameter in self._named.items()}
        # DeepSpeed makes master weights from weights that are rounded to bf16; these replace them afterwards
        fp32_weights = {name: p.detach().float().clone() for name, p in self._named.items()} if bf16 else {}
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints memory statistics
                self._engine = deepspeed.initialize(
                    model=model, optimizer=optimizer, config=settings, dist_init_required=False
                )[0]
        except ValueError as error:  # from pydantic, for an unknown key of a section
            raise ConfigurationError(f"DeepSpeed refuses its configuration: {_one_line(error)}") from None
        if self.zero_stage == 3:
            # the head's weight is not a parameter of the module that uses it
            deepspeed.zero.register_external_parameter(model, model.lm_weight())
        self._start_state(0)
        with torch.no_grad():
            for name, value in fp32_weights.items():
                self._write(name, value)

    def backward(self, batches: list[Batch], count: float) -> Tensor:
        """Do what `Engine.backward` does, with DeepSpeed's gradient accumulation."""
        loss = torch.zeros((), device=self.ranks.device)
        for index, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            share = self._engine(batch.to(self.ranks.device)).sum() / count
            # DeepSpeed averages over the ranks, and the count is already global
            self._engine.backward(share * loss_scale(share, self.ranks.data_size), scale_wrt_gas=False)
            loss += share.detach()
        return loss

    def update(self, optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
        """Clip, step and clear the gradients; return the global norm before clipping, [].

        `optimizer` and `limit` must be those of the constructor. At stages 1 to 3 DeepSpeed itself skips a step whose
        norm is not finite (its host knows the norm before the step), but not the steps after it.
        """
        assert optimizer is self.optimizer and limit == self._limit
        if self.zero_stage == 0:
            norm = self.clip(limit)
            self.skip_if_diverged(optimizer, norm)
            self._engine.step()
            return norm
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self.ranks.device).detach().clone()
        if self._engine.optimizer.overflow or not norm.isfinite():  # on all ranks
            # with offload the parameters of the optimizer are in host memory
            self.skip_if_diverged(optimizer, norm.to(next(iter(optimizer.state)).device))
        return norm

    def clip(self, limit: float) -> Tensor:
        """Clip for `update` at stage 0, where DeepSpeed does not return the norm."""
        return nn.utils.clip_grad_norm_(self.parameters(), limit or float("inf")).detach()

    @torch.no_grad()
    def tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return copies of the tensors of a checkpoint, with the names of `Engine.tensors`, sharded along dim 0.

        All ranks must call this. One parameter at a time is gathered.
        """
        state = {f"model.{name}": self._shard(self._read(name)) for name in self._named}
        for name in self._named:
            for moment in MOMENTS:
                state[f"optimizer.{moment}.{name}"] = self._shard(self._read(name, moment))
        return state

    @torch.no_grad()
    def load(self, state: dict[str, Tensor], steps: int) -> None:
        """Write back a checkpoint, `steps` steps old, that was read into what `tensors` returned."""
        self._start_state(steps)
        for name in self._named:
            self._write(name, _full_tensor(state[f"model.{name}"]))
            for moment in MOMENTS:
                self._write(name, _full_tensor(state[f"optimizer.{moment}.{name}"]), moment)

    # ------------------------------------------------------------------ DeepSpeed's storage of parameters and moments

    def _start_state(self, steps: int) -> None:
        """Set zero moments and the step count, which DeepSpeed would create at the first step."""
        zero_optimizer = self._engine.optimizer
        if self.zero_stage == 0:
            tensors = list(self._named.values())
        else:
            names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
            tensors = next(getattr(zero_optimizer, name) for name in names if hasattr(zero_optimizer, name))
        for tensor in tensors:
            self.optimizer.state[tensor] = {moment: torch.zeros_like(tensor) for moment in MOMENTS}
            self.optimizer.state[tensor]["step"] = torch.tensor(float(steps), device=tensor.device)
        if self.zero_stage in (1, 2):
            # DeepSpeed links them to the parameters after the first step
            zero_optimizer._hp_optimizer_states_linked = False
            zero_optimizer._lazy_init_hp_params_optimizer_state()

    def _read(self, name: str, moment: str | None = None) -> Tensor:
        """Return a gathered fp32 parameter, or a moment of it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self._named[name]
        if self.zero_stage == 0:
            return parameter.detach() if moment is None else self.optimizer.state[parameter][moment]
        full = safe_get_full_optimizer_state(parameter, moment) if moment else safe_get_full_fp32_param(parameter)
        assert full is not None
        return full.view(self._shapes[name])

    def _write(self, name: str, value: Tensor, moment: str | None = None) -> None:
        """Set an fp32 parameter, with its copy in the compute dtype, or a moment of it, from a full tensor."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter = self._named[name]
        if self.zero_stage == 0:
            self._read(name, moment).copy_(value)
        elif self.zero_stage == 3:
            self._write_partition(parameter, value, moment)
        elif moment:
            safe_set_full_optimizer_state(parameter, value, moment)
        else:
            safe_set_full_fp32_param(parameter, value)
            parameter.copy_(value)

    def _write_partition(self, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        """Set this rank's shard of a parameter at ZeRO stage 3; the last shard is padded to the size of the others."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()  # pyright: ignore[reportAttributeAccessIssue]
        flat = F.pad(value.flatten(), (0, size * self.ranks.data_size - value.numel()))
        shard = flat.narrow(0, size * self.ranks.data_rank, size)
        if moment:
            safe_set_local_optimizer_state(parameter, shard, moment)
            return
        safe_set_local_fp32_param(parameter, shard)
        with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)

    def _shard(self, full: Tensor) -> Tensor:
        """Return a copy of this rank's shard of `full` along dim 0, as FSDP2 has it."""
        mesh = self.ranks.mesh["replicate", "shard"]
        sharded = distribute_tensor(full.contiguous(), mesh, [Shard(0), Shard(0)], src_data_rank=None)
        return sharded.clone()  # a view would keep the full tensor alive


def _full_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
