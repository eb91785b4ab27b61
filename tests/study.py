"""The README's figures: a grid of runs, two at a time, and the tables that their logs give.

    python tests/study.py data ../photographs     # once: small copies, and a start of our own
    python tests/study.py run [TABLE ...]         # what is missing; again after a kill
    python tests/study.py show [TABLE ...]        # Markdown, from the logs alone
    python tests/study.py list [TABLE ...]        # every run's command, and whether it is done
    python tests/study.py labels                  # how right the pseudo labels of the flowers are

Run by hand. ../photographs holds camvid, flowers and vocanimals as `--dataset folder` reads them.
All of it happens in a checkout of its own, ../study by default (--home), a git worktree of the
commit at which it began: work on the code can go on meanwhile. A run is a script, its flags and a
seed; what no flag can change is an edit, a line of the script and what stands in its place, in a
copy that the run's folder keeps.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
Edits = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Cell:
    """What is run once for each seed."""

    name: str
    script: str
    flags: str
    seeds: tuple[int, ...] = (0, 1, 2)
    edits: Edits = ()

    def folder(self, home: Path, seed: int) -> Path:
        return home / "runs" / "study" / f"{self.name}-s{seed}"

    def command(self, home: Path, seed: int) -> list[str]:
        folder = self.folder(home, seed)
        program = (folder if self.edits else home) / f"{self.script}.py"
        own = f"--seed {seed} --output-dir {shlex.quote(str(folder))} --resume"
        return [sys.executable, str(program), *shlex.split(f"{self.flags} {own}")]

    def logs(self, home: Path) -> dict[int, list[dict]]:
        """By seed, the log's lines of what is done."""
        folders = {seed: self.folder(home, seed) for seed in self.seeds}
        return {
            seed: [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            for seed, folder in folders.items()
            if (folder / "done").exists()
        }

    def run(self, home: Path, seed: int) -> None:
        """Start it, or go on with it where it was killed."""
        folder = self.folder(home, seed)
        if (folder / "done").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self.edits:
            (folder / f"{self.script}.py").write_text(edited(home, self.script, self.edits))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(home)}
        with open(folder / "out.txt", "a") as out:
            options = dict(cwd=home, env=environment, stdout=out, stderr=out)
            status = subprocess.call(self.command(home, seed), **options)
        if status == 0:
            (folder / "done").touch()
        print(f"{folder.name}: {'done' if status == 0 else f'ended with {status}'}", flush=True)


def edited(home: Path, script: str, edits: Edits) -> str:
    """The script with other lines; the old ones have to stand there once."""
    text = (home / f"{script}.py").read_text(encoding="utf-8")
    for old, new in edits:
        if text.count(old) != 1:
            raise SystemExit(f"{script}.py: holds {text.count(old)} times, not once: {old}")
        text = text.replace(old, new)
    return text


# --- data ---


def prepare(home: Path, photographs: Path) -> None:
    """CamVid at a third of its size, the flowers at half, and a start from the animals' tags."""
    from PIL import Image

    for name, copy in (("flowers", "flowers-128"), ("vocanimals", "vocanimals")):
        shutil.copytree(photographs / name, home / "data" / copy, dirs_exist_ok=True)
    for name, by in (("camvid", 3), ("flowers", 2)):
        for path in sorted((photographs / name).rglob("*")):
            copy = home / "data" / path.relative_to(photographs)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.name == "classes.txt":
                copy.write_bytes(path.read_bytes())
            elif path.suffix in (".jpg", ".png"):
                with Image.open(path) as image:
                    size = round(image.width / by), round(image.height / by)
                    if "masks" in path.parts:
                        image.resize(size, Image.Resampling.NEAREST).save(copy)
                    else:
                        small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
                        small.save(copy.with_suffix(".jpg"), quality=95)
    start = home / "data" / "start.pt"
    if not start.exists():
        command = [sys.executable, "tests/pretrain.py", str(photographs / "vocanimals"), str(start)]
        subprocess.run(command, cwd=home, check=True)


# --- the grid ---

