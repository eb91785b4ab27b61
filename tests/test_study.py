"""The study's edits fit the scripts as they are; its tables come from logs alone."""

import shlex
from importlib import import_module

import pytest
import study

from common.flags import check_config, parse_config

CELLS = list(dict.fromkeys(c for cells, _ in study.TABLES.values() for c in cells.values()))


@pytest.mark.parametrize("cell", [c for c in CELLS if c.edits], ids=lambda cell: cell.name)
def test_edits_fit_and_compile(cell):
    text = study.edited(study.ROOT, cell.script, cell.edits)
    assert text != (study.ROOT / f"{cell.script}.py").read_text(encoding="utf-8")
    compile(text, cell.name, "exec")


def test_an_edit_that_no_longer_fits_is_named():
    with pytest.raises(SystemExit, match="0 times"):
        study.edited(study.ROOT, "cps", (("no such line", ""),))


def test_every_run_has_a_folder_of_its_own_and_flags_that_exist():
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    for cell in CELLS:
        script = import_module(cell.script)
        cfg = parse_config(script.Config, script.RECIPES, shlex.split(cell.flags))
        assert check_config(cfg) is None
