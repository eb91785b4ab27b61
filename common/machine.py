"""The device and the processes of a run."""

import ctypes
import inspect
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data._utils import signal_handling

from common.flags import InputError, LoneError


def find_device(name: str) -> torch.device:
    """The device that --device names, one of its own for each process; InputError without it."""
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
        # A launcher may show each process one GPU, its own, which is cuda:0 there.
        shown = count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
        index = 0 if shown else int(os.environ.get("LOCAL_RANK", 0))
        index = index if device.index is None else device.index
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "LOCAL_RANK" not in os.environ:
            raise InputError(
                "RANK without LOCAL_RANK: every process would take cuda:0; start with torchrun, or "
                "set LOCAL_RANK to the process's number on its machine"
            )
        if processes > count and not shown:
            raise InputError(f"--device {name}: start at most {count} processes, one a GPU")
        if processes > 1 and device.index is not None:
            raise InputError(f"--device {name}: every process takes a GPU of its own; use cuda")
        if index >= count:
            raise InputError(f"--device {name}: the GPUs are cuda:0 to cuda:{count - 1}")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 as such; others emulate it, slower than float32."""
    if device.type == "cuda":  # from Ampere on
        return torch.cuda.get_device_capability(device) >= (8, 0)
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and native


def precision(device: torch.device, amp: str) -> torch.dtype:
    """What --amp means on the device; auto: bf16 where it is native, else float32."""
    if amp == "fp16":
        if device.type != "cuda":  # a CPU's convolutions take 16 times as long as in float32
            raise InputError("--amp fp16: for CUDA GPUs alone; use auto, bf16 or none")
        return torch.float16
    half = amp == "bf16" or (amp == "auto" and has_bf16(device))
    return torch.bfloat16 if half else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Half precision for what can bear it; nothing where dtype is float32.

    Without the cache of cast weights: one made in a pass without gradients would serve the next
    pass, and in PyTorch 2.6 keep the gradients from the weights.
    """
    half = dtype != torch.float32
    return torch.autocast(
        device.type, dtype if half else torch.bfloat16, enabled=half, cache_enabled=False
    )


def be_deterministic() -> None:
    """Let the same command give the same bits, as far as PyTorch can, until the process ends.

    It warns once of each operator that has no such form on the device.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as cuBLAS asks for it
    torch.use_deterministic_algorithms(True, warn_only=True)


def keep_memory() -> None:
    """Let the C library keep what tensors on the CPU free, for the tensors of the next step.

    glibc would return it to the system, which hands out every page anew, and zeroed: a tenth of a
    step. Tensors of more than 32 MiB, its limit, still come and go.
    """
    with suppress(OSError, AttributeError, TypeError):  # another C library
        malloc = ctypes.CDLL(None).mallopt
        malloc(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        malloc(-3, 2**25)  # M_MMAP_THRESHOLD


def lacks_memory(error: Exception) -> bool:
    """Whether an error says so, in the words of PyTorch, of the system or of oneDNN (the last)."""
    words = "out of memory|can(no|')t allocate memory|bad_alloc"
    words += "|could not (create|execute) a (primitive|memory)( object)?$"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error), re.IGNORECASE))


@contextmanager
def shortages() -> Iterator[None]:
    """Raise LoneError, which says what to lower, where memory or a loader process was lost."""
    # By a signal, torch would raise wherever the program is. Loaders look every five seconds, too.
    signal_handling._SIGCHLD_handler_set = True
    try:
        yield
    except (EOFError, MemoryError, OSError, RuntimeError) as error:
        text = str(error)
        less = "lower --batch-size, with a larger --accum, or --crop-size"
        if isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in text:
            problem = f"the GPU's memory does not suffice; {less}"
        elif lacks_memory(error):
            problem = f"memory does not suffice; {less}, or --workers"
        elif isinstance(error, ConnectionError | EOFError) or "DataLoader worker (pid" in text:
            problem = "a loader process was lost, mostly for want of memory; lower --workers"
        else:
            raise
        raise LoneError(f"{problem}; --resume goes on after what was saved") from error


def join_processes(device: torch.device) -> tuple[int, int]:
    """This process's rank and the number of processes, whose group is made where there are many."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        nccl = device.type == "cuda" and dist.is_nccl_available()  # Windows has none
        how = dict(backend="nccl", device_id=device) if nccl else dict(backend="gloo")
        try:
            dist.init_process_group(**how)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise LoneError(f"RANK, WORLD_SIZE: the processes do not meet: {reason}") from error
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def part_processes(error: BaseException | None) -> None:
    """Leave the process group; after an error, which is printed, end this process at once.

    The others may wait for it in a collective, and `destroy_process_group` would wait with them.
    torchrun ends them when one has ended.
    """
    if not dist.is_initialized():
        return
    if error is None:
        dist.destroy_process_group()
        return
    # Where another process ended, that one says why, or torchrun does.
    lost = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
    if not (lost or isinstance(error, SystemExit)):  # whose message is printed already
        traceback.print_exception(error)
    sys.stdout.flush(), sys.stderr.flush()
    if lost or dist.get_rank():
        time.sleep(2)  # until the one that had something to say has said it
    if lost:
        reason = str(error).strip().splitlines()[0]
        print(f"another process was lost: {reason}", file=sys.stderr, flush=True)
    os._exit(getattr(error, "code", 1))


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