# A small network on small pictures: what can be learned from all labels is learned in minutes.
NETWORK = "--dataset folder --backbone resnet18 --width 64 --batch-size 16 --workers 0"
STARTS = {"start": "--weights data/start.pt", "nothing": "--weights none"}
SETS = {
    "flowers": f"{NETWORK} --data-path data/flowers --iters 1000 --eval-every 200 --lr 0.03",
    "camvid": f"{NETWORK} --data-path data/camvid --iters 1500 --eval-every 250 --lr 0.05",
}
SHARES = {"flowers": ("1/40", "1/16"), "camvid": ("1/32", "1/16")}
VIEWS = {  # crops, by script
    ("flowers", "cps"): "--crop-size 64 --scales 0.75 1.0 1.25",
    ("flowers", "psmt"): "--crop-size 64 --scales 0.75 1.25",
    ("flowers", "cac"): "--crop-size 48 --base-size 64 --scales 0.75 1.5 --pair-scales 1.0 1.5",
    ("camvid", "cps"): "--crop-size 96 --scales 0.75 1.0 1.25 1.5",
    ("camvid", "psmt"): "--crop-size 96 --scales 0.75 1.5",
    ("camvid", "cac"): "--crop-size 96 --base-size 160 --scales 0.75 1.5 --pair-scales 0.8 1.5",
}
ALL = "supervised, all labels"
METHODS = {  # tuned on seed 9; a method's baseline stands before it
    "supervised": ("cps", "--supervised-only"),
    "CPS": ("cps", "--no-cutmix --lam 1 --ramp 0.3"),
    "CPS + CutMix": ("cps", "--lam 1 --ramp 0.3"),
    "single network + CutMix": ("cps", "--supervision single --lam 1 --ramp 0.3"),
    "mean teacher + CutMix": ("cps", "--supervision mean_teacher --lam 10 --ramp 0.3"),
    "supervised, PS-MT's views": ("psmt", "--supervised-only --strength 0.2"),
    "PS-MT": (
        "psmt",
        "--teachers copy --warmup 0.1 --ramp 0.3 --lam 3 --ema-decay 0.98 --strength 0.2",
    ),
    "supervised, CAC's views": ("cac", "--supervised-only --dropout 0 --backbone-lr 1"),
    "CAC": ("cac", "--warmup 0.1 --bank 4 --dropout 0 --backbone-lr 1 --strength 0.5"),
}


def on_photographs(
    data: str, share: str, method: str, start: str = "start", more: str = ""
) -> Cell:
    """A method on a set with a share of its labels; more: further flags, which win."""
    script, flags = METHODS[method]
    name = re.sub(r"\W+", "_", f"{data} {share} {method} {start} {more}").strip("_").lower()
    labeled = f"--labeled {share}"
    parts = SETS[data], VIEWS[data, script], STARTS[start], labeled, flags, more
    return Cell(name, script, " ".join(part for part in parts if part))


# CPS: the second network begins as the first.
EQUAL = (
    (
        "    networks = [build() for _ in range(2 if twins else 1)]\n",
        "    networks = [build()]\n    networks += [deepcopy(networks[0])] * twins\n",
    ),
)
# CPS with 43 flowers labelled: λ and its rise; whether a second network is needed, and that it
# begins elsewhere.
RATES = {
    f"CPS + CutMix, λ {lam:g} after {ramp:g}": on_photographs(
        "flowers", "1/16", "CPS + CutMix", more=f"--lam {lam:g} --ramp {ramp:g}"
    )
    for lam, ramp in ((0.5, 0.3), (1.5, 0.3), (3, 0.3), (1, 0), (1, 0.6))
}
CPS = {
    name: on_photographs("flowers", "1/16", name)
    for name in ("supervised", "CPS", "CPS + CutMix", "single network + CutMix")
}
for name in ("CPS", "CPS + CutMix"):
    cell = CPS[name]
    CPS[f"{name}, equal networks"] = replace(cell, name=f"{cell.name}_equal", edits=EQUAL)
CPS |= RATES
# How many labels the method needs.
COUNTS = ("1/40", "1/32", "1/24", "1/16", "1/8")
ENOUGH = {
    f"{method} {share}": on_photographs("flowers", share, method)
    for share in COUNTS
    for method in ("supervised", "CPS + CutMix")
}


