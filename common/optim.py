"""SGD and the polynomial learning rate of the DeepLab papers."""

from collections.abc import Sequence

from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import PolynomialLR


def poly_lr(step: int, total: int, power: float = 0.9) -> float:
    """The learning rate's factor before update `step` of `total`: (1 - step / total)^power."""
    return (1 - step / total) ** power


def sgd_poly(
    networks: Sequence[nn.Module], lr: float, weight_decay: float, iters: int
) -> tuple[SGD, PolynomialLR]:
    """SGD with momentum 0.9 over all networks, and the schedule to step once per iteration.

    Weights of convolutions and linear layers decay; BatchNorm's and all biases do not: they are
    the parameters with a single axis.
    """
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = SGD(groups, lr=lr, momentum=0.9)
    return optimizer, PolynomialLR(optimizer, total_iters=iters, power=0.9)
