"""Flags, the run's folder, checkpoints, exact resuming, several processes, errors midway."""

import ctypes
import itertools
import json
import math
import os
import shutil
import sys
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trees
from few_shapes import SEMI, SMALL
from few_shapes import TINY as TINY_OF
from PIL import Image
from torch import nn

import cac
import cps
import ial
import psmt
from common import machine, shapes
from common.augment import whole_view
from common.data import load
from common.deeplab import DeepLabV3Plus
from common.flags import (
    Part,
    RunConfig,
    SemiConfig,
    Share,
    Span,
    check_config,
    given_flags,
    parse_config,
    refuse_silence,
    with_recipe,
)
from common.loaders import val_loader
from common.machine import average_buffers, average_gradients
from common.metrics import evaluate, iou
from common.outputs import evaluation, iou_columns, replace_file, replace_text
from common.progress import duration, plan, short
from common.run import InputError, Run, main

TINY = SEMI | dict(iters=8)


def said(work, error=InputError):
    """The one line of an error."""
    with pytest.raises(error) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def train(folder, **flags):
    return cps.train(cps.Config(output_dir=str(folder), **TINY | flags))


def made(folder, total=None, **flags):
    return Run("any", SemiConfig(output_dir=str(folder), **TINY | flags), total)


def begun(folder, total=None, **flags):
    """A run that has started, with its network."""
    run = made(folder, total, **flags)
    network = DeepLabV3Plus(7, "resnet18", width=8)
    run.start(run.load(), [network], network=network)
    return run, network


def logged(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key != "seconds"} for line in lines]


def saved(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


# --- flags ---


@dataclass
class Typed(SemiConfig):
    share: Share = 0.5  # a share
    part: Part = 0.5  # 100 % is too much
    span: Span = (1.0, 2.0)  # from, to
    many: tuple[float, ...] = (1.0,)  # numbers
    switch: bool = True  # on or off
    name: str = ""  # any


VALUES = {  # of a flag: some that it takes, some that it refuses
    "share": ([0, 0.0, 1.0], [-0.1, 1.1, math.nan, "half", None, True]),
    "part": ([0.0, 0.99], [1.0, -0.1]),
    "span": ([(1.0, 1.0), [1, 2]], [(2.0, 1.0), (1.0,), (1.0, 2.0, 3.0), (0.0, 1.0), 1.0]),
    "many": ([(3.0, 1.0)], [(), (1.0, 0.0), (math.inf,), 1.0, "1"]),
    "switch": ([True, False], ["no", 1, None]),
    "resume": ([True, False, "changed"], ["yes", None]),
    "name": (["x"], [7, None]),
    "iters": ([1], [0, -3, 2.5, True]),  # Count
    "lr": ([1e-9, 3], [0.0, -1.0, math.nan, math.inf]),  # Positive
    "weight_decay": ([0.0], [-1e-4, math.inf]),  # a plain float
    "workers": ([0, 4], [-1, 0.5]),  # a plain int
    "batch_size": ([2], [1, 0]),  # Batch
    "crop_size": ([32, 800], [0, -64, 24, 50]),  # Side
    "eval_window": ([0, 32, 33], [-5, 16, 31]),  # Window
    "seed": ([0, 2**32 - 1], [-1, 2**32]),  # Seed
    "amp": (["none"], ["fp8", None]),
    "backbone": (["resnet50"], ["vgg16"]),
}


@pytest.mark.parametrize("name, good, bad", [(k, *v) for k, v in VALUES.items()], ids=VALUES)
def test_a_value_that_cannot_be_right_is_refused_by_name(name, good, bad, tmp_path):
    for value in good:
        check_config(Typed(**{name: value}))
    for value in bad:
        cfg = Typed(**{name: value}, output_dir=str(tmp_path / "run"))
        message = said(partial(Run, "any", cfg))
        assert message.startswith(f"--{name.replace('_', '-')} {value}: must be ")
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, hint in (("tpu9", "use auto, cpu"), ("meta", "use auto, cpu"), ("cuda", "use --dev")):
        message = said(partial(Run, "any", Typed(device=name)))
        assert message.startswith(f"--device {name}: ") and hint in message


def test_bf16_is_taken_where_it_is_native(tmp_path, monkeypatch):
    for capability, fast in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, it=capability: it)
        assert machine.has_bf16(torch.device("cuda", 0)) == fast
    for avx512, amx in itertools.product((False, True), repeat=2):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", partial(bool, avx512))
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", partial(bool, amx))
        assert machine.has_bf16(torch.device("cpu")) == (avx512 or amx)
        assert not machine.has_bf16(torch.device("mps"))
        for amp, expected in (("none", False), ("bf16", True), ("auto", avx512 or amx)):
            cfg = Typed(amp=amp, device="cpu", output_dir=str(tmp_path / "run"))
            assert Run("any", cfg).dtype == (torch.bfloat16 if expected else torch.float32)


def test_fp16_is_for_cuda_alone(tmp_path):
    assert machine.precision(torch.device("cuda", 0), "fp16") == torch.float16
    cfg = Typed(amp="fp16", device="cpu", output_dir=str(tmp_path / "run"))
    assert said(partial(Run, "any", cfg)) == (
        "--amp fp16: for CUDA GPUs alone; use auto, bf16 or none"
    )
    assert not (tmp_path / "run").exists()


