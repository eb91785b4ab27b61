"""What surrounds a training loop: device, precision, the run's folder, log and checkpoints."""

import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from common import curves, machine
from common.augment import whole_view
from common.bars import tqdm
from common.checkpoints import model_part, read_last, settings_of
from common.data import Data, check, describe, load
from common.deeplab import Ensemble, Together
from common.flags import (
    InputError,
    LoneError,
    RunConfig,
    SemiConfig,
    check_config,
    check_scales,
    crop_share,
    given_flags,
    parse_config,
)
from common.layouts import read_header, shortened
from common.loaders import View, training_loader, val_loader
from common.metrics import evaluate, evaluating, iou, windows
from common.outputs import (
    add_lines,
    choose_folder,
    complete_log,
    evaluation,
    iou_columns,
    iou_table,
    open_folder,
    plain,
    read_log,
    replace_file,
    replace_text,
    run_name,
)
from common.panels import Show, panels, picture_name
from common.predict import Picture, segment
from common.progress import Clock, plan
from common.signals import Stopped, outlive_reader, signals


class Result(NamedTuple):
    """What `train` returns: the evaluated model, its last mIoU in [0, 1], all evaluations.

    An evaluation has `step`, `miou`, `iou` by class name (None: the class does not occur), and the
    mIoU of networks that were scored beside the model.
    """

    model: nn.Module
    miou: float
    history: list[dict]
    folder: Path

    def __repr__(self) -> str:
        evaluations = f"{len(self.history)} evaluation{'s' * (len(self.history) != 1)}"
        return f"Result(mIoU {100 * self.miou:.2f}, {evaluations}, {self.folder})"

    def segment(self, image: Picture, window: int = 0, amp: str = "auto") -> np.ndarray | Tensor:
        """The classes of a picture's pixels, (H, W) uint8: common.predict.segment."""
        return segment(self.model, image, window, amp)


def main(train: Callable[[RunConfig], Result], config: type[RunConfig], recipes: dict) -> None:
    """A script's guard: run `train` with the command line.

    An InputError ends it with status 2, a signal with 128 and its number: 130 for Ctrl-C.
    """
    rank = int(os.environ.get("RANK", 0))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console may know neither λ nor a class's name
        outlive_reader(stream)
    try:
        with signals.heard(), machine.shortages():
            train(parse_config(config, recipes, sys.argv[1:]))
    except InputError as error:
        # A loader process hands its error over inside a traceback's text: keep the message.
        message = re.split(r"\w+Error: ", str(error).strip())[-1]
        if rank == 0 or isinstance(error, LoneError):
            print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stop:  # which has been said
        sys.exit(128 + stop.args[0])
    finally:
        machine.part_processes(sys.exc_info()[1])


