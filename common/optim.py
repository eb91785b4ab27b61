"""SGD and the polynomial learning rate of the DeepLab papers."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import PolynomialLR


def poly_lr(step: int, total: int, power: float = 0.9) -> float:
    """The learning rate's factor before update `step` of `total`: (1 - step / total)^power."""
    return (1 - step / total) ** power


def sgd_poly(
    networks: Sequence[nn.Module],
    lr: float,
    weight_decay: float,
    iters: int,
    shares: Sequence[float] | None = None,
    decay_all: bool = False,
) -> tuple[SGD, PolynomialLR]:
    """SGD with momentum 0.9 over all networks, and the schedule to step once per iteration.

    Weights of convolutions and linear layers decay; BatchNorm's and all biases, which are the
    parameters with a single axis, do not, unless `decay_all`. shares: what each network takes of
    the learning rate; all of it when None.
    """
    groups = []
    for network, share in zip(networks, shares or [1.0] * len(networks), strict=True):
        parameters = [p for p in network.parameters() if p.requires_grad]
        for decays in (True, False):
            chosen = [p for p in parameters if (p.ndim > 1) == decays]
            decay = weight_decay if decays or decay_all else 0.0
            groups.append({"params": chosen, "lr": share * lr, "weight_decay": decay})
    groups = [group for group in groups if group["params"]]
    optimizer = SGD(groups, lr=lr, momentum=0.9, fused=True)
    optimizer.register_load_state_dict_post_hook(lay_out)
    # A fused SGD's first step would leave its momentum undefined where the scaler of --amp fp16
    # skips it. From zeros it is the same step.
    for weight in (weight for group in groups for weight in group["params"]):
        optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer, PolynomialLR(optimizer, total_iters=iters, power=0.9)


def lay_out(optimizer: SGD) -> None:
    """Momentum in the layout of its weight.

    A fused SGD goes by their places in memory, and a checkpoint may be of a device with others.
    """
    for weight, state in optimizer.state.items():
        state["momentum_buffer"] = torch.empty_like(weight).copy_(state["momentum_buffer"])
