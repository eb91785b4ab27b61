"""IAL's stages and the maps between them: what each learns from, what it leaves, resuming."""

import io
import json
import math
import pickle
import re
import shutil
import struct
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trees
from few_shapes import lighten
from PIL import Image
from test_tags import SHOWN, tagged_tree

import common.maps
import ial
from common.augment import normalise
from common.colors import DISTINCT, GREY
from common.flags import LoneError
from common.losses import VOID
from common.maps import Maps, at_pixels, pad
from common.panels import CELL, MARK
from common.run import InputError, Run
from common.tags import load_tagged

TINY = dict(dataset="folder", crop_size=32, batch_size=2, width=8, iters=2, rounds=1, tau=0.4)
TINY |= dict(net_steps=(1.0, 1.0, 1.0), eval_every=1, device="cpu", amp="none")
STAGES = ["seeds", "unary1", "region1", "pairwise1", "unary2"]  # of two steps each
PROBS = {"cam", "unary1", "unary2", "refined1"}
KINDS = PROBS | {"superpixels", "seeds", "majority1", "mined1", "labels1", "majority2"}
FLAGS = SimpleNamespace(batch_size=2, accum=1, workers=0, seed=0)
MACHINE = dict(rank=0, world=1, device="cpu", loading=dict(pin_memory=False))
ALONE = SimpleNamespace(**MACHINE, cfg=FLAGS, pixels=4000, gather=lambda tensor: tensor)  # a Run
NAMES = ["000", "001", "002", "004", "005"]  # 003 shows no class


def run(folder, data, **flags):
    with pytest.MonkeyPatch.context() as patch:
        lighten(patch.setattr)
        where = dict(data_path=str(data), output_dir=str(folder))
        cfg = ial.Config(**where, **TINY | flags)
        for name in ial.ignored(cfg):
            setattr(cfg, name, getattr(ial.Config(), name))
        return ial.train(cfg)


def logged(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key != "seconds"} for line in lines]


def figures(folder):
    """What the log says of each stage."""
    lines = [line for line in logged(folder) if "stage" in line and "val" not in line]
    assert len({line["stage"] for line in lines}) == len(lines)
    return {line["stage"]: line for line in lines}


def weights(folder):
    return torch.load(folder / "last.pt", weights_only=True)["networks"][0]


def same(ours, theirs):
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def files(folder):
    """All maps of a run as bytes."""
    paths = (path for path in (folder / "maps").rglob("*") if path.is_file())
    return {path.relative_to(folder / "maps").as_posix(): path.read_bytes() for path in paths}