class Run:
    """One run: device, precision and processes; its data; its folder with log and checkpoints.

    Made, then loaded, started, looped over, finished. What a resumed run takes from its checkpoint
    (`first`, `history`, ...) is there from `start` on; before it, reading it is an error. Nothing
    is written before `start`. Raises InputError for flags that cannot be right, a device that is
    not there, and an output folder that holds another run.
    """

    gather = staticmethod(machine.gather)
    average_buffers = staticmethod(machine.average_buffers)
    average_gradients = staticmethod(machine.average_gradients)

    def __init__(self, script: str, cfg: RunConfig, total: int | None = None):
        """total: the steps of all stages, for a script that has several; --iters when None."""
        check_config(cfg)
        self.script, self.cfg, self.total = script, cfg, total or cfg.iters
        self.device = machine.find_device(cfg.device)
        self.rank, self.world = machine.join_processes(self.device)
        machine.keep_memory()
        cuda = self.device.type == "cuda"
        if cuda:  # TF32, as in convolutions, where matrices stay in float32: above all CAC's loss
            torch.set_float32_matmul_precision("high")
        if cfg.deterministic:
            machine.be_deterministic()
        self.dtype = machine.precision(self.device, cfg.amp)
        # Small gradients would be 0 in fp16: they are those of a scaled loss. Else it does nothing.
        half = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.loading = dict(  # the loaders' arguments that depend on the machine
            rank=self.rank, world=self.world, workers=cfg.workers, pin_memory=cuda
        )
        # Of whole pictures as many pixels at once as in a training batch, or 2^16 where crops are
        # small: without gradients they take less memory.
        self.pixels = max(cfg.batch_size * cfg.crop_size**2, 2**16)
        self.window = windows(cfg.eval_window)
        self.trained = WeakSet()  # what `wrap` has made; a stage's networks end with it
        self.show: Show | None = None  # what the method adds to panels.png, networks in eval mode
        self.name = run_name(script, cfg)
        self.folder = machine.in_all_processes(lambda: choose_folder(script, cfg))
        torch.manual_seed(cfg.seed)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"Run.{name}: unknown, or not known before Run.start, Run.loop")

    # --- set-up ---

    def load(self, mixed: bool = False) -> Data:
        """The dataset's lists, by the flags of a SemiConfig; prints the counts.

        mixed: unlabelled pictures are mixed with one another; then there must be two.
        """
        cfg: SemiConfig = self.cfg
        data = load(cfg.dataset, cfg.data_path, cfg.labeled, cfg.unlabeled, cfg.seed)
        if mixed and len(data.unlabeled) < 2 and not cfg.supervised_only:
            (image, _), flag = data.unlabeled[0], "--no-cutmix"
            flag = flag if isinstance(cfg.cutmix, bool) else "--cutmix off"
            raise InputError(
                f"{image}: the only unlabelled picture, CutMix has no other; add some, or {flag}"
            )
        self.tell(data)
        return data

    def tell(self, data: Data) -> None:
        """Print what a dataset's lists hold, and what of it a user may not expect."""
        cfg, batch, notes = self.cfg, self.cfg.batch_size * self.world, list(data.notes)
        lists = {"labelled" if data.tags is None else "training": data.labeled}
        if isinstance(cfg, SemiConfig) and not cfg.supervised_only:
            lists["unlabelled"] = data.unlabeled
            if {image for image, _ in data.labeled} == {image for image, _ in data.unlabeled}:
                notes.append("all training pictures are labelled: they serve as unlabelled, too")
        elif isinstance(cfg, SemiConfig) and (idle := given_flags(cfg, cfg.left_out)):
            notes.append(f"--supervised-only: {', '.join(idle)} without effect")
        few = [f"{len(pairs)} {kind}" for kind, pairs in lists.items() if len(pairs) < batch]
        if few:
            notes.append(
                f"batches of {batch}, but {' and '.join(few)} pictures: they repeat within a batch"
            )
        self.print("\n".join([data.summary(), *notes]))

    def place(self, network: nn.Module) -> nn.Module:
        """The network on the run's device: machine.place."""
        return machine.place(network, self.device)

    def wrap(self, network: nn.Module, find_unused: bool = False) -> nn.Module:
        """The same for one that learns, with the gradients of all processes: machine.wrap."""
        network = machine.wrap(network, self.device, find_unused)
        if self.world > 1:
            self.trained.add(network)
        return network

    def start(self, data: Data, model: list[nn.Module], **state: Any) -> None:
        """Decode the pictures that must be right; open the folder, or `last.pt` when resumed.

        model: the DeepLabV3Plus whose mean logits are evaluated and saved. state: by name,
        everything with a state_dict that the next step depends on, equal in all processes but for
        statistics, which are averaged before they are saved. Randomness needs no place in it: each
        step seeds its own.
        """
        unlabeled = "unused" if getattr(self.cfg, "supervised_only", True) else self.cfg.check
        fits = partial(check_scales, self.cfg)
        counts = check(data, self.rank, self.world, unlabeled, fits)
        self.print(describe(data, counts))
        sizes = [read_header(image) for image, _ in data.labeled[:100]]
        share = median(crop_share(self.cfg, *size) for size in sizes)
        if share < 0.02:
            self.print(
                f"crops of --crop-size {self.cfg.crop_size} show {100 * share:.2g} % of a picture: "
                "make pictures smaller, or crops larger"
            )
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler
        self.data, self.networks, self.state, self.stage = data, model, state, {}
        self.model = model[0] if len(model) == 1 else Ensemble(model)
        self.draws, self.begins, self.planned = {}, {}, False
        self.unseen = []  # logged values that may not be finite: step, name, value
        self.val = val_loader(data, whole_view, **self.loading, pixels=self.pixels)
        self.started = self.saved = time.time()
        machine.in_all_processes(self._open)
        half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.dtype)
        precision = f"{half} where it can be (--amp none: float32)" if half else "float32"
        self.print(f"on {self.device}, in {precision}: {self.folder}")
        if self.first == self.total:
            self.print(f"--resume: all {self.total} steps are done")
        elif self.first:
            self.print(f"--resume: goes on after step {self.first} of {self.total}")
        elif self.cfg.resume:
            kept = f"; its log is {self.kept} now" * bool(self.kept)
            self.print(f"--resume: nothing to resume, begins at step 1{kept}")

    def batches(self, split: str, view: View, begin: int = 0) -> Iterator[list[Tensor]]:
        """--accum batches for each step left, from step `begin` on: common.loaders.training_loader.

        split is "labeled" or "unlabeled". The loader and its processes start with the first batch.
        """
        first, last = max(self.first - begin, 0), self.total - begin
        numbers = range(first * self.cfg.accum, last * self.cfg.accum)
        how = dict(batch_size=self.cfg.batch_size, seed=self.cfg.seed, **self.loading)
        loader = training_loader(self.data, split, view, numbers=numbers, **how)
        self.begins[split] = begin

        def started_late() -> Iterator[list[Tensor]]:
            self.draws[split] = loader.dataset
            yield from loader

        return started_late()

    def to_device(self, batch: list[Tensor]) -> list[Tensor]:
        """A loader's batch on the device, pictures (B, 3, H, W) in channels-last memory."""
        # Loaders' batches are pinned; what a script made itself would be waited for.
        if self.device.type == "cuda":
            batch = [t.pin_memory() for t in batch]
        return [
            t.to(
                self.device,
                non_blocking=True,
                memory_format=torch.channels_last if t.ndim == 4 else torch.preserve_format,
            )
            for t in batch
        ]

    def autocast(self) -> AbstractContextManager:
        """Half precision for what can bear it, or nothing, as --amp says."""
        return machine.autocast(self.device, self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients; with --amp fp16 those of the scaled loss."""
        self.scaler.scale(loss).backward()

    def update(self, optimizer: Optimizer) -> None:
        """A step of the optimiser; with --amp fp16 none where a scaled gradient is not finite."""
        self.scaler.step(optimizer)
        self.scaler.update()

    # --- the loop ---

    def passed(self, steps: range) -> bool:
        """Whether a resumed run was through with a stage, with what follows its loop, too."""
        return steps.stop < self.first or (steps.stop == self.first and not self.rest)

    def loop(self, steps: range | None = None, **stage: Any) -> Iterator[int]:
        """The steps left, or those left of a stage, with a bar on a terminal or in a notebook.

        With --accum N each comes N times, for as many batches; until the last, `more_to_come`.
        Each time torch is seeded by seed, step and process. After a step comes `last.pt`, where
        --save-every says so, where a signal stops the script, and at the end of a stage.

        stage: what a stage has beside the run's state, as in `start`.
        """
        steps = range(self.total) if steps is None else steps
        steps = range(max(self.first, steps.start), steps.stop)
        self.stage = stage
        if self.rest:
            self._take_up(stage)
        hidden, accum = self.rank > 0 or None, self.cfg.accum
        self.bar = tqdm(steps, initial=steps.start, total=self.total, disable=hidden)
        warmup = self.begins.get("unlabeled", 0)
        if steps and not self.planned:
            self.planned = True
            self.print(plan(self.cfg, self.data, self.total, self.world, warmup))
        self.clock = Clock({max(begin, steps.start) for begin in (0, warmup)}, steps.stop)
        self.ask = steps.start, steps.start, time.time()
        with machine.tuning(self.device.type == "cuda" and not self.cfg.deterministic):
            signals.held = True
            for step in self.bar:
                self._say_time(step)
                for number in range(accum):
                    self.more_to_come = number + 1 < accum
                    for network in self.trained:  # processes exchange a step's gradients once
                        network.require_backward_grad_sync = not self.more_to_come
                    self.seed(step * accum + number)
                    yield step
                self._pause(step, bool(stage) and step + 1 == steps.stop)
            signals.held = False
        self.stage = {}

    def _pause(self, step: int, stage_ends: bool) -> None:
        """Between two steps: write `last.pt` where it is time; end where a signal came."""
        number, late = self._wishes(step, stage_ends)
        if not (number or late or stage_ends):
            return
        if self.done != step + 1:  # an evaluation saves by itself
            self._look()
            self._note_broken(step)
            self._average()
            self.save(step)
        if self.world == 1:
            number = signals.number  # one may have come while it was written
        if not number:
            return
        if self.rank == 0:
            extra = ["--output-dir", str(self.folder)] * (not self.cfg.output_dir)
            command = [*sys.argv, *extra, *["--resume"] * (not self.cfg.resume)]
            start = "torchrun ..." if self.world > 1 else "python"
            tqdm.write(
                f"stopped after step {step + 1} of {self.total}, saved in "
                f"{self.folder / 'last.pt'}; go on with: {start} {shlex.join(command)}",
                file=sys.stderr,
            )
        self.barrier()  # torchrun ends the others as soon as one has ended
        raise Stopped(number)

    def _wishes(self, step: int, at_once: bool) -> tuple[int, bool]:
        """The signal that came, or 0; whether it is time to save.

        What one process has seen counts for all. They ask each other after the same steps, every
        two seconds or so, or at once: it means to wait for the device.
        """
        late = 0 < self.cfg.save_every * 60 <= time.time() - self.saved
        if self.world == 1:
            return signals.number, late
        last, due, since = self.ask
        if step < due and not at_once:
            return 0, False
        mine = torch.tensor([[signals.number, late, time.time() - since]], device=self.device)
        number, late, seconds = machine.gather(mine).amax(dim=0).tolist()
        left = int((step + 1 - last) * 2 / max(seconds, 1e-3))
        self.ask = step + 1, step + 1 + left, time.time()
        return int(number), bool(late)

    def _say_time(self, step: int) -> None:
        """How long it will take, soon after the start and after a warm-up."""
        if self.rank or not self.clock.looks(step):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if left := self.clock.look(step):
            tqdm.write(f"step {step}/{self.total}  {left}")

    def seed(self, step: int) -> None:
        """Seed torch by --seed, a step and the process."""
        torch.manual_seed(_mix(self.cfg.seed, step, self.rank))

    def log(self, step: int, **values: Tensor | float) -> None:
        """Now and then, and before an evaluation, a line of `log.jsonl`, which that completes.

        Most calls return without waiting for the device. With --accum the values are those of a
        step's last batch. Raises InputError where one is not finite, or was since the last line.
        """
        if self.more_to_come:
            return
        values = {name: torch.as_tensor(value).detach() for name, value in values.items()}
        self.unseen += [(step, name, value) for name, value in values.items()]
        every = max(min(50, self.total // 20), 1)
        if (step + 1) % every and not self.due(step):
            return
        self._look()
        if self.rank:
            return
        values = {name: value.item() for name, value in values.items()}
        if self.world == 1:
            self._note_broken(step)
        self._write_log({"step": step + 1, **values})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.bar.set_postfix_str(shown)
        if self.bar.disable:
            print(f"step {step + 1}/{self.total}  {shown}", file=sys.stderr, flush=True)

    def _look(self) -> None:
        """Raise InputError for the first value of any process, not yet seen, that is not finite."""
        unseen, self.unseen = self.unseen, []
        if not unseen:
            return
        values = [value.to(self.device, torch.float32) for _, _, value in unseen]
        values = machine.gather(torch.stack(values)[None]).T  # (values, processes)
        bad = (~values.isfinite()).nonzero().tolist()
        if bad:
            (row, rank), (step, name, _) = bad[0], unseen[bad[0][0]]
            self._diverged(f"{name} is {values[row, rank].item()}", step, rank)

    def _pictures(self, step: int, rank: int) -> list[str]:
        """What a process draws in a step, by the paths below the dataset's folder."""
        size, names = self.cfg.batch_size, []
        for split, draws in self.draws.items():
            begin = (step - self.begins[split]) * self.cfg.accum
            for number in range(max(begin, 0), begin + self.cfg.accum):
                first = number * draws.batch + rank * size
                indices = [draws.index(draw) for draw in range(first, first + size)]
                pairs = getattr(self.data, split)
                names += [picture_name(self.data, pairs[index][0]) for index in indices]
        return names

    def due(self, step: int) -> bool:
        """Whether to evaluate after this step: every --eval-every steps, and after the last."""
        return (step + 1) % self.cfg.eval_every == 0 or step + 1 == self.total

    def evaluate(self, step: int, **others: nn.Module) -> None:
        """Where it is due: score the model, and by name other networks beside it, and record.

        Statistics that processes kept apart are averaged first, in the whole state.
        """
        if self.due(step):
            self._note_broken(step)
            self._average()
            models = [self.model, *others.values()]
            own, *beside = self.score(Together(models), len(models))
            self.record(step, own, **dict(zip(others, beside, strict=True)))

    def _average(self) -> None:
        """Let statistics that processes kept apart be the same in all of them."""
        self.average_buffers(self._modules())

    def _modules(self) -> nn.ModuleList:
        """The networks among what a checkpoint holds."""
        parts = (self.state | self.stage).values()
        return nn.ModuleList(part for part in parts if isinstance(part, nn.Module))

    def score(self, network: nn.Module, several: int = 0) -> Tensor:
        """IoU by class (K,) on the validation pictures, whole or in --eval-window's windows.

        several: M where the network gives the logits of M networks; then (M, K).
        """
        classes = len(self.data.classes)
        with self.autocast(), machine.tuning(False):
            return iou(evaluate(network, self.val, classes, self.device, self.window, several))

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def record(self, step: int, ious: Tensor, **others: Tensor) -> None:
        """Log an evaluation after `step`; write `last.pt`, a better `best.pt`, tables and pictures.

        ious (K,): the model's IoU by class in [0, 1], NaN for a class that does not occur; others:
        those of networks that are not the model, whose mean is logged beside. Raises InputError
        when weights are not finite: no checkpoint is written then. Without validation masks all are
        NaN: only the log and `last.pt` are written.
        """
        self._check_weights(step)
        self.miou, done = ious.nanmean().item(), step + 1
        scored = not math.isnan(self.miou)  # not without validation masks
        values = [None if math.isnan(value) else value for value in ious.tolist()]
        by_class = dict(zip(self.data.classes, values, strict=True))
        means = {name: other.nanmean().item() for name, other in others.items()}
        entry = {"step": done, "miou": self.miou if scored else None, "iou": by_class, **means}
        self.history = [past for past in self.history if past["step"] < done] + [entry]
        self.done, self.saved = done, time.time()
        if self.rank:
            return
        better = self.miou > self.best
        self.best = self.miou if better else self.best
        # First: a log line too many is cut when the run is resumed.
        self._write_log(entry, complete_log)
        self._write_checkpoints(done, ["best.pt"] * better + ["last.pt"])
        self._draw()
        shown = "".join(f"  {name} {100 * value:.2f}" for name, value in means.items())
        figure = f"mIoU {100 * self.miou:.2f}" if scored else "no mIoU"
        tqdm.write(f"step {done}/{self.total}  {figure}{shown}")

    def note(self, step: int, stage: str, **figures: float) -> None:
        """A line of the log, and on the screen, there in percent, but energies.

        One that is not finite could not be measured.
        """
        figures = {name: float(v) if math.isfinite(v) else None for name, v in figures.items()}
        if self.rank == 0:
            self._write_log({"step": step + 1, "stage": stage, **figures}, complete_log)
            known = {name: v for name, v in figures.items() if v is not None}
            shown = "  ".join(
                f"{name} {v:.4g}" if name.startswith("energy") else f"{name} {100 * v:.2f}"
                for name, v in known.items()
            )
            tqdm.write(f"step {step + 1}/{self.total}  {stage}: {shown or 'done'}")

    def save(self, step: int) -> None:
        """Write `last.pt`, so that no step up to this one is repeated.

        Raises InputError when weights are not finite: the one before it is kept then.
        """
        self._check_weights(step)
        self.done, self.saved = step + 1, time.time()
        if self.rank == 0:
            self._write_checkpoints(step + 1, ["last.pt"])

    def _note_broken(self, step: int) -> None:
        """Name unlabelled pictures that could not be read, once, on the screen and in the log."""
        if "unlabeled" not in self.draws:
            return
        draws = self.draws["unlabeled"]
        broken = machine.gather_sum(draws.broken.numpy()).nonzero()[0]  # in any process
        images = [draws.items[index][0] for index in broken]
        new = [image for image in images if image not in self.skipped]
        self.skipped += new
        if new and self.rank == 0:
            self._write_log({"step": step + 1, "skipped": new})
            tqdm.write(f"cannot be read, and another one is drawn instead: {shortened(new)}")

    # --- the folder ---

    def _open(self) -> None:
        self.first, self.miou, self.best, self.kept = 0, math.nan, -1.0, ""
        self.drawn = False  # of the last evaluation
        self.waiting = []  # lines that could not be written to the log
        self.done = 0  # steps, those of the last checkpoint
        self.rest = {}  # of a stage's state what has not been taken up
        resumed = bool(self.cfg.resume) and (self.folder / "last.pt").exists()
        if self.world > 1:
            seen = [None] * self.world
            dist.all_gather_object(seen, resumed)
            if len(set(seen)) > 1:
                raise InputError(f"{self.folder}: must be on a disk that all machines share")
        if resumed:
            self._load()
        lines = read_log(self.folder / "log.jsonl") if resumed else []
        lines = [line for line in lines if line["step"] <= self.first]  # the others come again
        self.history = [evaluation(line) for line in lines if "miou" in line]
        self.skipped = [image for line in lines for image in line.get("skipped", ())]
        if self.rank == 0:
            settings = asdict(self.cfg) | {"processes": self.world}
            settings = None if resumed else settings | {"script": self.script}
            again, files = bool(self.cfg.resume), self.data.files
            self.kept = open_folder(self.folder, lines, settings, again, files)

    def _load(self) -> None:
        changed = self.cfg.resume == "changed"
        saved = read_last(self.folder, self._settings(), self.data, changed)
        self.first, self.miou, self.best = saved["step"], saved["miou"], saved["best"]
        self.rest = dict(saved["state"])
        if self.first > self.total:
            path = self.folder / "last.pt"
            raise InputError(f"{path}: is of step {self.first}; delete it to start afresh")
        self._take_up(self.state)

    def _take_up(self, parts: dict[str, Any]) -> None:
        """Give these parts of a resumed run's state what the checkpoint has for them."""
        try:
            for name, part in parts.items():
                part.load_state_dict(self.rest.pop(name))
        except Exception as error:  # as many kinds as there are ways to be another file
            path, kind = self.folder / "last.pt", type(error).__name__
            raise InputError(f"{path}: damaged ({kind}); delete it to start afresh") from error

    def _settings(self) -> dict:
        return settings_of(self.script, self.cfg, self.data, self.world)

    def _write_checkpoints(self, done: int, names: list[str]) -> None:
        """best.pt holds the model alone, last.pt also all that resuming takes."""
        window = self.cfg.eval_window
        model = model_part(self.networks, self.data, window, done, self.miou)
        everything = self.state | self.stage
        parts = {name: part.state_dict() for name, part in everything.items()}
        whole = model | dict(best=self.best, settings=self._settings(), state=parts)
        for name in names:
            content = plain(whole if name == "last.pt" else model)
            replace_file(self.folder / name, partial(torch.save, content))

    def _draw(self, draw: Callable[[Path], None] | None = None) -> None:
        """Write `panels.png`, of validation pictures or as `draw` does, `iou.txt`, `curves.png`."""
        path = self.folder / "panels.png"
        if not math.isnan(self.miou):
            table = iou_table(self.history[-1]["iou"], self.miou)
            replace_text(self.folder / "iou.txt", table)
        self.seed(self.total)  # no step's: what is random in them is the same in a resumed run
        if draw is not None:
            draw(path)
        elif self.data.val:
            how = dict(window=self.window, show=self.show)
            with self.autocast(), machine.tuning(False), evaluating(self._modules()):
                panels(self.model, self.data, path, self.device, **how)
        log = read_log(self.folder / "log.jsonl")
        curves.write(self.folder / "curves.png", {self.name: log})
        self.drawn = True

    def _check_weights(self, step: int) -> None:
        weights = list(self._modules().state_dict().values())
        if not torch.stack([weight.isfinite().all() for weight in weights]).all():
            self._diverged("a weight is not finite", step)

    def _diverged(self, what: str, step: int, rank: int = 0) -> None:
        """Raise InputError; rank: of the process where it was found."""
        pictures = ", ".join(self._pictures(step, rank))
        raise InputError(
            f"{what} at step {step + 1}: training diverged; lower --lr (what was saved before is "
            f"in {self.folder})" + f"; that step's pictures: {pictures}" * bool(pictures)
        )

    def finish(self, draw: Callable[[Path], None] | None = None) -> Result:
        """Draw, print IoU, time and memory; the result's model is in eval mode.

        draw: what writes `panels.png` in the end; by default it shows validation pictures.
        """
        if self.rank == 0:
            if draw is not None or not self.drawn:
                self._draw(draw)
            memory = ""
            if self.device.type == "cuda":
                memory = f", {torch.cuda.max_memory_allocated(self.device) / 2**30:.1f} GiB peak"
            if self.skipped:
                print(f"skipped {len(self.skipped)} unlabelled: {shortened(self.skipped)}")
            figures = "no network to evaluate"
            if not self.data.val:
                figures = "no validation masks, no mIoU"
            elif self.history:
                print(f"IoU by class in %\n{iou_columns(self.history[-1]['iou'])}", end="")
                figures = f"mIoU {100 * self.miou:.2f} at the last step (best on validation "
                figures += f"{100 * self.best:.2f})"
            print(f"{figures}, {time.time() - self.started:.0f} s{memory}: {self.folder}")
        return Result(self.model.eval(), self.miou, self.history, self.folder)

    def print(self, text: str) -> None:
        """Print in the first process alone."""
        if self.rank == 0:
            print(text, flush=True)

    def _write_log(self, entry: dict, write: Callable = add_lines) -> None:
        """Add a line to the log; what cannot be written waits for the next one.

        That is no reason to stop: the next checkpoint may fit.
        """
        waiting = bool(self.waiting)
        self.waiting.append(entry | {"seconds": round(time.time() - self.started, 1)})
        try:
            write(self.folder / "log.jsonl", self.waiting)
            self.waiting = []
        except InputError as error:
            if not waiting:
                tqdm.write(f"{error}", file=sys.stderr)


def _mix(*numbers: int) -> int:
    """A seed that differs wherever one of the numbers does."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
