"""What all scripts share: short runs, recipes, resuming, processes, flags, imports, shape."""

import ast
import json
import math
import os
import re
import runpy
import subprocess
import sys
import tokenize
from dataclasses import fields
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import torch
import trees
from few_shapes import COUNTS, ROOT, TINY, end, fork_two, shared, together
from torch import nn

import ial
from common import machine, shapes
from common.flags import Backbone, InputError, check_config, parse_config
from common.run import Run

VARIANTS = {  # short runs that together take every switch of a script, beside TINY's own
    "cps": [
        dict(),
        dict(supervised_only=True),
        dict(cutmix=False, ohem=True, crop_size=232, eval_window=48),
        dict(count_padding=True, scales=(0.5,), amp="bf16"),
        dict(supervision="prob_l2", cutmix=False),
        dict(supervision="prob_kl", cutmix=False, amp="auto"),
        dict(supervision="mean_teacher"),
        dict(supervision="mean_teacher", cutmix=False),
        dict(supervision="single", check="full", deterministic=True),
        dict(supervision="pseudoseg", cutmix=False),
    ],
    "psmt": [
        dict(),
        dict(supervised_only=True, amp="auto"),
        dict(teachers="copy", ohem=True, crop_size=232, eval_window=48),
        dict(cutmix="boxes", zoom=True, amp="bf16"),
        dict(cutmix="off", pseudo_eval=True, count_padding=True, scales=(0.3, 0.5)),
        dict(eps=0.0, check="full", deterministic=True),
    ],
    "cac": [
        dict(),
        dict(supervised_only=True, amp="auto"),
        dict(projector=False, jitter=True, eval_window=48),
        dict(context=False, amp="bf16", dropout=0.5),
        dict(directed=False, mean_over="overlap", bank=0),
        dict(class_filter=False, gamma=0.0, check="full", deterministic=True),
    ],
    "ial": [
        dict(),
        dict(method="direct", eval_window=48, tau=0.7),
        dict(method="unary", amp="auto", tau=0.7, rounds=2),
        dict(method="cam", tau=0.7, rounds=2, width=64),
        dict(mining="agree", net="resnet18", clamp=True, balance=False),
        dict(mining="rule80", rule="abs", stride=4, amp="bf16", tau=0.7),
        dict(scans="sequence", project=True, deterministic=True),
    ],
}
REFUSED = {  # flags that a script cannot take, the first of which is at fault
    "": ["--itres=5", "--iters", "--crop-size=50", "--dataset=imagenet", "--device=tpu9"],
    "semi": ["--labeled=1/999", "--unlabeled=nowhere", "--data-path=nowhere --dataset=folder"],
    "cps": ["--supervision=prob_l2", "--supervision=pseudoseg", "--scales 1 0", "--ramp=1.5"]
    + ["--ramp=0.5 --lam=0", "--ema-decay=0.5"],
    "psmt": ["--scales 2 0.5", "--scales 1", "--warmup=1", "--threshold=1.5", "--eps=-1"]
    + ["--threshold=0.5 --lam=0"],
    "cac": ["--gamma=1.5", "--tau=0", "--tau=nan", "--warmup=1", "--pair-scales 2 0.5"]
    + ["--scales 0.001 0.002", "--pair-scales 0.001 0.002", "--directed=maybe", "--bank=-1"]
    + ["--tau=0.5 --lam=0"],
    "ial": ["--fg 1.5", "--bg 0.9", "--net-steps 1 1", "--net-steps 0.01 1 1", "--stride=5"]
    + ["--labeled=1/2", "--supervised-only", "--background=nothing", "--mining=maybe"]
    + ["--method=direct", "--mining=rule80", "--lam=0 --probes=5"],  # the first two: TINY's --tau
}
STOPPED = [  # runs that are cut a step after a checkpoint: in a warm-up or a stage, and later
    ("cps", dict(iters=4), (3,)),
    ("cps", dict(iters=4, supervision="mean_teacher"), (3,)),
    ("psmt", dict(iters=6, warmup=0.5), (3, 5)),
    ("psmt", dict(iters=6, warmup=0.5, teachers="copy"), (3, 5)),
    ("cac", dict(iters=6, warmup=0.5, bank=2, accum=2), (3, 5)),
    ("ial", dict(), (1, 5, 7)),
]
ARTEFACTS = {"config.json", "log.jsonl", "last.pt", "best.pt", "iou.txt"}
ARTEFACTS |= {"curves.png", "panels.png"}
TREES = dict(
    folder=(trees.folder_tree, 3),
    voc=(partial(trees.voc_tree, aug=False), 21),
    coco=(trees.coco_tree, 4),
    cityscapes=(trees.cityscapes_tree, 19),
)
BACKGROUND = dict(folder="ground", cityscapes="road")  # what ial.py has to be told
for script in TINY:
    import_module(script)  # before a fixture puts other networks in the place of theirs
