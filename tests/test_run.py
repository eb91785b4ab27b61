"""Flags, the run's folder, checkpoints, exact resuming, several processes, the command line."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import trees

import cps
from common import shapes
from common.augment import whole_view
from common.data import load, val_loader
from common.deeplab import DeepLabV3Plus
from common.flags import parse_config
from common.metrics import evaluate
from common.outputs import replace_file, replace_text
from common.run import InputError, Run, in_all_processes, main

ROOT = Path(__file__).parent.parent
TINY = dict(batch_size=2, crop_size=32, width=8, iters=8, eval_every=2, labeled="4")
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]


@pytest.fixture
def few(monkeypatch):
    """The embedded dataset with few pictures."""
    monkeypatch.setattr(shapes, "COUNTS", {"train": 12, "val": 3})


def start(*flags, script="cps", processes=1):
    """A script on few pictures as a program of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [
            sys.executable,
            *(launcher if processes > 1 else []),
            "tests/few_shapes.py",
            script,
            *flags,
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def refusal(**flags):
    """The one line with which train refuses the flags."""
    with pytest.raises(InputError) as caught:
        cps.train(cps.Config(**flags))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- flags ---


def test_the_command_line_is_the_recipe_and_the_flags_win():
    parse = lambda *argv: parse_config(cps.Config, cps.RECIPES, list(argv))  # noqa: E731
    assert parse() == cps.Config()
    assert parse("--dataset", "voc") == cps.Config(**cps.RECIPES["voc"])
    assert parse("--dataset=voc", "--lr", "0.5", "--no-cutmix").lr == 0.5
    expected = cps.Config(
        **cps.RECIPES["cityscapes"] | dict(lam=2.0, resume=True, scales=(1.0, 2.0))
    )
    flags = ["--lam", "2", "--resume", "--scales", "1", "2"]
    assert parse("--dataset", "cityscapes", *flags) == expected


def test_every_recipe_names_its_dataset_and_only_fields():
    for name, recipe in cps.RECIPES.items():
        assert cps.Config(**recipe).dataset == name


def test_help_has_every_flag_with_the_recipes_value(capsys):
    with pytest.raises(SystemExit) as end:
        parse_config(cps.Config, cps.RECIPES, ["--dataset", "voc", "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "Cross Pseudo Supervision" in text
    for field in fields(cps.Config):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "[39680]" in text and "[IMAGENET1K_V1]" in text


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--itres", "5"], "--itres"),
        (["--iters", "many"], "--iters"),
        (["--dataset", "imagenet"], "--dataset"),
        (["--backbone", "vgg"], "--backbone"),
        (["--lr"], "--lr"),
        (["--dataset"], "--dataset"),
        (["--iter", "5"], "--iter"),
    ],
)
def test_a_flag_that_cannot_be_read_is_refused(argv, said):
    with pytest.raises(InputError, match=said) as caught:
        parse_config(cps.Config, cps.RECIPES, argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        dict(iters=0),
        dict(iters=-3),
        dict(iters=2.5),
        dict(batch_size=1),
        dict(batch_size=0),
        dict(crop_size=0),
        dict(crop_size=-64),
        dict(crop_size=50),
        dict(lr=0.0),
        dict(lr=-1.0),
        dict(lr=math.nan),
        dict(lr=math.inf),
        dict(weight_decay=-1e-4),
        dict(eval_every=0),
        dict(workers=-1),
        dict(seed=-1),
        dict(backbone="vgg16"),
        dict(amp="fp8"),
        dict(device="tpu9"),
        dict(weights="nowhere.pth"),
        dict(weights="IMAGENET9K"),
        dict(lam=-1.0),
        dict(lam_cutmix=math.nan),
        dict(scales=()),
        dict(scales=(1.0, 0.0)),
        dict(ema_decay=1.5),
        dict(ramp=-0.1),
        dict(width=0),
        dict(eval_window=-5),
        dict(eval_window=16),
        dict(data_path=7),
        dict(cutmix="no"),
        dict(scales=1.0),
        dict(seed=2**64),
        dict(device="meta"),
    ],
    ids=lambda flags: "-".join(f"{k}={v}" for k, v in flags.items()),
)
def test_a_value_that_cannot_be_right_is_refused_by_name(flags, few, tmp_path):
    said = refusal(output_dir=str(tmp_path / "run"), **{**TINY, **flags})
    (name,) = flags
    assert f"--{name.replace('_', '-')}" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(tmp_path):
    assert "--device cpu" in refusal(device="cuda", output_dir=str(tmp_path / "run"))


# --- the folder ---


