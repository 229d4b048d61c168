"""The environment variables that are heeded, and what each does; sdtrain has none of its own."""

from __future__ import annotations

from collections.abc import Mapping

HEEDED = {
    "CUDA_VISIBLE_DEVICES": "which cards are seen; empty: none",
    "OMP_NUM_THREADS": "threads of the CPU; with `--gpus` 1 for each process unless it is set",
    "GOMP_SPINCOUNT": "how long these wait for each other without sleep; 1000 where others compute as a command starts",
    "OMP_WAIT_POLICY": "the same in a word: active or passive",
    "PYTORCH_CUDA_ALLOC_CONF": "how torch shares out a card's memory",
    "CUBLAS_WORKSPACE_CONFIG": "how cuBLAS repeats its bits; `:4096:8` with `deterministic = true` unless it is set",
    "HF_HOME": "where hub models are kept",
    "HF_HUB_OFFLINE": "1: hub models are only taken from there, nothing is fetched",
    "HF_TOKEN": "who you are to the hub, for `push` and for models that ask for it; never shown",
    "WANDB_MODE": "offline: the tracker of that name uses no network",
    "XDG_CACHE_HOME": "where the compiled step of the optimizer is kept; else ~/.cache",
    "CXX": "the C++ compiler of that step; else g++, clang++ or c++",
    "TMPDIR": "where temporary files go",
    "NO_COLOR": "set: no colours in the terminal",
    "COLUMNS": "how wide the terminal is, where it does not say",
    "WORLD_SIZE": "how many processes train one run; set by torchrun and its like",
    "RANK": "which of them this is",
    "LOCAL_RANK": "which of those on this machine, and so which card",
    "TORCHELASTIC_RESTART_COUNT": "how often torchrun has started all of them again",
    "MASTER_ADDR": "the machine they meet at",
    "MASTER_PORT": "and its port",
    "HF_HUB_DISABLE_PROGRESS_BARS": "0: the hub's own bars are shown, too",
    "TRANSFORMERS_VERBOSITY": "what that library tells: `error` unless it is set",
    "DIFFUSERS_VERBOSITY": "what that library tells: `error` unless it is set",
}
SECRET = ("HF_TOKEN",)
"""Whose values are never shown."""


def told(environment: Mapping[str, str]) -> dict[str, str]:
    """Return those that are set, each with its value, unless that is a secret, and what it does."""
    return {
        f"${name}": f"{'set' if name in SECRET else repr(environment[name])} ({meaning})"
        for name, meaning in HEEDED.items()
        if name in environment
    }


def table_text() -> str:
    """Return them as a table of Markdown."""
    return "\n".join(
        ["| variable | meaning |", "|---|---|", *(f"| `{key}` | {text} |" for key, text in HEEDED.items())]
    )