OURS = sorted(path.stem for path in (ROOT / "common").glob("*.py") if path.stem != "__init__")
every_script = pytest.mark.parametrize("name", TINY)


def train(name, folder, **flags):
    script = import_module(name)
    return script.train(script.Config(output_dir=str(folder), **TINY[name] | flags))


def argv(flags):
    """The command line of a config's fields."""
    for name, value in flags.items():
        values = value if isinstance(value, tuple) else (value,)
        yield from (f"--{name.replace('_', '-')}", *map(str, values))


def guard(name, monkeypatch, *words):
    """The status with which a script ends that is called with these words."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    return end.value.code


# --- short runs ---


@pytest.mark.parametrize(
    "name, flags",
    [(name, flags) for name in TINY for flags in VARIANTS[name]],
    ids=lambda value: value if isinstance(value, str) else " ".join(argv(value)) or "plain",
)
def test_a_short_run_moves_all_weights_and_leaves_its_files(
    name, flags, few, tmp_path, monkeypatch, request
):
    if flags:
        request.getfixturevalue("light")  # the first of a script's runs has a real ResNet
    begin, networks, before, rates = Run.start, [], [], []

    def note(run, data, model, **state):
        networks.extend([*model, *(part for part in state.values() if isinstance(part, nn.Module))])
        optimizers = (part for part in state.values() if isinstance(part, torch.optim.Optimizer))
        rates.extend(group for optimizer in optimizers for group in optimizer.param_groups)
        before.extend({k: v.clone() for k, v in net.state_dict().items()} for net in networks)
        begin(run, data, model, **state)

    monkeypatch.setattr(Run, "start", note)
    result = train(name, tmp_path, **flags)
    files = {path.name for path in tmp_path.iterdir()} - ({"maps"} if name == "ial" else set())
    assert not result.model.training
    if flags.get("method") == "cam":  # it ends before there is a segmenter
        assert not result.history and files == ARTEFACTS - {"best.pt", "iou.txt"}
        return
    assert files == ARTEFACTS and math.isfinite(result.miou)
    assert all(group["lr"] == 0 for group in rates) and bool(rates) == (name != "ial")
    for network, old in zip(networks, before, strict=True):
        new = {k: v for k, v in network.state_dict().items() if v.is_floating_point()}
        assert [k for k, v in new.items() if torch.equal(v, old[k])] == []
        assert all(v.isfinite().all() for v in new.values())


@every_script
def test_short_runs_take_every_switch(name):
    """What no short run takes may be broken without a word."""
    config = import_module(name).Config
    for field in fields(config):
        choices = get_args(field.type) if get_origin(field.type) is Literal else ()
        choices = (True, False) if field.type is bool else choices
        if field.name == "amp":
            choices = set(choices) - {"fp16"}  # tests/test_cuda.py
        if choices and field.name not in ("dataset", "backbone", "net", "resume"):
            usual = {field.name: field.default} | TINY[name]
            taken = {(usual | flags)[field.name] for flags in VARIANTS[name]}
            assert taken == set(choices), field.name


# Of every flag another value than TINY's, and what it takes besides for it to make a difference.
SEEN_ELSEWHERE = {  # what a flag changes that no short run shows
    "deterministic": "the same result on a CPU",
    "dataset": "TREES",
    "data_path": "TREES",
    "background": "tests/test_tags.py",
    "weights": "tests/test_deeplab.py",
    "backbone": "tests/test_deeplab.py",
    "unlabeled": "tests/test_data.py",
    "check": "tests/test_run.py",
    "ohem": "tests/test_losses_optim.py; refused on small crops",
    "workers": "the same batches",
    "save_every": "tests/test_faults.py",
    "device": "the same result",
    "output_dir": "the same result",
    "resume": "the same result",
}
EVERY = dict(width=16, crop_size=48, batch_size=3, accum=2, iters=4, lr=0.01, weight_decay=0.5)
EVERY |= dict(eval_every=1, eval_window=32, amp="bf16", seed=1)
SEMI = EVERY | dict(labeled="5", supervised_only=True, lam=9.0)
LONGER = dict(iters=6, eval_every=6, warmup=0.3)
CAM = dict(method="cam", tau=0.7, rounds=2, width=64)
UNARY = dict(method="unary", tau=0.7, rounds=2)


def beside(what, values):
    return {name: (value, what) for name, value in values.items()}


OTHER = {
    "cps": SEMI
    | dict(supervision="single", cutmix=False, scales=(0.5,))
    | dict(ramp=(1.0, dict(iters=4)), count_padding=(True, dict(scales=(0.5,), crop_size=48)))
    | dict(ema_decay=(0.5, dict(supervision="mean_teacher", iters=4))),
    "psmt": SEMI
    | dict(threshold=0.9, ema_decay=0.5, eps=0.0, cutmix="off", pseudo_eval=True, strength=1.0)
    | dict(
        teachers="copy",
        scales=(0.3, 0.5),
        warmup=0.0,
        count_padding=(True, dict(scales=(0.3, 0.5))),
    )
    | dict(ramp=(1.0, LONGER), zoom=(True, LONGER)),
    "cac": SEMI
    | dict(backbone_lr=0.5, tau=0.5, gamma=0.0, warmup=0.0, mean_over="overlap", projector=False)
    | dict(context=False, directed=False, class_filter=False, base_size=80, scales=(0.5, 0.6))
    | dict(pair_scales=(1.5, 2.0), strength=1.0, jitter=True, dropout=0.5)
    | dict(bank=(0, LONGER)),
    "ial": beside(UNARY, EVERY | dict(scales=(0.5,)))
    | beside(CAM, dict(net="resnet18", net_lr=0.01, net_steps=(2.0, 1.0, 1.0), clip=0.01))
    | beside(CAM, dict(tag_scales=(0.5,), cam_scales=(0.5,), fg=0.6, bg=0.2))
    | beside(CAM, dict(segment_size=9, compactness=1.0))
    | beside(dict(tau=0.7), dict(method="direct", mining="rule80"))
    | dict(rounds=2, share=0.99, balance=False, tau=0.9, lam=3.0, probes=1, clamp=True)
    | dict(stride=4, rule="abs", scans="sequence", passes=1, project=True),
}


@every_script
def test_every_flag_makes_a_difference_or_is_refused(name, light, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "COUNTS", dict(train=8, val=2))

    def outcome(folder, **flags):
        train(name, folder, **flags)
        log = re.sub(r', "seconds": [\d.]+', "", (folder / "log.jsonl").read_text())
        return log, [
            {key: value.tolist() for key, value in net.items() if "classifier" in key}
            for net in torch.load(folder / "last.pt", weights_only=True)["networks"]
        ]

    known = {}
    for number, field in enumerate(fields(import_module(name).Config)):
        assert (field.name in OTHER[name]) != (field.name in SEEN_ELSEWHERE), field.name
        if field.name in SEEN_ELSEWHERE:
            continue
        other = OTHER[name][field.name]
        value, beside = (
            other if isinstance(other, tuple) and isinstance(other[-1], dict) else (other, {})
        )
        key = tuple(beside.items())
        if key not in known:
            known[key] = outcome(tmp_path / f"base{number}", **beside)
        flags = beside | {field.name: value}
        assert outcome(tmp_path / str(number), **flags) != known[key], field.name


@pytest.mark.parametrize("name", [name for name in TINY if name != "ial"])
def test_the_baseline_names_the_flags_that_it_leaves_out(name, few, light, tmp_path, capsys):
    """All those, and no others, do nothing with --supervised-only."""

    def outcome(**flags):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        train(name, path, supervised_only=True, **flags)
        return torch.load(path / "best.pt", weights_only=True)["networks"][0]["classifier.weight"]

    def other(field):
        value = OTHER[name][field]
        return value[0] if isinstance(value, tuple) and isinstance(value[-1], dict) else value

    config, plain, usual = import_module(name).Config, outcome(), capsys.readouterr().out
    own = [field for field in config.left_out if field in OTHER[name]]
    assert set(config.left_out) - set(own) == {"unlabeled", "check"}
    left_out = {field: other(field) for field in own}
    left_out |= dict(supervision="mean_teacher") if name == "cps" else {}  # --ema-decay needs it
    assert torch.equal(outcome(check="full", **left_out), plain)
    (said,) = re.findall("--supervised-only: (.*) without effect\n", capsys.readouterr().out)
    given = [field for field in own if left_out[field] != getattr(config, field)]
    assert said.split(", ") == [f"--{name.replace('_', '-')}" for name in ("check", *given)]
    assert all(f"--{field.replace('_', '-')}" not in usual for field in set(own) - set(TINY[name]))
    for field in config.__annotations__.keys() - OTHER["ial"].keys() - set(own) - {"ohem"}:
        assert not torch.equal(outcome(**{field: other(field)}), plain), field


@pytest.mark.parametrize("name, dataset", [(n, d) for n in TINY for d in TREES])
def test_recipes_train_on_tiny_trees(name, dataset, light, tmp_path):
    """Two steps of each real layout's recipe, with loader processes, at a size for tests."""
    tree, classes = TREES[dataset]
    recipe = import_module(name).RECIPES[dataset]
    flags = {key: value for key, value in recipe.items() if key not in TINY[name]}
    flags |= dict(backbone="resnet18", weights="none", iters=2, workers=1)
    flags |= dict(eval_window=32) if recipe.get("eval_window") else {}
    if "labeled" in TINY[name]:
        flags |= dict(labeled="1/3")  # CutMix needs two that are left
    else:
        flags |= dict(net="small", background=BACKGROUND.get(dataset, ""), tag_scales=(0.5,))
    result = train(name, tmp_path / "run", data_path=str(tree(tmp_path / "data")), **flags)
    assert math.isfinite(result.miou) and len(result.history[-1]["iou"]) == classes