def test_a_deterministic_run_asks_pytorch_for_it(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for wanted in (False, True):
        made(tmp_path / "run", deterministic=wanted)
        assert torch.are_deterministic_algorithms_enabled() == wanted
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == wanted
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


def test_memory_is_kept_where_the_c_library_can(monkeypatch):
    asked = []
    malloc = SimpleNamespace(mallopt=lambda *option: asked.append(option))
    for library in (malloc, SimpleNamespace()):  # glibc; macOS and musl lack it
        monkeypatch.setattr(ctypes, "CDLL", lambda _, library=library: library)
        machine.keep_memory()
    assert asked == [(-1, 2**31 - 1), (-3, 2**25)]


RECIPES = {
    "shapes": {},
    "voc": dict(dataset="voc", lr=0.5, labeled="1/8"),
    "voc resnet101": dict(backbone="resnet101", iters=101, crop_size=64),
    "voc 1/4": dict(labeled="1/4", lr=0.25, iters=4),
    "voc no-switch": dict(iters=7),
    "voc no-switch 1/4": dict(iters=8),
}


@pytest.mark.parametrize(
    "words, expected",
    [
        ("", {}),
        ("--resume --lr 2 --no-switch", dict(resume=True, lr=2.0, switch=False)),
        ("--resume changed --lr 2", dict(resume="changed", lr=2.0)),
        ("--span 1 2.5 --many 3 --part 0", dict(span=(1.0, 2.5), many=(3.0,), part=0.0)),
        ("--dataset voc", RECIPES["voc"]),
        ("--lr=0.1 --dataset=voc", RECIPES["voc"] | dict(lr=0.1)),
        ("--dataset voc --labeled 1/4", RECIPES["voc"] | RECIPES["voc 1/4"]),
        ("--dataset voc --labeled 1/3", RECIPES["voc"] | dict(labeled="1/3")),
        ("--dataset voc --no-switch", RECIPES["voc"] | dict(switch=False, iters=7)),
        (
            "--dataset voc --labeled 1/4 --no-switch",
            RECIPES["voc"] | RECIPES["voc 1/4"] | dict(switch=False, iters=8),
        ),
        ("--labeled 1/4", dict(labeled="1/4")),
        ("--dataset voc --backbone=resnet101", RECIPES["voc"] | RECIPES["voc resnet101"]),
        (
            "--dataset voc --backbone=resnet101 --labeled=1/4 --crop-size 96",
            RECIPES["voc"] | RECIPES["voc resnet101"] | RECIPES["voc 1/4"] | dict(crop_size=96),
        ),
    ],
)
def test_the_command_line_is_the_recipe_and_the_flags_win(words, expected):
    assert parse_config(Typed, RECIPES, words.split()) == Typed(**expected)


def test_what_would_have_no_effect_is_refused():
    ignored = dict(switch="without a light")
    voc = partial(with_recipe, Typed, RECIPES, dataset="voc")
    refuse_silence(voc(iters=9), RECIPES, **ignored)
    refuse_silence(Typed(), RECIPES, **ignored)
    message = said(partial(refuse_silence, voc(switch=False), RECIPES, **ignored))
    assert message == "--no-switch: has no effect without a light"
    # The recipe's own value is not one that the user gave.
    off = {"shapes": {}, "voc": RECIPES["voc"] | dict(switch=False)}
    refuse_silence(with_recipe(Typed, off, dataset="voc"), off, **ignored)


def test_flags_that_somebody_gave_a_value_are_known():
    """Of a recipe also those given its own value; of a config made by hand those that differ."""
    words = ["--dataset", "voc", "--lr", "0.5", "--iters", str(Typed.iters)]
    given = given_flags(parse_config(Typed, RECIPES, words), ("iters", "switch", "lr", "labeled"))
    assert given == ["--iters", "--lr"]
    assert given_flags(Typed(switch=False), ("iters", "switch")) == ["--switch"]


def test_another_dataset_with_the_toys_settings_is_refused():
    message = said(partial(refuse_silence, Typed(dataset="voc", iters=9), RECIPES))
    assert "write recipe('voc', data_path=...)" in message
    refuse_silence(Typed(dataset="voc", crop_size=64), RECIPES)  # settings of one's own
    toy = {name: getattr(Typed(), name) for name in ("weights", "crop_size", "lr")}
    refuse_silence(with_recipe(Typed, RECIPES, dataset="voc", **toy), RECIPES)  # asked for


def test_a_data_path_without_its_dataset_is_refused():
    message = said(partial(check_config, Typed(data_path="mine")))
    assert "--data-path mine" in message and "add --dataset folder" in message


@pytest.mark.parametrize(
    "words",
    ["--itres 5", "--iters many", "--dataset imagenet", "--backbone vgg", "--lr", "--dataset"]
    + ["--iter 5", "--resume yes", "--dataset folder"],
)
def test_a_flag_that_cannot_be_read_is_refused(words):
    message = said(partial(parse_config, Typed, RECIPES, words.split()))
    assert words.split()[words == "--resume yes"] in message


@dataclass
class Uncommented(RunConfig):
    bare: int = 0


@dataclass
class Optional(RunConfig):
    limit: int | None = None  # of something


FUTURE = '''"""A fifth script."""
from __future__ import annotations
from dataclasses import dataclass
from common.flags import RunConfig
@dataclass
class Config(RunConfig):
    tau: float = 0.5  # a threshold
'''


def test_who_writes_a_config_is_told_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "fifth.py").write_text(FUTURE)
    monkeypatch.syspath_prepend(tmp_path)
    future = import_module("fifth").Config
    for config, words in (
        (Uncommented, "Uncommented.bare: write a comment behind it"),
        (Optional, "Optional.limit: int . None cannot be read .* a value that means none"),
        (future, "Config.tau: .* remove `from __future__ import annotations`"),
    ):
        with pytest.raises(TypeError, match=words):
            parse_config(config, {"shapes": {}}, [])
    with pytest.raises(TypeError, match="Optional.limit"):
        check_config(Optional())  # in a notebook, too