def maps_of(folder, data, stride=2):
    """The maps of a run that is over, or of none."""
    return Maps(folder / "maps", load_tagged("folder", str(data)), stride)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of 37 x 45 pixels, whose cells do not fit."""
    return tagged_tree(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a run that nothing stopped, and its result."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run(folder, data)


# --- a whole run ---


def test_a_run_leaves_a_line_for_each_stage(whole):
    folder, result = whole
    assert 0 <= result.miou == result.history[-1]["miou"] <= 1 and len(result.history) == 2
    lines = figures(folder)
    assert list(lines) == STAGES and [line["step"] for line in lines.values()] == [2, 4, 6, 8, 10]
    parts = ["", "_fg_precision", "_bg_precision", "_fg_coverage", "_bg_coverage"]
    kinds = [["seeds"], ["majority", "unary"], ["mined"], ["refined"], ["majority", "unary"]]
    others = [["cam"], [], [], ["energy_unary", "energy_refined"], []]
    for line, maps, other in zip(lines.values(), kinds, others, strict=True):
        shares = {kind + part for kind in maps for part in parts}
        other += [f"{kind}_fg_area" for kind in maps]
        assert line.keys() == {"step", "stage", *other, *shares}
        assert all(line[share] is None or 0 <= line[share] <= 1 for share in shares)
        assert all(line[name] is None or line[name] >= 0 for name in other)
    steps = [line for line in logged(folder) if "stage" not in line]
    losses = [name for name in ("tags", "unary", "region", "affinity", "unary") for _ in range(2)]
    assert all(math.isfinite(line[f"loss_{n}"]) for n, line in zip(losses, steps, strict=True))


def test_maps_of_every_stage_are_there_and_hold_possible_classes_alone(whole, data):
    folder, _ = whole
    assert {path.name for path in (folder / "maps").iterdir()} == KINDS
    maps, seen = maps_of(folder, data), {kind: set() for kind in KINDS}
    assert maps.names == NAMES and len(files(folder)) == len(KINDS) * len(NAMES)
    for index, name in enumerate(NAMES):
        possible = {0, *map(int, SHOWN[int(name)])}
        for kind in PROBS:
            stored = np.load(folder / "maps" / kind / f"{name}.npy")
            assert stored.dtype == np.float16 and stored.shape == (len(possible), 19, 23)
            probs = maps.read(kind, index)
            assert probs.shape == (3, 19, 23) and ((probs >= 0) & (probs <= 1)).all()
            assert {c for c in range(3) if probs[c].any()} <= possible
            if kind != "cam":  # nothing of them is lost with the absent classes
                torch.testing.assert_close(probs.sum(0), torch.ones(19, 23), rtol=0, atol=2e-3)
        segments = maps.read("superpixels", index)
        for kind in KINDS - PROBS - {"superpixels"}:
            labels = maps.read(kind, index)
            assert labels.dtype == torch.int64 and labels.shape == segments.shape == (37, 45)
            seen[kind] |= set(labels.unique().tolist())
            assert set(labels.unique().tolist()) <= possible | {VOID}
            if kind != "labels1":
                assert all(len(labels[segments == s].unique()) == 1 for s in segments.unique())
    assert seen["labels1"] <= {0, 1, 2} and len(seen["mined1"] - {VOID}) > 1
    assert len(seen["seeds"]) > 2


def test_the_log_is_about_the_maps_that_lie_there(whole, data):
    folder, _ = whole
    maps, lines = maps_of(folder, data), figures(folder)
    stages = dict(seeds="seeds", majority="unary1", unary="unary1", mined="region1")
    for name, stage in [*stages.items(), ("refined", "pairwise1")]:
        kind = {"seeds": "seeds", "refined": "labels1"}.get(name, f"{name}1")
        for figure, value in maps.quality(ALONE, name, kind).items():
            expected = lines[stage][figure]
            assert math.isnan(value) if expected is None else value == pytest.approx(expected)
    for index in range(5):
        large = F.interpolate(maps.read("refined1", index)[None], (38, 46), mode="bilinear")
        assert torch.equal(maps.read("labels1", index), large[0].argmax(dim=0)[:37, :45])


def test_the_plan_has_the_stages_of_the_method():
    lengths = dict(seeds=12, unary=10, region=5, pairwise=3)
    ial2 = "seeds unary1 region1 pairwise1 unary2 region2 pairwise2 unary3"
    direct2, unary = "seeds unary1 unary2 unary3", "seeds unary1"
    cases = dict(
        ial=(unary, ial2), direct=(unary, direct2), unary=(unary, unary), cam=("seeds",) * 2
    )
    for method, expected in cases.items():
        for rounds, stages in zip((0, 2), expected, strict=True):
            cfg = ial.Config(method=method, rounds=rounds, iters=10, net_steps=(1.2, 0.5, 0.3))
            plan, done = ial.plan(cfg), 0
            assert " ".join(f"{name}{t or ''}" for name, t, _ in plan) == stages
            for name, _, steps in plan:
                assert steps == range(done, done + lengths[name])
                done = steps.stop


def test_baselines_share_the_first_stages(whole, data, tmp_path, capsys):
    """Each is the start of the whole run; what it has no stage for is not there."""
    expected, kinds = files(whole[0]), dict(cam={"cam", "superpixels", "seeds"})
    kinds["unary"] = kinds["cam"] | {"unary1", "majority1"}
    kinds["direct"] = {*kinds["unary"], "unary2", "majority2", "labels1", "labels2"}
    for method, left in kinds.items():
        run(tmp_path / method, data, method=method)
        maps = files(tmp_path / method)
        assert {name.split("/")[0] for name in maps} == left and len(maps) == 5 * len(left)
        common = (name for name in maps if name.split("/")[0] in kinds["unary"])
        assert all(maps[name] == expected[name] for name in common)
        assert (tmp_path / method / "panels.png").is_file()
    assert "no network to evaluate" in capsys.readouterr().out


UNSURE = dict(fg=1.0, tau=1.0)  # no class has a seed, no region is so sure
COLLAPSED = dict(fg=1.0, bg=1.0, lr=0.5, mining="rule80")  # background is all that is learnt


@pytest.mark.parametrize("flags", [dict(), UNSURE, COLLAPSED], ids=["usual", "unsure", "collapsed"])
def test_classes_that_a_stage_finds_nowhere_are_named(flags, data, tmp_path, capsys):
    """With the flag to change; no mask is needed."""
    root, said, absent = tmp_path / "data", {}, {}
    shutil.copytree(data, root)
    listed = {name: SHOWN[int(name)].translate({49: "cat\t", 50: "sea lion"}) for name in NAMES}
    (root / "tags.txt").write_text("".join(f"{name}\t{t}\n" for name, t in listed.items()))
    shutil.rmtree(root / "masks")
    run(tmp_path / "run", root, **flags)
    for line in capsys.readouterr().out.splitlines():
        if found := re.fullmatch("(.*): no pixel of (.*); take (.*)", line):
            said[found[1]] = found[2], found[3]
    for kind in ("seeds", "mined1", "labels1"):
        maps = [np.array(Image.open(path)) for path in (tmp_path / "run/maps" / kind).iterdir()]
        found = set(np.concatenate([labels.flatten() for labels in maps]).tolist())
        classes = enumerate(("background", "cat", "sea lion"))
        absent[kind] = ", ".join(name for index, name in classes if index not in found)
    assert {k: names for k, (names, _) in said.items()} == {k: n for k, n in absent.items() if n}
    if flags:
        assert said["seeds"] == ("cat, sea lion", "a lower --fg, a higher --bg, or more --iters")
    if flags == UNSURE:
        names = "background, cat, sea lion"
        assert said["mined1"] == (names, "a lower --tau, or more --iters")
    if flags == COLLAPSED:
        assert said["mined1"] == ("cat, sea lion", "a lower --share, or more --iters")
        assert said["labels1"] == ("cat, sea lion", "more --iters")


# --- what the stages give each other ---


@pytest.fixture
def views(monkeypatch):
    """What the loaders gave to the views that crop: the pictures and their maps."""
    seen = {"tag_view": [], "train_view": [], "crop_view": []}

    def note(name, view):
        def noted(*args, **options):
            seen[name].append([arg for arg in args if isinstance(arg, torch.Tensor)])
            return view(*args, **options)

        return noted

    for name in seen:
        monkeypatch.setattr(ial, name, note(name, getattr(ial, name)))
    return seen


@pytest.mark.parametrize("method", ["ial", "direct"])
def test_each_stage_learns_from_the_maps_of_those_before(
    method, data, views, tmp_path, monkeypatch
):
    own, first_weights = [], []
    majority, train_unary = ial.majority_labels, ial.train_unary

    def note_labels(labels, *args):
        own.extend(labels)
        return majority(labels, *args)

    def note_weights(*args):
        first_weights.append({k: v.clone() for k, v in args[5].state_dict().items()})
        return train_unary(*args)

    monkeypatch.setattr(ial, "majority_labels", note_labels)
    monkeypatch.setattr(ial, "train_unary", note_weights)
    run(tmp_path, data, method=method, rounds=2)
    assert len(first_weights) == 3  # each starts anew
    assert all(same(first_weights[0], others) for others in first_weights[1:])
    maps = maps_of(tmp_path, data)
    pictures = [maps.image(index) for index in range(5)]

    def check(draws, *kinds):
        """Two steps' draws of two pictures and of their maps of these kinds."""
        assert len(draws) == 4
        for picture, *given in draws:
            (index,) = (i for i in range(5) if torch.equal(pictures[i], picture))
            expected = maps.draw(index, kinds)
            assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))

    check(views["tag_view"], "tags")
    for t, source in ((1, "seeds"), (2, "labels1"), (3, "labels2")):
        check(views["train_view"][4 * t : 4 * t + 4], source)  # the first four are tag_view's
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
        for t in (1, 2):
            region, pairwise = (views["crop_view"][8 * t - k : 8 * t - k + 4] for k in (8, 4))
            check(region, "superpixels", f"majority{t}")
            check(pairwise, "superpixels", f"mined{t}", f"unary{t}")


