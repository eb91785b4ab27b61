"""IAL's stages, the maps between them, resuming, several processes; its encoders and maps."""

import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import trees
from PIL import Image
from test_psmt import Small
from test_tags import SHOWN, tagged_tree
from torch import nn
from torch.utils.data import DataLoader

import common.maps
import ial
from common.augment import MEAN, STD, normalise
from common.encoders import GuidanceNet, TagNet, activation_maps, trunk
from common.flags import parse_config
from common.layouts import VOID
from common.losses import balanced_cross_entropy
from common.maps import (
    Maps,
    at_cells,
    at_pixels,
    clamped,
    crop_view,
    pad,
    stage_panels,
    tag_view,
)
from common.predict import CELL, GAP, LINE, sheet
from common.run import InputError, Run
from common.slic import of_segments, paint
from common.tags import load_tagged

TINY = dict(dataset="folder", crop_size=32, batch_size=2, width=8, iters=2, rounds=1, tau=0.4)
TINY |= dict(net_steps=(1.0, 1.0, 1.0), eval_every=1, device="cpu")
STAGES = ["seeds", "unary1", "region1", "pairwise1", "unary2"]  # of two steps each
KINDS = {"cam", "superpixels", "seeds", "mined1", "refined1", "labels1"}
KINDS |= {"unary1", "majority1", "unary2", "majority2"}
ALONE = SimpleNamespace(rank=0, world=1, device="cpu", gather=lambda tensor: tensor)  # as a Run
NAMES = ["000", "001", "002", "004", "005"]


def run(folder, data, **flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ial, "DeepLabV3Plus", Small)
        where = dict(data_path=str(data), output_dir=str(folder))
        return ial.train(ial.Config(**where, **TINY | flags))


def logged(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key != "seconds"} for line in lines]


def figures(folder):
    """What the log says of each stage."""
    lines = [line for line in logged(folder) if "stage" in line and "val" not in line]
    assert len({line["stage"] for line in lines}) == len(lines)
    return {line["stage"]: line for line in lines}


