"""What surrounds a training loop: device, processes, the run's folder, log and checkpoints."""

import inspect
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.deeplab import Ensemble
from common.flags import InputError, LoneError, RunConfig, check_config, parse_config
from common.outputs import choose_folder, plain, read_log, replace_file, replace_text


class Result(NamedTuple):
    """What `train` returns: the evaluated model, its last mIoU in [0, 1], all evaluations."""

    model: nn.Module
    miou: float
    history: list[dict]


def main(train: Callable[[RunConfig], Result], config: type[RunConfig], recipes: dict) -> None:
    """A script's guard: run `train` with the command line; an InputError ends it with status 2."""
    rank = int(os.environ.get("RANK", 0))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console may know neither λ nor a class's name
    try:
        train(parse_config(config, recipes, sys.argv[1:]))
    except InputError as error:
        # A loader process hands its error over inside a traceback's text: keep the message.
        message = re.split(r"\w+Error: ", str(error).strip())[-1]
        if rank == 0 or isinstance(error, LoneError):
            print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume continues", file=sys.stderr)
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def in_all_processes(work: Callable[[], Any]) -> Any:
    """Call `work` in this process; an InputError of one process is raised in all of them."""
    result, error = None, None
    try:
        result = work()
    except InputError as caught:
        error = caught
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, None if error is None else str(error))
        message = next((text for text in errors if text is not None), None)
        error = None if message is None else InputError(message)
    if error is not None:
        raise error
    return result


# --- the run ---


