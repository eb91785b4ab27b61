"""The flags that every script has, and the way from a dataclass to a command line."""

import argparse
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin


class InputError(ValueError):
    """The user's input is at fault; the message is one line that says what to change."""


class LoneError(InputError):
    """An InputError over a file that one process of several meets alone: it prints it itself."""


class Needs(NamedTuple):
    """What a flag's value has to satisfy besides being of its type: in words, and as a test."""

    words: str
    test: Callable[[Any], bool]


# Types of flags. Every number is finite and 0 or more.
Dataset = Literal["shapes", "folder", "voc", "coco", "cityscapes"]
Backbone = Literal["resnet18", "resnet34", "resnet50", "resnet101"]
Share = Annotated[float, Needs("between 0 and 1", lambda value: value <= 1)]
Part = Annotated[float, Needs("0 or more and below 1", lambda value: value < 1)]
Positive = Annotated[float, Needs("positive", lambda value: value > 0)]
Count = Annotated[int, Needs("1 or more", lambda value: value >= 1)]
Span = Annotated[
    tuple[float, ...],
    Needs("two numbers, the smaller one first", lambda v: len(v) == 2 and v[0] <= v[1]),
]
Window = Annotated[int, Needs("0, or 32 pixels and more", lambda value: not 0 < value < 32)]
Side = Annotated[int, Needs("a multiple of 8, 32 or more", lambda v: v >= 32 and v % 8 == 0)]
Batch = Annotated[int, Needs("2 or more: BatchNorm and CutMix need two pictures", lambda v: v > 1)]
Seed = Annotated[int, Needs("below 2^32", lambda value: value < 2**32)]
Resume = Literal[False, True, "changed"]  # a switch that may take a word


@dataclass
class RunConfig:
    """The flags that every script has; the values are those of the embedded dataset."""

    given = None  # no field: which ones `with_recipe` was given

    dataset: Dataset = "shapes"  # selects the recipe too
    data_path: str = ""  # the dataset's root folder; shapes needs none
    backbone: Backbone = "resnet18"  # of DeepLabv3+
    weights: str = "none"  # none (random), a torchvision name such as IMAGENET1K_V1, or a path
    width: Count = 64  # channels of DeepLabv3+'s ASPP and decoder: 256 in its paper
    crop_size: Side = 48  # side of a training crop in pixels, a multiple of 8
    batch_size: Batch = 8  # labelled pictures per process and batch; as many unlabelled beside
    accum: Count = 1  # batches a step, gradients averaged; BatchNorm and means see each alone
    iters: Count = 250  # optimisation steps
    lr: Positive = 0.06  # initial rate, (1 - step / iters)^0.9 later; whatever batch and processes
    weight_decay: float = 1e-4  # on weights; BatchNorm and biases have none
    eval_every: Count = 125  # steps between two evaluations, each of which writes last.pt
    save_every: float = 10.0  # minutes after which last.pt is written between evaluations; 0: off
    eval_window: Window = 0  # side of evaluation's sliding windows in pixels; 0: whole pictures
    workers: int = 0  # loader processes per stream and process; 0: load in the main process
    # fp16 is for GPUs before Ampere, which are slow in bf16.
    amp: Literal["auto", "none", "bf16", "fp16"] = "auto"  # auto: bf16 where GPU or CPU has it
    deterministic: bool = False  # twice the same bits on a GPU, slower; a CPU has them anyway
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    seed: Seed = 0  # of initial weights, batches and every step's randomness
    output_dir: str = ""  # the run's own folder; empty: runs/<script>-<dataset>[-<labeled>]-s<seed>
    resume: Resume = False  # continue the run in the output folder; changed: on other data, too


@dataclass
class SemiConfig(RunConfig):
    """The flags of the scripts that learn from labelled and unlabelled pictures."""

    labeled: str = "1/40"  # 1/r, a count, all, or a list file
    unlabeled: str = ""  # a list file or a folder; empty: the training pictures not labelled
    check: Literal["headers", "full"] = "headers"  # of unlabelled pictures at the start; full: all
    supervised_only: bool = False  # the baseline: labelled pictures alone, at the same budget
    left_out = ("unlabeled", "check")  # no field: those that do nothing with --supervised-only


