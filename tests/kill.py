"""Kills runs at random moments, resumes them, and compares them with runs that nobody killed.

    python tests/kill.py [SCRIPT ...] [--times 20] [--home FOLDER]

Run by hand. Scripts run at their smallest, as few_shapes.py has them, and save every third of a
second. A run is right if its checkpoints, its log and its pictures are bit for bit the same.
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

from few_shapes import TINY, finish, start  # noqa: E402

LONG = {  # by script: flags of runs that take some seconds
    "cps": dict(iters=100),
    "psmt": dict(iters=100),
    "cac": dict(iters=60, bank=2, accum=2),
    "ial": dict(iters=20, rounds=2),
}


def command(name: str, folder: Path) -> list[str]:
    """The words of a command line."""
    words, flags = [name], TINY[name] | LONG[name]
    flags |= dict(eval_every=40, save_every=1 / 180, output_dir=folder)
    for flag, value in flags.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{flag.replace('_', '-')}", *map(str, values)]
    return [*words, "--resume"]


def outcome(folder: Path) -> dict[str, object]:
    """What a run leaves that must be the same, by file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    del found["config.json"]
    lines = map(json.loads, found["log.jsonl"].splitlines())
    return found | {"log.jsonl": [line | {"seconds": 0} for line in lines]}


def begin(name: str, folder: Path):
    """A run whose first step is near."""
    process = start(*command(name, folder))
    while process.poll() is None and not (folder / "log.jsonl").exists():
        time.sleep(0.01)
    return process


def reached(folder: Path) -> str:
    """The last line of a log, in short."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    line = json.loads(lines[-1]) if lines and lines[-1].endswith("}") else {}
    return f"{line.get('step', 0)} {next((k for k in line if k.startswith('loss')), '')}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scripts", nargs="*", default=list(TINY), metavar="SCRIPT")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--home", type=Path, default=None, help="where runs go [a new folder]")
    options = parser.parse_args()
    home = options.home or Path(tempfile.mkdtemp())
    for name in options.scripts:
        whole = home / f"{name}-whole"
        process, began = begin(name, whole), time.time()
        finish(process)
        expected, seconds, right = outcome(whole), time.time() - began, 0
        for number in range(options.times):
            cut = home / f"{name}-{number}"
            process = begin(name, cut)
            time.sleep(random.uniform(0, seconds))
            process.kill()
            killed = process.wait() != 0
            where = reached(cut)
            finish(start(*command(name, cut)))
            found = outcome(cut)
            wrong = [f for f in expected.keys() | found if expected.get(f) != found.get(f)]
            right += killed and not wrong
            print(f"{name} {number}: killed at {where}: {wrong or 'the same'}", flush=True)
            if not wrong:
                shutil.rmtree(cut)
        print(f"{name}: {right} of {options.times} the same", flush=True)


if __name__ == "__main__":
    main()
