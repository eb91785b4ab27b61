"""Several processes: how they meet, end, and learn what one would."""

import re
import sys
import time
from functools import partial
from importlib import import_module

import few_shapes
import pytest
import torch
from few_shapes import (
    EQUAL,
    ROOT,
    argv,
    end,
    fork,
    fork_two,
    frozen_batchnorm,
    one_direction,
    together,
)
from torch import nn
from torch.distributed import run

import cac
import cps
from common import machine
from common.flags import InputError
from common.run import main

# --- how they meet ---


def gpus(monkeypatch, count, **env):
    """A machine with so many GPUs, and what a launcher sets."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    names = "WORLD_SIZE RANK LOCAL_RANK LOCAL_WORLD_SIZE CUDA_VISIBLE_DEVICES".split()
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "count, env, found",
    [
        (1, dict(), 0),
        (8, dict(WORLD_SIZE="8", RANK="5", LOCAL_RANK="5", LOCAL_WORLD_SIZE="8"), 5),
        (4, dict(WORLD_SIZE="8", RANK="5", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4"), 1),
        # As Slurm does with --gpus-per-task=1: each sees its own alone.
        (1, dict(WORLD_SIZE="8", RANK="5", LOCAL_RANK="5", LOCAL_WORLD_SIZE="8"), None),
        (1, dict(WORLD_SIZE="8", RANK="5", LOCAL_RANK="5", CUDA_VISIBLE_DEVICES="5"), 0),
        (
            1,
            dict(WORLD_SIZE="8", RANK="5", LOCAL_RANK="5", LOCAL_WORLD_SIZE="8")
            | dict(CUDA_VISIBLE_DEVICES="5"),
            0,
        ),
        (8, dict(WORLD_SIZE="8", RANK="5"), None),
        (2, dict(WORLD_SIZE="4", RANK="1", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4"), None),
    ],
)
def test_each_process_takes_a_gpu_of_its_own(count, env, found, monkeypatch):
    gpus(monkeypatch, count, **env)
    if found is None:
        words = "RANK without LOCAL_RANK" if "LOCAL_RANK" not in env else f"at most {count} proc"
        with pytest.raises(InputError, match=words):
            machine.find_device("auto")
    else:
        assert machine.find_device("auto") == torch.device("cuda", found)


def test_the_group_is_nccls_on_gpus_that_have_it(monkeypatch):
    made = []
    monkeypatch.setattr(machine.dist, "init_process_group", lambda **how: made.append(how))
    monkeypatch.setenv("WORLD_SIZE", "2")
    gpu = torch.device("cuda", 1)
    for available in (True, False):
        monkeypatch.setattr(machine.dist, "is_nccl_available", lambda it=available: it)
        machine.join_processes(gpu)
        machine.join_processes(torch.device("cpu"))
    gloo = dict(backend="gloo")
    assert made == [dict(backend="nccl", device_id=gpu), gloo, gloo, gloo]


def test_processes_that_do_not_meet_say_so_in_one_line(tmp_path, monkeypatch, capsys):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "argv", ["cps.py", f"--output-dir={tmp_path}", "--device=cpu"])
    with pytest.raises(SystemExit) as end:
        main(cps.train, cps.Config, cps.RECIPES)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    assert err.startswith("cps.py: RANK, WORLD_SIZE: the processes do not meet: ")
    assert "MASTER_ADDR" in err


def test_a_bank_from_a_checkpoint_goes_where_the_run_is():
    bank = cac.Bank(2)
    bank.load_state_dict({"past": [[torch.ones(3, 4), torch.ones(3)]]})
    for count in (5, 7, 6):  # as long as the bank remembers it
        negatives, labels = bank.push(torch.ones(2, 4, device="meta"), torch.ones(2, device="meta"))
        assert negatives.device == labels.device == torch.device("meta")
        assert len(negatives) == len(labels) == count


# --- how they end ---


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """Two runs of two processes that lose the second one: by an error, and by a signal."""
    folder, torchrun = tmp_path_factory.mktemp("faults"), ["--standalone", "--nproc-per-node=2"]

    def begun(fault):
        words = [*torchrun, few_shapes.__file__, "cps", *argv("cps", folder / fault, iters=9)]
        program = partial(run.main, list(map(str, words)))
        return time.time(), fork(program, FAULT=fault, PYTHONPATH=ROOT)

    return {fault: begun(fault) for fault in ("a real fault", "killed")}


def ended(faults, fault):
    """What the run says, and the cause in the report with which torchrun ends."""
    began, process = faults[fault]
    err = end(process, status=1)
    assert time.time() - began < 60
    return err.split("torch/distributed/run.py")[0], err.split("Root Cause")[1]


def test_an_error_of_one_process_ends_all_and_is_printed_once(faults):
    ours, cause = ended(faults, "a real fault")
    assert ours.count("ValueError: a real fault") == 1 and "RuntimeError" not in ours
    assert re.search(r"rank +: 1 .*\n +exitcode +: 1 ", cause)


def test_a_process_that_is_killed_ends_all(faults):
    ours, cause = ended(faults, "killed")
    assert "Error" not in ours
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9 ", cause)


# --- what they learn ---


@pytest.fixture(scope="module")
def equal(tmp_path_factory):
    """By script, the weights that two processes have learnt."""
    folder = tmp_path_factory.mktemp("equal")

    def program():
        nn.BatchNorm2d.forward, torch.rand_like = frozen_batchnorm, one_direction
        together(folder, EQUAL)

    for process in fork_two(program):
        end(process)
    return torch.load(folder / "0.pt", weights_only=True)


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_learn_what_one_learns_of_batches_twice_as_large(
    name, equal, few, light, tmp_path, monkeypatch
):
    """Up to the rounding of float32, after several steps. few_shapes.EQUAL says on which terms."""
    monkeypatch.setattr(nn.BatchNorm2d, "forward", frozen_batchnorm)
    monkeypatch.setattr(torch, "rand_like", one_direction)
    script = import_module(name)
    accum = 2 if name == "psmt" else 1
    flags = EQUAL[name] | dict(batch_size=4, accum=accum)
    alone = script.train(script.Config(output_dir=str(tmp_path), **flags)).model.state_dict()
    for key, value in equal[name]["weights"].items():
        torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-6)
