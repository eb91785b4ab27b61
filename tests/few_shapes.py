"""The scripts at their smallest: on few pictures, here or as a program of one or two processes.

`few_shapes.py SCRIPT [FLAGS]` is that script's command line.
"""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common import curves, deeplab, panels, shapes
from common.augment import whole_view
from common.data import load
from common.deeplab import DeepLabV3Plus
from common.flags import InputError
from common.loaders import val_loader
from common.machine import gather, in_all_processes
from common.metrics import evaluate
from common.run import Run, main

ROOT = Path(__file__).parent.parent
COUNTS = {"train": 12, "val": 5}
SMALL = dict(batch_size=2, crop_size=32, width=8, iters=2, eval_every=2)
SMALL |= dict(device="cpu", amp="none")  # whatever machine it is
SEMI = SMALL | dict(labeled="4")
WARMED = SEMI | dict(iters=3, eval_every=3, warmup=1 / 3)
TINY = {  # by script: the flags of a short run, which test_scripts varies
    "cps": SEMI,
    "psmt": WARMED | dict(threshold=0.2, teachers="own"),
    "cac": WARMED | dict(gamma=0.25, base_size=64),
    "ial": SMALL | dict(rounds=1, net_steps=(1.0, 1.0, 1.0), tau=0.4),
}


# Two processes of batches of 2 learn what one learns of batches of 4 where all means are of as many
# terms in either process: they are means of a process's own batch. That takes labels without void,
# crops without padding; no confidence that selects pixels, no dropout, CutMix or noise that a
# process draws for itself; of ial.py the stages before regions are mined, which leave some unknown.
# Everywhere else a pixel, cell or region counts for more in the process that has fewer of them.
ALIKE = dict(iters=4, eval_every=4, scales=(1.0,))
EQUAL = {
    "cps": SEMI | ALIKE | dict(cutmix=False, ramp=0.0),
    "psmt": SEMI
    | ALIKE
    | dict(cutmix="off", threshold=0.0, scales=(1.0, 1.0), warmup=0.25)
    | dict(teachers="own", ramp=0.0),
    "cac": SEMI
    | ALIKE
    | dict(directed=False, gamma=0.0, context=False, warmup=0.25, bank=1)
    | dict(scales=(1.0, 1.0), pair_scales=(1.0, 1.0), base_size=64),
    "ial": SMALL | ALIKE | dict(method="unary", fg=0.3, bg=0.3, net_steps=(1.0, 1.0, 1.0)),
}


def frozen_batchnorm(self: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """In the place of its forward: as in eval mode, where a picture does not see the others."""
    statistics = self.running_mean, self.running_var
    return F.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)


def one_direction(like: Tensor) -> Tensor:
    """In the place of torch.rand_like: the same start of T-VAT for every picture."""
    return torch.linspace(0, 1, like[0].numel()).sin().view_as(like[0]).expand_as(like)


def light_resnet(backbone: str, weights: str | None) -> nn.Module:
    """In the place of a ResNet-18: a few convolutions. Checkpoints of 200 MB become one of 2."""
    net = nn.Module()
    net.conv1, net.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
    net.relu, net.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    net.layer1, net.layer2 = nn.Conv2d(8, 64, 1), nn.Conv2d(64, 8, 3, 2, 1)
    net.layer3, net.layer4 = nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 512, 1)
    return net


def lighten(put: Callable = setattr) -> None:
    """Light networks; small pictures of a run. put(module, name, value)."""
    put(deeplab, "dilated_resnet", light_resnet)
    put(panels, "CELL", 64)
    for name, value in dict(WIDTH=480, HEIGHT=270, FONT=8).items():
        put(curves, name, value)


def argv(name: str, folder: Path, **flags) -> list[str]:
    """A script's command line, of TINY's flags and these."""
    words = []
    for flag, value in (TINY[name] | flags | dict(output_dir=folder)).items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{flag.replace('_', '-')}", *map(str, values)]
    return words


def fork(program: Callable, **environment) -> multiprocessing.Process:
    """A program of its own, in which nothing is imported again."""
    reads, writes = os.pipe()

    def child():
        os.setpgrp()  # a group of its own, as a terminal gives
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(writes, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
        os.environ.update({key: str(value) for key, value in environment.items()})
        program()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    os.close(writes)
    process.errors = os.fdopen(reads)
    return process


def command(name: str, words: list[str]) -> Callable:
    """A script's program with this command line."""
    script = import_module(name)

    def program():
        sys.argv = [f"{name}.py", *words]
        main(script.train, script.Config, script.RECIPES)

    return program


def fork_two(program: Callable) -> list[multiprocessing.Process]:
    """Two processes of a program, that meet by their environment as torchrun's do."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [fork(program, RANK=rank, **where) for rank in (0, 1)]


def end(process: multiprocessing.Process, status: int = 0) -> str:
    """What a forked program said on stderr, but for losses; it has to end with the status."""
    process.join(120)
    with process.errors as errors:
        said = "".join(line for line in errors if not line.startswith("step "))
    assert process.exitcode == status, said
    return said


def shared(rank: int = 0, world: int = 1) -> dict:
    """How many pictures of `evaluate` are this process's; what it has of all, and of an error."""
    torch.manual_seed(7)
    network = DeepLabV3Plus(7, "resnet18", width=8)
    loader = val_loader(load("shapes", "", "4", "", 0), whole_view, rank, world)
    found = dict(pictures=len(loader.dataset), confusion=evaluate(network, loader, 7, "cpu"))
    found["gathered"] = gather(torch.arange(6.0).view(2, 3).T + 10 * rank)

    def fail():
        if rank == world - 1:
            raise InputError(f"a file: is broken for process {rank}")

    try:
        in_all_processes(fail)
    except InputError as error:
        return found | dict(error=str(error))


def together(folder: Path, runs: dict) -> None:
    """Train every script; save what this process has in the end. What is printed is an error."""
    sys.stdout = sys.stderr
    shapes.COUNTS = COUNTS
    lighten()
    saved = {}
    for name, flags in runs.items():
        script = import_module(name)
        accum = 2 if name == "psmt" else 1
        flags = flags | dict(output_dir=str(folder / name), accum=accum)
        result = script.train(script.Config(**flags))
        saved[name] = dict(weights=result.model.state_dict(), miou=result.miou)
    rank = dist.get_rank()
    torch.save(saved | shared(rank, dist.get_world_size()), folder / f"{rank}.pt")
    dist.destroy_process_group()


def fail(run: Run, step: int, **losses: Tensor) -> None:
    """In the place of Run.log in process 1: what FAULT says."""
    if os.environ["FAULT"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError(os.environ["FAULT"])


if __name__ == "__main__":
    shapes.COUNTS = COUNTS
    lighten()
    if "FAULT" in os.environ and os.environ["RANK"] == "1":
        Run.log = fail
    script = import_module(sys.argv.pop(1))
    main(script.train, script.Config, script.RECIPES)