@every_script
def test_a_step_may_have_several_batches(name, few, light, tmp_path, monkeypatch):
    """As many backward passes; one update, one move of the rate, one line of the log."""
    passes, updates = [], []
    backward, update = torch.Tensor.backward, torch.optim.SGD.step

    def note_backward(loss):
        backward(loss)
        passes.append(loss.item())

    def note_update(optimizer, *args):
        updates.append((len(passes), optimizer.param_groups[0]["lr"]))
        return update(optimizer, *args)

    monkeypatch.setattr(torch.Tensor, "backward", note_backward)
    monkeypatch.setattr(torch.optim.SGD, "step", note_update)
    seen, first = {}, {}
    for accum in (1, 3):
        passes.clear(), updates.clear()
        train(name, tmp_path / str(accum), accum=accum)
        log = [json.loads(line) for line in (tmp_path / str(accum) / "log.jsonl").open()]
        assert len(set(passes)) == len(passes)  # all batches differ
        assert [done for done, _ in updates] == list(range(accum, len(passes) + 1, accum))
        seen[accum] = [rate for _, rate in updates], [line["step"] for line in log]
        first[accum] = accum * passes[0]  # of the same batch, weights and seed
    assert seen[1] == seen[3] and first[1] == pytest.approx(first[3], rel=1e-5)