# --- the folder ---


def test_default_folders_are_numbered_and_resume_takes_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = Path("runs/any-shapes-1_20-s3")

    def folder(config=SemiConfig, **flags):
        return Run("any", config(**dict(seed=3) | flags)).folder

    def semi(**flags):
        return folder(**dict(labeled="1/20") | flags)

    assert semi() == semi(resume=True) == name
    for suffix in ("", "-2", "-3"):
        assert semi() == Path(f"{name}{suffix}")
        Path(f"{name}{suffix}").mkdir(parents=True)
        Path(f"{name}{suffix}/config.json").touch()
        assert semi(resume=True) == Path(f"{name}{suffix}")
    (name / "config.json").unlink()  # a gap in the numbers is not filled
    assert semi() == Path(f"{name}-4") and semi(resume=True) == Path(f"{name}-3")
    assert semi(supervised_only=True) == Path(f"{name}-sup")
    assert semi(labeled="lists/mine.txt") == Path("runs/any-shapes-mine-s3")
    assert folder(RunConfig) == Path("runs/any-shapes-s3")


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(few, light, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")  # no run: no reason to refuse
    train(tmp_path, iters=2)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert "--resume" in said(partial(train, tmp_path, iters=2))
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_is_refused(few, light, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"--output-dir {place}: " in said(partial(begun, place))


def test_two_runs_that_start_at_once_do_not_share_a_folder(few, light, tmp_path):
    late = made(tmp_path)
    begun(tmp_path)
    assert "another run" in said(lambda: late.start(late.load(), []))


def test_outputs_are_complete_and_the_checkpoints_rebuild_the_model(few, light, tmp_path):
    result = train(tmp_path, eval_window=48)
    for name, steps in (("miou", [2, 4, 6, 8]), ("loss_sup", [*range(1, 9)])):
        assert [line["step"] for line in logged(tmp_path) if name in line] == steps
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["batch_size"] == 2 and set(config) == {
        "processes",
        "script",
        *asdict(cps.Config()),
    }
    rows = (tmp_path / "iou.txt").read_text().splitlines()
    assert [row.split("\t")[0] for row in rows] == [*shapes.CLASSES, "mean"]
    assert rows[-1] == f"mean\t{100 * result.miou:.2f}"

    last, best = saved(tmp_path), saved(tmp_path, "best.pt")
    model = {"networks", "arguments", "classes", "colors", "mean", "std", "window", "step", "miou"}
    assert set(best) == model and set(last) == model | {"best", "settings", "state"}
    assert best["miou"] == max(entry["miou"] for entry in result.history) == last["best"]
    loader = val_loader(load("shapes", "", "4", "", 0), whole_view)
    for content in (last, best):
        assert content["classes"] == shapes.CLASSES and len(content["colors"]) == 7
        network = DeepLabV3Plus(**content["arguments"][0])
        network.load_state_dict(content["networks"][0])
        ious = iou(evaluate(network, loader, 7, "cpu", (48, 32)))
        (entry,) = (e for e in result.history if e["step"] == content["step"])
        values = [None if math.isnan(v) else v for v in ious.tolist()]
        assert entry["iou"] == dict(zip(shapes.CLASSES, values, strict=True))
        assert entry["miou"] == content["miou"]


def test_a_run_that_diverges_says_so(few, light, tmp_path):
    assert "lower --lr" in said(partial(train, tmp_path, lr=1e30))


def test_the_best_checkpoint_stays_and_one_that_is_not_finite_is_not_written(few, light, tmp_path):
    run, network = begun(tmp_path)
    absent = torch.tensor([math.nan] + [0.0] * 6)
    for step, miou in enumerate((0.25, 0.5, 0.375)):
        run.record(step, absent + miou, other=absent + 0.125)
    network.classifier.bias.data[0] = math.nan
    assert "diverged" in said(lambda: run.record(3, absent + 1))
    run.state["student"], run.networks = network, [deepcopy(network)]  # which are evaluated
    run.networks[0].classifier.bias.data.zero_()
    assert "diverged" in said(lambda: run.save(3)) == said(lambda: run.record(3, absent + 1))
    assert saved(tmp_path, "best.pt")["step"] == 2 and saved(tmp_path)["step"] == 3
    assert (tmp_path / "iou.txt").read_text().startswith("ground\tabsent\nfish\t37.50\n")
    by_class = dict(zip(shapes.CLASSES, [None] + [0.375] * 6, strict=True))
    entry = {"step": 3, "miou": 0.375, "iou": by_class, "other": 0.125}
    assert logged(tmp_path)[-1] == entry
    again, _ = begun(tmp_path, resume=True)
    assert (again.miou, again.best, again.history[-1]) == (0.375, 0.5, entry)


def test_an_evaluation_completes_the_line_of_its_step(few, light, tmp_path, capsys):
    """So that losses and mIoU of one step are one row of a table; a stage's line stays its own."""
    run, _ = begun(tmp_path)
    ious = torch.tensor([math.nan, 0.5, 0.25, 0.5, 0.5, 0.25, 0.5], dtype=torch.float64)
    by_class = {"ground": None} | dict(zip(shapes.CLASSES[1:], ious.tolist()[1:], strict=True))
    for step in run.loop():
        run.log(step, loss_sup=1.0)
        if step == 3:
            run.note(step, "stage", other=0.5)
        if run.due(step):
            run.record(step, ious, teacher=ious)
    losses = [dict(step=step, loss_sup=1.0) for step in range(1, 9)]
    scored = dict(miou=ious.nanmean().item(), iou=by_class, teacher=ious.nanmean().item())
    expected = [line | (scored if line["step"] % 2 == 0 else {}) for line in losses]
    expected.insert(4, dict(step=4, stage="stage", other=0.5))
    assert logged(tmp_path) == expected
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert all(list(json.loads(line))[-1] == "seconds" for line in lines)

    again, _ = begun(tmp_path, resume=True)
    assert again.history == run.history == [dict(step=s, **scored) for s in (2, 4, 6, 8)]
    capsys.readouterr()
    for name in ("panels.png", "curves.png"):  # they are drawn at every evaluation, and in the end
        (tmp_path / name).unlink()
    again.finish()
    assert (tmp_path / "panels.png").is_file() and (tmp_path / "curves.png").is_file()
    table = [line.split() for line in capsys.readouterr().out.splitlines()[:3]]
    assert table[0] == "IoU by class in %".split()
    assert table[1] == "ground absent leaf 25.00 house 50.00 butterfly 50.00".split()


def test_ious_on_a_console_are_aligned_in_as_many_columns_as_fit():
    ious = {"sky": 0.5, "traffic light": None, "car": 1.0}
    assert iou_columns(ious, 30) == (
        "    sky             50.00\n    traffic light  absent\n    car            100.00\n"
    )
    assert iou_columns(ious, 60) == (
        "    sky             50.00    car            100.00\n    traffic light  absent\n"
    )


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    def broken(file):
        file.write(b"ne")
        raise OSError("disk full")

    path = tmp_path / "file"
    replace_text(path, "old")
    with pytest.raises(InputError, match=": file cannot be written .disk full.; what was"):
        replace_file(path, broken)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    replace_text(path, "new")
    assert path.read_text() == "new"


# --- steps ---


def test_nothing_of_a_run_is_known_before_its_start(few, light, tmp_path):
    """A loader made then would begin at step 0, and a resumed run replay its batches."""
    run = made(tmp_path / "run")
    for early in (
        lambda: run.first,
        lambda: run.history,
        lambda: run.batches("labeled", whole_view),
        lambda: next(run.loop()),
        lambda: run.evaluate(1),
        lambda: run.record(1, torch.ones(7)),
        lambda: run.note(1, "stage"),
        lambda: run.save(1),
        lambda: run.finish(),
    ):
        assert "before Run.start" in said(early, AttributeError)
    assert not (tmp_path / "run").exists()


def test_batches_and_steps_go_on_where_the_run_does(few, light, tmp_path):
    whole, _ = begun(tmp_path)
    batches = [images for images, _ in whole.batches("unlabeled", whole_view, begin=2)]
    assert list(whole.loop()) == list(range(8)) and len(batches) == 6
    for done, left in ((1, 6), (5, 3)):
        whole.save(done - 1)
        run, _ = begun(tmp_path, resume=True)
        rest = [images for images, _ in run.batches("unlabeled", whole_view, begin=2)]
        assert list(run.loop()) == list(range(done, 8)) and len(rest) == left
        assert all(torch.equal(a, b) for a, b in zip(batches[-left:], rest, strict=True))


def test_each_step_and_process_has_its_own_seed(few, light, tmp_path):
    run, _ = begun(tmp_path)
    seeds = []
    for run.rank in (0, 1, 0):
        seeds.append([torch.initial_seed() for _ in run.loop(range(3))])
    assert seeds[0] == seeds[2] and len(set(seeds[0] + seeds[1])) == 6
    run.seed(2)
    assert torch.initial_seed() == seeds[0][2]


def test_stages_are_noted_and_saved(few, light, tmp_path, capsys):
    run, _ = begun(tmp_path, total=19)
    assert run.total == 19 and [s for s in range(19) if run.due(s)] == [*range(1, 19, 2), 18]
    capsys.readouterr()
    run.note(2, "first", good=0.51234, energy_of_it=0.51234, bad=math.nan, worse=math.inf)
    said = capsys.readouterr().out
    assert said == "step 3/19  first: good 51.23  energy_of_it 0.5123\n"
    assert not (tmp_path / "last.pt").exists()
    run.save(4)
    for run.rank in (0, 1):  # the second process is silent
        run.note(4 + run.rank, "second", other=1)
    run.save(6)
    assert saved(tmp_path)["step"] == 5
    assert logged(tmp_path) == [
        {"step": 3, "stage": "first", "good": 0.51234, "energy_of_it": 0.51234}
        | {"bad": None, "worse": None},
        {"step": 5, "stage": "second", "other": 1.0},
    ]


# --- resuming ---


def test_resume_refuses_other_flags_and_broken_checkpoints(few, light, tmp_path, monkeypatch):
    train(tmp_path, iters=2)

    def resume(**flags):
        return said(partial(train, tmp_path, **dict(iters=2) | flags, resume=True))

    for changed in (dict(lr=0.5), dict(iters=9), dict(seed=1), dict(cutmix=False), dict(width=16)):
        assert f"--{next(iter(changed)).replace('_', '-')}" in resume(**changed)
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "CLASSES", ["ground", "trout", *shapes.CLASSES[2:]])
        assert "trout" in resume()
    (tmp_path / "last.pt").write_bytes(b"rubbish")
    assert "last.pt" in resume()


def test_a_checkpoint_is_read_to_the_cpu(few, light, tmp_path, monkeypatch):
    """On a GPU it would take the memory that the run needs."""
    train(tmp_path, iters=1)
    read, places = torch.load, []
    monkeypatch.setattr(
        torch, "load", lambda path, **how: places.append(how["map_location"]) or read(path, **how)
    )
    train(tmp_path, iters=1, resume=True)
    assert places == ["cpu"]


def of_folder(folder, root, **flags):
    """A run on a folder of pictures, two of which are labelled by a list, after its first step."""
    flags = TINY | dict(dataset="folder", data_path=str(root), labeled=str(root / "list")) | flags
    run = Run("any", SemiConfig(output_dir=str(folder), **flags))
    network = DeepLabV3Plus(3, "resnet18", width=8)
    run.start(run.load(), [network], network=network)
    run.save(0)
    return run


@pytest.fixture
def listed(light, tmp_path):
    """Pictures with a list of labelled ones, and a folder with a run on them."""
    root = trees.folder_tree(tmp_path / "data")
    (root / "list").write_text("000\n001\n")
    of_folder(tmp_path / "run", root)
    return tmp_path / "run", root


def redraw(path):
    """Other values in a mask, as if it were corrected; the size of its picture stays."""
    mask = np.array(Image.open(path))
    trees.save_mask(path, np.where(mask == 1, 2, mask))


CHANGES = {  # what is done to the data after the start, what of it is named
    "a mask": (lambda root: redraw(root / "masks/train/001.png"), "masks/train/001.png (changed)"),
    "a validation picture": (
        lambda root: trees.save_picture(root / "images/val/002.jpg", np.random.default_rng(9)),
        "images/val/002.jpg (changed)",
    ),
    "an unlabelled picture more": (
        lambda root: shutil.copy(root / "images/train/002.jpg", root / "images/train/new.jpg"),
        "images/train/new.jpg (new)",
    ),
    "one less": (lambda root: (root / "images/train/005.jpg").unlink(), "/005.jpg (gone)"),
    "the list": (
        lambda root: (root / "list").write_text("000\n003\n"),
        "images/train/001.jpg (in another list), images/train/003.jpg (in another list), "
        "masks/train/001.png (gone), masks/train/003.png (new)",
    ),
}


@pytest.mark.parametrize("change, named", CHANGES.values(), ids=CHANGES)
def test_data_that_changed_is_named_and_resumed_by_word(change, named, listed):
    folder, root = listed
    change(root)
    message = said(partial(of_folder, folder, root, resume=True))
    assert message.startswith(f"{folder}: the data is not") and f"{named}; restore it" in message
    assert message.endswith("--resume changed")
    assert of_folder(folder, root, resume="changed").first == 1
    assert of_folder(folder, root, resume=True).first == 1  # from then on it is the run's data


def test_equal_data_elsewhere_is_the_same_data(listed):
    folder, root = listed
    moved = shutil.copytree(root, root.parent / "moved", copy_function=shutil.copyfile)  # new times
    flags = dict(labeled=str(root / "list"), resume=True)  # the flag itself must be the same
    assert of_folder(folder, moved, **flags).first == 1


def test_other_classes_are_never_resumed(listed):
    folder, root = listed
    (root / "classes.txt").write_text("ground\ndog\ncat\n")
    for resume in (True, "changed"):
        assert "dog, cat" in said(partial(of_folder, folder, root, resume=resume))


def test_a_run_without_a_record_of_its_data_is_resumed(listed):
    folder, root = listed
    for damage in (b"[", b"[1]", b"\xff", b"[" * 100_000):
        (folder / "files.json").write_bytes(damage)
        message = said(partial(of_folder, folder, root, resume=True))
        assert message == f"{folder / 'files.json'}: unreadable; delete it to go on unchecked"
    (folder / "files.json").unlink()
    redraw(root / "masks/train/001.png")
    assert of_folder(folder, root, resume=True).first == 1
    redraw(root / "masks/train/000.png")  # now there is one
    assert "masks/train/000.png" in said(partial(of_folder, folder, root, resume=True))


STATES = [  # what a checkpoint of another kind may hold
    dict(step=-1),
    dict(step=3),
    dict(step=1.0),
    dict(step="1"),
    dict(miou="x"),
    dict(best=torch.zeros(2)),
    dict(best=None),
    dict(state={}),
    dict(state=dict(network={})),
    dict(state=7),
]


@pytest.mark.parametrize("changed", STATES, ids=str)
def test_a_checkpoint_of_other_values_is_refused(changed, few, light, tmp_path):
    run, _ = begun(tmp_path, iters=2)
    run.save(0)
    torch.save(saved(tmp_path) | changed, tmp_path / "last.pt")
    message = said(partial(begun, tmp_path, iters=2, resume=True))
    assert message.startswith(f"{tmp_path / 'last.pt'}: ") and "delete it to start" in message


def test_a_message_has_no_value_that_grows_without_end(few, light, tmp_path):
    """A list of two references to a list, and so on, is small until it is printed."""
    run, _ = begun(tmp_path, iters=2)
    run.save(0)
    whole, value = saved(tmp_path), []
    for _ in range(60):
        value = [value, value]
    for settings in (
        whole["settings"] | dict(lr=value),
        whole["settings"] | {1: 0},
        [1],
        None,
        10**5000,
    ):
        torch.save(whole | dict(settings=settings), tmp_path / "last.pt")
        assert "last.pt: unreadable (" in said(partial(begun, tmp_path, iters=2, resume=True))


def test_damaged_settings_are_made_up_for(few, light, tmp_path):
    """config.json is for who reads it; last.pt knows the settings, too."""
    run, _ = begun(tmp_path, iters=2)
    run.save(0)
    config = tmp_path / "config.json"
    for content in (b"[1]", b"7", b"\xff", b"", b"[" * 10**5, b"9" * 10**4):
        config.write_bytes(content)
        assert begun(tmp_path, iters=2, resume=True)[0].first == 1
    config.unlink()
    os.mkfifo(config)  # would be waited for
    assert begun(tmp_path, iters=2, resume=True)[0].first == 1
    (tmp_path / "last.pt").unlink()
    (tmp_path / "last.pt").mkdir()  # not at the first evaluation, hours later
    assert "last.pt: unreadable" in said(partial(begun, tmp_path, iters=2, resume=True))


def test_resuming_a_finished_run_gives_its_result(few, light, tmp_path):
    first = train(tmp_path, iters=2)
    again = train(tmp_path, iters=2, resume=True, workers=1, device="auto")
    assert again.miou == first.miou and again.history == first.history
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b.cpu())