def test_default_folders_are_numbered_and_resume_takes_the_newest(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = Path("runs/cps-shapes-1_20-s3")

    def folder(**flags):
        return Run("cps", cps.Config(**{"seed": 3, "labeled": "1/20", **flags})).folder

    assert folder() == folder(resume=True) == name
    for suffix in ("", "-2", "-3"):
        assert folder() == Path(f"{name}{suffix}")
        Path(f"{name}{suffix}").mkdir(parents=True)
        Path(f"{name}{suffix}/config.json").touch()
        assert folder(resume=True) == Path(f"{name}{suffix}")
    assert folder(supervised_only=True) == Path(f"{name}-sup")
    assert folder(labeled="lists/mine.txt") == Path("runs/cps-shapes-mine-s3")
    (name / "config.json").unlink()  # a gap in the numbers is not filled
    assert folder() == Path(f"{name}-4") and folder(resume=True) == Path(f"{name}-3")


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(few, tmp_path):
    run = dict(output_dir=str(tmp_path), **{**TINY, "iters": 2})
    (tmp_path / "notes.txt").write_text("mine")  # no run: no reason to refuse
    cps.train(cps.Config(**run))
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert "--resume" in refusal(**run)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_is_refused(few, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--output-dir" in refusal(output_dir=str(tmp_path / "file"), **TINY)
    assert "--output-dir" in refusal(output_dir=str(tmp_path / "file" / "below"), **TINY)


def test_outputs_are_complete_and_the_checkpoint_rebuilds_the_model(few, tmp_path):
    result = cps.train(cps.Config(output_dir=str(tmp_path), **TINY))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "miou" in line] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if "loss_sup" in line] == list(range(1, 9))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["batch_size"] == 2 and set(config) == {"processes", *asdict(cps.Config())}
    rows = (tmp_path / "iou.txt").read_text().splitlines()
    assert [row.split("\t")[0] for row in rows] == [*shapes.CLASSES, "mean"]
    assert rows[-1] == f"mean\t{100 * result.miou:.2f}"
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    network = DeepLabV3Plus(**saved["arguments"][0])
    network.load_state_dict(saved["networks"][0])
    assert saved["classes"] == shapes.CLASSES and len(saved["colors"]) == 7
    confusion = evaluate(network, val_loader(load("shapes", "", "4", "", 0), whole_view), 7, "cpu")
    expected = [None if math.isnan(v) else v for v in cps.iou(confusion).tolist()]
    assert expected == result.history[-1]["iou"]
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert best["miou"] == max(entry["miou"] for entry in result.history) == saved["best"]


def test_a_run_that_diverges_says_so(few, tmp_path):
    flags = {**TINY, "lr": 1e30, "output_dir": str(tmp_path / "run")}
    assert "lower --lr" in refusal(**flags)


# --- resuming ---


def test_resume_refuses_other_flags_and_broken_checkpoints(few, tmp_path):
    run = {**TINY, "iters": 2, "output_dir": str(tmp_path)}
    cps.train(cps.Config(**run))
    for changed in (dict(lr=0.5), dict(iters=9), dict(seed=1), dict(cutmix=False), dict(width=16)):
        said = refusal(**{**run, **changed}, resume=True)
        assert f"--{next(iter(changed)).replace('_', '-')}" in said
    shapes.CLASSES[1], fish = "trout", shapes.CLASSES[1]
    try:
        assert "trout" in refusal(**run, resume=True)
    finally:
        shapes.CLASSES[1] = fish
    (tmp_path / "last.pt").write_bytes(b"rubbish")
    assert "last.pt" in refusal(**run, resume=True)


def test_resuming_a_finished_run_gives_its_result(few, tmp_path):
    run = {**TINY, "iters": 2, "output_dir": str(tmp_path)}
    first = cps.train(cps.Config(**run))
    again = cps.train(cps.Config(**run, resume=True, workers=1, device="cpu", data_path="x"))
    assert again.miou == first.miou and again.history == first.history
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resume_without_a_checkpoint_starts_afresh(few, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss_sup": 3.0}\n{"st')
    cps.train(cps.Config(**{**TINY, "iters": 2}, output_dir=str(tmp_path), resume=True))
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()]
    assert steps == [1, 2, 2]


def test_killed_at_three_steps_and_resumed_the_checkpoint_is_bit_equal(tmp_path):
    """SIGKILL between checkpoints: the steps after the last one are taken again, exactly."""
    whole = start(*FLAGS, "--output-dir", str(tmp_path / "whole"))
    cut = tmp_path / "cut"
    for stop in (3, 4, 7):
        process = start(*FLAGS, "--output-dir", str(cut), "--resume")
        log = cut / "log.jsonl"
        while not (log.exists() and f'"step": {stop}, "loss_sup"' in log.read_text()):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.kill()
        process.wait()
    finish(start(*FLAGS, "--output-dir", str(cut), "--resume"))
    finish(whole)
    for name in ("last.pt", "best.pt", "iou.txt", "panels.png"):
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    logs = [
        [{**json.loads(line), "seconds": 0} for line in (folder / "log.jsonl").open()]
        for folder in (cut, tmp_path / "whole")
    ]
    assert logs[0] == logs[1]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    replace_text(path, "old")

    def broken(file):
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, broken)
    assert path.read_text() == "old"
    replace_text(path, "new")
    assert path.read_text() == "new"


