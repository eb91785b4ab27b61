"""What the READMEs tell a reader to paste runs, block by block, in a plain interpreter."""

import ast
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from few_shapes import ROOT
from PIL import Image

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