def test_what_an_evaluation_gave_is_found_whatever_the_order():
    line = {"step": 4, "loss": 1.0, "iou": {"a": 0.5}, "miou": 0.5, "student": 0.4, "seconds": 9.0}
    told = {"step": 4, "iou": {"a": 0.5}, "miou": 0.5, "student": 0.4}
    assert evaluation(line) == told


@pytest.mark.parametrize("damage", [None, "last.pt", "config.json"])
def test_another_scripts_run_is_not_resumed(damage, few, light, tmp_path):
    train(tmp_path, iters=2)
    for name in {"last.pt": ["last.pt"], "config.json": ["config.json"]}.get(damage, []):
        (tmp_path / name).unlink()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    flags = SEMI | dict(output_dir=str(tmp_path), iters=2, resume=True)
    message = said(partial(cac.train, cac.Config(**flags)))
    assert message == f"--output-dir {tmp_path}: was made by cps.py; name another folder"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_whose_config_is_damaged_is_resumed(few, light, tmp_path):
    train(tmp_path, iters=2)
    (tmp_path / "config.json").write_text("[")
    train(tmp_path, iters=2, resume=True)


def test_resume_says_where_it_goes_on(few, light, tmp_path, capsys, power_cut):
    train(tmp_path / "new", iters=2, resume=True)
    out = capsys.readouterr().out
    assert "--resume: nothing to resume, begins at step 1\n" in out
    power_cut(3, partial(train, tmp_path / "cut", iters=4))
    assert "--resume" not in capsys.readouterr().out
    train(tmp_path / "cut", iters=4, resume=True)
    assert "--resume: goes on after step 2 of 4\n" in capsys.readouterr().out
    train(tmp_path / "cut", iters=4, resume=True)
    out = capsys.readouterr().out
    assert "--resume: all 4 steps are done\n" in out and "epochs" not in out