def saved(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def files(folder):
    """All maps of a run as bytes."""
    paths = (path for path in (folder / "maps").rglob("*") if path.is_file())
    return {path.relative_to(folder / "maps").as_posix(): path.read_bytes() for path in paths}


def maps_of(folder, data, stride=2):
    """The maps of a run that is over, or of none."""
    return Maps(folder / "maps", load_tagged("folder", str(data)), stride)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of 37 x 45 pixels, whose cells do not fit; 003 shows no class."""
    return tagged_tree(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a run that nothing stopped, and its result."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run(folder, data)


# --- a whole run ---


def test_a_run_leaves_its_result_and_a_line_for_each_stage(whole):
    folder, result = whole
    assert 0 <= result.miou == result.history[-1]["miou"] <= 1 and len(result.history) == 2
    names = {path.name for path in folder.iterdir()}
    plain = {"config.json", "log.jsonl", "last.pt", "best.pt", "panels.png", "iou.txt", "maps"}
    assert names == plain
    lines = figures(folder)
    assert list(lines) == STAGES
    assert [line["step"] for line in lines.values()] == [2, 4, 6, 8, 10]
    parts = ["", "_fg_precision", "_bg_precision", "_fg_coverage", "_bg_coverage"]
    kinds = [["seeds"], ["majority", "unary"], ["mined"], ["refined"], ["majority", "unary"]]
    others = [["cam"], [], [], ["energy_unary", "energy_refined"], []]
    for line, maps, other in zip(lines.values(), kinds, others, strict=True):
        expected = {"step", "stage", *other, *(kind + part for kind in maps for part in parts)}
        assert line.keys() == expected
        shares = [v for k, v in line.items() if k not in ("step", "stage") and "energy" not in k]
        assert all(value is None or 0 <= value <= 1 for value in shares)
    assert min(lines["pairwise1"]["energy_unary"], lines["pairwise1"]["energy_refined"]) > 0
    steps = [line for line in logged(folder) if "stage" not in line and "miou" not in line]
    losses = ["tags", "unary", "region", "affinity", "unary"]
    assert [line["step"] for line in steps] == list(range(1, 11))
    assert all(f"loss_{losses[k // 2]}" in line for k, line in enumerate(steps))


def test_the_checkpoint_rebuilds_the_last_unary_network(whole):
    folder, result = whole
    state = saved(folder)
    assert state["step"] == 10 and state["classes"] == ["background", "cat", "sea lion"]
    network = Small(**state["arguments"][0]).eval()
    network.load_state_dict(state["networks"][0])
    images = torch.randn(1, 3, 37, 45)
    torch.testing.assert_close(network(images), result.model(images))
    assert not result.model.training


def test_maps_of_every_stage_are_there_and_hold_possible_classes_alone(whole, data):
    folder, _ = whole
    assert {path.name for path in (folder / "maps").iterdir()} == KINDS
    maps = maps_of(folder, data)
    seen = {kind: set() for kind in KINDS}
    for name, index in ((name, maps.names.index(name)) for name in NAMES):
        possible = {0, *map(int, SHOWN[int(name)])}
        for kind in KINDS:
            path = folder / "maps" / kind / name
            if kind in ("cam", "unary1", "unary2", "refined1"):
                stored = np.load(f"{path}.npy")
                assert stored.dtype == np.float16 and stored.shape == (len(possible), 19, 23)
                probs = maps.read(kind, index)
                assert probs.shape == (3, 19, 23) and (probs >= 0).all() and (probs <= 1).all()
                assert {c for c in range(3) if probs[c].any()} <= possible
                if kind != "cam":  # nothing of them is lost with the absent classes
                    ones = torch.ones(19, 23)
                    torch.testing.assert_close(probs.sum(dim=0), ones, rtol=0, atol=2e-3)
                assert not Path(f"{path}.png").exists()
                continue
            with Image.open(f"{path}.png") as png:
                assert png.mode == "L" and png.size == (45, 37)
            labels = maps.read(kind, index)
            assert labels.dtype == torch.int64 and labels.shape == (37, 45)
            if kind != "superpixels":
                assert set(labels.unique().tolist()) <= possible | {VOID}
                seen[kind] |= set(labels.unique().tolist())
            if kind in ("majority1", "mined1", "seeds"):
                segments = maps.read("superpixels", index)
                for segment in segments.unique():
                    assert len(labels[segments == segment].unique()) == 1
    assert len(files(folder)) == len(KINDS) * len(NAMES)
    assert seen["labels1"] <= {0, 1, 2} and len(seen["mined1"] - {VOID}) > 1
    assert len(seen["seeds"]) > 2


def test_the_log_is_about_the_maps_that_lie_there(whole, data):
    folder, _ = whole
    maps, lines = maps_of(folder, data), figures(folder)
    kinds = dict(seeds="seeds", majority="majority1", mined="mined1", refined="labels1")
    stages = dict(seeds="seeds", majority="unary1", mined="region1", refined="pairwise1")
    kinds["unary"] = stages["unary"] = "unary1"
    for name, kind in kinds.items():
        for figure, value in maps.quality(ALONE, name, kind).items():
            expected = lines[stages[name]][figure]
            assert math.isnan(value) if expected is None else value == pytest.approx(expected)
    for name, index in zip(NAMES, range(5), strict=True):
        probs = maps.read("refined1", index)
        large = F.interpolate(probs[None], (38, 46), mode="bilinear", align_corners=False)
        assert torch.equal(maps.read("labels1", index), large[0].argmax(dim=0)[:37, :45]), name


@pytest.mark.parametrize(
    "method, rounds, expected",
    [
        ("ial", 0, "seeds unary1"),
        ("ial", 1, "seeds unary1 region1 pairwise1 unary2"),
        ("ial", 2, "seeds unary1 region1 pairwise1 unary2 region2 pairwise2 unary3"),
        ("direct", 0, "seeds unary1"),
        ("direct", 1, "seeds unary1 unary2"),
        ("direct", 2, "seeds unary1 unary2 unary3"),
        ("unary", 2, "seeds unary1"),
        ("cam", 2, "seeds"),
    ],
)
def test_the_plan_has_the_stages_of_the_method(method, rounds, expected):
    cfg = ial.Config(method=method, rounds=rounds, iters=10, net_steps=(1.2, 0.5, 0.3))
    stages, done = ial.plan(cfg), 0
    assert " ".join(f"{name}{t or ''}" for name, t, _ in stages) == expected
    for name, _, steps in stages:
        assert steps == range(done, done + dict(seeds=12, unary=10, region=5, pairwise=3)[name])
        done = steps.stop


def test_baselines_share_the_first_stages(whole, data, tmp_path, capsys):
    """Each is the start of the whole run; what it has no stage for is not there."""
    expected = files(whole[0])
    kinds = dict(cam={"cam", "superpixels", "seeds"})
    kinds["unary"] = kinds["cam"] | {"unary1", "majority1"}
    kinds["direct"] = kinds["unary"] | {"labels1", "labels2", "labels3"}
    kinds["direct"] |= {"unary2", "unary3", "majority2", "majority3"}
    for method, left in kinds.items():
        run(tmp_path / method, data, method=method, rounds=2)
        maps = files(tmp_path / method)
        assert {name.split("/")[0] for name in maps} == left and len(maps) == 5 * len(left)
        for name in kinds["unary"] & left:
            for picture in (path for path in maps if path.startswith(f"{name}/")):
                assert maps[picture] == expected[picture]
    assert list(figures(tmp_path / "direct")) == ["seeds", "unary1", "unary2", "unary3"]
    assert list(figures(tmp_path / "unary")) == STAGES[:2]
    assert list(figures(tmp_path / "cam")) == STAGES[:1]
    assert "no network to evaluate" in capsys.readouterr().out


# --- what the stages give each other ---


@pytest.fixture
def views(monkeypatch):
    """What the loaders gave to the views that crop: the pictures and their maps."""
    seen = {"tag_view": [], "train_view": [], "crop_view": []}

    def note(name, view):
        def noted(*args, **options):
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            seen[name].append(tensors)
            return view(*args, **options)

        return noted

    for name in seen:
        monkeypatch.setattr(ial, name, note(name, getattr(ial, name)))
    return seen


@pytest.mark.parametrize("method", ["ial", "direct"])
def test_each_stage_learns_from_the_maps_of_those_before(method, data, views, tmp_path):
    own, first_weights = [], []
    majority, train_unary = ial.majority_labels, ial.train_unary

    def note_labels(labels, *args):
        own.append(labels[0])
        return majority(labels, *args)

    def note_weights(*args):
        first_weights.append({k: v.clone() for k, v in args[0].networks[0].state_dict().items()})
        return train_unary(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ial, "majority_labels", note_labels)
        patch.setattr(ial, "train_unary", note_weights)
        run(tmp_path, data, method=method, rounds=2)
    initial, *others = first_weights
    assert len(others) == 2  # each starts anew
    assert all(torch.equal(v, weights[k]) for weights in others for k, v in initial.items())
    maps = maps_of(tmp_path, data)
    pictures = [maps.image(index) for index in range(5)]

    def check(draws, *kinds):
        """Two steps' draws of two pictures and of their maps of these kinds."""
        assert len(draws) == 4
        for picture, *given in draws:
            (index,) = (i for i in range(5) if torch.equal(pictures[i], picture))
            expected = [maps.tags[index] if k == "tags" else maps.read(k, index) for k in kinds]
            assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))

    check(views["tag_view"], "tags")
    unary = views["train_view"]
    assert len(unary) == 12
    for t, source in ((1, "seeds"), (2, "labels1"), (3, "labels2")):
        check(unary[4 * t - 4 : 4 * t], source)
    seeds, first, second = (
        torch.stack([maps.read(kind, i) for i in range(5)])
        for kind in ("seeds", "labels1", "labels2")
    )
    assert not torch.equal(seeds, first) and not torch.equal(first, second)
    if method == "direct":
        assert not views["crop_view"]
        assert torch.equal(first, torch.stack(own[:5]))
        assert torch.equal(second, torch.stack(own[5:10]))
    else:
        assert len(views["crop_view"]) == 16
        for t in (1, 2):
            region, pairwise = (views["crop_view"][8 * t - k : 8 * t - k + 4] for k in (8, 4))
            check(region, "superpixels", f"majority{t}")
            check(pairwise, "superpixels", f"mined{t}", f"unary{t}")


