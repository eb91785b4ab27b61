"""One thread per process: on a busy machine two are several times slower than one."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the programs that tests start

import few_shapes
import pytest
import torch

from common import deeplab, shapes
from common.run import Run

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same generator state."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)  # a run with --deterministic leaves it on


@pytest.fixture
def few(monkeypatch):
    """The embedded dataset with few pictures."""
    monkeypatch.setattr(shapes, "COUNTS", few_shapes.COUNTS)


@pytest.fixture
def light(monkeypatch):
    """Networks with a few convolutions for a backbone."""
    monkeypatch.setattr(deeplab, "dilated_resnet", few_shapes.light_resnet)


@pytest.fixture
def power_cut(monkeypatch):
    """power_cut(step, start): start(), a run that ends before this step is logged."""

    def cut(step, start):
        log = Run.log

        def fail(self, now, **values):
            if now == step:
                raise RuntimeError("power cut")
            log(self, now, **values)

        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
            patch.setattr(Run, "log", fail)
            start()

    return cut