@pytest.mark.parametrize("script", [cps, cac])
def test_crops_of_large_photographs_are_said_to_show_little(
    script, few, light, tmp_path, monkeypatch, capsys
):
    """CAC scales pictures to --base-size first."""
    monkeypatch.setattr("common.run.read_header", lambda path: (3000, 4000))
    script.train(script.Config(**TINY_OF[script.__name__] | dict(output_dir=str(tmp_path))))
    said = "crops of --crop-size 32 show 0.0085 % of a picture: make pictures smaller, or crops"
    assert (said in capsys.readouterr().out) == (script is cps)


def test_processes_exchange_gradients_once_a_step(few, light, tmp_path, monkeypatch):
    run, network = begun(tmp_path, accum=3)
    run.world = 2
    monkeypatch.setattr(run, "_wishes", lambda step, at_once: (0, False))
    trained = run.wrap(network)
    exchanged = [trained.require_backward_grad_sync for _ in itertools.islice(run.loop(), 6)]
    assert exchanged == [False, False, True] * 2


@pytest.mark.parametrize(
    "script, flags, plan",
    [
        (cps, {}, "2 labelled and 2 unlabelled pictures: 2 epochs of the labelled, 1 of the un"),
        (
            psmt,
            dict(accum=3, warmup=0.5),
            "6 labelled and 6 unlabelled pictures (2 batch x 3 accum): 6 epochs of the labelled, "
            "1.5 of the un",
        ),
        (cac, dict(supervised_only=True), "2 pictures: 2 epochs\n"),
    ],
)
def test_the_start_says_how_many_steps_of_what(script, flags, plan, few, light, tmp_path, capsys):
    usual = TINY_OF[script.__name__] | dict(output_dir=str(tmp_path / "run"), iters=4)
    script.train(script.Config(**usual | flags))
    assert f"\n4 steps of {plan}" in capsys.readouterr().out