def test_seeds_are_decided_superpixel_by_superpixel(data, tmp_path, monkeypatch):
    """Activation in the left half of the picture alone, 0.8 for one class and 1 for the other."""

    def halves(net, images, tags, scales):
        maps = torch.zeros(len(images), 2, *images.shape[2:])
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
        for segment in segments.unique():
            inside = segments == segment
            mean = (inside & (torch.arange(45) < 23)).sum() / inside.sum() * (1 if lion else 0.8)
            label = 2 if lion else 1
            assert (labels[inside] == (label if mean > 0.6 else 0 if mean < 0.2 else VOID)).all()
    assert maps.count == 1 + max(int(maps.read("superpixels", i).max()) for i in range(5))


def test_mining_without_a_network_and_by_agreement(data, tmp_path):
    for mining in ("rule80", "agree", "relabel"):
        run(tmp_path / mining, data, mining=mining, share=0.97, tau=0.35)
    rule80, agree, relabel = (
        torch.stack([maps_of(tmp_path / mining, data).read("mined1", i) for i in range(5)])
        for mining in ("rule80", "agree", "relabel")
    )
    maps = maps_of(tmp_path / "rule80", data)
    assert torch.equal(rule80, torch.stack([maps.read("majority1", i) for i in range(5)]))
    assert 0.1 < (rule80 != VOID).float().mean() < 1
    assert not any("loss_region" in line for line in logged(tmp_path / "rule80"))  # none learns
    assert torch.equal(agree, torch.where(rule80 == relabel, rule80, VOID))
    assert (agree != rule80).any() and (agree != relabel).any()


