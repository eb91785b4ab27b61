"""What only a GPU shows: precision, equal bits, resuming there, processes, prediction, memory.

`test_cuda.py TASK FOLDER RANK` is one of the processes that share the GPU; TASK is a script, whose
TINY run two train together, `steps` or `nccl`.
"""

import json
import math
import os
import subprocess
import sys
import time
import traceback
import warnings
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from few_shapes import COUNTS, ROOT, TINY, lighten
from torch import nn

from common import machine, predict, shapes
from common.augment import train_view
from common.deeplab import DeepLabV3Plus
from common.flags import SemiConfig
from common.losses import cross_entropy
from common.optim import sgd_poly
from common.run import Run, main

# As --deterministic sets it; it is too late for that where a test before has used cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
every_script = pytest.mark.parametrize("name", TINY)
STEPS = dict(device="cuda", iters=4, eval_every=2)


def train(name, folder, **flags):
    script = import_module(name)
    return script.train(script.Config(output_dir=str(folder), **TINY[name] | STEPS | flags))


def logged(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def saved(folder, name="last.pt"):
    return torch.load(folder / name, map_location="cpu", weights_only=True)


def assert_same(one, other, where="last.pt"):
    """Nested dicts and lists with equal tensors."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where} {key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, (first, second) in enumerate(zip(one, other, strict=True)):
            assert_same(first, second, f"{where} {number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other or (one != one and other != other), where


# --- precision ---


@pytest.fixture(scope="module")
def first_losses():
    """By script, the first line of the log in float32: of equal weights and batches."""
    return {}


@pytest.mark.parametrize("amp", ["none", "auto", "bf16", "fp16"])
@every_script
def test_every_precision_trains(name, amp, few, tmp_path, monkeypatch, capsys, first_losses):
    """The real backbone. Losses are float32, and about those of float32 in the first step."""
    dtypes, log = set(), Run.log

    def note(run, step, **values):
        dtypes.update(value.dtype for value in values.values() if torch.is_tensor(value))
        log(run, step, **values)

    monkeypatch.setattr(Run, "log", note)
    result = train(name, tmp_path / "run", amp=amp, iters=8, eval_every=8)
    assert math.isfinite(result.miou) and dtypes == {torch.float32}
    used = amp.replace("auto", "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "none")
    used = "float32" if used == "none" else f"{used} where it can be"
    assert f"on cuda:0, in {used}" in capsys.readouterr().out
    for weight in result.model.parameters():
        assert weight.device.type == "cuda" and weight.dtype == torch.float32
        assert weight.isfinite().all()
    state = saved(tmp_path / "run")["state"]
    assert ("scaler" in state) == (amp == "fp16")
    if amp == "fp16":
        # It halves where a step is skipped: of eight one at least was taken.
        assert 2.0**8 < state["scaler"]["scale"] <= 2.0**16
    first = logged(tmp_path / "run")[0]
    loss = first[next(key for key in first if key.startswith("loss"))]
    if amp == "none":
        first_losses[name] = loss
    assert loss == pytest.approx(first_losses.get(name, loss), rel=0.3)


# --- equal bits ---


@pytest.mark.parametrize("amp", ["none", "fp16"])
@every_script
def test_the_same_command_gives_the_same_bits(name, amp, few, tmp_path):
    for run in ("first", "second"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(name, tmp_path / run, amp=amp, deterministic=True)
    assert logged(tmp_path / "first") == logged(tmp_path / "second")
    assert_same(saved(tmp_path / "first"), saved(tmp_path / "second"))
    # Operators without a deterministic form: equal by chance.
    assert not {str(w.message) for w in caught if "deterministic" in str(w.message)}


@pytest.mark.parametrize(
    "name, flags, stops",
    [
        ("cps", dict(amp="fp16"), (3,)),
        ("psmt", dict(iters=6, warmup=0.5, accum=2), (3, 5)),
        ("cac", dict(iters=6, warmup=0.5, bank=2, amp="none"), (3, 5)),
        ("ial", dict(amp="fp16"), (5, 10)),
    ],
    ids=str,
)
def test_a_run_that_stops_goes_on_exactly(name, flags, stops, few, light, tmp_path, power_cut):
    flags = dict(amp="auto", deterministic=True) | flags
    train(name, tmp_path / "whole", **flags)
    cut = partial(train, name, tmp_path / "cut", **flags, resume=True)
    for stop in stops:
        power_cut(stop, cut)
    cut()
    assert logged(tmp_path / "whole") == logged(tmp_path / "cut")
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "cut"))


@every_script
def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu_and_back(
    name, few, light, tmp_path, power_cut, capsys
):
    """Each ends with its own rounding, but all it needs is there."""
    go_on = partial(train, name, tmp_path / "run", amp="none", resume=True, iters=6)
    first, second = (8, 14) if name == "ial" else (3, 5)  # whose stages have 6 steps each
    power_cut(first, go_on)
    power_cut(second, partial(go_on, device="cpu"))
    assert math.isfinite(go_on().miou)
    assert capsys.readouterr().out.count("goes on after step") == 2


# --- the way to the GPU ---


def test_batches_are_pinned_and_arrive_as_they_are_used(few, light, tmp_path):
    view = partial(train_view, crop=32, scales=(1.0,))
    flags = TINY["cps"] | STEPS | dict(output_dir=str(tmp_path), amp="none", workers=2)
    run = Run("any", SemiConfig(**flags))
    network = run.wrap(DeepLabV3Plus(7, "resnet18", width=8))
    run.start(run.load(), [network], network=network)
    for tensor in (batch := next(run.batches("labeled", view))):
        assert tensor.is_pinned()
    images, labels, _ = run.to_device(batch)
    assert images.device == labels.device == torch.device("cuda", 0)
    assert images.is_contiguous(memory_format=torch.channels_last)
    for conv in (module for module in network.modules() if isinstance(module, nn.Conv2d)):
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert network(images).shape == (2, 7, 32, 32)
    # What a script made itself is pinned on the way.
    (own,) = run.to_device([torch.arange(3)])
    assert own.tolist() == [0, 1, 2] and own.device.type == "cuda"


@every_script
def test_loader_processes_change_nothing(name, few, light, tmp_path):
    for workers in (0, 2):
        flags = dict(workers=workers, deterministic=True, amp="auto", iters=2)
        train(name, tmp_path / str(workers), **flags)
    assert_same(saved(tmp_path / "0")["networks"], saved(tmp_path / "2")["networks"])


# --- two processes ---


def steps_of(rank, world, steps=4):
    """A few steps on this process's part of batches of 4: the loss and the weights."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    network = DeepLabV3Plus(7, "resnet18", width=8)
    trained = machine.wrap(network, device)
    optimizer, schedule = sgd_poly([network], 0.01, 1e-4, steps)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(4, 3, 64, 64, generator=generator)
        labels = torch.randint(7, (4, 64, 64), generator=generator)
        part = slice(rank * 4 // world, (rank + 1) * 4 // world)
        loss = cross_entropy(trained(images[part].to(device)), labels[part].to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(machine.gather(loss[None]).mean().item())
    kinds = {type(module).__name__ for module in trained.modules()}
    weights = {name: value.cpu() for name, value in network.state_dict().items()}
    return dict(losses=losses, weights=weights, kinds=[k for k in kinds if "BatchNorm" in k])


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """When they were started; by task, the folder and processes.

    Of one GPU two processes take gloo, which NCCL refuses; to see NCCL there is one alone.
    """
    env = os.environ | dict(PYTHONPATH=str(ROOT), LOCAL_WORLD_SIZE="1", LOCAL_RANK="0")
    env |= dict(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
    tasks = {}
    for task in ("steps", "nccl", *TINY):
        folder, world = tmp_path_factory.mktemp(task), 1 if task == "nccl" else 2
        tasks[task] = folder, []
        for rank in range(world):
            with open(folder / f"{rank}.err", "w") as err:
                process = subprocess.Popen(
                    [sys.executable, __file__, task, str(folder), str(rank)],
                    env=env | dict(RANK=str(rank), WORLD_SIZE=str(world)),
                    stdout=err,
                    stderr=err,
                )
            tasks[task][1].append(process)
    yield time.time(), tasks
    for _, processes in tasks.values():
        for process in processes:
            process.kill()
            process.wait()


def ended(begun, task):
    """What each process of a task has in the end."""
    since, tasks = begun
    folder, processes = tasks[task]
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(since + 90 - time.time(), 1))
    said = [(folder / f"{rank}.err").read_text()[-2000:] for rank in range(len(processes))]
    assert [process.poll() for process in processes] == [0] * len(processes), "\n".join(said)
    return [saved(folder, f"{rank}.pt") for rank in range(len(processes))]


def test_two_processes_with_synchronised_batchnorm_learn_as_one_does(begun, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    before = torch.get_float32_matmul_precision()
    alone = steps_of(0, 1)
    torch.set_float32_matmul_precision(before)
    assert alone["kinds"] == ["BatchNorm2d"]
    first, second = ended(begun, "steps")
    assert_same(first, second)
    assert first["kinds"] == ["SyncBatchNorm"]
    assert first["losses"] == pytest.approx(alone["losses"], rel=2e-4)
    for key, value in alone["weights"].items():
        torch.testing.assert_close(first["weights"][key], value, rtol=1e-2, atol=1e-3)


@every_script
def test_two_processes_of_a_gpu_train_one_model(name, begun):
    assert_same(*ended(begun, name))


@every_script
def test_nccl_takes_what_scripts_exchange(name, begun):
    (errors,) = ended(begun, "nccl")
    assert not errors[name], errors[name]


# --- prediction, memory ---


@every_script
def test_predictions_are_those_of_a_cpu(name, few, tmp_path):
    train(name, tmp_path / "run", amp="none", iters=2)
    picture = np.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=np.uint8)
    masks = {}
    for device, amp in (("cpu", "none"), ("cuda", "none"), ("cuda", "auto"), ("cuda", "fp16")):
        model = predict.load(tmp_path / "run" / "last.pt", device)
        masks[device, amp] = predict.segment(model, picture, amp=amp)
        where = torch.from_numpy(picture).permute(2, 0, 1).to(device)
        assert predict.segment(model, where, amp=amp).device.type == device
    for (_, amp), mask in masks.items():
        share = (mask == masks["cpu", "none"]).mean()
        assert share > (0.95 if amp == "none" else 0.8), (amp, share)


def test_memory_that_does_not_suffice_is_one_line(few, tmp_path, monkeypatch, capsys):
    cps = import_module("cps")
    words = ["cps.py", "--device", "cuda", "--output-dir", str(tmp_path), "--labeled", "4"]
    monkeypatch.setattr(sys, "argv", [*words, "--crop-size", "512"])
    torch.cuda.empty_cache()
    share = torch.cuda.memory_reserved() + 2**29  # enough for the networks
    torch.cuda.set_per_process_memory_fraction(
        share / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        with pytest.raises(SystemExit) as end:
            main(cps.train, cps.Config, cps.RECIPES)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("cps.py: ") and "memory" in err
    assert err.count("\n") == 1 and "--batch-size" in err


def part_of(task, folder, rank):
    """What one of these processes does."""
    how = dict(init_method=f"file://{folder}/store", rank=rank)
    if task != "steps":
        shapes.COUNTS = COUNTS
        lighten()
    if task == "steps":
        dist.init_process_group("gloo", world_size=2, **how)
        found = steps_of(rank, 2)
    elif task == "nccl":
        gpu = torch.device("cuda", 0)
        dist.init_process_group("nccl", world_size=1, device_id=gpu, **how)
        found = {}
        for name in TINY:
            try:
                train(name, folder / name, amp="auto")
                found[name] = ""
            except Exception:  # the other scripts are still to be seen
                found[name] = traceback.format_exc()
    else:
        dist.init_process_group("gloo", world_size=2, **how)
        result = train(task, folder / "run", amp="auto")
        weights = {name: value.cpu() for name, value in result.model.state_dict().items()}
        found = dict(weights=weights, miou=result.miou)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    part_of(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
