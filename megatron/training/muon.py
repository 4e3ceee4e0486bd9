"""Muon for the matrices of the blocks, beside another optimizer for all else.

Jordan, Muon: An optimizer for hidden layers in neural networks (https://kellerjordan.github.io/posts/muon, 2024), with
the size of an update of Liu et al., Muon is Scalable for LLM Training (2502.16982), so that learning rate and weight
decay are shared with AdamW: torch.optim.Muon with adjust_lr_fn="match_rms_adamw", on sharded matrices.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import distribute_tensor
from torch.optim import Optimizer

COEFFICIENTS, STEPS = (3.4445, -4.7750, 2.0315), 5  # Jordan's: the steepest at 0 that still ends near 1
SCALE = 0.2  # root mean square of what AdamW adds to a weight, by 2502.16982, section 2.2
# bf16 on a CPU is slow, and too coarse there for a test of one layout against another
PRECISION = {"cuda": torch.bfloat16, "cpu": torch.float32}


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return about U V^T of the decomposition U S V^T of `matrix` [M, N], in fp32.

    Each Newton-Schulz step maps singular values s to 3.4445 s - 4.7750 s^3 + 2.0315 s^5; after five of them those that
    were not tiny lie in about [0.7, 1.2].
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    result = (matrix / matrix.norm().clamp(min=1e-7)).to(PRECISION[matrix.device.type])
    result = result.T if tall else result  # the smaller of the two squares
    for _ in range(STEPS):
        square = result @ result.T
        polynomial = torch.addmm(square, square, square, beta=b, alpha=c)
        result = torch.addmm(result, polynomial, result, beta=a)
    return (result.T if tall else result).float()


class Muon(Optimizer):
    """Muon on the matrices of `group`, DTensors, and `others` on its own groups: one optimizer with one state.

    Momentum is sharded as the matrices are. An update is a function of the whole matrix, so it is gathered, one matrix
    at a time, and every process of a stage orthogonalises it for itself: any layout takes the steps of one process.
    Query, key and value projections are matrices of their own here. `start_state` must be called before the first step.
    """

    def __init__(self, group: dict, others: Optimizer, momentum: float):
        super().__init__([group, *others.param_groups], {})
        others.state = self.state
        self.others, self.momentum = others, momentum

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        rate, decay = group["lr"], group["weight_decay"]
        for parameter in group["params"]:
            gradient, momentum = parameter.grad, self.state[parameter]["momentum_buffer"]
            momentum.lerp_(gradient, 1 - self.momentum)
            mesh = parameter.device_mesh
            whole = gradient.lerp(momentum, self.momentum).full_tensor()  # Nesterov's momentum
            update = orthogonalise(whole.to(mesh.device_type))  # where --cpu-offload keeps matrices, it is slow
            part = distribute_tensor(update, mesh, parameter.placements, src_data_rank=None).to_local()
            local = parameter.to_local()
            local.mul_(1 - rate * decay)
            local.add_(part.to(local.device), alpha=-rate * SCALE * max(parameter.shape) ** 0.5)
        self.others.step()