def test_superpixels_without_a_cell_are_mined_nowhere(data, tmp_path):
    """At stride 8 a cell's label is that of one of 64 pixels, and superpixels have about 36."""
    run(tmp_path, data, stride=8, tau=0.0, rule="abs", passes=1)
    maps, unseen = maps_of(tmp_path, data, stride=8), 0
    for index in range(5):
        mined, segments = maps.read("mined1", index), maps.read("superpixels", index)
        cells = ial.at_cells(pad(segments, 8), 8)
        seen = (segments[..., None] == cells.unique()).any(dim=-1)
        assert torch.equal(mined != VOID, seen)
        unseen += (~seen).sum()
    assert unseen > 100


def test_clamping_changes_what_is_refined_alone(whole, data, tmp_path):
    run(tmp_path, data, clamp=True)
    ours, expected = files(tmp_path), files(whole[0])
    changed = {path.split("/")[0] for path in ours if ours[path] != expected[path]}
    assert "refined1" in changed <= {"refined1", "labels1", "unary2", "majority2"}


def test_projected_labels_are_those_of_means_over_superpixels(whole, data, tmp_path):
    """The stored probabilities are as they were: G α^u at the cells."""
    run(tmp_path, data, project=True)
    ours, expected = files(tmp_path), files(whole[0])
    changed = {path.split("/")[0] for path in ours if ours[path] != expected[path]}
    assert "labels1" in changed <= {"labels1", "unary2", "majority2"}
    maps = maps_of(tmp_path, data)
    for index in range(5):
        probs = at_pixels(maps.read("refined1", index)[None], 2)[0, :, :37, :45]
        labels, segments = maps.read("labels1", index), maps.read("superpixels", index)
        for inside in (segments == s for s in segments.unique()):
            assert (labels[inside] == probs[:, inside].mean(dim=1).argmax()).all()


