"""Faults injected for real: signals, kills, full disks, lost processes; nothing is lost."""

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib import import_module

import pytest
import torch
from few_shapes import TINY

import cps
from common.run import Run, main

LONG = {  # by script: runs of some 24 steps that are evaluated once, by TINY's flags
    "cps": dict(iters=24),
    "psmt": dict(iters=24),
    "cac": dict(iters=24, bank=2, accum=2),
    "ial": dict(iters=5),
}
every_script = pytest.mark.parametrize("name", TINY)


def argv(name, folder, **flags):
    """A script's command line."""
    flags = TINY[name] | dict(eval_every=9999, save_every=0) | LONG[name] | flags
    for flag, value in (flags | dict(output_dir=folder)).items():
        values = value if isinstance(value, tuple) else (value,)
        yield from (f"--{flag.replace('_', '-')}", *map(str, values))


def begin(name, folder, *words, rank=0, world=1, port=0, **flags):
    """A script as a program of its own, forked: what it prints is in files beside the folder."""
    script = import_module(name)

    def program():
        os.setpgrp()  # a group of its own, as a terminal gives
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(
                os.open(f"{folder}.{kind}{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number
            )
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
        if world > 1:
            where = dict(RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            os.environ.update({key: str(value) for key, value in where.items()})
        sys.argv = [f"{name}.py", *argv(name, folder, **flags), *words]
        main(script.train, script.Config, script.RECIPES)

    process = multiprocessing.get_context("fork").Process(target=program)
    process.start()
    return process


def end(process, status=0):
    process.join(60)
    assert process.exitcode == status


def said(folder, rank=0):
    """What a program printed on stderr, but for the losses."""
    with open(f"{folder}.err{rank}") as file:
        return "".join(line for line in file if not line.startswith("step "))


def saved(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def logged(folder):
    return [json.loads(line) | {"seconds": 0} for line in (folder / "log.jsonl").open()]


def same(folder, whole):
    """A run has left what another one did, bit for bit."""
    assert logged(folder) == logged(whole)
    for name in ("last.pt", "best.pt", "iou.txt", "panels.png"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.fixture
def midway(few, light, monkeypatch):
    """midway(n, work): from now on a program that begins does some work in its n-th pass."""
    autocast = Run.autocast

    def plan(call=0, work=None):
        calls = iter(range(1, call + 1))

        def enter(run):
            if next(calls, None) == call:
                work(run)
            return autocast(run)

        monkeypatch.setattr(Run, "autocast", enter)

    return plan


def send(*numbers):
    """Work that signals its own process."""
    return lambda run: [os.kill(os.getpid(), number) for number in numbers]


# --- signals ---

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 128 + signal.SIGUSR1}


@every_script
def test_stopped_and_killed_anywhere_a_run_goes_on_exactly(name, midway, tmp_path):
    """A signal loses no step, whichever stage it meets; SIGKILL those after the last write."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    end(begin(name, whole))
    done = 0
    for number, status in random.sample(list(STATUS.items()), 2):
        midway(random.randint(2, 8), send(number))
        end(begin(name, cut, "--resume"), status)
        before, done = done, saved(cut)["step"]
        assert done == logged(cut)[-1]["step"] >= before
    midway(random.randint(2, 8), send(signal.SIGKILL))
    end(begin(name, cut, "--resume", save_every=1e-9), -9)
    assert saved(cut)["step"] >= done
    midway()
    end(begin(name, cut, "--resume"))
    same(cut, whole)


def test_a_signal_says_where_the_run_is_and_how_to_go_on(midway, tmp_path, monkeypatch):
    midway(5, send(signal.SIGTERM))
    folder = tmp_path / "run"
    end(begin("cps", folder), 143)
    first, second = said(folder).splitlines()
    assert first == "cps.py: interrupted: finishes the step and saves; another signal ends at once"
    assert second.startswith(f"stopped after step 5 of 24, saved in {folder}/last.pt; go on with: ")
    assert second.endswith(f"python cps.py {' '.join(argv('cps', folder))} --resume")


def test_before_the_first_step_a_signal_ends_at_once(few, light, monkeypatch, tmp_path):
    monkeypatch.setattr(Run, "batches", lambda run, *_, **__: os.kill(os.getpid(), signal.SIGINT))
    end(begin("cps", tmp_path / "run"), 130)
    assert said(tmp_path / "run") == (
        "cps.py: interrupted; the same command with --resume continues\n"
    )
    assert not (tmp_path / "run/last.pt").exists()


def test_a_second_signal_ends_at_once(midway, tmp_path):
    """But not the same one that comes twice, from Slurm and from torchrun."""

    def twice(run):
        send(signal.SIGTERM, signal.SIGTERM)(run)
        time.sleep(1.1)
        send(signal.SIGINT)(run)

    midway(3, twice)
    end(begin("cps", tmp_path / "run"), 130)
    assert not (tmp_path / "run/last.pt").exists()


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_to_loader_processes_too_lets_them_give_the_steps_batch(number, midway, tmp_path):
    def everywhere(run):
        # Not from the process itself, which may end them.
        subprocess.run(["kill", f"-{int(number)}", "--", f"-{os.getpgrp()}"])
        time.sleep(0.1)

    midway(3, everywhere)
    end(begin("cps", tmp_path / "run", workers=1), STATUS[number])
    assert saved(tmp_path / "run")["step"] == 3


def test_a_signal_to_one_process_stops_all_after_the_same_step(midway, tmp_path):
    def at_one(run):
        if run.rank == 1:
            send(signal.SIGUSR1)(run)

    midway(3, at_one)
    folder = tmp_path / "run"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    both = [begin("cps", folder, rank=r, world=2, port=port, iters=9999) for r in (0, 1)]
    for process in both:
        end(process, STATUS[signal.SIGUSR1])
    step = saved(folder)["step"]
    assert step < 9999 and f"stopped after step {step} of 9999" in said(folder)
    assert "stopped" not in said(folder, rank=1)


def test_a_notebook_is_interrupted_at_once_and_keeps_its_handlers(midway, tmp_path):
    before = [signal.getsignal(number) for number in STATUS]
    midway(3, send(signal.SIGINT))
    flags = TINY["cps"] | dict(output_dir=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt) as caught:
        cps.train(cps.Config(**flags))
    assert caught.type is KeyboardInterrupt

    sys_argv, sys.argv = sys.argv, ["cps.py", *argv("cps", tmp_path / "again", iters=2)]
    midway()
    main(cps.train, cps.Config, cps.RECIPES)
    thread = threading.Thread(target=main, args=(cps.train, cps.Config, cps.RECIPES))
    sys.argv = ["cps.py", *argv("cps", tmp_path / "thread", iters=2)]
    thread.start()
    thread.join()
    sys.argv = sys_argv
    assert (tmp_path / "thread/last.pt").exists()
    assert [signal.getsignal(number) for number in STATUS] == before