def test_weights_that_are_not_finite_are_not_saved(few, tmp_path):
    run = Run("cps", cps.Config(output_dir=str(tmp_path)))
    network = DeepLabV3Plus(7, "resnet18", width=8)
    run.start([network], load("shapes", "", "4", "", 0), state={})
    run.record(0, torch.ones(7))
    kept = (tmp_path / "last.pt").read_bytes()
    network.classifier.bias.data[0] = math.nan
    with pytest.raises(InputError, match="diverged"):
        run.record(1, torch.ones(7))
    assert (tmp_path / "last.pt").read_bytes() == kept


def test_two_runs_that_start_at_once_do_not_share_a_folder(few, tmp_path):
    first, second = (Run("cps", cps.Config(output_dir=str(tmp_path))) for _ in range(2))
    start = [DeepLabV3Plus(7, "resnet18", width=8)], load("shapes", "", "4", "", 0), {}
    first.start(*start)
    with pytest.raises(InputError, match="another run"):
        second.start(*start)


# --- several processes ---


def test_an_error_of_one_process_is_raised_in_all(monkeypatch):
    def gather(errors, own):
        assert own is None
        errors[:] = [own, "a file: is broken"]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(InputError, match="a file: is broken"):
        in_all_processes(lambda: None)


def test_statistics_are_averaged_and_nothing_else(few, tmp_path, monkeypatch):
    run = Run("cps", cps.Config(output_dir=str(tmp_path)))
    run.world = 2
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.add_(4))  # of 1 and 5, say
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(2))
    network.register_buffer("bank", torch.ones(2))
    network[0].running_mean.fill_(2)
    run.average_buffers(network)
    assert network[0].running_mean.tolist() == [3, 3] and network.bank.tolist() == [1, 1]


def test_each_step_and_process_has_its_own_seed(few, tmp_path):
    run = Run("cps", cps.Config(output_dir=str(tmp_path)))
    seeds = []
    for run.rank in (0, 1, 0):
        loop = run.loop()
        seeds.append([(next(loop), torch.initial_seed())[1] for _ in range(3)])
    assert seeds[0] == seeds[2] and len(set(seeds[0] + seeds[1])) == 6


def test_two_processes_train_one_model_and_count_every_picture_once(tmp_path, monkeypatch):
    saved = tmp_path / "saved"
    flags = [*FLAGS, "--iters=2", "--output-dir", str(tmp_path / "run")]
    out = finish(start("--check", str(saved), *flags, processes=2))
    assert out.count("validation pictures") == 1  # the first process alone prints
    first, second = (torch.load(f"{saved}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["miou"] == second["miou"] and first["pictures"] + second["pictures"] == 5
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name

    monkeypatch.setattr(shapes, "COUNTS", {"train": 12, "val": 5})
    torch.manual_seed(7)
    network = DeepLabV3Plus(7, "resnet18", width=8)
    loader = val_loader(load("shapes", "", "4", "", 0), whole_view)
    alone = evaluate(network, loader, 7, "cpu")
    assert torch.equal(first["confusion"], alone) and torch.equal(second["confusion"], alone)
    assert alone.sum() == 5 * shapes.SIZE**2


def test_a_bad_flag_ends_all_processes(tmp_path):
    process = start("--lr=-1", "--output-dir", str(tmp_path / "run"), processes=2)
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0 and err.count("few_shapes.py: --lr -1.0") == 1
    assert not (tmp_path / "run").exists()


# --- as a program, and in a plain interpreter ---


def test_bad_input_ends_with_one_line_and_status_2(tmp_path):
    for flags in (["--itres=5"], ["--labeled=1/999"], ["--dataset=folder", "--data-path=nowhere"]):
        process = start(*flags, "--output-dir", str(tmp_path / "run"))
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and err.count("\n") == 1 and "Traceback" not in err
        assert flags[-1].split("=")[0] in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_picture_that_breaks_midway_is_named(workers, tmp_path, monkeypatch, capsys):
    """Unlabelled pictures are first decoded when drawn; a loader process hands its error over."""
    root = trees.folder_tree(tmp_path / "data")
    for path in sorted((root / "images" / "train").glob("*"))[1:]:
        path.write_bytes(path.read_bytes()[:300])
    flags = "--dataset folder --labeled 1/6 --weights none --backbone resnet18 --iters 2"
    flags += " --batch-size 2 --crop-size 32 --width 8"
    where = ["--data-path", str(root), "--output-dir", str(tmp_path / "run"), "--workers", workers]
    monkeypatch.setattr(sys, "argv", ["cps.py", *flags.split(), *where])
    with pytest.raises(SystemExit) as end:
        main(cps.train, cps.Config, cps.RECIPES)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith(f"cps.py: {root}") and said.count("\n") == 1


def test_import_has_no_side_effects():
    code = (
        "import random, numpy, torch; torch.manual_seed(3); a = torch.get_rng_state(); "
        "import cps; assert torch.equal(a, torch.get_rng_state()); "
        "assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_train_works_in_a_plain_interpreter(tmp_path):
    code = "import cps; print(cps.train(cps.Config(iters=1, batch_size=2, width=8)).miou)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and 0 <= float(done.stdout.split()[-1]) <= 1, done.stderr