def test_every_propagation_of_a_run_obeys_its_flags(data, tmp_path, monkeypatch):
    """All passes, but for the energies, which are those of a single one."""
    seen, propagate = [], ial.propagate

    def noted(values, gates, passes=1, rule="softmax", scans="mean"):
        seen.append((torch.is_grad_enabled(), (passes, rule, scans)))
        return propagate(values, gates, passes, rule, scans)

    monkeypatch.setattr(ial, "propagate", noted)
    for rule, scans in (("softmax", "mean"), ("softmax", "sequence"), ("abs", "sequence")):
        seen.clear()
        run(tmp_path / (rule + scans), data, rule=rule, scans=scans, passes=3)
        learnt = [form for learning, form in seen if learning]
        assert learnt == [(3, rule, scans)] * 4  # L_α and L_s, two steps
        refined = [form for learning, form in seen if not learning]
        assert refined == [(3, rule, scans), (1, rule, scans), (1, rule, scans)]


def test_passes_over_all_pictures_have_a_bar(data, tmp_path, monkeypatch):
    """Of many pictures they take minutes, superpixels before the first step."""
    seen, tqdm = [], common.maps.tqdm

    def counted(items, title, total, **how):
        seen.append([title, total, 0])
        for item in tqdm(items, title, total, **how):
            seen[-1][2] += 1
            yield item

    monkeypatch.setattr(common.maps, "tqdm", counted)
    run(tmp_path, data)
    assert seen[0] == ["superpixels", 5, 5] and len(seen) > 10
    assert all(bar == ["all pictures", 1, 1] for bar in seen[1:])


def test_masks_are_not_read_but_for_scores(whole, data, tmp_path):
    """With the masks' own tags listed: other masks, then none, leave everything as it was."""
    root = tmp_path / "data"
    shutil.copytree(data, root)
    listed = {name: SHOWN[int(name)].translate({49: "cat\t", 50: "sea lion"}) for name in NAMES}
    (root / "tags.txt").write_text("".join(f"{name}\t{t}\n" for name, t in listed.items()))
    rng = np.random.default_rng(1)
    for name in NAMES:
        trees.save_mask(root / "masks/train" / f"{name}.png", rng.integers(0, 3, (37, 45)))
    for masks in ("other", "none"):
        if masks == "none":
            shutil.rmtree(root / "masks/train")
        run(tmp_path / masks, root)
        assert files(tmp_path / masks) == files(whole[0])
        assert same(weights(tmp_path / masks), weights(whole[0]))
    assert figures(tmp_path / "other")["seeds"] != figures(whole[0])["seeds"]
    for line in figures(tmp_path / "none").values():
        for name, value in line.items():
            known = name in ("step", "stage") or name.startswith("energy")
            assert (value is not None) == known
    assert (tmp_path / "none" / "panels.png").is_file()


def test_a_run_needs_no_validation_masks(whole, data, tmp_path, capsys, monkeypatch):
    root, folder, titles = tmp_path / "data", tmp_path / "run", []
    shutil.copytree(data, root)
    listed = {name: SHOWN[int(name)].translate({49: "cat\t", 50: "sea lion"}) for name in NAMES}
    (root / "tags.txt").write_text("".join(f"{name}\t{t}\n" for name, t in listed.items()))
    shutil.rmtree(root / "masks")
    sheet = common.maps.sheet
    monkeypatch.setattr(common.maps, "sheet", lambda *a: titles.extend(a[1]) or sheet(*a))
    for again in (False, True):
        result = run(folder, root, resume=again)
        assert same(weights(folder), weights(whole[0])) and files(folder) == files(whole[0])
        assert math.isnan(result.miou) and [e["miou"] for e in result.history] == [None, None]
        assert not (folder / "best.pt").exists() and not (folder / "iou.txt").exists()
        assert (folder / "panels.png").is_file() and "truth" not in titles
        said = capsys.readouterr().out
        assert "no validation masks: no mIoU, no best.pt\n" in said
        assert "no masks: nothing is scored\n" in said
        assert said.splitlines()[-1].startswith("no validation masks, no mIoU, ")
        assert "nan" not in said.replace(str(tmp_path), "")
    assert "NaN" not in (folder / "log.jsonl").read_text()


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
        for what, where in (("step", 2 * stage + 1), ("index", 3)):
            taken.clear()
            stop.clear()
            stop[what] = where
            with pytest.raises(RuntimeError, match="power cut"):
                run(tmp_path, data, resume=True)
            assert taken == [2 * stage, 2 * stage + 1]  # none of the stage before
    stop.clear()
    run(tmp_path, data, resume=True)
    for name in ("last.pt", "best.pt", "iou.txt", "panels.png", "curves.png"):
        assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes(), name
    assert files(tmp_path) == files(whole[0]) and logged(tmp_path) == logged(whole[0])


