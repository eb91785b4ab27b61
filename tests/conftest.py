"""One thread per process: on a busy machine two are several times slower than one."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the programs that tests start

import few_shapes
import pytest
import torch

from common import shapes
from common.run import Run

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same generator state."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)  # a run with --deterministic leaves it on


@pytest.fixture(autouse=True, scope="session")
def no_sync():
    """No file is waited for until it is on the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture
def few(monkeypatch):
    """The embedded dataset with few pictures."""
    monkeypatch.setattr(shapes, "COUNTS", few_shapes.COUNTS)


@pytest.fixture
def light(monkeypatch):
    """Networks with a few convolutions for a backbone; small pictures of a run."""
    few_shapes.lighten(monkeypatch.setattr)


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
