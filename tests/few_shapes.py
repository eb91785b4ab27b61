"""A script on few pictures; with --check, what several processes must agree on."""

import sys
from functools import partial
from importlib import import_module

import torch
import torch.distributed as dist

from common import data, shapes
from common.augment import whole_view
from common.deeplab import DeepLabV3Plus
from common.metrics import evaluate
from common.run import Result, RunConfig, main

shapes.COUNTS = {"train": 12, "val": 5}


def check(path: str, cfg: RunConfig) -> Result:
    """Train, then save from each process: weights, and the confusion matrix of a seeded network."""
    result = script.train(cfg)
    torch.manual_seed(7)
    network = DeepLabV3Plus(7, "resnet18", width=8)
    listed = data.load("shapes", "", "4", "", 0)
    rank, world = dist.get_rank(), dist.get_world_size()
    loader = data.val_loader(listed, whole_view, rank, world)
    confusion = evaluate(network, loader, 7, "cpu")
    saved = dict(
        weights=result.model.state_dict(), confusion=confusion, pictures=len(loader.dataset)
    )
    torch.save(saved | {"miou": result.miou}, f"{path}-{rank}.pt")
    return result


if __name__ == "__main__":
    script = import_module(sys.argv.pop(1))
    train = script.train
    if sys.argv[1] == "--check":
        train = partial(check, sys.argv[2])
        del sys.argv[1:3]
    main(train, script.Config, script.RECIPES)