def test_evaluations_between_leave_lines_and_nothing_else(data, tmp_path):
    flags = dict(method="unary", iters=5, net_steps=(0.4, 1.0, 1.0), scales=(0.5, 2.0))
    run(tmp_path / "often", data, **flags | dict(eval_every=2))
    run(tmp_path / "never", data, **flags | dict(eval_every=99, workers=1))
    lines = [line for line in logged(tmp_path / "often") if "val" in line]
    assert [(line["stage"], line["step"]) for line in lines] == [("unary1", 4), ("unary1", 6)]
    assert all(0 <= line["val"] <= 1 and len(line) == 3 for line in lines)
    assert not any("val" in line for line in logged(tmp_path / "never"))
    assert same(weights(tmp_path / "often"), weights(tmp_path / "never"))
    assert files(tmp_path / "often") == files(tmp_path / "never")


def test_the_loss_of_tags_is_taken_in_float32(data, tmp_path, monkeypatch):
    """As all losses are, where networks give half precision."""
    loss, seen = F.multilabel_soft_margin_loss, []

    def noted(scores, tags):
        seen.append((scores.dtype, torch.is_autocast_enabled("cpu")))
        return loss(scores, tags)

    monkeypatch.setattr(F, "multilabel_soft_margin_loss", noted)
    assert math.isfinite(run(tmp_path, data, amp="bf16", cam_scales=(0.5, 1.0)).miou)
    assert seen == [(torch.float32, False)] * 2


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
    for value, modes in ((255, ["P"]), (256, wide), (65535, wide)):
        labels = torch.tensor([[0, 1, 2], [254, 100, value]])
        maps.write("labels", 0, labels)
        with Image.open(tmp_path / "maps/labels/000.png") as png:
            assert png.mode in modes
            if png.mode == "P":  # in the classes' colours for who opens it
                shown = np.asarray(png.convert("RGB"))
                assert (shown[0] == DISTINCT[:3]).all() and (shown[1, 2] == GREY).all()
        ours = maps.read("labels", 0)
        assert ours.dtype == torch.int64 and torch.equal(ours, labels)
    with pytest.raises(InputError, match="--segment-size"):
        maps.write("labels", 0, torch.tensor([[2**16]]))


def test_maps_of_any_device_are_written(data, tmp_path, monkeypatch):
    """Here they are asked for their copy on the CPU, which others need."""
    maps, asked, cpu = maps_of(tmp_path, data), [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: asked.append(t.shape) or cpu(t))
    maps.write("labels", 0, torch.zeros(4, 5).long())
    maps.write("probs", 0, torch.rand(3, 4, 5))
    maps.write_batch("more", [0, 1], torch.rand(2, 3, 4, 5))
    assert asked[:3] == [(4, 5), (3, 4, 5), (2, 3, 4, 5)]


def header(shape, kind="<f2"):
    """An array's file, of few bytes whatever its shape."""
    text = str(dict(descr=kind, fortran_order=False, shape=shape)).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(24)


