"""Bars: tqdm's own tests see to what they look like; here, which of them it is."""

import subprocess
import sys

import pytest
from few_shapes import ROOT

NOTEBOOK = """
import sys
from types import ModuleType
class ZMQInteractiveShell: config = {"IPKernelApp": {}}  # which older tqdm asks for
class Widget:
    def __init__(self, *args, **kwargs):
        self.children, self.layout, self.style = kwargs.get("children", ()), self, self
    def __getattr__(self, name): return None
for name in ("IPython", "IPython.display", "ipykernel", "ipykernel.zmqshell"):
    sys.modules[name] = ModuleType(name)
sys.modules["IPython"].get_ipython = ZMQInteractiveShell
sys.modules["IPython.display"].display = lambda what: print("displayed", type(what).__name__)
"""
WIDGETS = """
sys.modules["ipywidgets"] = ModuleType("ipywidgets")
for name in ("HTML", "FloatProgress", "HBox"): setattr(sys.modules["ipywidgets"], name, Widget)
"""
BAR = """
from common.bars import tqdm
print(sum(tqdm(range(4), disable=None)))
"""


@pytest.mark.parametrize(
    "before, shown",
    [("", ""), (NOTEBOOK, ""), (NOTEBOOK + WIDGETS, "displayed TqdmHBox\n")],
    ids=["no terminal", "a notebook without ipywidgets", "a notebook"],
)
def test_bars_are_the_notebooks_own_where_it_has_them(before, shown):
    command = [sys.executable, "-c", before + BAR]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (shown + "6\n", "")