def parse_config(config: type[RunConfig], recipes: dict[str, dict], argv: list[str]) -> RunConfig:
    """The config of a command line: `with_recipe` of the flags given.

    Fields become flags; the comment behind a field is its help. Raises InputError for the user's
    mistakes, TypeError for those of who wrote the config.
    """
    about = "\n\n".join(inspect.getmodule(config).__doc__.split("\n\n")[:3])  # up to the idea
    parser = Parser(
        description=about,
        epilog="Values in brackets are the recipe's, which --dataset and other flags select.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    helps, actions = _comments(config), []
    for field in fields(config):
        kind = _plain_type(config, field)
        options: dict[str, Any] = {}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = [word for word in get_args(kind) if isinstance(word, str)]
            if True in get_args(kind):  # a switch alone
                options |= dict(nargs="?", const=True)
        elif get_origin(kind) is tuple:
            options |= {"nargs": "+", "type": get_args(kind)[0]}
        else:
            options["type"] = kind
        options["help"] = helps[field.name].replace("%", "%%")
        actions.append(parser.add_argument(_flag(field.name), **options))
    asked = any(word in ("-h", "--help") for word in argv)
    given = vars(parser.parse_args([word for word in argv if word not in ("-h", "--help")]))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    cfg = with_recipe(config, recipes, **given)
    if asked:
        for action in actions:
            value = getattr(cfg, action.dest)
            shown = f"{value:.4g}" if isinstance(value, float) else f"{value}"
            action.help += f" [{shown}]".replace("%", "%%")
        parser.parse_args(["--help"])
    return cfg


def with_recipe(config: type[RunConfig], recipes: dict[str, dict], **given: Any) -> RunConfig:
    """A config of a dataset's recipe, and of the values given, which win.

    recipes[dataset] comes first; then, fewer words first, those whose name has more words, all of
    them values of a flag, or no-FLAG for one that is off: "voc 1/4", "voc no-cutmix", "folder
    no-weights" for --weights none.
    """
    dataset = given.get("dataset", config.dataset)
    if dataset not in recipes:
        known = ", ".join(name for name in recipes if " " not in name)
        raise InputError(f"--dataset {dataset}: has no recipe here; there are {known}")
    cfg = config(**_recipe(config, recipes, recipes[dataset] | given) | given)
    cfg.given = list(given)
    return cfg


def _recipe(config: type[RunConfig], recipes: dict[str, dict], values: dict) -> dict:
    """Of all recipes that these values select, the last value of every field that they have."""
    values = {field.name: field.default for field in fields(config)} | values
    words = {value for value in values.values() if isinstance(value, str)}
    off = [name for name, value in values.items() if value is False or value == "none"]
    words |= {f"no-{name.replace('_', '-')}" for name in off}
    found: dict = {}
    for name in sorted(recipes, key=lambda name: name.count(" ")):
        dataset, *special = name.split()
        if dataset == values["dataset"] and words.issuperset(special):
            found |= recipes[name]
    return found


def refuse_silence(cfg: RunConfig, recipes: dict[str, dict], **ignored: str) -> None:
    """Raise InputError for what would be ignored without a word.

    That is a value given to a field that has no effect, which `ignored` says of a name and why; and
    another dataset with all of the embedded one's settings, for want of its recipe.
    """
    config = type(cfg)
    defaults = {field.name: field.default for field in fields(config)}
    usual = defaults | _recipe(config, recipes, vars(cfg))
    for name, reason in ignored.items():
        value = getattr(cfg, name)
        if value not in (usual[name], defaults[name]):
            switches = {True: _flag(name), False: _flag(f"no_{name}")}
            given = switches[value] if isinstance(value, bool) else f"{_flag(name)} {value}"
            raise InputError(f"{given}: has no effect {reason}")
    toy = all(getattr(cfg, name) == defaults[name] for name in ("weights", "crop_size", "lr"))
    if toy and cfg.dataset != config.dataset and cfg.given is None:
        raise InputError(
            f"dataset={cfg.dataset!r}: with the embedded dataset's settings; write "
            f"recipe({cfg.dataset!r}, data_path=...) for its own"
        )


def given_flags(cfg: RunConfig, names: Sequence[str]) -> list[str]:
    """Of these fields the flags that somebody gave a value."""
    given = cfg.given
    if given is None:
        given = [field.name for field in fields(cfg) if getattr(cfg, field.name) != field.default]
    return [_flag(name) for name in names if name in given]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are InputErrors."""

    def error(self, message: str) -> None:
        raise InputError(f"{message}; --help lists the flags")


@contextmanager
def one_line(program: str) -> Iterator[None]:
    """What cannot be right, or cannot be written, ends a program with one line and status 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console may not know every name
    try:
        yield
    except (InputError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@cache
def _comments(config: type[RunConfig]) -> dict[str, str]:
    """The comment behind each field of a config and of its bases."""
    found = {}
    for cls in reversed(config.__mro__[:-1]):
        source = inspect.getsource(cls)
        found |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, flags=re.MULTILINE))
    for field in fields(config):
        if field.name not in found:
            raise TypeError(
                f"{config.__name__}.{field.name}: write a comment behind it, on its line; it "
                f"becomes the help of {_flag(field.name)}"
            )
    return found


