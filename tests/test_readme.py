"""What the READMEs tell a reader to paste runs, block by block, in a plain interpreter."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from few_shapes import ROOT
from PIL import Image

from common.data import load
from common.deeplab import DeepLabV3Plus
from common.shapes import CLASSES, COLORS

PAGES = [ROOT / "README.md", ROOT / "common" / "README.md", ROOT / "tests" / "README.md"]
TEXT = "\n\n".join(page.read_text(encoding="utf-8") for page in PAGES)


def blocks():
    """The pages' indented blocks that are Python, by their first line."""
    found = {}
    for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", TEXT, flags=re.MULTILINE):
        code = re.sub(r"^    ", "", block, flags=re.MULTILINE).strip("\n")
        try:
            tree = ast.parse(code)
        except SyntaxError:
            continue
        if any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body):
            found[code.splitlines()[0]] = code
    return found


def test_there_are_blocks_to_run():
    assert len(blocks()) >= 2


def test_links_lead_somewhere():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            path, _, anchor = target.partition("#")
            other = (page.parent / path if path else page).resolve()
            assert other.exists(), (page, target)
            if anchor:
                heads = re.findall(r"^#+ (.*)", other.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {
                    re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads
                }


@pytest.mark.parametrize("code", blocks().values(), ids=blocks())
def test_a_block_runs_as_it_stands(code, tmp_path):
    (tmp_path / "masks" / "train").mkdir(parents=True)
    Image.new("RGB", (40, 40), (128, 0, 0)).save(tmp_path / "mask_rgb.png")
    Image.new("RGB", (40, 40), (90, 90, 0)).save(tmp_path / "photo.jpg")
    network = DeepLabV3Plus(len(CLASSES), "resnet18", None, 8)
    saved = dict(networks=[network.state_dict()], arguments=[network.arguments])
    saved |= dict(
        classes=list(CLASSES), colors=[list(color) for color in COLORS], window=0, miou=0.5
    )
    for path in re.findall(r'"(runs/[^"]+\.pt)"', code):
        (tmp_path / path).parent.mkdir(parents=True)
        torch.save(saved, tmp_path / path)
    code = re.sub(r"iters=\d+", "iters=2", code)  # as it stands, but for its length
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error::SyntaxWarning"}
    options = dict(cwd=tmp_path, env=environment, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 0, done.stderr
    for path in re.findall(r'save\("([^"]+)"\)', code):
        assert np.array(Image.open(tmp_path / path)).size


def test_the_flowers_are_converted(tmp_path, monkeypatch):
    """Flower, unsure, the rest of the picture; cowslip is no class; every fifth one validates."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trimaps").mkdir(), (tmp_path / "jpg").mkdir()
    trimap = Image.fromarray(np.repeat(np.uint8([[0, 1, 2, 3]]), 4, axis=0))
    trimap.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    for number in (1, 2, 3, 4, 5, 80, 1121):
        trimap.save(f"trimaps/image_{number:04}.png")
        Image.new("RGB", (40, 30)).save(f"jpg/image_{number:04}.jpg")
    (code,) = (code for code in blocks().values() if "trimaps" in code)
    exec(code, {})
    data = Path("flowers")
    assert [path.stem for path in data.glob("images/val/*.jpg")] == ["image_0005"]
    for number, kind in ((1, 1), (80, 1), (1121, 14)):
        mask = np.array(Image.open(data / f"masks/train/image_{number:04}.png"))
        assert mask.shape == (128, 128)
        assert mask[0, ::32].tolist() == [255, kind, 0, 0]
    found = load("folder", str(data), "all", "", 0)
    assert len(found.labeled) == 6 and len(found.classes) == 17
    assert found.classes[0] == "background" and "cowslip" not in found.classes