class Run:
    """One run: device, precision and processes; the output folder with its log and checkpoints.

    Raises InputError for flags that cannot be right, a device that is not there, and an output
    folder that holds another run. Nothing is written before `start`.
    """

    def __init__(self, script: str, cfg: RunConfig, total: int | None = None):
        """total: the steps of all stages, for a script that has several; --iters when None."""
        check_config(cfg)
        self.cfg, self.total = cfg, total or cfg.iters
        self.device = _device(cfg.device)
        cuda = self.device.type == "cuda"
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        # Before Ampere (8.0) GPUs emulate bf16, which is slower than float32.
        fast = cuda and torch.cuda.get_device_capability(self.device) >= (8, 0)
        self.bf16 = cfg.amp == "bf16" or (cfg.amp == "auto" and fast)
        self.folder = in_all_processes(lambda: choose_folder(script, cfg))
        self.first, self.miou, self.best, self.history = 0, math.nan, -1.0, []
        torch.manual_seed(cfg.seed)

    @property
    def loading(self) -> dict:
        """The loaders' arguments that depend on the machine."""
        return dict(
            rank=self.rank,
            world=self.world,
            workers=self.cfg.workers,
            pin_memory=self.device.type == "cuda",
        )

    @property
    def drawing(self) -> dict:
        """The training loaders' arguments: those of `loading`, and what the batches depend on."""
        return dict(
            batch_size=self.cfg.batch_size, steps=self.steps, seed=self.cfg.seed, **self.loading
        )

    @property
    def steps(self) -> range:
        """The steps that are left: all of them, or those after the checkpoint resumed."""
        return range(self.first, self.total)

    def wrap(self, network: nn.Module) -> nn.Module:
        """Move a network to the device; with several processes, synchronise its gradients.

        Only passes through the returned module's `forward` are synchronised. BatchNorm sees all
        processes' pictures on GPUs; SyncBatchNorm refuses CPU tensors, so on CPUs each process
        keeps its own statistics until `average_buffers`.
        """
        network.to(self.device, memory_format=torch.channels_last)
        if self.world == 1:
            return network
        if self.device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        # Two forwards before one backward forbid broadcasting the buffers in between. Newer
        # PyTorch has another name for the flag, and warns at the old one.
        accepted = inspect.signature(DistributedDataParallel).parameters
        new, old = "forward_sync_buffers", "broadcast_buffers"
        return DistributedDataParallel(network, **{new if new in accepted else old: False})

    def to_device(self, batch: list[Tensor]) -> list[Tensor]:
        """A loader's batch on the device, pictures (B, 3, H, W) in channels-last memory."""
        return [
            t.to(
                self.device,
                non_blocking=True,
                memory_format=torch.channels_last if t.ndim == 4 else torch.preserve_format,
            )
            for t in batch
        ]

    def autocast(self) -> AbstractContextManager:
        """bf16 for what can bear it, or nothing, as --amp says.

        Without the cache of cast weights: one made in a pass without gradients would serve the
        next pass, and in PyTorch 2.6 keep the gradients from the weights.
        """
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False
        )

    def start(
        self,
        networks: list[nn.Module],
        data: Any,
        state: dict[str, Any],
        summary: str | None = None,
    ) -> None:
        """Open the output folder, or load its `last.pt` when the run is resumed.

        networks: the DeepLabV3Plus whose mean logits are the model. data: a common.data.Data.
        state: by name, everything with a state_dict that the next step depends on, equal in all
        processes. Randomness needs no place in it: each step seeds its own. summary: what must be
        equal when the run is resumed, that of the data when None.
        """
        self.networks, self.state = networks, state
        self.model_facts = dict(
            arguments=[network.arguments for network in networks],
            classes=list(data.classes),
            colors=[list(color) for color in data.colors],
        )
        self.pictures = " ".join((summary or data.summary()).split())
        self.started = time.time()
        in_all_processes(self._open)

    def _open(self) -> None:
        resumed = self.cfg.resume and (self.folder / "last.pt").is_file()
        if self.world > 1:
            seen = [None] * self.world
            dist.all_gather_object(seen, resumed)
            if len(set(seen)) > 1:
                raise InputError(f"{self.folder}: must be on a disk that all machines share")
        if resumed:
            self._load()
        # Lines after the checkpoint belong to steps that will be taken again.
        lines = read_log(self.folder / "log.jsonl") if resumed else []
        lines = [line for line in lines if line["step"] <= self.first]
        self.history = [
            {key: line[key] for key in line if key != "seconds"} for line in lines if "miou" in line
        ]
        if self.rank:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not resumed:
                if not self.cfg.resume:  # two runs that start at once must not share a folder
                    (self.folder / "config.json").open("x").close()
                settings = json.dumps(asdict(self.cfg) | {"processes": self.world}, indent=2)
                replace_text(self.folder / "config.json", settings + "\n")
            log = "".join(json.dumps(line) + "\n" for line in lines)
            replace_text(self.folder / "log.jsonl", log)
        except FileExistsError as error:
            raise InputError(f"--output-dir {self.folder}: another run just took it") from error
        except OSError as error:
            raise InputError(f"--output-dir {self.folder}: cannot be written ({error})") from error

    def _load(self) -> None:
        path = self.folder / "last.pt"
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
            settings = saved["settings"]
        except Exception as error:  # torch.load raises a dozen kinds for a file it cannot read
            kind = type(error).__name__
            raise InputError(f"{path}: unreadable ({kind}); delete it to start afresh") from error
        now = self._settings()
        for name in settings | now:
            if settings.get(name) != now.get(name):
                flag = name if name in ("processes", "pictures") else f"--{name.replace('_', '-')}"
                raise InputError(
                    f"{self.folder}: was started with {flag} {settings.get(name)}, now it is "
                    f"{now.get(name)}; resume as the run was started"
                )
        for name, part in self.state.items():
            part.load_state_dict(saved["state"][name])
        self.first, self.miou, self.best = saved["step"], saved["miou"], saved["best"]

    def _settings(self) -> dict:
        """What a resumed run must share: its data, and all flags but those it may change."""
        free = ("output_dir", "resume", "data_path", "workers", "device")
        settings = {k: v for k, v in asdict(self.cfg).items() if k not in free}
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
        return settings | {"processes": self.world, "pictures": self.pictures}

    def loop(self, steps: range | None = None) -> Iterator[int]:
        """The steps left, or a stage's, with a bar on a terminal.

        Each seeds torch by seed, step and process.
        """
        steps = self.steps if steps is None else steps
        on_terminal = self.rank == 0 and sys.stderr.isatty()
        self.bar = tqdm(steps, initial=steps.start, total=self.total, disable=not on_terminal)
        for step in self.bar:
            self.seed(step)
            yield step

    def seed(self, step: int) -> None:
        """Seed torch by --seed, a step and the process."""
        torch.manual_seed(_mix(self.cfg.seed, step, self.rank))

    def log(self, step: int, **values: Tensor | float) -> None:
        """Now and then, and before an evaluation, a line of `log.jsonl`.

        Most calls return without waiting for the device. Raises InputError for a value that is
        not finite.
        """
        every = max(min(50, self.total // 20), 1)
        if self.rank or ((step + 1) % every and not self.due(step)):
            return
        values = {name: float(torch.as_tensor(value).detach()) for name, value in values.items()}
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            self._diverged(f"{bad[0]} is {values[bad[0]]}", step)
        self._write_log({"step": step + 1, **values})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.bar.set_postfix_str(shown)
        if self.bar.disable:
            print(f"step {step + 1}/{self.total}  {shown}", file=sys.stderr, flush=True)

    def due(self, step: int) -> bool:
        """Whether to evaluate after this step: every --eval-every steps, and after the last."""
        return (step + 1) % self.cfg.eval_every == 0 or step + 1 == self.total

    def average_buffers(self, networks: nn.Module) -> None:
        """One set of BatchNorm statistics for all processes, where they kept their own."""
        for module in networks.modules() if self.world > 1 else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for statistic in (module.running_mean, module.running_var):
                    dist.all_reduce(statistic)
                    statistic /= self.world

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def gather(self, tensor: Tensor) -> Tensor:
        """(N, ...) of each process -> (processes x N, ...) in all of them, constant.

        N and the other sizes must be equal in all processes.
        """
        tensor = tensor.detach().contiguous()
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def record(self, step: int, ious: Tensor, **others: Tensor) -> None:
        """Log an evaluation after `step`, and write `last.pt`, `iou.txt`, and a better `best.pt`.

        ious (K,): the model's IoU by class in [0, 1], NaN for a class that does not occur; others:
        those of networks that are not the model, whose mean is logged beside. Raises InputError
        when weights are not finite: no checkpoint is written then.
        """
        weights = (weight for network in self.networks for weight in network.parameters())
        if not all(weight.isfinite().all() for weight in weights):
            self._diverged("a weight is not finite", step)
        self.miou, done = ious.nanmean().item(), step + 1
        by_class = [None if math.isnan(value) else value for value in ious.tolist()]
        means = {name: other.nanmean().item() for name, other in others.items()}
        entry = {"step": done, "miou": self.miou, "iou": by_class, **means}
        self.history.append(entry)
        if self.rank:
            return
        better = self.miou > self.best
        self.best = self.miou if better else self.best
        rows = zip(self.model_facts["classes"], by_class, strict=True)
        text = "".join(
            f"{name}\t{'absent' if value is None else f'{100 * value:.2f}'}\n"
            for name, value in rows
        )
        text += f"mean\t{100 * self.miou:.2f}\n"
        self._write_log(entry)  # first: a log line too many is cut when the run is resumed
        replace_text(self.folder / "iou.txt", text)
        self._write_checkpoints(done, ["best.pt"] * better + ["last.pt"])
        shown = "".join(f"  {name} {100 * value:.2f}" for name, value in means.items())
        tqdm.write(f"step {done}/{self.total}  mIoU {100 * self.miou:.2f}{shown}")

    def note(self, step: int, stage: str, **figures: float) -> None:
        """A line of the log, and on the screen; a figure that is NaN could not be measured."""
        figures = {name: None if math.isnan(v) else float(v) for name, v in figures.items()}
        if self.rank == 0:
            self._write_log({"step": step + 1, "stage": stage, **figures})
            shown = "  ".join(f"{name} {v:.4g}" for name, v in figures.items() if v is not None)
            tqdm.write(f"step {step + 1}/{self.total}  {stage}: {shown}")

    def save(self, step: int) -> None:
        """Write `last.pt`, so that no step up to this one is repeated."""
        if self.rank == 0:
            self._write_checkpoints(step + 1, ["last.pt"])

    def _write_checkpoints(self, done: int, names: list[str]) -> None:
        checkpoint = dict(
            networks=[network.state_dict() for network in self.networks],
            **self.model_facts,
            settings=self._settings(),
            state={name: part.state_dict() for name, part in self.state.items()},
            step=done,
            miou=self.miou,
            best=self.best,
        )
        for name in names:
            replace_file(self.folder / name, lambda file: torch.save(plain(checkpoint), file))

    def _diverged(self, what: str, step: int) -> None:
        raise LoneError(
            f"{what} at step {step + 1}: training diverged; lower --lr (what was saved before is "
            f"in {self.folder})"
        )

    def finish(self) -> Result:
        """Print the last and the best mIoU, time and memory; the model is in eval mode."""
        if self.rank == 0:
            memory = ""
            if self.device.type == "cuda":
                memory = f", {torch.cuda.max_memory_allocated(self.device) / 2**30:.1f} GiB peak"
            figures = "no network to evaluate"
            if self.history:
                figures = f"mIoU {100 * self.miou:.2f} at the last step (best on validation "
                figures += f"{100 * self.best:.2f})"
            print(f"{figures}, {time.time() - self.started:.0f} s{memory}: {self.folder}")
        model = self.networks[0] if len(self.networks) == 1 else Ensemble(self.networks)
        return Result(model.eval(), self.miou, self.history)

    def print(self, text: str) -> None:
        """Print in the first process alone."""
        if self.rank == 0:
            print(text, flush=True)

    def _write_log(self, entry: dict) -> None:
        seconds = round(time.time() - self.started, 1)
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry | {"seconds": seconds}) + "\n")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: unknown; use auto, cpu, cuda, cuda:N or mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {name}: not supported; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: this PyTorch sees no CUDA device; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"--device {name}: no Metal device here; use --device cpu")
    if device.type == "cuda":
        count, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if processes > count:
            raise InputError(f"--device {name}: start at most {count} processes, one a GPU")
        if processes > 1 and device.index is not None:
            raise InputError(f"--device {name}: every process takes a GPU of its own; use cuda")
        if index >= count:
            raise InputError(f"--device {name}: the GPUs are cuda:0 to cuda:{count - 1}")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def _mix(*numbers: int) -> int:
    """A seed that differs wherever one of the numbers does."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