@pytest.fixture
def scaled(monkeypatch):
    """The scaler of --amp fp16 in float32, where it must change nothing: it scales by powers of 2.

    scaled(scale): with this one at first.
    """
    make = torch.amp.GradScaler

    def start(scale=2.0**16):
        monkeypatch.setattr(machine, "precision", lambda device, amp: torch.float16)
        monkeypatch.setattr(Run, "autocast", lambda run: torch.autocast("cpu", enabled=False))
        monkeypatch.setattr(torch.amp, "GradScaler", partial(make, init_scale=scale))

    return start


@every_script
def test_all_gradients_go_through_the_scaler(name, few, light, tmp_path, scaled):
    flags = dict(accum=2, clip=0.3) if name == "ial" else dict(accum=2)
    expected = train(name, tmp_path / "plain", **flags).model.state_dict()
    scaled()
    for key, value in train(name, tmp_path / "scaled", **flags).model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    saved = torch.load(tmp_path / "scaled" / "last.pt", weights_only=True)
    assert saved["state"]["scaler"]["scale"] == 2.0**16


def test_the_scaler_is_resumed_and_skips_steps(few, light, tmp_path, scaled, power_cut):
    """From a scale at which the first losses are infinite."""
    scaled(2.0**127)
    flags = dict(iters=6, eval_every=2)
    train("cps", tmp_path / "whole", **flags)
    power_cut(3, partial(train, "cps", tmp_path / "cut", **flags, resume=True))
    train("cps", tmp_path / "cut", **flags, resume=True)
    whole, cut = (tmp_path / run / "last.pt" for run in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    assert torch.load(cut, weights_only=True)["state"]["scaler"]["scale"] < 2.0**127


# --- resuming, several processes ---


@pytest.mark.parametrize("name, flags, stops", STOPPED, ids=str)
def test_a_run_that_stops_goes_on_exactly(name, flags, stops, few, light, tmp_path, power_cut):
    flags = flags | dict(eval_every=2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(name, whole, **flags)
    for stop in stops:
        power_cut(stop, partial(train, name, cut, **flags, resume=True))
    train(name, cut, **flags, resume=True)
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    for file in set(files) - {Path("config.json"), Path("log.jsonl")}:
        assert (cut / file).read_bytes() == (whole / file).read_bytes(), file
    logs = [[json.loads(line) for line in (f / "log.jsonl").open()] for f in (whole, cut)]
    first, second = ([line | {"seconds": 0} for line in log] for log in logs)
    assert first == second and len(first) >= 4


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes has after a run of every script."""
    folder = tmp_path_factory.mktemp("both")
    said = [end(process) for process in fork_two(partial(together, folder, TINY))]
    counts = [text.count("validation pictures") for text in said]
    assert counts == [len(TINY), 0]  # the first process alone prints
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@every_script
def test_two_processes_train_one_model(name, both):
    first, second = (saved[name] for saved in both)
    assert first["miou"] == second["miou"] and first["weights"].keys() == second["weights"].keys()
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key


def test_two_processes_count_every_picture_once_and_share_rows_and_errors(both, few, light):
    alone = shared()
    assert alone["confusion"].sum() == COUNTS["val"] * shapes.SIZE**2
    assert [saved["pictures"] for saved in both] == [3, 2]
    for saved in both:
        assert torch.equal(saved["confusion"], alone["confusion"])
        rows = alone["gathered"]
        assert torch.equal(saved["gathered"], torch.cat([rows, rows + 10]))
        assert saved["error"] == "a file: is broken for process 1"


# --- flags and recipes ---


@pytest.mark.parametrize(
    "name, words",
    [
        (name, words)
        for name in TINY
        for kind in ("", "semi", name)
        for words in REFUSED[kind]
        if kind != "semi" or "labeled" in TINY[name]
    ],
)
def test_a_bad_flag_ends_with_one_line_and_status_2(
    name, words, few, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert guard(name, monkeypatch, *argv(TINY[name]), *words.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{name}.py: ") and said.count("\n") == 1
    assert re.split("[ =]", words)[0] in said
    assert list(tmp_path.iterdir()) == []


@every_script
def test_help_has_every_flag_with_the_recipes_value(name, monkeypatch, capsys):
    script = import_module(name)
    assert guard(name, monkeypatch, "--dataset", "voc", "--help") == 0
    said = capsys.readouterr().out
    assert said.count(script.__doc__.splitlines()[0]) == 1
    for field in fields(script.Config):
        assert re.search(rf"^  --{field.name.replace('_', '-')}\b", said, flags=re.MULTILINE)
    assert f"[{script.RECIPES['voc']['iters']}]" in said and "[IMAGENET1K_V1]" in said


@every_script
def test_recipes_name_their_dataset_and_hold_values_that_can_be(name):
    script = import_module(name)
    assert parse_config(script.Config, script.RECIPES, []) == script.Config()
    for key, recipe in script.RECIPES.items():
        dataset, *special = key.split()
        given = {}
        # A word is a value of --backbone, --supervision or --labeled, or says that a flag is off.
        off = {"no-cutmix": dict(cutmix=False), "no-weights": dict(weights="none")}
        kinds = dict.fromkeys(get_args(Backbone), "backbone") | dict(mean_teacher="supervision")
        for word in special:
            given |= off.get(word) or {kinds.get(word, "labeled"): word}
        words = [
            f"--no-{name}" if value is False else f"--{name}={value}"
            for name, value in given.items()
        ]
        cfg = parse_config(script.Config, script.RECIPES, ["--dataset", dataset, *words])
        assert cfg == script.recipe(dataset, **given)
        assert all(getattr(cfg, name) == value for name, value in (recipe | given).items())
        assert cfg.dataset == dataset == script.RECIPES[dataset].get("dataset", "shapes")
        check_config(cfg)
        getattr(script, "check_flags", check_config)(cfg)


@every_script
def test_without_weights_own_pictures_have_a_small_network_and_other_flags_still_win(name):
    script = import_module(name)
    cfg = script.recipe("folder", weights="none", data_path="data", width=32)
    assert (cfg.backbone, cfg.width, cfg.iters, cfg.workers) == ("resnet18", 32, 500, 0)
    for other in (dict(amp="none"), dict(weights="start.pt")):
        assert script.recipe("folder", data_path="data", **other).backbone == "resnet50"
    assert script.recipe("voc", data_path="data", weights="none").backbone == "resnet50"


def test_all_of_ials_networks_have_the_backbone_that_is_asked_for():
    for words in ("--net small", "--net small --backbone resnet18", "--net resnet101"):
        cfg = parse_config(ial.Config, ial.RECIPES, ["--dataset", "folder", *words.split()])
        assert cfg.net == words.split()[1]
    for dataset in TREES:
        assert ial.recipe(dataset).backbone == ial.recipe(dataset).net == "resnet50"
        for backbone in get_args(Backbone):
            assert ial.recipe(dataset, backbone=backbone).net == backbone
    assert ial.recipe("shapes", backbone="resnet50").net == "small"


@every_script
def test_a_dataset_without_a_recipe_is_an_error(name):
    script = import_module(name)
    recipes = {key: value for key, value in script.RECIPES.items() if key.split()[0] != "voc"}
    with pytest.raises(InputError, match="--dataset voc: has no recipe here; there are "):
        parse_config(script.Config, recipes, ["--dataset", "voc"])


# --- what a script imports, and what importing it does ---


@cache
def imported(path):
    """The modules that a file imports, those of common/ in full."""
    return set(modules_in(path))


def modules_in(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            inside = node.module == "common"
            yield from (f"common.{a.name}" for a in node.names) if inside else (node.module,)


def reached(name, path=()):
    """The modules of common/ that one of them, or a script, imports directly and indirectly."""
    assert name not in path, f"a circle: {' -> '.join((*path, name))}"
    file = ROOT / "common" / f"{name}.py" if name in OURS else ROOT / f"{name}.py"
    direct = {m.removeprefix("common.") for m in imported(file) if m.startswith("common.")}
    return direct.union(*(reached(module, (*path, name)) for module in direct))


@pytest.mark.parametrize("path", [*TINY, *(f"common/{name}" for name in OURS)])
def test_imports_are_few_and_run_one_way(path):
    others = {"torch", "torchvision", "numpy", "PIL", "tqdm", "common"}
    others |= {"scipy"} if path == "common/sbd" else set()  # a conversion, which no run needs
    roots = {module.split(".")[0] for module in imported(ROOT / f"{path}.py")}
    assert roots <= others | sys.stdlib_module_names
    assert reached(Path(path).name) <= set(OURS)


def test_only_slic_tags_and_maps_are_there_for_ial_alone():
    several = set().union(*(reached(name) for name in TINY if name != "ial"))
    assert set(OURS) - several - {"sbd"} == {"slic", "tags", "maps"}  # sbd is a program


def interpreter(code, folder):
    """What a fresh Python prints that runs the code in a folder."""
    where = dict(cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **where)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_importing_a_script_has_no_side_effect(tmp_path):
    """Nothing printed, written, seeded or set; all together, in an interpreter of their own."""
    code = f"""
import os, random, sys, numpy, torch, torch.backends.cudnn as cudnn
state = lambda: (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist(),
    torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), dict(os.environ),
    cudnn.benchmark, cudnn.deterministic, torch.get_float32_matmul_precision(), sys.argv)
before = state()
import {", ".join(TINY)}
assert before == state()
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
"""
    assert interpreter(code, tmp_path) == "" and list(tmp_path.iterdir()) == []


def test_help_does_not_wait_for_torchvision(tmp_path):
    """It imports PyTorch's compiler, and takes as long as PyTorch itself."""
    code = f"""
import contextlib, runpy, sys
for script in {[str(ROOT / f"{name}.py") for name in TINY]}:
    sys.argv = [script, "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
print(*{{"torch", "torchvision", "torch._dynamo"}} & set(sys.modules))
"""
    said = interpreter(code, tmp_path)
    assert said.count("--output-dir") >= len(TINY) and said.splitlines()[-1] == "torch"


def test_a_loss_is_imported_without_pictures_or_flags(tmp_path):
    code = "import sys, torch; bare = set(sys.modules); import common.losses; "
    new = interpreter(code + "print(*sorted(set(sys.modules) - bare))", tmp_path).split()
    assert new == ["common", "common.losses"]
    # Those that torch itself may have loaded, too.
    assert not {"argparse", "PIL", "torchvision"} & set(imported(ROOT / "common" / "losses.py"))


# --- the shape of a script ---


@every_script
def test_the_docstring_is_at_most_40_lines(name):
    first = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")).body[0]
    assert isinstance(first.value.value, str) and first.lineno == 1 and first.end_lineno <= 40


@every_script
def test_differences_say_from_what(name):
    """From the paper (P), the released code (C), or both."""
    with open(ROOT / f"{name}.py", "rb") as file:
        comments = [
            t.string for t in tokenize.tokenize(file.readline) if t.type == tokenize.COMMENT
        ]
    marked = [comment for comment in comments if "Δ" in comment]
    assert marked and all(re.match(r"# Δ (P|C|PC): \S", comment) for comment in marked)
