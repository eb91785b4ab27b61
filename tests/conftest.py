"""One thread per process: on a busy machine two are several times slower than one."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the programs that tests start

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same generator state."""
    torch.manual_seed(0)
