"""For all tests: one torch thread, as in a run (two on a busy machine are many times slower)."""

from __future__ import annotations

import os

import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
