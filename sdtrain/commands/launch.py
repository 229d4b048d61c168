"""`sdtrain fit CONFIG --gpus N`: starts N processes of the same command on this machine, as torchrun does."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from sdtrain.errors import user_error

PATIENCE_S = 3600
"""How long a process may save after it was asked to end; torch's own 30 seconds are too few for a large state."""
FORWARDED = "SIGTERM,SIGHUP,SIGUSR1"
"""The signals that are passed on. Ctrl-C reaches all processes of a terminal by itself."""


def launch(num: int, arguments: Sequence[str], *, on_cpu: bool) -> int:
    """Run `sdtrain ARGUMENTS` in `num` processes that train together, and return the exit code of the first.

    on_cpu: whether they compute on the CPU, of which any number may. Raises UserError where there are fewer cards.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    cards = torch.cuda.device_count()
    if not on_cpu and num > cards:
        what = f"{num}, but torch finds {cards or 'no'} card{'' if cards == 1 else 's'} on this machine"
        raise user_error("this machine", "--gpus", what)
    logging.disable()  # the processes tell what a person should know
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = FORWARDED
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num,
        run_id="sdtrain",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        shutdown_timeout=PATIENCE_S,
    )
    try:
        elastic_launch(settings, sys.executable)("-m", "sdtrain", *arguments)
    except ChildFailedError as failed:
        codes = [failure.exitcode for _, failure in sorted(failed.failures.items())]
        return next((code for code in codes if code > 0), 128 - codes[0])
    except SignalException as ended:
        return 128 + int(ended.sigval)
    return 0