def _plain_type(config: type[RunConfig], field: Any) -> Any:
    """What a field's values are read as: str, bool, int, float, a Literal or a tuple of one."""
    kind = get_args(field.type)[0] if get_origin(field.type) is Annotated else field.type
    if isinstance(kind, str):
        raise TypeError(
            f"{config.__name__}.{field.name}: its type is a string; remove `from __future__ import "
            "annotations` where the config is defined"
        )
    if kind not in (str, bool, int, float) and get_origin(kind) not in (Literal, tuple):
        raise TypeError(
            f"{config.__name__}.{field.name}: {kind} cannot be read from a command line; take str, "
            "bool, int, float, a tuple or a Literal, and a value that means none"
        )
    return kind


def check_config(cfg: RunConfig) -> None:
    """Raise InputError for a flag that cannot be right whatever the data; opens no file."""
    for field in fields(cfg):
        value, kind = getattr(cfg, field.name), _plain_type(type(cfg), field)
        needs = [_own_needs(kind), *getattr(field.type, "__metadata__", ())]
        for words, test in needs:
            if not test(value):
                raise InputError(f"{_flag(field.name)} {value}: must be {words}")
    if cfg.dataset == "shapes" and cfg.data_path:
        raise InputError(
            f"--data-path {cfg.data_path}: --dataset shapes draws its pictures; for your own add "
            "--dataset folder"
        )


SMALLEST = 8  # pixels: less of a picture is not meant


def check_scales(cfg: RunConfig, image: str, height: int, width: int) -> None:
    """Raise InputError where a crop, at one of the scales, would show next to nothing of a picture.

    A scale is a number, or in a script with --base-size the long side's share of that.
    """
    long = max(height, width)
    for name in ("scales", "pair_scales", "tag_scales"):
        base = getattr(cfg, "base_size", long)
        sides = [scale * base for scale in getattr(cfg, name, ())]
        for side in sides:
            if side < SMALLEST:
                what = f"leave {side:.2g} of {long} pixels of {image}; take larger ones"
            elif cfg.crop_size * long / side < SMALLEST:
                what = f"enlarge {image} so that a crop shows under {SMALLEST} pixels; take smaller"
            else:
                continue
            raise InputError(f"{_flag(name)} {' '.join(map(str, getattr(cfg, name)))}: {what}")


def crop_share(cfg: RunConfig, height: int, width: int) -> float:
    """The share of a picture that a training crop shows at the middle one of --scales."""
    long = max(height, width)
    side = median(getattr(cfg, "scales", [1.0])) * getattr(cfg, "base_size", long)
    shown = cfg.crop_size * long / side  # pixels of the picture, before it is scaled
    return min(shown / height, 1) * min(shown / width, 1)


def _own_needs(kind: Any) -> Needs:
    """What every value of a type has to satisfy."""
    if get_origin(kind) is Literal:
        return Needs(f"one of {', '.join(map(str, get_args(kind)))}", lambda v: v in get_args(kind))
    if get_origin(kind) is tuple:
        words = "one or more positive numbers"
        several = lambda v: isinstance(v, tuple | list) and len(v) > 0  # noqa: E731
        return Needs(words, lambda v: several(v) and all(_finite(x) and x > 0 for x in v))
    return {
        str: Needs("a string", lambda v: isinstance(v, str)),
        bool: Needs("True or False", lambda v: isinstance(v, bool)),
        int: Needs("a whole number, 0 or more", lambda v: _finite(v) and isinstance(v, int)),
        float: Needs("a finite number, 0 or more", _finite),
    }[kind]


def _finite(value: Any) -> bool:
    """Whether it is a number from 0 on; NaN is not."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < math.inf
