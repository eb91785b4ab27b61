"""What `last.pt` and `best.pt` hold: tensors and plain Python, for prediction and to go on from."""

import os
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.augment import IMAGENET
from common.flags import InputError, RunConfig
from common.layouts import Data, shortened
from common.outputs import changed_files, refuse_other

# Fields that a resumed run may change.
FREE = "output_dir resume save_every data_path workers device check deterministic".split()


def model_part(networks: list[nn.Module], data: Data, window: int, step: int, miou: float) -> dict:
    """All of `best.pt`, and what prediction takes from `last.pt`: the mean of these networks."""
    return IMAGENET | dict(
        networks=[network.state_dict() for network in networks],
        arguments=[network.arguments for network in networks],
        classes=list(data.classes),
        colors=[list(color) for color in data.colors],
        window=window,
        step=step,
        miou=miou,
    )


def settings_of(script: str, cfg: RunConfig, data: Data, processes: int) -> dict:
    """What a resumed run must share: its data, and all flags but those that it may change."""
    flags = {k: v for k, v in asdict(cfg).items() if k not in FREE}
    flags = {k: list(v) if isinstance(v, tuple) else v for k, v in flags.items()}
    pictures = " ".join(data.summary().split())
    return flags | dict(script=script, processes=processes, pictures=pictures)


def read_last(folder: Path, settings: dict, data: Data, changed: bool) -> dict:
    """A folder's `last.pt`, for a run of these settings and data.

    changed: the data may be other than at the start. Raises InputError for a file that is damaged,
    or of a run with other settings or data.
    """
    path = folder / "last.pt"
    try:
        # Not to the device, whose memory the run needs; each part moves what it takes.
        saved = read_checkpoint(path)
        before, _ = dict(saved["settings"]), dict(saved["state"])
        step, miou, best = (saved[name] for name in ("step", "miou", "best"))
        # What is printed has to be small: a list of lists may grow without end.
        named = all(isinstance(name, str) for name in before)
        small = all(_is_simple(v) or all(map(_is_simple, v)) for v in before.values())
        scores = isinstance(miou, float) and isinstance(best, float)
        if not (named and small and scores and isinstance(step, int) and step >= 0):
            raise ValueError
    except Exception as error:  # a dozen kinds
        kind = type(error).__name__
        raise InputError(f"{path}: unreadable ({kind}); delete it to start afresh") from error
    refuse_other(folder, settings["script"], before)
    names = [name for name in before | settings if before.get(name) != settings.get(name)]
    if changed and saved.get("classes") == list(data.classes):
        names = [name for name in names if name != "pictures"]
    elif names in ([], ["pictures"]):
        _refuse_changed(folder, data, before.get("pictures"), settings["pictures"])
    for name in names:
        flag = name if name in ("processes", "pictures") else f"--{name.replace('_', '-')}"
        raise InputError(
            f"{folder}: was started with {flag} {before.get(name)}, now it is "
            f"{settings.get(name)}; resume as the run was started"
        )
    return saved


def _refuse_changed(folder: Path, data: Data, before: str, now: str) -> None:
    """Raise InputError where files, or the lists that before and now sum up, are not as before."""
    files = shortened(changed_files(folder, data.files))
    if files or before != now:
        raise InputError(
            f"{folder}: the data is not what the run began with: "
            f"{files or f'it was {before}, now it is {now}'}; restore it, or take it as it is by "
            "--resume changed"
        )


def _is_simple(value: Any) -> bool:
    """Whether it is a string or a number such as flags have."""
    return isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 2**63)


def read_checkpoint(path: str | Path) -> Any:
    """What torch.save wrote; nothing in it is run. Other files raise a dozen kinds of exceptions.

    torch.save packs nothing: a file that is packed might hold a thousand times its size.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise OSError
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
        if sum(record.file_size for record in records) > os.path.getsize(path):
            raise ValueError("packed")
    return torch.load(path, map_location="cpu", weights_only=True)