def test_seeds_are_decided_superpixel_by_superpixel(data, tmp_path, monkeypatch):
    """Activation in the left half of the picture alone, 0.8 for one class and 1 for the other."""

    def halves(net, images, tags, scales):
        maps = torch.zeros(1, 2, *images.shape[2:])
        maps[..., : images.shape[3] // 2] = torch.tensor([0.8, 1.0]).view(1, 2, 1, 1)
        return maps * tags[:, :, None, None]

    monkeypatch.setattr(ial, "activation_maps", halves)
    run(tmp_path, data, method="cam", fg=0.6, bg=0.2)
    maps = maps_of(tmp_path, data)
    for index, (cat, lion) in enumerate(maps.tags):
        cells = maps.read("cam", index)
        expected = torch.tensor([0.0, 0.8 * cat, 1.0 * lion]).half().float()
        assert (cells[:, :, :11] == expected[:, None, None]).all() and not cells[:, :, 12:].any()
        segments, labels = maps.read("superpixels", index), maps.read("seeds", index)
        height = max(0.8 * cat, 1.0 * lion)
        for segment in segments.unique():
            inside = segments == segment
            mean = height * (inside & (torch.arange(45) < 23)).sum() / inside.sum()
            label = 2 if lion else 1
            label = label if mean > 0.6 else 0 if mean < 0.2 else VOID
            assert (labels[inside] == label).all()
    assert maps.count == 1 + max(int(maps.read("superpixels", i).max()) for i in range(5))


def test_rule80_keeps_the_labels_of_the_majority(data, tmp_path):
    run(tmp_path, data, mining="rule80", share=0.97)
    maps, kept = maps_of(tmp_path, data), 0
    for index in range(5):
        mined = maps.read("mined1", index)
        assert torch.equal(mined, maps.read("majority1", index))
        kept += (mined != VOID).sum() / mined.numel() / 5
    assert 0.1 < kept < 1
    assert not any("loss_region" in line for line in logged(tmp_path))  # no network learns


def test_superpixels_without_a_cell_are_mined_nowhere(data, tmp_path):
    """At stride 8 a cell's label is that of one of 64 pixels, and superpixels have about 36."""
    run(tmp_path, data, stride=8, tau=0.0)
    maps, unseen = maps_of(tmp_path, data, stride=8), 0
    for index in range(5):
        mined, segments = maps.read("mined1", index), maps.read("superpixels", index)
        cells = at_cells(pad(segments, 8), 8)
        seen = (segments[..., None] == cells.unique()).any(dim=-1)
        assert torch.equal(mined != VOID, seen)
        unseen += (~seen).sum()
    assert unseen > 100


def test_clamping_changes_what_is_refined_alone(whole, data, tmp_path):
    run(tmp_path, data, clamp=True)
    ours, expected = files(tmp_path), files(whole[0])
    changed = {path.split("/")[0] for path in ours if ours[path] != expected[path]}
    assert "refined1" in changed <= {"refined1", "labels1", "unary2", "majority2"}


def test_masks_are_not_read_but_for_scores(whole, data, tmp_path):
    """With the masks' own tags listed: other masks, then none, leave everything as it was."""
    root = tmp_path / "data"
    shutil.copytree(data, root)
    listed = {name: SHOWN[int(name)].translate({49: "cat\t", 50: "sea lion"}) for name in NAMES}
    (root / "tags.txt").write_text("".join(f"{name}\t{t}\n" for name, t in listed.items()))
    rng = np.random.default_rng(1)
    for name in NAMES:
        trees.save_mask(root / "masks/train" / f"{name}.png", rng.integers(0, 3, (37, 45)))
    expected, others = files(whole[0]), {}
    for masks in ("other", "none"):
        if masks == "none":
            shutil.rmtree(root / "masks/train")
        run(tmp_path / masks, root)
        assert files(tmp_path / masks) == expected
        ours, theirs = (saved(folder)["networks"][0] for folder in (tmp_path / masks, whole[0]))
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        others[masks] = figures(tmp_path / masks)
    assert others["other"]["seeds"] != figures(whole[0])["seeds"]
    for line in others["none"].values():
        for name, value in line.items():
            known = name in ("step", "stage") or name.startswith("energy")
            assert (value is not None) == known
    assert (tmp_path / "none" / "panels.png").is_file()


def test_a_run_that_stops_in_any_stage_goes_on_exactly(whole, data, tmp_path, monkeypatch):
    """Twice in each stage: before its second step is logged, and between two of its maps."""
    log, write, taken, stop = Run.log, Maps.write, [], {}

    def fail_log(self, step, **values):
        taken.append(step)
        if step == stop.get("step"):
            raise RuntimeError("power cut")
        log(self, step, **values)

    def fail_write(self, kind, index, value):
        if index == stop.get("index") and kind != "superpixels":
            raise RuntimeError("power cut")
        write(self, kind, index, value)

    monkeypatch.setattr(Run, "log", fail_log)
    monkeypatch.setattr(Maps, "write", fail_write)
    for stage in range(len(STAGES)):
        first = max(2 * stage - 2, 0)  # of the last stage that is not over
        places = [("step", 2 * stage + 1, first), ("index", 3, 2 * stage)]
        for what, where, start in places:
            stop.clear()
            taken.clear()
            stop[what] = where
            with pytest.raises(RuntimeError, match="power cut"):
                run(tmp_path, data, resume=True)
            assert taken == list(range(start, 2 * stage + 2))
    stop.clear()
    run(tmp_path, data, resume=True)
    for name in ("last.pt", "best.pt", "iou.txt", "panels.png"):
        assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes(), name
    assert files(tmp_path) == files(whole[0]) and logged(tmp_path) == logged(whole[0])
    again = run(tmp_path, data, resume=True)
    assert taken[-2:] == [8, 9] and again.miou == whole[1].miou
    assert logged(tmp_path) == logged(whole[0])


def test_lost_maps_are_named_when_a_run_goes_on(whole, data, tmp_path):
    maps = maps_of(tmp_path, data)
    for content in (None, b"junk", b"\x93NUMPY"):
        (tmp_path / "maps/unary1").mkdir(parents=True, exist_ok=True)
        if content:
            (tmp_path / "maps/unary1/001.npy").write_bytes(content)
        with pytest.raises(InputError, match="unary1/001: lost or damaged"):
            maps.read("unary1", 1)
    (tmp_path / "maps/unary1/001.png").write_bytes((whole[0] / "maps/seeds/001.png").read_bytes())
    assert maps.read("unary1", 1).dtype == torch.int64
    (tmp_path / "maps/unary1/001.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match="unary1/001: lost or damaged"):
        maps.read("unary1", 1)


def test_evaluations_between_leave_lines_and_nothing_else(data, tmp_path):
    flags = dict(method="unary", iters=5, net_steps=(0.4, 1.0, 1.0))
    run(tmp_path / "often", data, **flags | dict(eval_every=2))
    run(tmp_path / "never", data, **flags | dict(eval_every=99))
    lines = [line for line in logged(tmp_path / "often") if "val" in line]
    assert [(line["stage"], line["step"]) for line in lines] == [("unary1", 4), ("unary1", 6)]
    assert all(0 <= line["val"] <= 1 and len(line) == 3 for line in lines)
    assert not any("val" in line for line in logged(tmp_path / "never"))
    often, never = (saved(tmp_path / name)["networks"][0] for name in ("often", "never"))
    assert all(torch.equal(value, never[name]) for name, value in often.items())
    assert files(tmp_path / "often") == files(tmp_path / "never")


@pytest.mark.parametrize(
    "flags", [dict(rule="abs", stride=4, passes=1, amp="bf16"), dict(scales=(0.5, 2.0), workers=1)]
)
def test_other_settings_run(flags, data, tmp_path):
    assert math.isfinite(run(tmp_path, data, cam_scales=(0.5, 1.0), **flags).miou)
    assert all(
        math.isfinite(v) for line in logged(tmp_path) for k, v in line.items() if "loss" in k
    )


def test_the_recipe_of_voc_trains_on_a_tiny_tree(tmp_path):
    root = trees.voc_tree(tmp_path / "data", aug=False)
    few = dict(iters=1, rounds=1, batch_size=2, crop_size=32, width=8, workers=0, device="cpu")
    few |= dict(backbone="resnet18", net="resnet18", weights="none", net_steps=(1.0, 1.0, 1.0))
    few |= dict(cam_scales=(0.5, 1.0))
    flags = ial.RECIPES["voc"] | few
    where = dict(data_path=str(root), output_dir=str(tmp_path / "run"))
    result = ial.train(ial.Config(**where, **flags))
    assert math.isfinite(result.miou) and len(result.history[-1]["iou"]) == 21
    assert list(figures(tmp_path / "run")) == STAGES


# --- several processes ---


def one_of_two(rank, folder, data):
    """What each of two processes does and saves."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    result = run(folder / "run", data)
    torch.save(result.model.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_one_network_and_share_the_maps(data, tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path, data), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert len(files(tmp_path / "run")) == len(KINDS) * len(NAMES)
    lines, maps = figures(tmp_path / "run"), maps_of(tmp_path / "run", data)
    assert list(lines) == STAGES
    for figure, value in maps.quality(ALONE, "refined", "labels1").items():
        expected = lines["pairwise1"][figure]
        assert math.isnan(value) if expected is None else value == pytest.approx(expected)


# --- the run's own part ---


def test_stages_are_noted_and_saved(data, tmp_path, capsys):
    one = Run("ial", ial.Config(**TINY, output_dir=str(tmp_path)), total=7)
    network = Small(3, "resnet18", width=8)
    one.start([network], load_tagged("folder", str(data)).data, dict(network=network))
    assert one.total == 7
    one.note(2, "first", good=0.5, bad=math.nan)
    assert not (tmp_path / "last.pt").exists()
    one.note(4, "second", other=1)
    one.save(4)
    assert logged(tmp_path) == [
        {"step": 3, "stage": "first", "good": 0.5, "bad": None},
        {"step": 5, "stage": "second", "other": 1.0},
    ]
    assert saved(tmp_path)["step"] == 5
    assert "bad" not in capsys.readouterr().out
    one.rank = 1  # the others are silent
    one.note(6, "third", other=1)
    one.save(6)
    assert len(logged(tmp_path)) == 2 and saved(tmp_path)["step"] == 5


def test_a_stage_loops_over_its_own_steps(tmp_path):
    one = Run("ial", ial.Config(output_dir=str(tmp_path)), total=9)
    steps = []
    for step in one.loop(range(3, 6)):
        steps.append((step, torch.initial_seed()))
    assert [step for step, _ in steps] == [3, 4, 5] and len({seed for _, seed in steps}) == 3
    for step, seed in steps:
        one.seed(step)
        assert torch.initial_seed() == seed
    assert list(one.loop()) == list(range(9))
    row = torch.ones(2, 3, requires_grad=True)
    one.barrier()
    assert torch.equal(one.gather(row), row) and not one.gather(row).requires_grad


# --- maps ---


def test_maps_are_read_as_they_were_written(data, tmp_path):
    maps = maps_of(tmp_path, data)  # 001 shows the second class
    probs = torch.rand(3, 4, 5)
    maps.write("probs", 1, probs)
    stored = np.load(tmp_path / "maps/probs/001.npy")
    assert stored.dtype == np.float16 and stored.shape == (2, 4, 5)
    expected = probs.half().float()
    expected[1] = 0
    ours = maps.read("probs", 1)
    assert ours.dtype == torch.float32 and torch.equal(ours, expected)
    wide = ["I;16", "I"]  # the latter in older Pillow
    for value, modes in ((255, ["L"]), (256, wide), (65535, wide)):
        labels = torch.tensor([[0, 1, 2], [254, 100, value]])
        maps.write("labels", 0, labels)
        with Image.open(tmp_path / "maps/labels/000.png") as png:
            assert png.mode in modes
        ours = maps.read("labels", 0)
        assert ours.dtype == torch.int64 and torch.equal(ours, labels)


def test_pictures_and_maps_travel_to_other_processes(data, tmp_path):
    """Loaders' workers are started anew on some systems: what they are given is pickled."""
    maps = maps_of(tmp_path, data)
    for index in range(5):
        maps.write("labels", index, torch.full((37, 45), index))
    settings = SimpleNamespace(batch_size=2, seed=0)
    loading = dict(rank=0, world=1, workers=0)
    lone = SimpleNamespace(cfg=settings, world=1, loading=loading)
    view = partial(crop_view, 32, 2)
    expected = list(maps.loader(lone, range(2), view, "labels"))
    loader = maps.loader(lone, range(2), view, "labels")
    spawned = DataLoader(
        loader.dataset,
        batch_sampler=loader.batch_sampler,
        num_workers=1,
        multiprocessing_context="spawn",
    )
    for ours, theirs in zip(spawned, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_labels_are_the_likeliest_classes(data, tmp_path):
    maps = maps_of(tmp_path, data)
    probs = torch.zeros(3, 19, 23)
    probs[1, :, :10], probs[2, :, 10:] = 0.5, 0.25
    maps.write("probs", 2, probs)
    labels = maps.labels("probs", 2)
    assert labels.shape == (37, 45)
    assert (labels[:, :19] == 1).all() and (labels[:, 21:] == 2).all()


def test_the_best_threshold_is_that_of_the_labels_it_gives(data, tmp_path):
    """Each level as a constant map of the background, scored one by one."""
    maps, levels = maps_of(tmp_path, data), (0.1, 0.3, 0.5, 0.7, 0.9)
    for index in range(5):
        probs = F.pad(torch.rand(2, 19, 23), (0, 0, 0, 0, 1, 0))
        maps.write("heat", index, probs)
        for level in levels:
            maps.write(f"at{level}", index, torch.cat([torch.full((1, 19, 23), level), probs[1:]]))
    scores = [maps.quality(ALONE, "it", f"at{level}")["it"] for level in levels]
    assert len(set(scores)) > 2
    best = maps.best_threshold(ALONE, "heat", levels)
    assert best == pytest.approx(max(scores), abs=1e-3)  # levels were rounded to half precision
    assert maps.best_threshold(ALONE, "heat", levels[:1]) == pytest.approx(scores[0], abs=1e-3)
    maps.pairs = [(image, None) for image, _ in maps.pairs]
    assert math.isnan(maps.best_threshold(ALONE, "heat", levels))


def test_more_superpixels_than_a_file_can_hold_are_refused(data, tmp_path):
    with pytest.raises(InputError, match="--segment-size"):
        maps_of(tmp_path, data).write("superpixels", 0, torch.tensor([[2**16]]))


def test_a_picture_too_small_to_be_predicted_is_named(tmp_path):
    root = tagged_tree(tmp_path / "data", ("1", "2"), height=40, width=31)
    with pytest.raises(InputError, match="images/train/000.png: is under 32 x 32"):
        run(tmp_path / "run", root)


def test_each_process_has_its_share_of_the_filled_pictures(data, tmp_path):
    maps = maps_of(tmp_path, data, stride=8)
    shares = list(maps.each(SimpleNamespace(rank=1, world=2, device="cpu")))
    assert [index for index, _ in shares] == [1, 3]
    for index, images in shares:
        assert images.shape == (1, 3, 40, 48)
        expected = normalise(maps.image(index).float() / 255)
        assert torch.equal(images[0, :, :37, :45], expected)
        assert torch.equal(images[0, :, 39, :45], expected[:, 36])


def test_quality_counts_what_is_labelled_and_right(tmp_path):
    """Two pictures of 3 x 4 pixels, counted by hand; void counts nowhere."""
    truth = [[[0, 0, 1, 1], [0, 0, 1, 255], [0, 0, 0, 0]], [[2, 2, 0, 0], [2, 2, 0, 0], [0] * 4]]
    labels = [[[0, 1, 1, 2], [0, 0, 255, 1], [255] * 4], [[2, 2, 2, 0], [0, 255, 0, 0], [0] * 4]]
    root = tagged_tree(tmp_path / "data", ("1", "2"), height=40, width=40)
    for index, values in enumerate(truth):
        trees.save_mask(root / "masks/train" / f"{index:03d}.png", np.array(values))
    maps = maps_of(tmp_path / "run", root)
    for index, values in enumerate(labels):
        maps.write("labels", index, torch.tensor(values))
    ours = maps.quality(ALONE, "it", "labels")
    # Labelled: class 0 is right 3 + 7 times, taken for 1 once, for 2 once; class 1 is right once,
    # taken for 2 once; class 2 is right twice, taken for 0 once.
    iou = [10 / 13, 1 / 3, 2 / 5]
    assert ours == pytest.approx(
        {
            "it": sum(iou) / 3,
            "it_fg_precision": 3 / 6,
            "it_bg_precision": 10 / 11,
            "it_fg_coverage": 5 / 7,
            "it_bg_coverage": 12 / 16,
        }
    )
    maps.pairs = [(image, None) for image, _ in maps.pairs]
    unknown = maps.quality(ALONE, "it", "labels")
    assert unknown.keys() == ours.keys() and all(map(math.isnan, unknown.values()))


def test_panels_show_the_maps_of_some_pictures(whole, data, tmp_path, monkeypatch):
    folder, result = whole
    maps, drawn = maps_of(folder, data), []
    monkeypatch.setattr(common.maps, "sheet", lambda *args: drawn.append(args))
    tagged = load_tagged("folder", str(data)).data
    kinds = {"seeds": "seeds", "refined": "labels1"}
    stage_panels(tmp_path / "x.png", maps, kinds, result.model, tagged, rows=2)
    ((path, titles, strips, _),) = drawn
    assert path == tmp_path / "x.png" and len(strips) == 2
    assert titles == "image activation superpixels seeds refined prediction truth".split()
    white = np.full(3, 255)
    palette = np.array([*tagged.colors, *[white] * 253], dtype=np.uint8)
    for index, strip in ((0, strips[0]), (4, strips[1])):
        assert all(cell.shape == (37, 45, 3) and cell.dtype == np.uint8 for cell in strip)
        assert (strip[0] == maps.image(index).permute(1, 2, 0).numpy()).all()
        for cell, kind in ((strip[3], "seeds"), (strip[4], "labels1")):
            assert (cell == palette[maps.read(kind, index).numpy()]).all()
        segments = maps.read("superpixels", index).numpy()
        for segment in np.unique(segments):
            mean = strip[0][segments == segment].mean(axis=0)
            assert (abs(strip[2][segments == segment] - mean) < 1).all()
        with Image.open(data / "masks/train" / f"{maps.names[index]}.png") as mask:
            assert (strip[6] == palette[np.array(mask)]).all()
        image = pad(maps.image(index), 2)[None].float() / 255
        predicted = result.model(normalise(image)).argmax(dim=1)[0, :37, :45]
        assert (strip[5] == palette[predicted.numpy()]).all()


def test_a_sheet_keeps_the_colours_of_maps(data, tmp_path):
    """A photograph may be smoothed; maps of any size are enlarged cell by cell."""
    tagged = load_tagged("folder", str(data)).data
    rows = []
    for height in (20, 30):
        photo = np.random.default_rng(0).integers(0, 256, (height, 40, 3), dtype=np.uint8)
        board = np.indices((2, 4)).sum(axis=0) % 2
        board = (255 * board[..., None]).repeat(3, axis=2).astype(np.uint8)
        rows.append([photo, board])
    sheet(tmp_path / "sheet.png", ["photo", "board"], rows, tagged)
    drawn = np.array(Image.open(tmp_path / "sheet.png"))
    assert drawn.shape[1] == 2 * CELL + 3 * GAP
    top = LINE
    for height in (112, 168):
        board = drawn[top : top + height, CELL + 2 * GAP : 2 * CELL + 2 * GAP]
        expected = np.kron(np.indices((2, 4)).sum(axis=0) % 2, np.ones((height // 2, 56)))
        assert (board == 255 * expected[..., None]).all()
        assert (drawn[top + height : top + height + GAP] == 255).all()
        top += height + GAP


# --- pixels and cells ---


@pytest.mark.parametrize("crop, stride", [(16, 2), (16, 4), (48, 2), (48, 4)])
def test_windows_show_the_same_place_of_picture_labels_and_cells(crop, stride):
    """A picture of its own coordinates; crops of 48 reach beyond its 37 x 45 pixels."""
    rows, columns = torch.meshgrid(torch.arange(37), torch.arange(45), indexing="ij")
    picture = torch.stack([rows, columns, 0 * rows]).byte()
    cells = pad(picture, stride)[:, ::stride, ::stride].float() // stride
    tops, lefts, flips = set(), set(), set()
    for _ in range(200):
        image, labels, cut = crop_view(crop, stride, picture, 64 * rows + columns, cells)
        assert image.shape == (3, crop, crop) and labels.shape == (crop, crop)
        assert cut.shape == (3, crop // stride, crop // stride)
        mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
        row, column, _ = (255 * (image * std + mean)).round().long()
        assert torch.equal(64 * row + column, labels)
        large = cut.repeat_interleave(stride, 1).repeat_interleave(stride, 2)
        assert torch.equal(large[0], (row // stride).float())
        assert torch.equal(large[1], (column // stride).float())
        flipped = bool(column[0, 0] > column[0, -1])
        column = column.flip(-1) if flipped else column
        top, left = int(row[0, 0]), int(column[0, 0])
        assert row[:, 0].tolist() == [min(top + k, 36) for k in range(crop)]
        assert column[0].tolist() == [min(left + k, 44) for k in range(crop)]
        tops, lefts, flips = tops | {top}, lefts | {left}, flips | {flipped}
    assert tops == set(range(0, max(37 - crop, 0) + 1, stride)) and len(flips) == 2
    assert lefts == set(range(0, max(45 - crop, 0) + 1, stride))


def test_a_view_for_tags_is_a_crop_with_all_tags():
    picture, tags = torch.full((3, 40, 40), 255, dtype=torch.uint8), torch.tensor([True, False])
    image, given = tag_view(picture, tags, 32, (1.0,))
    assert image.shape == (3, 32, 32) and torch.equal(given, tags)
    assert torch.equal(image, normalise(torch.ones(3, 32, 32)))


def test_pictures_are_filled_with_their_last_pixels():
    maps = torch.arange(12.0).view(1, 3, 4)
    assert torch.equal(pad(maps, 2), maps[:, [0, 1, 2, 2]])
    assert torch.equal(pad(maps[0], 3), maps[0][:, [0, 1, 2, 3, 3, 3]])
    assert torch.equal(pad(maps, 1), maps)


def test_cells_take_the_label_of_one_of_their_pixels():
    labels = torch.arange(48).view(1, 6, 8)
    assert at_cells(labels, 2).tolist() == [[[9, 11, 13, 15], [25, 27, 29, 31], [41, 43, 45, 47]]]
    assert torch.equal(at_cells(labels, 1), labels)
    cells = torch.rand(1, 2, 3, 5)
    pixels = at_pixels(cells, 4)
    assert pixels.shape == (1, 2, 12, 20)
    torch.testing.assert_close(
        F.avg_pool2d(pixels, 4)[..., 1, 2], pixels[..., 4:8, 8:12].mean((2, 3))
    )
    assert (at_pixels(torch.ones(1, 1, 2, 2), 3) == 1).all()
    middle = at_pixels(torch.tensor([[[[0.0, 1.0]]]]), 2)[0, 0, 0]
    assert middle.tolist() == [0, 0.25, 0.75, 1]


def test_labels_of_superpixels_are_painted_and_found_again():
    segments = torch.tensor([[[0, 0, 2], [2, 4, 4]], [[1, 1, 1], [1, 3, 0]]])
    labels = torch.tensor([[5, 255, 7, 255, 0], [1, 2, 255, 255, 255]])
    painted = paint(labels, segments)
    assert painted.tolist() == [[[5, 5, 7], [7, 0, 0]], [[2, 2, 2], [2, 255, 1]]]
    assert torch.equal(of_segments(painted, segments, 5), labels)


def test_clamped_cells_are_means_over_their_pixels():
    unary = torch.rand(2, 3, 2, 3).softmax(dim=1)
    mined = torch.randint(4, (2, 4, 6))
    mined[mined == 3] = VOID
    ours = clamped(unary, mined, 2)
    for b in range(2):
        for row in range(2):
            for column in range(3):
                expected = torch.zeros(3)
                for y in (2 * row, 2 * row + 1):
                    for x in (2 * column, 2 * column + 1):
                        label = int(mined[b, y, x])
                        own = unary[b, :, row, column] if label == VOID else torch.eye(3)[label]
                        expected += own / 4
                torch.testing.assert_close(ours[b, :, row, column], expected)


# --- encoders and the loss of regions ---


def test_activation_maps_undo_flips_and_scales():
    """A network that looks at single pixels: its maps are those of the unflipped picture."""
    net = nn.Conv2d(3, 4, 1, bias=False)
    net.weight.data[3] = 0  # a class without activation anywhere
    images = torch.randn(2, 3, 40, 48)
    tags = torch.tensor([[True, False, True, True], [True, True, False, False]])
    ours = activation_maps(net, images, tags, (1.0,))
    scores = net(images).relu() * tags[:, :, None, None]
    expected = scores / scores.amax(dim=(2, 3), keepdim=True).clamp(min=1e-5)
    torch.testing.assert_close(ours, expected)
    assert ours.shape == (2, 4, 40, 48) and not ours.requires_grad
    assert ours.amax(dim=(2, 3)).tolist() == [[1, 0, 1, 0], [1, 1, 0, 0]]
    resize = partial(F.interpolate, mode="bilinear", align_corners=False)
    half = resize(net(resize(images, (80, 96))).relu(), (40, 48)) * tags[:, :, None, None]
    both = scores + half
    both = both / both.amax(dim=(2, 3), keepdim=True).clamp(min=1e-5)
    torch.testing.assert_close(activation_maps(net, images, tags, (1.0, 2.0)), both)


def test_activation_maps_see_the_mirrored_picture_too():
    sizes = []

    def ramp(images):
        sizes.append(tuple(images.shape[2:]))
        return torch.arange(1.0, 9).expand(1, 1, 6, 8)

    ours = activation_maps(ramp, torch.zeros(1, 3, 36, 48), torch.tensor([[True]]), (1.0, 0.1))
    torch.testing.assert_close(ours, torch.ones(1, 1, 36, 48))
    assert sizes == [(36, 48)] * 2 + [(32, 32)] * 2  # never too small for a network


@pytest.mark.parametrize("net, strides", [("small", (4, 2)), ("resnet18", (16, 2))])
def test_networks_fit_odd_sizes(net, strides):
    images = torch.randn(2, 3, 37, 45)
    scores = TagNet(5, net, "none")(images)
    assert scores.shape == (2, 5, *(-(-side // strides[0]) for side in (37, 45)))
    for stride in (2, 3, 4):
        gates = GuidanceNet(net, "none", stride)(images)
        assert gates.shape == (2, 4, 4, -(-37 // stride), -(-45 // stride))
    segments = torch.randint(6, (2, 19, 23))
    region = ial.RegionNet(4, net, "none").eval()
    logits = region(images, segments, 7)
    assert logits.shape == (2, 7, 4)
    assert torch.equal(logits[0, 6], logits[1, 6])  # nobody's: features of 0
    for module in (scores, gates, logits):
        assert module.isfinite().all()


def test_the_region_network_sees_little_around_a_superpixel():
    region = ial.RegionNet(4, "small", "none").eval()
    images = torch.randn(1, 3, 48, 48, requires_grad=True)
    segments = torch.zeros(1, 24, 24, dtype=torch.long)
    segments[0, 12:15, 6:9] = 1
    region(images, segments, 2)[0, 1].square().sum().backward()
    rows, columns = images.grad[0].abs().sum(dim=0).nonzero().unbind(1)
    assert rows.min() >= 24 - 4 and rows.max() < 30 + 4
    assert columns.min() >= 12 - 4 and columns.max() < 18 + 4


def test_the_trunk_of_a_larger_resnet_has_its_widths():
    stages, widths = trunk("resnet50", "none", 3, [])
    assert len(stages) == 3 and widths == [64, 256, 512]
    features = torch.randn(1, 3, 32, 32)
    for stage, width, size in zip(stages, widths, (16, 8, 4), strict=True):
        features = stage.eval()(features)
        assert features.shape == (1, width, size, size)


def test_balanced_cross_entropy_is_the_mean_over_classes():
    logits = torch.randn(2, 9, 4, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([[0, 0, 0, 0, 2, 255, 0, 0, 2], [255, 0, 3, 0, 0, 0, 0, 255, 0]])
    ours, means = balanced_cross_entropy(logits, labels), []
    for kind in range(4):
        losses = [
            -logits[b, s].log_softmax(dim=0)[kind]
            for b in range(2)
            for s in range(9)
            if labels[b, s] == kind
        ]
        means += [sum(losses) / len(losses)] if losses else []
    assert len(means) == 3
    expected = sum(means) / 3
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)
    nothing = balanced_cross_entropy(logits, torch.full_like(labels, VOID))
    nothing.backward()
    assert nothing == 0 and (logits.grad == 0).all()


# --- flags ---


@pytest.mark.parametrize(
    "flags",
    [
        "--fg 1.5",
        "--bg 0.9",
        "--share 2",
        "--tau nan",
        "--tau -0.1",
        "--net-steps 1 nan 1",
        "--net-steps 1 1",
        "--net-steps 0.01 1 1",
        "--net-steps 1 1 0",
        "--segment-size 0",
        "--probes 0",
        "--passes 0",
        "--stride 0",
        "--stride 5",
        "--lam -1",
        "--rounds -1",
        "--method both",
        "--mining maybe",
        "--rule tanh",
        "--net vgg16",
        "--cam-scales 0",
        "--clamp=yes",
        "--labeled 1/2",
        "--supervised-only",
        "--background nothing",
        "--data-path nowhere",
        "--dataset cityscapes",
    ],
)
def test_a_flag_that_cannot_be_right_ends_with_one_line_and_status_2(
    flags, data, tmp_path, monkeypatch, capsys
):
    root = trees.cityscapes_tree(tmp_path / "data") if "cityscapes" in flags else data
    argv = ["ial.py", "--dataset=folder", f"--data-path={root}", "--iters=9", "--weights=none"]
    argv += ["--backbone=resnet18", "--output-dir", str(tmp_path / "run"), "--crop-size=32"]
    monkeypatch.setattr(sys, "argv", [*argv, *flags.split()])
    with pytest.raises(SystemExit) as end:
        ial.main(ial.train, ial.Config, ial.RECIPES)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and said.startswith("ial.py: ")
    named = "--background" if "cityscapes" in flags else flags.split("=")[0].split()[0]
    assert named in said and not (tmp_path / "run").exists()


def test_recipes_are_those_of_their_datasets(capsys):
    parse = lambda *argv: parse_config(ial.Config, ial.RECIPES, list(argv))  # noqa: E731
    assert parse() == ial.Config()
    for name, recipe in ial.RECIPES.items():
        assert parse("--dataset", name) == ial.Config(**recipe)
        ial.check_flags(ial.Config(**recipe))
    voc = parse("--dataset=voc", "--rounds=2", "--net-steps", "1", "2", "3", "--clamp")
    assert (voc.rounds, voc.net_steps, voc.clamp, voc.crop_size) == (2, (1.0, 2.0, 3.0), True, 320)
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "Iterative Affinity Learning" in text and "--cam-scales" in text
