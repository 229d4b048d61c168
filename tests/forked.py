"""Processes for tests, forked from one that has imported what a run needs: importing PyTorch takes seconds."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from unittest import mock

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def forking() -> ForkServerContext:
    """Return what starts such processes; the one that they are forked from is started where there is none yet."""
    context = multiprocessing.get_context("forkserver")
    with mock.patch.dict(os.environ, ENVIRONMENT):
        context.set_forkserver_preload([f"{__package__}.warm"])
        forkserver.ensure_running()
    return context
