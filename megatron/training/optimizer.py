"""Builds AdamW, or Muon with AdamW, over parameter groups by kind; weight decay applies to some kinds.

On CUDA the AdamW update is NVIDIA apex's if that is installed, else PyTorch's fused one. All optimizers skip a step, so
that nothing changes, where their attribute `found_inf`, a tensor, is 1.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from megatron.config.parametrization import STANDARD, Parametrization, Scale
from megatron.config.sections import Config, OptimizerConfig
from megatron.config.vocabulary import Vocabulary
from megatron.model.transformer import Transformer
from megatron.parallel.engine import MOMENTS, Engine
from megatron.torch_private import LocalAdamW
from megatron.training.muon import Muon

MATRICES, TABLES, VECTORS = KINDS = ("matrices of the blocks", "embedding and head", "vectors")
DECAYING = {"hidden": (MATRICES,), "matrices": (MATRICES, TABLES), "all": KINDS}  # by --weight-decay-parameters


def kind(name: str, parameter: torch.Tensor) -> str:
    """Return the kind (of KINDS) of a parameter by its name in the whole model; vectors are norms and biases."""
    if parameter.dim() < 2:
        return VECTORS
    return MATRICES if name.startswith("layers.") else TABLES


def parameter_groups(
    model: nn.Module | Engine, config: OptimizerConfig, parametrization: Parametrization = STANDARD
) -> list[dict]:
    """Return the parameter groups of this rank: one per kind of parameter and its factors of the parametrization.

    "moments" names the optimizer's state per parameter, "decays" is whether weight decay applies, "scale" has the
    factors of learning rate and weight decay.
    """
    members: dict[tuple[str, Scale], list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        group = kind(name, parameter)
        in_block, is_matrix = name.startswith("layers."), group == MATRICES
        scale = parametrization.scale(in_block=in_block, is_matrix=is_matrix, optimizer=optimizer_of(group, config))
        members.setdefault((group, scale), []).append(parameter)
    decaying = DECAYING[config.weight_decay_parameters]
    return [
        {
            "params": parameters,
            "lr": config.lr * scale.lr,
            "eps": config.adam_eps * scale.eps,
            "moments": ("momentum_buffer",) if optimizer_of(group, config) == "muon" else MOMENTS,
            "decays": group in decaying,
            "weight_decay": config.weight_decay * scale.weight_decay if group in decaying else 0.0,
            "scale": scale,
        }
        # a pipeline stage may have no embedding
        for (group, scale), parameters in sorted(members.items(), key=lambda item: KINDS.index(item[0][0]))
    ]


def optimizer_of(kind: str, config: OptimizerConfig) -> str:
    """Return the optimizer of a kind of parameters: Muon is only for matrices that map hidden states."""
    return config.optimizer if kind == MATRICES else "adamw"


def parameter_table(config: Config, vocabulary: Vocabulary) -> Iterator[str]:
    """Yield the lines of a table over the whole model: kind of parameters, count, optimizer and weight decay."""
    optimizer = config.optimizer
    counts: dict[str, int] = dict.fromkeys(KINDS, 0)
    with torch.device("meta"):
        model = Transformer(config.model, vocabulary)
    for name, parameter in model.named_parameters():
        counts[kind(name, parameter)] += parameter.numel()
    decay = f"{optimizer.weight_decay:g}"
    if optimizer.weight_decay_incr_style != "constant":
        ends = f"{optimizer.start_weight_decay:g} to {optimizer.end_weight_decay:g}"
        decay = f"{ends}, {optimizer.weight_decay_incr_style}"
    yield f"{'parameters':<24}{'number':>16}  {'optimizer':<9}  weight decay"
    for group, count in counts.items():
        group_decay = decay if group in DECAYING[optimizer.weight_decay_parameters] else "none"
        yield f"{group:<24}{count:>16,}  {optimizer_of(group, optimizer):<9}  {group_decay}"


def build_optimizer(
    model: nn.Module | Engine, config: OptimizerConfig, parametrization: Parametrization = STANDARD
) -> Optimizer:
    """Return the optimizer of the parameters on this rank; learning rate and weight decay are set at every step."""
    groups = parameter_groups(model, config, parametrization)
    matrices = groups.pop(0) if config.optimizer == "muon" else None
    first = groups[0]["params"][0]
    options = {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    sharded = isinstance(first, DTensor)
    if sharded and first.device.type == "cuda" and (apex := apex_adam()):
        adamw = ShardedApexAdam(apex, groups, **options)
    else:
        adamw = (LocalAdamW if sharded else AdamW)(groups, **options, fused=True)
    return Muon(matrices, adamw, config.muon_momentum) if matrices else adamw


def apex_adam() -> type | None:
    """Return NVIDIA apex's FusedAdam, or None; the PyPI package named apex is unrelated and has no optimizers."""
    try:
        from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return FusedAdam