def photographs(data: str, start: str = "start") -> dict[str, Cell]:
    """Every method and its baseline at both shares; all labels."""
    cells = {ALL: on_photographs(data, "1/1", "supervised", start)}
    for share in SHARES[data]:
        for method in METHODS:
            cells[f"{method} {share}"] = on_photographs(data, share, method, start)
    return cells


# The edits. PS-MT: noise of T-VAT's norm that is random, and T-VAT's with the sign that raises the
# student's loss, for the divergence is even in r.
NOISE = """\
            return t_vat(encoded, *map(decoder, teachers), eps=cfg.eps, size=(cfg.crop_size,) * 2)
"""
SIGNED = (
    (
        NOISE,
        NOISE.replace("return", "r =")
        + """\
        losses = []
        for sign in (1, -1):
            with torch.no_grad(), evaluating(student.decoder), torch.autocast("cpu", enabled=False):
                logits = student.classify(student.decode(encoded + sign * r), (cfg.crop_size,) * 2)
            losses.append(F.cross_entropy(logits, target, ignore_index=255, reduction="none"))
        rises = losses[0].sum(dim=(1, 2)) >= losses[1].sum(dim=(1, 2))
        return torch.where(rises, 1.0, -1.0)[:, None, None, None] * r
""",
    ),
    (
        "            logits_l = trained(strong_l, perturb)\n",
        "            target = labels_l\n            logits_l = trained(strong_l, perturb)\n",
    ),
    (
        "                logits_u = trained(strong_u, perturb)",
        """\
                conf, target = teacher_logits.softmax(dim=1).max(dim=1)
                target = target.masked_fill(conf < cfg.threshold, 255)
                logits_u = trained(strong_u, perturb)""",
    ),
)
RANDOM = (
    (
        "    return eps * unit(torch.where(flat, d.detach(), gradient))\n",
        "    return eps * unit(torch.randn_like(z))\n",
    ),
)
# What the teachers would teach on the validation pictures, whose truth is known: by class the share
# of pixels that pass, and of these the share that is right.
OBSERVE = (
    (
        "        run.evaluate(step, **(named if teachers else {}))\n",
        """\
        run.evaluate(step, **(named if teachers else {}))
        if semi and run.due(step):
            for name, model in dict(active=teachers[active], idle=teachers[1 - active],
                                    mean=ensemble).items():
                counts = torch.zeros(3, len(data.classes))  # pixels; confident ones; these, right
                with torch.no_grad(), evaluating(model):
                    for images, labels in run.val:
                        conf, pseudo = model(images).softmax(dim=1).max(dim=1)
                        known, passing = labels != 255, conf >= cfg.threshold
                        chosen = known, known & passing, known & passing & (pseudo == labels)
                        for row, pixels in zip(counts, chosen):
                            row += labels[pixels].bincount(minlength=len(row))
                pixels, passing, right = torch.cat([counts.sum(dim=1, keepdim=True), counts], dim=1)
                for what, share in (("passes", passing / pixels), ("right", right / passing)):
                    by_name = dict(zip(["all", *data.classes], share.tolist()))
                    run.note(step, f"{name} {what}", **by_name)
""",
    ),
)
FULL_TURN = (
    ("    turn = min(epoch, round(ramp / 12)) if ramp else epoch\n", "    turn = epoch\n"),
)
ALL_VALID = (
    (
        "    return torch.where(passing, losses, 0.0).sum() / passing.sum().clamp(min=1)\n",
        "    return torch.where(passing, losses, 0.0).sum() / valid.sum().clamp(min=1)\n",
    ),
)
# CAC: both crops are mirrored, or none.
ONE_FLIP = (
    (
        "flipped.append(bool(torch.rand(()) < 0.5))",
        "flipped.append(flipped[0] if flipped else bool(torch.rand(()) < 0.5))",
    ),
)


def on_shapes(
    script: str, flags: str = "", seeds: int = 3, edits: Edits = (), note: str = ""
) -> Cell:
    """A run on the embedded dataset, in float32."""
    name = re.sub(r"\W+", "_", f"shapes {script} {flags} {note}").strip("_")
    return Cell(name, script, f"--amp none {flags}".strip(), tuple(range(seeds)), edits)


