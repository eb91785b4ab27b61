"""Faults injected for real: signals, kills, full disks, lost processes; nothing is lost."""

import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from few_shapes import COUNTS, TINY, argv, command, end, fork, fork_two, lighten
from torch import nn

import cps
import ial
from common import loaders, machine, maps, shapes
from common.layouts import DRAWN
from common.run import InputError, Run, main

LONG = {  # by script: runs of twelve steps or more that are evaluated once, by TINY's flags
    "cps": dict(iters=12),
    "psmt": dict(iters=12),
    "cac": dict(iters=12, bank=2, accum=2),
    "ial": dict(iters=3),
}
every_script = pytest.mark.parametrize("name", TINY)


def words(name, folder, *more, **flags):
    """A command line; the run is evaluated and saved at its end alone."""
    flags = dict(eval_every=9999, save_every=0) | LONG[name] | flags
    return [*argv(name, folder, **flags), *more]


def run(name, folder, *more, status=0, **flags):
    """What a script says in a process of its own."""
    return end(fork(command(name, words(name, folder, *more, **flags))), status)


def saved(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def logged(folder):
    return [json.loads(line) | {"seconds": 0} for line in (folder / "log.jsonl").open()]


def same(folder, whole):
    """A run has left what another one did, bit for bit."""
    assert logged(folder) == logged(whole)
    for name in ("last.pt", "best.pt", "iou.txt", "panels.png"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.fixture(autouse=True, scope="module")
def heard():
    """Handlers as a program has them.

    A shell has what it starts in the background ignore Ctrl-C, which these tests send. Loaders of
    earlier tests leave PyTorch's handler of SIGCHLD, which raises wherever a program is.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGCHLD: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of cps.py that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "COUNTS", COUNTS)
        lighten(patch.setattr)
        run("cps", folder)
    return folder


@pytest.fixture
def midway(few, light, monkeypatch):
    """midway({n: work}): programs that begin from now on do this work in their n-th pass."""
    autocast = Run.autocast

    def plan(works):
        calls = itertools.count(1)

        def enter(run):
            works.get(next(calls), lambda run: None)(run)
            return autocast(run)

        monkeypatch.setattr(Run, "autocast", enter)

    return plan


def send(*numbers):
    """Work that signals its own process."""
    return lambda run: [os.kill(os.getpid(), number) for number in numbers]


# --- signals ---

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 128 + signal.SIGUSR1}


@every_script
def test_stopped_and_killed_anywhere_a_run_goes_on_exactly(name, midway, tmp_path, whole):
    """A signal loses no step, whichever stage it meets; SIGKILL those after the last write."""
    cut, done = tmp_path / "cut", 0
    if name != "cps":
        whole = tmp_path / "whole"
        run(name, whole)
    for number, status in random.sample(list(STATUS.items()), 2):
        midway({random.randint(2, 4): send(number)})
        run(name, cut, "--resume", status=status)
        before, done = done, saved(cut)["step"]
        assert done == logged(cut)[-1]["step"] >= before
    midway({random.randint(2, 4): send(signal.SIGKILL)})
    run(name, cut, "--resume", save_every=1e-9, status=-9)
    assert saved(cut)["step"] >= done
    midway({})
    run(name, cut, "--resume")
    same(cut, whole)
    (cut / "panels.png").unlink()  # as if killed after the last checkpoint
    run(name, cut, "--resume")
    same(cut, whole)


def test_a_signal_says_where_the_run_is_and_how_to_go_on(midway, tmp_path, monkeypatch):
    midway({5: send(signal.SIGTERM)})
    folder = tmp_path / "run"
    first, second = run("cps", folder, status=143).splitlines()
    assert first == "cps.py: interrupted: finishes the step and saves; another signal ends at once"
    assert second.startswith(f"stopped after step 5 of 12, saved in {folder}/last.pt; go on with: ")
    assert second.endswith(f"python cps.py {' '.join(words('cps', folder))} --resume")


def test_before_the_first_step_a_signal_ends_at_once(few, light, monkeypatch, tmp_path):
    monkeypatch.setattr(Run, "batches", lambda run, *_, **__: os.kill(os.getpid(), signal.SIGINT))
    said = run("cps", tmp_path / "run", status=130)
    assert said == "cps.py: interrupted; the same command with --resume continues\n"
    assert not (tmp_path / "run/last.pt").exists()


def test_a_second_signal_ends_at_once(midway, tmp_path):
    """But not the same one that comes twice, from Slurm and from torchrun."""

    def twice(run):
        send(signal.SIGTERM, signal.SIGTERM)(run)
        time.sleep(1.1)
        send(signal.SIGINT)(run)

    midway({3: twice})
    run("cps", tmp_path / "run", status=130)
    assert not (tmp_path / "run/last.pt").exists()


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_to_loader_processes_too_lets_them_give_the_steps_batch(number, midway, tmp_path):
    def everywhere(run):
        # Not from the process itself, which may end them.
        subprocess.run(["kill", f"-{int(number)}", "--", f"-{os.getpgrp()}"])
        time.sleep(0.1)

    midway({3: everywhere})
    run("cps", tmp_path / "run", workers=1, status=STATUS[number])
    assert saved(tmp_path / "run")["step"] == 3


def in_two(folder, **flags):
    """A script in two processes."""
    return fork_two(command("cps", words("cps", folder, **flags)))


def test_a_signal_to_one_process_stops_all_after_the_same_step(midway, tmp_path):
    def at_one(run):
        if run.rank == 1:
            send(signal.SIGUSR1)(run)

    midway({3: at_one})
    folder = tmp_path / "run"
    both = in_two(folder, iters=9999)
    first, second = (end(process, STATUS[signal.SIGUSR1]) for process in both)
    step = saved(folder)["step"]
    assert step < 9999 and f"stopped after step {step} of 9999" in first and second == ""


def test_a_notebook_is_interrupted_at_once_and_keeps_its_handlers(midway, tmp_path):
    before = [signal.getsignal(number) for number in STATUS]
    midway({3: send(signal.SIGINT)})
    flags = TINY["cps"] | dict(output_dir=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt) as caught:
        cps.train(cps.Config(**flags))
    assert caught.type is KeyboardInterrupt

    sys_argv, sys.argv = sys.argv, ["cps.py", *words("cps", tmp_path / "again", iters=2)]
    midway({})
    main(cps.train, cps.Config, cps.RECIPES)
    thread = threading.Thread(target=main, args=(cps.train, cps.Config, cps.RECIPES))
    sys.argv = ["cps.py", *words("cps", tmp_path / "thread", iters=2)]
    thread.start()
    thread.join()
    sys.argv = sys_argv
    assert (tmp_path / "thread/last.pt").exists()
    assert [signal.getsignal(number) for number in STATUS] == before


# --- disks ---


def limit(size):
    """Work after which this process writes no file beyond a size: its disk is full."""
    return lambda run: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_full_disk_is_named_and_the_checkpoint_before_it_is_kept(share, midway, tmp_path, whole):
    """However much of the next one it takes. A line of the log does not end the run before that."""
    midway({5: limit(int(share * (whole / "last.pt").stat().st_size))})
    cut = tmp_path / "cut"
    *first, last = run("cps", cut, save_every=1e-9, status=2).splitlines()
    problem = "{}: {} cannot be written (File too large); what was there before is kept"
    assert last == f"cps.py: {problem.format(cut, 'last.pt')}"
    assert first == [problem.format(cut, "log.jsonl")] * (share == 0)
    assert saved(cut)["step"] == 4 and names(cut) == {"config.json", "log.jsonl", "last.pt"}
    midway({})
    run("cps", cut, "--resume")
    same(cut, whole)


def test_a_log_that_cannot_be_written_waits_until_it_can(midway, tmp_path, whole):
    def away(run):
        (run.folder / "log.jsonl").rename(run.folder / "log")
        (run.folder / "log.jsonl").mkdir()

    def back(run):
        (run.folder / "log.jsonl").rmdir()
        (run.folder / "log").rename(run.folder / "log.jsonl")

    midway({5: away, 9: back})
    cut = tmp_path / "cut"
    said = run("cps", cut)
    assert said.count("\n") == 1 and "log.jsonl cannot be written (Is a directory)" in said
    same(cut, whole)


def test_what_a_kill_left_half_written_goes(midway, tmp_path, whole):
    def kill_in_a_write(run):
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)

    midway({4: kill_in_a_write})
    cut = tmp_path / "cut"
    run("cps", cut, save_every=1e-9, status=-9)
    assert saved(cut)["step"] == 3 and "last.pt.tmp" in names(cut)
    midway({})
    run("cps", cut, "--resume")
    assert names(cut) == names(whole)
    same(cut, whole)


def test_a_map_that_cannot_be_written_is_named(midway, tmp_path, monkeypatch):
    find = ial.find_superpixels

    def on_a_full_disk(run, cfg, maps):
        limit(50)(run)
        find(run, cfg, maps)

    monkeypatch.setattr(ial, "find_superpixels", on_a_full_disk)
    said = run("ial", tmp_path / "run", status=2)
    assert f"{tmp_path}/run/maps/superpixels/train: 000 cannot be written (File too" in said
    assert said.count("\n") == 1


# --- divergence ---


@pytest.fixture
def drawn(monkeypatch):
    """The pictures that are read, in order."""
    paths, read_pair = [], loaders.read_pair

    def note(pair, lookup):
        paths.append(pair[0].removeprefix(DRAWN))
        return read_pair(pair, lookup)

    for module in (loaders, maps):
        monkeypatch.setattr(module, "read_pair", note)
    return paths


def diverge(run):
    """Now losses are not finite, and after the step no weight is."""
    for part in (run.state | run.stage).values():
        for weight in part.parameters() if isinstance(part, nn.Module) else ():
            weight.data.fill_(torch.nan)


@pytest.mark.parametrize(
    "name, passes, step, term, pictures",
    [
        ("cps", 5, 5, "loss_sup", 4),
        ("psmt", 31, 31, "loss_sup", 4),
        ("cac", 65, 33, "loss_sup", 8),  # two batches
        ("ial", 13, 13, "loss_unary", 2),
    ],
)
def test_divergence_names_the_step_the_term_and_the_pictures(
    name, passes, step, term, pictures, midway, drawn, tmp_path
):
    """Not those of the next line of the log. The checkpoint before it stays."""
    midway({passes: diverge})
    script, flags = import_module(name), dict(iters=[48, 10][name == "ial"], save_every=1e-9)
    flags = TINY[name] | LONG[name] | dict(eval_every=99, output_dir=str(tmp_path / "run")) | flags
    with pytest.raises(InputError, match=f"{term} is nan at step {step}: training div") as caught:
        script.train(script.Config(**flags))
    named = str(caught.value).split("pictures: ")[1].split(", ")
    assert sorted(named) == sorted(drawn[-pictures:])
    last = saved(tmp_path / "run")
    assert last["step"] == step - 1
    assert all(weight.isfinite().all() for net in last["networks"] for weight in net.values())


def test_divergence_in_another_process_names_that_ones_pictures(midway, drawn, tmp_path):
    def diverge_alone(run):
        if run.rank == 1:
            diverge(run)
            (tmp_path / "drawn").write_text("\n".join(drawn[-2:]))  # labelled ones

    midway({3: diverge_alone})
    first, second = (end(process, 2) for process in in_two(tmp_path / "run"))
    named = first.split("pictures: ")[1].strip().split(", ")
    assert "loss_sup is nan at step 3:" in first and second == ""
    assert len(named) == 4 and named[:2] == (tmp_path / "drawn").read_text().split()


# --- memory, loader processes, pipes ---


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_lost_loader_process_is_named(number, midway, tmp_path):
    midway({3: lambda run: os.kill(multiprocessing.active_children()[0].pid, number)})
    said = run("cps", tmp_path / "run", "--supervised-only", workers=1, status=2)
    line = "cps.py: a loader process was lost, mostly for want of memory; lower --workers; --resume"
    assert line in said and "Traceback" not in said


def out_of_gpu_memory(size):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 PiB.\nMore of it.")


@pytest.mark.parametrize(
    "allocate, start",
    [(torch.empty, "memory"), (np.empty, "memory"), (out_of_gpu_memory, "the GPU's memory")],
)
def test_where_memory_does_not_suffice_it_says_what_to_lower(allocate, start, midway, tmp_path):
    midway({2: lambda run: allocate(2**50)})
    said = run("cps", tmp_path / "run", status=2)
    assert said.startswith(f"cps.py: {start} does not suffice; lower --batch-size, ")
    assert said.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_where_the_system_gives_no_more_memory_it_is_one_line_too(midway, tmp_path):
    """oneDNN finds out, which has code to write for pictures of this size; it says it its way."""

    def enclose(run):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(),) * 2)

    midway({1: enclose})
    process = fork(command("cps", words("cps", tmp_path / "run", crop_size=256)))
    process.join(60)
    if process.exitcode == -signal.SIGSEGV:
        pytest.skip("oneDNN of older PyTorch crashes")
    said = end(process, 2)
    assert said.startswith("cps.py: memory does not suffice; lower --batch-size, ")
    assert said.count("\n") == 1


def test_what_tells_that_memory_is_lacking():
    """oneDNN's words among them, but not those for what it cannot compute."""
    lacking = (
        "could not create a primitive",
        "could not create a memory object",
        "could not execute a primitive",
        "std::bad_alloc",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.",
        "[Errno 12] Cannot allocate memory",
    )
    assert all(machine.lacks_memory(RuntimeError(text)) for text in lacking)
    descriptor = "could not create a primitive descriptor for the matmul primitive"
    assert not machine.lacks_memory(RuntimeError(descriptor))


def test_a_closed_pipe_ends_nothing(few, light, tmp_path):
    reads, writes = os.pipe()

    def program():
        os.close(reads)
        sys.stdout = open(writes, "w")
        command("cps", words("cps", tmp_path / "run", iters=2))()

    process = fork(program)
    os.close(writes)
    with open(reads) as pipe:
        assert pipe.readline()
    assert end(process) == ""
    assert saved(tmp_path / "run")["step"] == 2
