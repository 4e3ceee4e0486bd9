"""Muon for the matrices of the transformer blocks, with another optimizer for all other parameters.

Jordan, Muon: An optimizer for hidden layers in neural networks (https://kellerjordan.github.io/posts/muon, 2024), with
the update scale of Liu et al., Muon is Scalable for LLM Training (2502.16982), so that learning rate and weight decay
are shared with AdamW: torch.optim.Muon with adjust_lr_fn="match_rms_adamw", on sharded matrices.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import distribute_tensor
from torch.optim import Optimizer

COEFFICIENTS, STEPS = (3.4445, -4.7750, 2.0315), 5  # Jordan's: steepest slope at 0 that still converges near 1
SCALE = 0.2  # RMS of an AdamW update, 2502.16982, section 2.2
# on a CPU bf16 is slow, and too coarse for comparing parallel layouts in tests
PRECISION = {"cuda": torch.bfloat16, "cpu": torch.float32}


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return an approximation of U V^T for `matrix` = U S V^T [M, N], in fp32.

    Each Newton-Schulz step maps singular values s to 3.4445 s - 4.7750 s^3 + 2.0315 s^5; after five steps all but tiny
    ones lie in about [0.7, 1.2].
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    result = (matrix / matrix.norm().clamp(min=1e-7)).to(PRECISION[matrix.device.type])
    result = result.T if tall else result  # [min(M, N), max(M, N)]: the smaller Gram matrix
    for _ in range(STEPS):
        gram = result @ result.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        result = torch.addmm(result, polynomial, result, beta=a)
    return (result.T if tall else result).float()


class Muon(Optimizer):
    """Muon on the matrices of `group` (DTensors) and `adamw` on its own groups, as one optimizer with one state.

    Momentum is sharded like the matrices. An update depends on the whole matrix, so the gradient is gathered, one
    matrix at a time, and every rank of a pipeline stage orthogonalises it redundantly: the result does not depend on
    the layout. Query, key and value projections are separate matrices. `start_state` must be called before the first
    step.
    """

    def __init__(self, group: dict, adamw: Optimizer, momentum: float):
        super().__init__([group, *adamw.param_groups], {})
        adamw.state = self.state
        self.adamw: Any = adamw
        self.momentum = momentum
        self.found_inf = torch.zeros((), device=group["params"][0].device)  # 1: skip the step, as in torch's AdamW

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters from their gradients."""
        group = self.param_groups[0]
        rate, decay = group["lr"], group["weight_decay"]
        for parameter in group["params"]:
            gradient, momentum = parameter.grad, self.state[parameter]["momentum_buffer"]
            new_momentum = momentum.lerp(gradient, 1 - self.momentum)
            mesh = parameter.device_mesh
            whole = gradient.lerp(new_momentum, self.momentum).full_tensor()  # Nesterov's momentum
            update = orthogonalise(whole.to(mesh.device_type))  # with --cpu-offload the matrix is in host memory
            shard = distribute_tensor(update, mesh, parameter.placements, src_data_rank=None).to_local()
            weights = parameter.to_local()
            new_weights = weights * (1 - rate * decay)
            new_weights.add_(shard.to(weights.device), alpha=-rate * SCALE * max(parameter.shape) ** 0.5)
            self._store(weights, new_weights)
            self._store(momentum.to_local(), new_momentum.to_local())
        self.adamw.found_inf = self.found_inf
        self.adamw.step()

    def _store(self, tensor: Tensor, value: Tensor) -> None:
        """Set `tensor` to `value`, unless the step is skipped."""
        torch.where(self.found_inf.bool(), tensor, value, out=tensor)
