"""A run's folder: which one it is, and files in it that are whole or not there."""

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.flags import InputError, LoneError, RunConfig, SemiConfig


def choose_folder(script: str, cfg: RunConfig) -> Path:
    """Where the run goes; an InputError when a folder given by hand holds another run.

    With --resume it may hold a run, of the same script.
    """
    if cfg.output_dir:
        folder = Path(cfg.output_dir).expanduser()
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--output-dir {folder}: is a file; name a folder")
        if holds_run(folder) and not cfg.resume:
            raise InputError(
                f"--output-dir {folder}: holds another run; name a new folder, or continue that "
                "run with --resume"
            )
        # Without one, or with a damaged one, last.pt makes up for it.
        refuse_other(folder, script, read_json(folder / "config.json") or {})
        return folder
    name = run_name(script, cfg)
    taken = {
        int(match[1] or 1)
        for folder in Path("runs").glob(f"{name}*")
        if (match := re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?", folder.name))
        and holds_run(folder)
    }
    number = max(taken, default=0) + (not (cfg.resume and taken))
    return Path("runs") / (name if number == 1 else f"{name}-{number}")


def read_json(path: Path) -> dict | None:
    """An object in a JSON file; None where there is no such file, or it holds something else."""
    try:  # a pipe would be waited for
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except OSError:
        return None
    return parse_json(text)


def parse_json(text: str) -> dict | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # of deep nesting
        return None
    return value if isinstance(value, dict) else None


def refuse_other(folder: Path, script: str, settings: dict) -> None:
    """Raise InputError where a run's settings are another script's."""
    maker = settings.get("script", script)
    if maker != script:
        raise InputError(f"--output-dir {folder}: was made by {maker}.py; name another folder")


def run_name(script: str, cfg: RunConfig) -> str:
    """What a folder is called that nobody named."""
    if not isinstance(cfg, SemiConfig):
        return f"{script}-{cfg.dataset}-s{cfg.seed}"
    labeled = Path(cfg.labeled).stem if "." in cfg.labeled else cfg.labeled
    labeled = re.sub(r"[^\w.]+", "_", labeled)
    return f"{script}-{cfg.dataset}-{labeled}-s{cfg.seed}" + "-sup" * cfg.supervised_only


def holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "log.jsonl", "last.pt"))


WHOLE = "config.json files.json log.jsonl last.pt best.pt iou.txt panels.png curves.png".split()


def changed_files(folder: Path, files: dict[str, str]) -> list[str]:
    """Which of the files that `common.data.check` lists are not what the folder's run began with.

    None where its record is gone. Raises InputError for one that is damaged.
    """
    path = folder / "files.json"
    before = read_json(path) if path.exists() else files
    if before is None:
        raise InputError(f"{path}: unreadable; delete it to go on unchecked")
    found = []
    for name in sorted(before.keys() | files):
        old, new = before.get(name), files.get(name)
        if old != new:
            kind = "changed" if old and new else "in another list"
            kind = "new" if old is None else "gone" if new is None else kind
            found.append(f"{name} ({kind})")
    return found


def open_folder(
    folder: Path, log: list[dict], settings: dict | None, again: bool, files: dict[str, str]
) -> str:
    """Make the folder, with `log.jsonl` of these lines, and `config.json` of a run that begins.

    files: the record for `changed_files`; none of pictures that are drawn. again: the run may have
    begun before; otherwise no second one may take the folder. Returns the name that the log of a
    run has now that begins afresh; "" without one.
    """
    path, kept = folder / "log.jsonl", ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in WHOLE:  # of a run that was killed as it wrote
            (folder / f"{name}.tmp").unlink(missing_ok=True)
        if settings is not None:
            if not again:  # two runs that start at once must not share a folder
                (folder / "config.json").open("x").close()
            replace_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")
            if path.is_file() and path.stat().st_size:
                names = (f"log.old{number}.jsonl" for number in ("", *range(2, 10**6)))
                kept = next(name for name in names if not (folder / name).exists())
                path.rename(folder / kept)
        replace_text(path, log_text(log))
        if files:
            replace_text(folder / "files.json", json.dumps(files, indent=0) + "\n")
    except FileExistsError as error:
        raise InputError(f"--output-dir {folder}: another run just took it") from error
    except OSError as error:
        raise InputError(f"--output-dir {folder}: cannot be written ({error})") from error
    return kept