PSMT = {
    "no noise": on_shapes("psmt", "--eps 0", 6),
    "T-VAT, eps 2": on_shapes("psmt", "", 6),
    "T-VAT, eps 10": on_shapes("psmt", "--eps 10", 6),
    "T-VAT, eps 30": on_shapes("psmt", "--eps 30", 6),
    "random, eps 2": on_shapes("psmt", "", 6, RANDOM, "random"),
    "T-VAT, eps 2, signed": on_shapes("psmt", "", 6, SIGNED, "signed"),
    "eps 2, a turn is a pass": on_shapes("psmt", "", 3, FULL_TURN, "turn"),
    "eps 2, mean over valid pixels": on_shapes("psmt", "", 3, ALL_VALID, "valid"),
    "supervised": on_shapes("psmt", "--supervised-only"),
}
NOISY = on_photographs("flowers", "1/16", "PS-MT")
PSMT_FLOWERS = {
    "no noise": on_photographs("flowers", "1/16", "PS-MT", more="--eps 0"),
    "T-VAT, eps 2": NOISY,
    "random, eps 2": replace(NOISY, name=f"{NOISY.name}_random", edits=RANDOM),
}
SEEN = {"observed": on_shapes("psmt", "--eval-every 35", 1, OBSERVE, "seen")}
CAC = {
    "VIII (all)": on_shapes("cac"),
    "II": on_shapes("cac", "--no-directed --no-class-filter --gamma 0"),
    "III": on_shapes("cac", "--no-class-filter --gamma 0"),
    "IV": on_shapes("cac", "--gamma 0"),
    "V": on_shapes("cac", "--no-directed"),
    "VI": on_shapes("cac", "--no-context"),
    "VII": on_shapes("cac", "--no-projector"),
    "(a) supervised": on_shapes("cac", "--supervised-only"),
    "(b) λ = 0": on_shapes("cac", "--lam 0"),
    "(d) mean over the overlap": on_shapes("cac", "--mean-over overlap"),
    "(e) one flip for both crops": on_shapes("cac", "", 3, ONE_FLIP, "flip"),
}
IAL = {
    flags or "as it is": on_shapes("ial", flags)
    for flags in (
        "",
        "--scans sequence",
        "--project",
        "--no-balance",
        "--mining agree",
        "--mining rule80",
        "--method direct",
    )
}
# From tags, at the pictures' own size: four cells a side, as at half of it, are too coarse a map.
TAGS = (
    f"{NETWORK} --weights data/start.pt --net resnet18 --crop-size 128 --rounds 2 --iters 1200 "
    "--eval-every 1200 --lr 0.03 --net-lr 0.02 --net-steps 0.5 0.25 0.5 --scales 0.75 1.0 1.25 "
    "--tag-scales 0.75 1.0 1.25 --cam-scales 1.0 1.5 2.0 --fg 0.5 --bg 0.15"
)


def from_tags(data: str, *variants: str, seeds: int = 3) -> dict[str, Cell]:
    """IAL on a set, as it is and with further flags."""
    cells = {}
    for flags in ("", *variants):
        name = re.sub(r"\W+", "_", f"{data} ial {flags}").strip("_")
        every = f"{TAGS} --data-path data/{data} {flags}".strip()
        cells[flags or "as it is"] = Cell(name, "ial", every, tuple(range(seeds)))
    return cells


IAL_FLOWERS = from_tags(
    "flowers-128", "--method direct", "--scans sequence --project", "--no-balance"
)
IAL_ANIMALS = from_tags("vocanimals", "--method direct", seeds=1)

# --- the tables ---


def last(log: list[dict], key: str = "miou") -> float:
    """The last value of that name in a log, in percent."""
    return 100 * [line[key] for line in log if line.get(key) is not None][-1]