def start_state(optimizer: Optimizer, steps: int) -> None:
    """Set zero moments and the step count of every parameter, so that a checkpoint can be loaded into them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {moment: torch.zeros_like(parameter) for moment in group["moments"]}
            if group["moments"] == MOMENTS:  # the fused kernel reads the count on the parameter's device
                optimizer.state[parameter]["step"] = torch.tensor(float(steps), device=parameter.device)
    adamw = optimizer.adamw if isinstance(optimizer, Muon) else optimizer
    if isinstance(adamw, ShardedApexAdam):
        adamw.attach(steps)


class ShardedApexAdam(Optimizer):
    """Apex's FusedAdam on the local shards of DTensor parameters, which its kernels do not support directly.

    Parameters, gradients and moments remain DTensors outside, as for every optimizer here; apex updates their
    storage. `start_state` must be called before the first step. Apex's capturable kernels read the learning rate, the
    step count and whether to skip on the device, so that the host waits for nothing; the last comes from a GradScaler.
    """

    found_inf: torch.Tensor | None = None  # 1: skip the step, as in torch's AdamW

    def __init__(self, fused_adam: type, groups: list[dict], **options):
        super().__init__(groups, options)
        self._local = {
            parameter: nn.Parameter(parameter.detach().to_local())
            for group in self.param_groups
            for parameter in group["params"]
        }
        local_groups = [
            {
                "params": [self._local[p] for p in group["params"]],
                "eps": group["eps"],
                "weight_decay": group["weight_decay"],
            }
            for group in self.param_groups
        ]
        self._apex = fused_adam(local_groups, **options, adam_w_mode=True, capturable=True)
        self._device = next(iter(self._local.values())).device

    def attach(self, steps: int) -> None:
        """Make apex use the moments of `self.state`, and `steps` as the step count."""
        for parameter, local in self._local.items():
            self._apex.state[local] = {moment: self.state[parameter][moment].to_local() for moment in MOMENTS}
        for group in self._apex.param_groups:
            group["step"] = torch.tensor([steps], dtype=torch.int32, device=self._device)
            group["lr"] = torch.zeros(1, device=self._device)  # of its own: apex may share one among its groups

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters from their gradients, or none if `found_inf` is 1."""
        for outer, inner in zip(self.param_groups, self._apex.param_groups, strict=True):
            inner["lr"].fill_(outer["lr"])
            inner["weight_decay"] = outer["weight_decay"]
            for parameter in outer["params"]:
                self._local[parameter].grad = parameter.grad.to_local()
        self._apex.step(grad_scaler=self)

    def _check_inf_per_device(self, _optimizer: Optimizer) -> dict[torch.device, torch.Tensor]:
        """Return whether to skip, as torch.amp.GradScaler does for apex."""
        found_inf = torch.zeros(1, device=self._device) if self.found_inf is None else self.found_inf.reshape(1)
        return {self._device: found_inf}

    def _get_scale_async(self) -> torch.Tensor:
        """Return the factor of the loss that apex divides gradients by, as torch.amp.GradScaler does: 1."""
        return torch.ones(1, device=self._device)