def read_log(path: Path) -> list[dict]:
    """The whole lines of a log; a killed run may have left the last one unfinished.

    Others that no run writes are left out, too.
    """
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = map(parse_json, text.splitlines())
    return [line for line in lines if line is not None and _is_logged(line)]


def _is_logged(line: dict) -> bool:
    """Whether a run writes such a line: a step, and numbers by name."""

    def number(value: Any) -> bool:  # a float32 at most
        return isinstance(value, int | float) and abs(value) < 1e39

    def known(value: Any) -> bool:
        return value is None or number(value)

    def by_class(value: Any) -> bool:
        return isinstance(value, dict) and len(value) > 0 and all(map(known, value.values()))

    tests = {
        "miou": known,
        "step": lambda value: isinstance(value, int) and 1 <= value < 2**53,
        "iou": by_class,
        "stage": lambda value: isinstance(value, str),
        "skipped": lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value),
    }
    whole = "step" in line and ("miou" in line) == ("iou" in line)
    usual = known if "stage" in line else number
    return whole and all(tests.get(name, usual)(value) for name, value in line.items())


def add_lines(path: Path, lines: list[dict]) -> None:
    """Add lines to a log: all of them, or it stays as it was."""
    with explained(path), open(path, "ab", buffering=0) as file:
        size, text = file.tell(), log_text(lines).encode()
        try:
            if file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)
            raise


def complete_log(path: Path, lines: list[dict]) -> None:
    """Add lines to a log, of which the last one is an evaluation, or sums up a stage.

    An evaluation is added to the line which has the losses of its step. A stage's line takes the
    place of the one that was written before a kill, and before the stage was done.
    """
    lines, entry = read_log(path) + lines[:-1], lines[-1]
    if "stage" in entry:
        place = entry["step"], entry["stage"]
        lines = [line for line in lines if (line["step"], line.get("stage")) != place]
    same = [n for n, line in enumerate(lines) if line["step"] == entry["step"]]
    losses = [n for n in same if "stage" not in lines[n]]
    if losses and "stage" not in entry:
        lines[losses[-1]].pop("seconds", None)  # those of the evaluation count, at the line's end
        lines[losses[-1]] |= entry
    else:
        lines.append(entry)
    replace_text(path, log_text(lines))


def log_text(lines: list[dict]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def evaluation(line: dict) -> dict:
    """Of a log's line what an evaluation gave: the step, and mIoU with what stands behind it."""
    names = list(line)
    names = ["step", *names[min(names.index("miou"), names.index("iou")) :]]
    return {name: line[name] for name in names if name != "seconds"}


def in_percent(value: float | None) -> str:
    return "absent" if value is None else f"{100 * value:.2f}"


def iou_table(ious: dict[str, float | None], mean: float) -> str:
    """A line for each class, name and IoU in percent with a tab between, and one for the mean."""
    rows = [*ious.items(), ("mean", mean)]
    return "".join(f"{name}\t{in_percent(value)}\n" for name, value in rows)


def iou_columns(ious: dict[str, float | None], width: int = 96) -> str:
    """Names and IoU in percent for a console, aligned, in as many columns as its width holds."""
    names = max(map(len, ious))
    cells = [f"{name:{names}}  {in_percent(value):>6}" for name, value in ious.items()]
    rows = -(-len(cells) // max((width + 4) // (len(cells[0]) + 4), 1))
    return "".join(" " * 4 + (" " * 4).join(cells[row::rows]) + "\n" for row in range(rows))


def replace_file(path: Path, write: Callable[[Any], Any]) -> None:
    """Write a file under a temporary name and rename it, so that no half-written one remains."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with explained(path):
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def replace_text(path: Path, text: str) -> None:
    replace_file(path, lambda file: file.write(text.encode()))


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise LoneError, which names folder, file and cause, where a disk does not take a file."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch raises the second over the first
        cause = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise LoneError(
            f"{path.parent}: {path.name} cannot be written ({cause.strerror or cause}); what was "
            "there before is kept"
        ) from error


def plain(value: Any) -> Any:
    """Nested state as plain dicts and lists whose equal strings are one object.

    Pickle writes an object that it meets again as a reference. Without this, a file's bytes would
    depend on whether the run was resumed.
    """
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return sys.intern(value) if isinstance(value, str) else value