def test_processes_count_in_the_plan(few):
    data, cfg = load("shapes", "", "4", "", 0), cps.Config(batch_size=2, accum=3)
    assert plan(cfg, data, total=10, processes=2, begin=4) == (
        "10 steps of 12 labelled and 12 unlabelled pictures (2 batch x 3 accum x 2 processes): 30 "
        "epochs of the labelled, 9 of the unlabelled"
    )


def test_the_plan_of_stages_is_said_once(few, light, tmp_path, capsys):
    ial.train(ial.Config(**TINY_OF["ial"] | dict(output_dir=str(tmp_path / "run"))))
    out = capsys.readouterr().out
    assert "\n10 steps of 2 pictures: 1.67 epochs\n" in out and out.count("epochs") == 1


def test_soon_after_the_start_and_a_warm_up_the_time_left_is_said(
    few, light, tmp_path, capsys, monkeypatch
):
    run, _ = begun(tmp_path, iters=1000)
    run.batches("unlabeled", whole_view, begin=20)
    now, seconds = 0.0, {False: 7, True: 60}
    monkeypatch.setattr(time, "time", lambda: now)
    for step in itertools.islice(run.loop(), 40):
        now += 1000 if step < 3 else seconds[step >= 20]  # the first steps take longest
    lines = [line for line in capsys.readouterr().out.splitlines() if "about" in line]
    assert lines == [
        "step 8/1000  about 1.9 h to step 1000, without evaluations",
        "step 28/1000  about 16.2 h to step 1000, without evaluations",
    ]
    assert [short(n) for n in (1.6667, 83.33, 999.6, 12345)] == ["1.67", "83.3", "1000", "12345"]
    assert [duration(s) for s in (20, 89, 100, 5000, 6000)] == "20 s,89 s,2 min,83 min,1.7 h".split(
        ","
    )
    now, seconds = 0.0, {False: 0.01, True: 0.01}
    for _ in itertools.islice(run.loop(), 40):
        now += 0.01
    assert "about" not in capsys.readouterr().out  # too soon over


