"""The flags that every script has, and the way from a dataclass to a command line."""

import argparse
import inspect
import math
import re
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin


class InputError(ValueError):
    """The user's input is at fault; the message is one line that says what to change."""


class LoneError(InputError):
    """An InputError that one process of several may meet alone, and therefore has to print."""


@dataclass
class RunConfig:
    """The flags that every script has; the values are those of the embedded dataset."""

    dataset: Literal["shapes", "folder", "voc", "cityscapes"] = "shapes"  # selects the recipe too
    data_path: str = ""  # the dataset's root folder; shapes needs none
    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet18"  # of DeepLabv3+
    weights: str = "none"  # none (random), a torchvision name such as IMAGENET1K_V1, or a path
    crop_size: int = 48  # side of a training crop in pixels, a multiple of 8
    batch_size: int = 8  # labelled pictures per process; as many unlabelled ones come with them
    iters: int = 250  # optimisation steps
    lr: float = 0.06  # initial learning rate, falling to 0 by (1 - step / iters)^0.9
    weight_decay: float = 1e-4  # on weights; BatchNorm and biases have none
    eval_every: int = 125  # steps between two evaluations, each of which writes last.pt
    workers: int = 0  # loader processes per stream and process; 0: load in the main process
    amp: Literal["auto", "none", "bf16"] = "auto"  # auto: bf16 on GPUs that have it, else none
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    seed: int = 0  # of initial weights, batches and every step's randomness
    output_dir: str = ""  # the run's own folder; empty: runs/<script>-<dataset>-<labeled>-s<seed>
    resume: bool = False  # continue the run in the output folder


@dataclass
class SemiConfig(RunConfig):
    """The flags of the scripts that learn from labelled and unlabelled pictures."""

    labeled: str = "1/40"  # 1/r, a count, all, or a list file
    unlabeled: str = ""  # a list file or a folder; empty: the training pictures not labelled
    supervised_only: bool = False  # the baseline: labelled pictures alone, at the same budget


def parse_config(config: type[RunConfig], recipes: dict[str, dict], argv: list[str]) -> RunConfig:
    """The config of a command line: the dataset's recipe, overridden by the flags given.

    recipes[f"{dataset} {labeled}"] and recipes[f"{dataset} {backbone}"] go before recipes[dataset]
    where there are such. Fields become flags; the comment behind a field is its help. Raises
    InputError.
    """
    about = "\n\n".join(inspect.getmodule(config).__doc__.split("\n\n")[:3])  # up to the idea
    parser = _Parser(
        description=about,
        epilog="Values in brackets are the recipe's, which --dataset (and --labeled) selects.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    helps = {}
    for cls in reversed(config.__mro__[:-1]):
        source = inspect.getsource(cls)
        helps |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, flags=re.MULTILINE))
    for field in fields(config):
        flag, kind = "--" + field.name.replace("_", "-"), field.type
        options: dict[str, Any] = {"help": helps[field.name].replace("%", "%%") + " [%(default)s]"}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif get_origin(kind) is tuple:
            options |= {"nargs": "+", "type": get_args(kind)[0]}
        else:
            options["type"] = kind
        parser.add_argument(flag, default=field.default, **options)
    choice = _Parser(add_help=False, allow_abbrev=False)
    choice.add_argument("--dataset", default=config.dataset)
    choice.add_argument("--labeled", default="")
    choice.add_argument("--backbone", default="")
    chosen = choice.parse_known_args(argv)[0]
    for special in dict.fromkeys(("", chosen.backbone, chosen.labeled)):
        parser.set_defaults(**recipes.get(f"{chosen.dataset} {special}".strip(), {}))
    values = vars(parser.parse_args(argv))
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"{message}; --help lists the flags")


def check_config(cfg: RunConfig) -> None:
    """Raise InputError for a flag that cannot be right whatever the data; opens no file."""

    def refuse(name: str, need: str) -> None:
        raise InputError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be {need}")

    for field in fields(cfg):
        value, kind = getattr(cfg, field.name), field.type
        if get_origin(kind) is Literal and value not in get_args(kind):
            refuse(field.name, f"one of {', '.join(get_args(kind))}")
        if kind in (str, bool) and not isinstance(value, kind):
            refuse(field.name, "a string" if kind is str else "True or False")
        if kind is int and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            refuse(field.name, "a whole number, 0 or more")
        if kind is float and not _finite(value):
            refuse(field.name, "a finite number, 0 or more")
        if get_origin(kind) is tuple and not (
            isinstance(value, tuple | list) and value and all(_finite(v) and v for v in value)
        ):
            refuse(field.name, "one or more positive numbers")
    for name in ("iters", "eval_every", "lr"):
        if not getattr(cfg, name):
            refuse(name, "positive")
    if cfg.seed >= 2**32:
        refuse("seed", "below 2^32")
    if cfg.batch_size < 2:
        refuse("batch_size", "2 or more: BatchNorm and CutMix need two pictures")
    if cfg.crop_size < 32 or cfg.crop_size % 8:
        refuse("crop_size", "a multiple of 8, 32 or more")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0