def spread(values: list[float]) -> str:
    """Mean and range."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "not run"
    return f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def scores(cell: Cell, home: Path) -> dict[int, float]:
    """The last mIoU of each seed that is done."""
    return {seed: last(log) for seed, log in cell.logs(home).items()}


def gain(cell: Cell, base: Cell, home: Path) -> str:
    """The mean difference of the seeds that both have, with its standard error."""
    own, other = scores(cell, home), scores(base, home)
    differences = [own[seed] - other[seed] for seed in own if seed in other]
    if len(differences) < 2:
        return "".join(f"{value:+.1f}" for value in differences)
    error = stdev(differences) / len(differences) ** 0.5
    return f"{mean(differences):+.1f} ± {error:.1f}"


def markdown(head: list[str], rows: list[list[str]]) -> None:
    for row in [head, ["---"] * len(head), *rows]:
        print("|", " | ".join(row), "|")
    print()


def show_variants(cells: dict[str, Cell], home: Path, base: str) -> None:
    """A row each: mIoU by seed, mean and range, the paired difference to `base`."""
    seeds = sorted({seed for cell in cells.values() for seed in cell.seeds})
    rows = []
    for name, cell in cells.items():
        found = scores(cell, home)
        by_seed = [f"{found[seed]:.1f}" if seed in found else "" for seed in seeds]
        difference = "" if name == base else gain(cell, cells[base], home)
        rows.append([name, *by_seed, spread(list(found.values())), difference])
    markdown(["", *(f"seed {seed}" for seed in seeds), "mean (range)", f"to {base}"], rows)


def show_classes(cells: dict[str, Cell], home: Path, base: str) -> None:
    """A row each: IoU by class, means over the seeds, and below the first the differences."""
    table = {}
    for name, cell in cells.items():
        logs = cell.logs(home).values()
        ious = [[line["iou"] for line in log if "iou" in line][-1] for log in logs]
        if ious:
            classes = list(ious[0])
            table[name] = [100 * mean(iou[name] for iou in ious) for name in classes]
    rows = []
    for name, values in table.items():
        pairs = zip(values, table[base], strict=True)
        shown = values if name == base else [value - other for value, other in pairs]
        rows.append([name, *(f"{v:.1f}" if name == base else f"{v:+.1f}" for v in shown)])
    if rows:
        markdown(["", *classes], rows)


STAGES = {  # IAL: a line of the log and what it says
    "activation maps": ("seeds", "cam"),
    "seeds": ("seeds", "seeds"),
    "unary, round 1": ("unary1", "unary"),
    "mined, round 1": ("region1", "mined"),
    "refined, round 1": ("pairwise1", "refined"),
    "unary, round 2": ("unary2", "unary"),
    "mined, round 2": ("region2", "mined"),
    "refined, round 2": ("pairwise2", "refined"),
    "unary, the last": ("unary3", "unary"),
    "area of mined foreground": ("region1", "mined_fg_area"),
    "area of refined foreground": ("pairwise1", "refined_fg_area"),
}


def show_stages(cells: dict[str, Cell], home: Path) -> None:
    """IAL, a column each: the stages' maps on the training pictures, the result on validation."""
    rows = []
    for name, (stage, key) in STAGES.items():
        row = [name]
        for cell in cells.values():
            lines = [
                [line[key] for line in log if line.get("stage") == stage and line.get(key)]
                for log in cell.logs(home).values()
            ]
            values = [values[-1] for values in lines if values]
            if "area" in key:
                row.append(f"{mean(values):.2f}" if values else "")
            else:
                row.append(spread([100 * value for value in values]) if values else "")
        rows.append(row)
    rows.append(["validation", *(spread(list(scores(c, home).values())) for c in cells.values())])
    markdown(["", *cells], rows)


def show_seen(cells: dict[str, Cell], home: Path) -> None:
    """PS-MT's teachers over the run: shares of pixels that pass, and of these that are right."""
    for cell in cells.values():
        for log in cell.logs(home).values():
            lines = [line for line in log if line.get("stage", "").endswith(("passes", "right"))]
            classes = [key for key in lines[0] if key not in ("step", "stage", "seconds")]
            rows = [
                [
                    str(line["step"]),
                    line["stage"],
                    *(f"{100 * (line[k] or 0):.0f}" for k in classes),
                ]
                for line in lines
            ]
            markdown(["step", "", *classes], rows)


def show_photographs(data: str, cells: dict[str, Cell], home: Path) -> None:
    """A row for each method, two columns for each share: mIoU, and the gain over its baseline."""
    rows, base = [], ""
    for method in METHODS:
        base = method if method.startswith("supervised") else base
        row = [method]
        for share in SHARES[data]:
            cell, other = cells[f"{method} {share}"], cells[f"{base} {share}"]
            shown = "" if base == method else gain(cell, other, home)
            row += [spread(list(scores(cell, home).values())), shown]
        rows.append(row)
    every = spread(list(scores(cells[ALL], home).values()))
    markdown([data, *(head for share in SHARES[data] for head in (share, "gain"))], rows)
    print(f"{ALL}: {every}\n")


