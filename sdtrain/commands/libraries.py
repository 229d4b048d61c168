"""The libraries that sdtrain is built on: keeps them quiet, imports few of them, and tells their versions."""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import platform
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from sdtrain import __version__
from sdtrain.commands.starting.bare import CROWDED, hold_back
from sdtrain.commands.starting.uncompiled import unmarked

SHOWN = ("torch", "diffusers", "transformers", "peft")
"""The libraries whose versions decide what a run does."""

LOUD = ("torchao", "bitsandbytes", "diffusers.quantizers.torchao", "torch.utils._pytree")
"""Loggers that warn of missing kernels when a package of the extra `quantised` is imported, as diffusers does."""

SPINS = "1000"
"""How often a thread of the CPU looks whether the others are done before it sleeps, where they share the machine. By
itself it looks 300,000 times, which makes steps of the tiny model a seventh faster where nothing else runs, and six
times as slow beside another program: looking keeps the thread that it waits for from its turn."""

QUANTISERS = ("bitsandbytes", "torchao")
"""Packages for quantised weights, which diffusers, transformers and peft import wherever they are installed."""


def quiet_libraries() -> None:
    """Keep advice meant for programmers out of the user's terminal; errors still come through."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_pillow() -> None:
    """Keep Pillow from warning, with a line of its source, of pictures above 89 megapixels, which it does read."""
    warnings.filterwarnings("ignore", message=r"Image size \(\d+ pixels\) exceeds limit", category=RuntimeWarning)


def versions() -> list[str]:
    """Return what a report of a problem should name, one version per line; nothing is imported for it."""
    return [
        f"sdtrain {__version__}",
        f"Python {platform.python_version()}",
        *(f"{name} {_version(name)}" for name in SHOWN),
    ]


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "is not installed"


USUALLY = gc.get_threshold()
SELDOM = (50_000, 20, 100)
"""How often garbage that refers to itself is looked for, and not at all while libraries are imported: they make a
million objects that all stay. Looking through them again and again takes a fifth of the time until a first step."""


class _Process:
    is_ours = False


def process_is_ours() -> None:
    """Tell that nothing but a command of sdtrain runs in this process; call it before torch is imported."""
    _Process.is_ours = True
    gc.set_threshold(*SELDOM)
    if "OMP_WAIT_POLICY" not in os.environ and others_compute():
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def look_for_garbage() -> None:
    """Look for garbage as often as Python usually does, but not in all that there is now."""
    if _Process.is_ours:
        gc.freeze()
        gc.set_threshold(*USUALLY)


def end_process(code: int) -> NoReturn:
    """End this process: its threads, what is registered for its end and what is to be written, and nothing else.

    Python would also look through a million objects of the libraries several times, and take them apart: a second, for
    memory that the system takes back anyway.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        sys.exit(code)  # Python says that it could not be written
    os._exit(code)


LOOKS, PAUSE_S = 6, 0.004
"""Whoever started this process may run for a moment beside it, or look every now and then how far it is."""


def others_compute(load: Path = Path("/proc/loadavg")) -> bool:
    """Whether other programs compute on this machine all the time, which Linux tells; elsewhere it is not known."""
    for look in range(LOOKS):
        time.sleep(PAUSE_S if look else 0.0)
        if not _others_run(load):
            return False
    return True


def _others_run(load: Path) -> bool:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(load.read_text(encoding="ascii").split()[3].partition("/")[0]) > 1  # this one does, too
    return False


@contextmanager
def importing_less(*, compiles: bool = False, quantised: bool = True, networks: bool = True) -> Iterator[None]:
    """Keep away from this process what its command has no use for, unless somebody has it already.

    compiles: whether it compiles a network. quantised: whether it may need packed weights. networks: whether it builds
    any, whose classes are imported here then. Two to three seconds are saved. From Python, where others use the same
    libraries, everything is imported as ever.
    """
    if not _Process.is_ours:
        yield
        return
    gc.disable()
    try:
        if not quantised:
            for name in QUANTISERS:
                sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # to Python: not there
        with nullcontext() if compiles else unmarked():
            for name in CROWDED:
                hold_back(name)
            yield
            if networks:
                from sdtrain.models.checkpoints.networks import import_networks

                import_networks()
    finally:
        atexit.register(gc.unfreeze)  # else triton takes what was not looked through for lost, and says so at the end
        gc.freeze()
        gc.enable()
