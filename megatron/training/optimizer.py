"""AdamW over two parameter groups: matrices decay, vectors do not.

On CUDA the update is NVIDIA apex's where that is installed, else PyTorch's own fused one.
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from megatron.config.sections import OptimizerConfig
from megatron.parallel.engine import MOMENTS, Engine


def decays(parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: to matrices, embeddings included; not to norms and biases."""
    return parameter.dim() >= 2


def build_optimizer(model: nn.Module | Engine, config: OptimizerConfig) -> Optimizer:
    """Return fused AdamW over the parameters held here; the learning rate is set at every step."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if decays(p)], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if not decays(p)], "weight_decay": 0.0},
    ]
    options = {"lr": config.lr, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
    sharded = parameters[0].device.type == "cuda" and isinstance(parameters[0], DTensor)
    apex = apex_adam() if sharded else None
    return ShardedApexAdam(apex, groups, **options) if apex else AdamW(groups, **options, fused=True)


def apex_adam() -> type | None:
    """Return NVIDIA apex's FusedAdam, or None. PyPI's package of that name is another one and has no optimizers."""
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    return FusedAdam


def start_state(optimizer: Optimizer, steps: int) -> None:
    """Give every parameter zero moments and the step count, ready for a checkpoint to be loaded into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            # the fused kernel reads the count on the parameter's device
            optimizer.state[parameter]["step"] = torch.tensor(float(steps), device=parameter.device)
    if isinstance(optimizer, ShardedApexAdam):
        optimizer.attach(steps)


class ShardedApexAdam(Optimizer):
    """Apex's FusedAdam on the local shards of DTensor parameters, which its kernels do not know.

    Parameters, gradients and moments stay DTensors outside, as for every optimizer here; apex updates their
    storage. `start_state` must be called before the first step.
    """

    def __init__(self, fused_adam: type, groups: list[dict], **options):
        super().__init__(groups, options)
        self._local = {
            parameter: nn.Parameter(parameter.detach().to_local())
            for group in self.param_groups
            for parameter in group["params"]
        }
        local_groups = [group | {"params": [self._local[p] for p in group["params"]]} for group in self.param_groups]
        self._apex = fused_adam(local_groups, **options, adam_w_mode=True)

    def attach(self, steps: int) -> None:
        """Let apex work on the moments of `self.state`, `steps` steps old."""
        for parameter, local in self._local.items():
            self._apex.state[local] = {moment: self.state[parameter][moment].to_local() for moment in MOMENTS}
        for group in self._apex.param_groups:
            group["step"] = steps

    @torch.no_grad()
    def step(self) -> None:
        for outer, inner in zip(self.param_groups, self._apex.param_groups, strict=True):
            inner["lr"] = outer["lr"]
            for parameter in outer["params"]:
                self._local[parameter].grad = parameter.grad.to_local()
        self._apex.step()