def show_labels(data: str, home: Path) -> None:
    """What the checkpoints call the unlabelled training pictures, whose masks no run has opened.

    Of the foreground pixels that they find, the share with the right class.
    """
    import torch

    sys.path.insert(0, str(home))
    from common.augment import whole_view
    from common.data import load
    from common.deeplab import DeepLabV3Plus
    from common.loaders import Pictures
    from common.metrics import confusion_matrix

    root, methods, rows = str(home / "data" / data), ("supervised", "CPS + CutMix"), []

    def right(checkpoint: Path, pictures: Pictures, classes: int) -> float:
        saved = torch.load(checkpoint, weights_only=True)
        network = DeepLabV3Plus(**saved["arguments"][0] | dict(weights=None)).eval()
        network.load_state_dict(saved["networks"][0])
        counts = torch.zeros(classes, classes)
        with torch.no_grad():
            for image, label in (pictures[index] for index in range(len(pictures))):
                counts += confusion_matrix(network(image[None]).argmax(dim=1), label[None], classes)
        return 100 * float(counts.diagonal()[1:].sum() / counts[1:, 1:].sum())

    for share in COUNTS:
        every, few = (load("folder", root, chosen, "", 0) for chosen in ("all", share))
        pairs = [pair for pair in every.labeled if pair not in few.labeled]
        pictures = Pictures(pairs, every.lookup, whole_view)
        for start in STARTS:
            row = [share, start]
            for method in methods:
                cell = on_photographs(data, share, method, start)
                paths = [cell.folder(home, seed) / "last.pt" for seed in cell.logs(home)]
                found = [right(path, pictures, len(every.classes)) for path in paths]
                row.append(spread(found))
            rows.append(row)
    markdown(["labelled", "from", *methods], rows)


TABLES = {
    "psmt": (PSMT, partial(show_variants, base="no noise")),
    "psmt-flowers": (PSMT_FLOWERS, partial(show_variants, base="no noise")),
    "seen": (SEEN, show_seen),
    "cac": (CAC, partial(show_variants, base="VIII (all)")),
    "cac-classes": (CAC, partial(show_classes, base="(a) supervised")),
    "ial": (IAL, show_stages),
    "ial-flowers": (IAL_FLOWERS, show_stages),
    "ial-animals": (IAL_ANIMALS, show_stages),
    "cps": (CPS, partial(show_variants, base="supervised")),
    "enough": (ENOUGH, partial(show_variants, base="supervised 1/40")),
}
for data in SETS:
    for start in STARTS:
        table = photographs(data, start)
        TABLES[f"{data}-{start}"] = table, partial(show_photographs, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["data", "run", "show", "list", "labels"])
    parser.add_argument("names", nargs="*", help=f"photographs, or tables: {', '.join(TABLES)}")
    parser.add_argument("--home", type=Path, default=ROOT.parent / "study")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="a pattern that a run's folder has to hold")
    args = parser.parse_intermixed_args()
    home = args.home.resolve()
    if not home.exists():
        subprocess.run(["git", "worktree", "add", "--detach", str(home)], cwd=ROOT, check=True)
    if args.what == "data":
        return prepare(home, Path(*args.names))
    if args.what == "labels":
        return show_labels("flowers", home)
    tables = {name: TABLES[name] for name in args.names or TABLES}
    if args.what == "show":
        for cells, show in tables.values():
            show(cells, home)
        return None
    cells = dict.fromkeys(cell for cells, _ in tables.values() for cell in cells.values())
    runs = sorted((seed, n, cell) for n, cell in enumerate(cells) for seed in cell.seeds)
    runs = [run for run in runs if re.search(args.only, run[2].folder(home, run[0]).name)]
    if args.what == "list":
        for seed, _, cell in runs:
            mark = "done" if (cell.folder(home, seed) / "done").exists() else "    "
            print(mark, shlex.join(cell.command(home, seed)))
        return None
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: run[2].run(home, run[0]), runs))
    return None


if __name__ == "__main__":
    main()