def place(network: nn.Module, device: torch.device) -> nn.Module:
    """A network on the device; with several GPUs, BatchNorm sees the pictures of all.

    SyncBatchNorm refuses CPU tensors: on CPUs each process keeps its own statistics until
    `average_buffers`.
    """
    network.to(device)
    for conv in (module for module in network.modules() if isinstance(module, nn.Conv2d)):
        # On a CPU a dilated one stays as it is: common.deeplab.DilatedConv says why. To others of
        # that kind it does no harm.
        if device.type != "cpu" or conv.dilation == (1, 1):
            conv.to(memory_format=torch.channels_last)
    if dist.is_initialized() and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network


def wrap(network: nn.Module, device: torch.device, find_unused: bool = False) -> nn.Module:
    """`place`, and with several processes the mean of their gradients, after each batch.

    Only passes through the returned module's `forward` are averaged. find_unused: a pass may leave
    parameters out; where all processes do, they get no gradient.
    """
    # How that scales, on paper, for CPS on VOC: 8 + 8 pictures, 155 ms a step on each GPU. Its two
    # ResNet-50 have 323 MB of gradients, of which a GPU of N in a ring sends 2 (N - 1) / N: 0.57 GB
    # for 8, 0.64 for 64 and 512. That is 3 ms at NVLink's 200 GB/s, 26 ms at 25 between machines,
    # and hides behind the backward pass. SyncBatchNorm's 620 small exchanges hide behind nothing:
    # 12 ms for 8 GPUs at 20 µs each, 0.1 s for 64 at 150 µs, 0.6 s for 512 at 1 ms. They are the
    # bottleneck from 64 on; at 512, a step's labelled pictures are three times the 1,323 there are.
    network = place(network, device)
    if not dist.is_initialized():
        return network
    # Two forwards before one backward forbid broadcasting the buffers in between. Newer PyTorch
    # has another name for the flag, and warns at the old one.
    accepted = inspect.signature(DistributedDataParallel).parameters
    new, old = "forward_sync_buffers", "broadcast_buffers"
    options = {new if new in accepted else old: False, "find_unused_parameters": find_unused}
    return DistributedDataParallel(network, **options)


@contextmanager
def tuning(on: bool) -> Iterator[None]:
    """Whether cuDNN times its algorithms for every new size: that pays where sizes recur."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def average_gradients(networks: nn.Module) -> None:
    """The mean over processes, for networks that are not wrapped."""
    for weight in networks.parameters() if dist.is_initialized() else ():
        if weight.grad is not None:
            dist.all_reduce(weight.grad)
            weight.grad /= dist.get_world_size()


def average_buffers(networks: nn.Module) -> None:
    """One set of BatchNorm statistics for all processes, where they kept their own."""
    for module in networks.modules() if dist.is_initialized() else ():
        own = not isinstance(module, nn.SyncBatchNorm)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and own:
            for statistic in (module.running_mean, module.running_var):
                dist.all_reduce(statistic)
                statistic /= dist.get_world_size()


def gather_sum(values: np.ndarray) -> np.ndarray:
    """The sum of the arrays of all processes."""
    if not dist.is_initialized():
        return values
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return np.sum(parts, axis=0)


def gather(tensor: Tensor) -> Tensor:
    """(N, ...) of each process -> (processes x N, ...) in all of them, constant.

    N and the other sizes must be equal in all processes.
    """
    tensor = tensor.detach().contiguous()
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)