def test_resume_without_a_checkpoint_starts_afresh(few, light, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    before = '{"step": 1, "loss_sup": 3.0}\n{"st'
    (tmp_path / "log.jsonl").write_text(before)
    train(tmp_path, iters=2, resume=True)
    assert [line["step"] for line in logged(tmp_path)] == [1, 2]
    assert "nothing to resume, begins at step 1; its log is log.old.jsonl now\n" in (
        capsys.readouterr().out
    )
    assert (tmp_path / "log.old.jsonl").read_text() == before
    (tmp_path / "last.pt").unlink()
    second = (tmp_path / "log.jsonl").read_text()
    train(tmp_path, iters=2, resume=True)
    assert (tmp_path / "log.old2.jsonl").read_text() == second
    assert json.loads((tmp_path / "config.json").read_text())["iters"] == 2


# --- several processes ---


def test_statistics_and_gradients_are_averaged_and_nothing_else(monkeypatch):
    """As if the sum over two processes added 4."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(4))
    network = nn.Sequential(nn.BatchNorm2d(2))
    network.register_buffer("bank", torch.ones(2))
    network[0].running_mean.fill_(2)
    average_buffers(network)
    assert network[0].running_mean.tolist() == [3, 3] and network.bank.tolist() == [1, 1]
    network[0].weight.grad = torch.zeros(2)
    average_gradients(network)
    assert network[0].weight.grad.tolist() == [2, 2] and network[0].bias.grad is None
    assert network[0].weight.tolist() == [1, 1]


# --- the guard ---


def guard(monkeypatch, capsys, *words):
    """What a script says that ends with status 2."""
    monkeypatch.setattr(sys, "argv", ["any.py", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main(cps.train, cps.Config, cps.RECIPES)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_of_several_processes_the_first_says_what_is_wrong(monkeypatch, capsys):
    for rank, message in (("0", "any.py: --lr 0.0: must be positive\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert guard(monkeypatch, capsys, "--lr=0") == message


@pytest.fixture
def root(tmp_path):
    return trees.folder_tree(tmp_path / "data")


def own(root, folder, script=cps, **flags):
    """A run on one's own folder."""
    usual = SMALL | (dict(background="ground") if script is ial else dict(labeled="1/2"))
    usual |= dict(dataset="folder", data_path=str(root))
    return script.train(script.Config(output_dir=str(folder), **usual | flags))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unlabelled_picture_that_is_broken_is_named_once_and_skipped(
    workers, root, light, tmp_path, capsys, power_cut
):
    path = root / "images/train/003.jpg"
    path.write_bytes(path.read_bytes()[:700])
    flags = dict(workers=workers, iters=6)
    whole = own(root, tmp_path / "whole", **flags)
    said = capsys.readouterr().out
    assert said.count(f"cannot be read, and another one is drawn instead: {path}\n") == 1
    assert f"skipped 1 unlabelled: {path}\n" in said
    lines = [line["skipped"] for line in logged(tmp_path / "whole") if "skipped" in line]
    assert lines == [[str(path)]]
    cut = tmp_path / "cut"
    power_cut(4, partial(own, root, cut, resume=True, **flags))
    again = own(root, cut, resume=True, **flags)
    assert again.history == whole.history
    assert capsys.readouterr().out.count("skipped 1 unlabelled") == 1
    with pytest.raises(InputError, match=f"{path}: not a readable picture"):
        own(root, tmp_path / "full", check="full")
    own(root, tmp_path / "sup", check="full", supervised_only=True)


def test_what_repeats_and_what_serves_twice_is_said(root, light, tmp_path, capsys):
    own(root, tmp_path / "half", iters=1)
    assert "repeat within" not in capsys.readouterr().out
    own(root, tmp_path / "few", labeled="1/6", batch_size=6, iters=1)
    few = "batches of 6, but 1 labelled and 5 unlabelled pictures: they repeat within a batch\n"
    assert few in capsys.readouterr().out
    own(root, tmp_path / "all", labeled="all", iters=1)
    same = "all training pictures are labelled: they serve as unlabelled, too\n"
    assert same in capsys.readouterr().out
    own(root, tmp_path / "sup", labeled="all", iters=1, supervised_only=True)
    assert same not in capsys.readouterr().out


def test_one_picture_is_not_mixed_with_itself(root, light, tmp_path):
    one = tmp_path / "one"
    trees.save_picture(one / "a.jpg", np.random.default_rng(0))
    flags = dict(unlabeled=str(one), iters=1)
    message = said(partial(own, root, tmp_path / "run", **flags))
    assert message.startswith(f"{one / 'a.jpg'}: the only unlabelled picture")
    assert message.endswith("add some, or --no-cutmix")
    assert "--cutmix off" in said(partial(own, root, tmp_path / "run", psmt, **flags))
    own(root, tmp_path / "off", cutmix=False, **flags)
    own(root, tmp_path / "sup", supervised_only=True, **flags)


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (cps, dict(scales=(1.0, 0.1)), "--scales 1.0 0.1: leave 6.4 of 64 pixels of .*/000.jpg"),
        (cps, dict(scales=(9.0,)), "--scales 9.0: enlarge .*/000.jpg so that a crop shows under 8"),
        (psmt, dict(scales=(0.1, 1.0)), "--scales 0.1 1.0: leave 6.4 of 64 pixels"),
        (cac, dict(scales=(1.0, 9.0)), "--scales 1.0 9.0: enlarge"),
        (cac, dict(pair_scales=(1.0, 9.0)), "--pair-scales 1.0 9.0: enlarge"),
        (ial, dict(scales=(0.1,)), "--scales 0.1: leave 6.4 of 64"),
        (ial, dict(tag_scales=(0.1,)), "--tag-scales 0.1: leave 6.4 of 64"),
    ],
)
def test_scales_that_leave_nothing_of_a_picture_are_refused(script, flags, words, root, tmp_path):
    with pytest.raises(InputError, match=words):
        own(root, tmp_path / "run", script, **flags)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_breaks_midway_is_named(workers, light, tmp_path, monkeypatch, capsys):
    """Unlabelled pictures are first decoded when drawn; a loader process hands its error over.

    Of several processes the one that meets it says so, whichever it is.
    """
    root = trees.folder_tree(tmp_path / "data")
    for path in sorted((root / "images" / "train").glob("*"))[1:]:
        path.write_bytes(path.read_bytes()[:700])
    flags = "--dataset folder --labeled 1/6 --weights none --backbone resnet18 --iters 2 --width 8"
    flags += f" --batch-size 2 --crop-size 32 --workers {workers}"
    where = ["--data-path", root, "--output-dir", tmp_path / "run"]
    monkeypatch.setenv("RANK", "1")
    err = guard(monkeypatch, capsys, *flags.split(), *where)
    assert err.startswith(f"any.py: {root}") and err.count("\n") == 1
