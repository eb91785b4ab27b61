"""Kills runs at random moments, resumes them, and compares them with runs that nobody killed.

    python tests/kill.py [SCRIPT ...] [--times 20] [--home FOLDER]

Run by hand. Scripts run at their smallest, as few_shapes.py has them, and save ten times a second.
A resumed run is right if all its files are bit for bit the same, but for the log's clock.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"  # more of them sum in no fixed order

from few_shapes import COUNTS, TINY, argv, command, end, fork, lighten  # noqa: E402

from common import shapes  # noqa: E402

LONG = {  # by script: flags of runs that take a few seconds
    "cps": dict(iters=40),
    "psmt": dict(iters=40),
    "cac": dict(iters=24, bank=2, accum=2),
    "ial": dict(iters=6, rounds=2),
}


def outcome(folder: Path) -> dict[str, object]:
    """What a run leaves that must be the same, by file."""
    # log.old.jsonl: of a run that was killed before its first checkpoint, and begins anew.
    others = "config.json", "log.old.jsonl"
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in others]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    lines = map(json.loads, found["log.jsonl"].splitlines())
    return found | {"log.jsonl": [line | {"seconds": 0} for line in lines]}


def started(name: str, folder: Path):
    """A run whose first step is near."""
    flags = LONG[name] | dict(eval_every=15, save_every=1 / 600)
    process = fork(command(name, [*argv(name, folder, **flags), "--resume"]))
    while process.is_alive() and not (folder / "log.jsonl").exists():
        time.sleep(0.001)
    return process


def killed(name: str, folder: Path, seconds: float) -> str:
    """Kill a run at a random moment before its end; where that was."""
    while True:
        process = started(name, folder)
        time.sleep(random.uniform(0, seconds))
        process.kill()
        process.join()
        if process.exitcode:
            lines = (folder / "log.jsonl").read_text().splitlines()
            return f"{len(lines)} lines of the log, the last one {lines[-1:]}"
        shutil.rmtree(folder)  # it was faster


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help="all four")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--home", type=Path, help="where runs go [a new folder]")
    options = parser.parse_args()
    home = options.home or Path(tempfile.mkdtemp())
    shapes.COUNTS = COUNTS
    lighten()
    for name in options.scripts or TINY:
        process, began = started(name, home / f"{name}-whole"), time.time()
        end(process)
        seconds, right = time.time() - began, 0
        expected = outcome(home / f"{name}-whole")
        for number in range(options.times):
            folder = home / f"{name}-{number}"
            where = killed(name, folder, seconds)
            end(started(name, folder))
            found = outcome(folder)
            wrong = [f for f in expected | found if expected.get(f) != found.get(f)]
            right += not wrong
            print(f"{folder.name}: killed after {where[:90]}: {wrong or 'the same'}", flush=True)
            if not wrong:
                shutil.rmtree(folder)
        print(f"{name}: {right} of {options.times} the same", flush=True)


if __name__ == "__main__":
    main()