def png_of(image):
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def test_maps_of_a_picture_that_was_replaced_are_refused(data, tmp_path):
    """It may be, by --resume changed; superpixels of other pixels are none."""
    maps = maps_of(tmp_path, data)
    height, width = maps.image(0).shape[1:]
    cells = -(-height // maps.stride), -(-width // maps.stride)
    maps.write("labels", 0, torch.zeros(height, width).long())
    maps.write("probs", 0, torch.zeros(3, *cells))
    assert len(maps.draw(0, ("image", "labels", "probs", "tags"))) == 4
    maps.write("wide", 0, torch.zeros(height, width + 1).long())
    maps.write("long", 0, torch.zeros(3, cells[0] + 1, cells[1]))
    for kind in ("wide", "long"):
        with pytest.raises(LoneError, match="has another size than its files in .*start the run"):
            maps.draw(0, ("image", kind))


def test_lost_maps_are_named(data, tmp_path):
    maps = maps_of(tmp_path, data)
    folder = tmp_path / "maps/unary1"
    folder.mkdir(parents=True)
    for suffix, content in (
        (None, b""),
        ("npy", b"junk"),
        ("npy", b"\x93NUMPY"),
        ("png", b"\x89P"),
        ("npy", header((10**6, 10**6))),  # terabytes
        ("npy", header((3, 4))),
        ("npy", header((2, 2, 2), "|O")),
        ("png", png_of(Image.new("RGB", (4, 4)))),
    ):
        for path in folder.iterdir():
            path.unlink()
        if suffix:
            (folder / f"001.{suffix}").write_bytes(content)
        with pytest.raises(InputError, match="unary1/001: lost or damaged"):
            maps.read("unary1", 1)


def test_pictures_and_maps_travel_to_other_processes(data, tmp_path):
    """Loaders' workers are started anew on some systems: what they are given is pickled."""
    maps = maps_of(tmp_path, data)
    for index in range(5):
        maps.write("labels", index, torch.full((37, 45), index))
    cfg, loading = SimpleNamespace(batch_size=2, accum=1, seed=0), dict(rank=0, world=1, workers=0)
    lone = SimpleNamespace(cfg=cfg, world=1, first=0, draws={}, begins={}, loading=loading)
    draws = maps.loader(lone, range(2), partial(ial.crop_view, 32, 2), "labels").dataset
    for one, other in zip(draws[7], pickle.loads(pickle.dumps(draws))[7], strict=True):
        assert torch.equal(one, other)


def test_each_process_has_its_share_of_the_continued_pictures(data, tmp_path):
    maps, waited = maps_of(tmp_path, data, stride=8), []
    for index in range(5):
        maps.write("superpixels", index, torch.full((37, 45), index))
    one = SimpleNamespace(**vars(ALONE) | dict(rank=1, world=2, barrier=lambda: waited.append(1)))
    ((indices, images, tags, segments),) = maps.each(one, "superpixels")
    assert indices == [1, 3] and waited == [1]
    assert images.shape == (2, 3, 40, 48) and segments.shape == (2, 37, 45)
    for index, image, shown, segment in zip(indices, images, tags, segments, strict=True):
        expected = normalise(maps.image(index).float() / 255)
        assert torch.equal(image[:, :37, :45], expected)
        assert torch.equal(image[:, 39, :45], expected[:, 36])
        assert torch.equal(shown, maps.tags[index]) and (segment == index).all()


def test_batches_hold_pictures_of_one_size(tmp_path):
    """Of at most 4000 pixels, or of a single picture, however large."""
    root = tagged_tree(tmp_path / "data", ("12",) * 7, height=32, width=40)
    for index in (1, 4, 6):
        path, rng = root / f"images/train/{index:03d}.png", np.random.default_rng(0)
        trees.save_picture(path, rng, 40, 32)
        trees.save_mask(root / f"masks/train/{index:03d}.png", np.ones((40, 32)))
    maps = maps_of(tmp_path / "run", root)
    for index in range(7):
        maps.write("superpixels", index, torch.zeros(maps.image(index).shape[1:]).long())
    one = SimpleNamespace(**vars(ALONE), barrier=lambda: None)
    batches = {tuple(indices): images.shape for indices, images, *_ in maps.each(one)}
    wide, high = (3, 3, 32, 40), (3, 3, 40, 32)
    assert batches == {(0, 2, 3): wide, (5,): (1, *wide[1:]), (1, 4, 6): high}
    one.pixels = 100
    assert [indices for indices, *_ in maps.each(one)] == [[0], [2], [3], [5], [1], [4], [6]]


def test_the_best_threshold_is_that_of_the_labels_it_gives(data, tmp_path):
    """Each level as a constant map of the background, scored one by one."""
    maps, levels = maps_of(tmp_path, data), (0.1, 0.3, 0.5, 0.7, 0.9)
    for index in range(5):
        maps.write("superpixels", index, torch.zeros(37, 45).long())  # for the sizes
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


def test_quality_counts_what_is_labelled_and_right(tmp_path):
    """Two pictures of 3 x 4 pixels, counted by hand; void counts nowhere."""
    truth = [[[0, 0, 1, 1], [0, 0, 1, 255], [0, 0, 0, 0]], [[2, 2, 0, 0], [2, 2, 0, 0], [0] * 4]]
    labels = [[[0, 1, 1, 2], [0, 0, 255, 1], [255] * 4], [[2, 2, 2, 0], [0, 255, 0, 0], [0] * 4]]
    root = tagged_tree(tmp_path / "data", ("1", "2"), height=40, width=40)
    for index, values in enumerate(truth):
        trees.save_mask(root / "masks/train" / f"{index:03d}.png", np.array(values))
    maps = maps_of(tmp_path / "run", root)
    for index, values in enumerate(labels):
        maps.write("superpixels", index, torch.zeros(3, 4).long())  # for the sizes
        maps.write("labels", index, torch.tensor(values))
    ours = maps.quality(ALONE, "it", "labels")
    # Labelled: class 0 is right 3 + 7 times, taken for 1 once, for 2 once; class 1 is right once,
    # taken for 2 once; class 2 is right twice, taken for 0 once. So 6 of foreground, 5 truly.
    expected = dict(it=(10 / 13 + 1 / 3 + 2 / 5) / 3, it_fg_precision=3 / 6)
    expected |= dict(it_bg_precision=10 / 11, it_fg_coverage=5 / 7, it_bg_coverage=12 / 16)
    expected |= dict(it_fg_area=6 / 5)
    assert ours == pytest.approx(expected)
    maps.pairs = [(image, None) for image, _ in maps.pairs]
    unknown = maps.quality(ALONE, "it", "labels")
    assert unknown.keys() == ours.keys() and all(map(math.isnan, unknown.values()))


def test_panels_show_the_maps_of_some_pictures(whole, data, tmp_path, monkeypatch):
    maps, drawn = maps_of(whole[0], data), []
    monkeypatch.setattr(common.maps, "sheet", lambda *args: drawn.append(args))
    maps.panels(tmp_path / "x.png", ["seeds", "mined7", "labels1", "unary2"], rows=2)
    ((path, titles, strips, notes, _),) = drawn
    assert path == tmp_path / "x.png" and len(strips) == 2
    pictures = [Path(maps.pairs[index][0]) for index in (0, 4)]
    assert notes == [picture.relative_to(data).as_posix() for picture in pictures]
    assert titles == "image activation superpixels seeds labels1 unary2 truth".split()
    palette = np.full((256, 3), GREY)
    palette[:3] = DISTINCT[:3]
    for index, (photo, heat, regions, *labels) in ((0, strips[0]), (4, strips[1])):
        assert (photo == maps.image(index).permute(1, 2, 0).numpy()).all()
        expected = (255 * maps.read("cam", index).amax(dim=0)).byte()
        assert all(np.array_equal(heat[..., channel], expected) for channel in range(3))
        segments, fine = maps.read("superpixels", index).numpy(), CELL // 45
        for segment in np.unique(segments):
            mean = photo[segments == segment].mean(axis=0)
            assert (abs(regions[::fine, ::fine][segments == segment] - mean) < 1).all()
        marked = (regions == MARK).all(axis=-1)  # at the last row and column of a pixel's block
        assert (marked[fine - 1 :: fine, ::fine][:-1] == (np.diff(segments, axis=0) != 0)).all()
        assert (marked[::fine, fine - 1 :: fine][:, :-1] == (np.diff(segments, axis=1) != 0)).all()
        with Image.open(data / "masks/train" / f"{maps.names[index]}.png") as mask:
            truth = np.array(mask)
        kinds = [maps.read(kind, index)[None] for kind in ("seeds", "labels1", "unary2")]
        kinds = [maps.labels(stored, (37, 45))[0].numpy() for stored in kinds]
        for cell, expected in zip(labels, [*kinds, truth], strict=True):
            assert (cell == palette[expected]).all()
    assert Path(whole[0] / "panels.png").is_file()
