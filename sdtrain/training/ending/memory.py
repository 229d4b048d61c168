"""Too little memory: how it is known, what is said, and what is given up so that a run can go on."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from optim import ProdigyPlusScheduleFree
from sdtrain.config.schema import Config, FullConfig, LoraConfig
from sdtrain.errors import OutOfMemoryError, Problem
from sdtrain.models.model import Model
from sdtrain.training.parameters import Trainable
from sdtrain.training.planning.recomputing import recompute_activations
from sdtrain.training.ranks.group import ALONE, Ranks
from sdtrain.training.run import Run, computes_in_float16, lacks_bfloat16

if sys.platform != "win32":
    import resource

Result = TypeVar("Result")

SIGNS = ("can't allocate memory", "out of memory", "not enough memory", "ALLOC_FAILED")
"""What a RuntimeError says that is about memory: of the CPU's allocator, of CUDA and of its libraries."""
RECOMPUTING = "about a third more time"
"""What recomputed activations cost: a forward pass more, where a step is one and a backward of twice its work."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that there was too little memory, on the device or on the machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def release(error: BaseException) -> None:
    """Free what the frames of an error hold, which may be the activations of a whole step."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Room:
    """How a step is computed within the memory there is; with `memory.on_oom = "adapt"` it gives up more and more."""

    def __init__(
        self,
        model: Model,
        config: Config,
        optimizer: ProdigyPlusScheduleFree,
        free: Callable[[], None],
        ranks: Ranks = ALONE,
    ) -> None:
        """free: lets go what is kept from step to step only to be faster. ranks: those that compute a step together."""
        self._model, self._config, self._optimizer, self._free = model, config, optimizer, free
        self._ranks = ranks
        self._recomputes = config.memory.gradient_checkpointing
        self.batch_size = config.data.batch_size
        """The most pictures that are computed at once; a step has the same pictures, however few."""

    def enough_for(self, compute: Callable[[], Result], tell: Callable[[str], None]) -> Result:
        """Return what `compute` returns, which computes a step's gradients and is called again with more room.

        Where one rank has too little, all give up the same. Raises what `compute` raises: too little memory, where
        nothing is left to give up, or where it must not be.
        """
        while True:
            result, used = None, ""
            try:
                result = compute()
            except Exception as error:
                if not is_out_of_memory(error) or not self._may_adapt():
                    raise
                used = memory_used(self._model.device)
                release(error)
            if not self._any_lacks_memory(result is None):
                assert result is not None
                return result
            if result is not None:
                result, used = None, " on another process"
            self._optimizer.zero_grad(set_to_none=True)
            self._free()
            tell(f"out of memory{used}; {self._give_up_more()}. The step is done again.")

    def _any_lacks_memory(self, lacks: bool) -> bool:
        """Return whether this rank or another has too little memory; they compare only where they may adapt."""
        if self._config.memory.on_oom != "adapt":
            return lacks
        return self._ranks.agree(0, lacks)[1]

    def _may_adapt(self) -> bool:
        """Return whether something is left to give up, and the step that failed has moved nothing."""
        smaller = self.batch_size > 1 and not self._config.memory.fused_back_pass
        adapts = self._config.memory.on_oom == "adapt" and (smaller or not self._recomputes)
        return adapts and self._optimizer.abandon_step()

    def _give_up_more(self) -> str:
        if not self._recomputes:
            recompute_activations(self._model, self._config)
            self._recomputes = True
            return f"from here on activations are computed again in backward, which takes {RECOMPUTING}"
        self.batch_size = (self.batch_size + 1) // 2
        pictures = "one picture is" if self.batch_size == 1 else f"at most {self.batch_size} pictures are"
        return f"from here on {pictures} computed at once; a step has as many as before, with the same noise"


def memory_used(device: torch.device) -> str:
    """Return how much memory was used and how much there is, as a part of a sentence."""
    peak = peak_memory_gib(device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f" ({peak:.2f} GiB were in use at most, of {_gib(total)} on the card)"
    return "" if peak is None else f" ({peak:.2f} GiB were in use at most by this process)"


def peak_memory_gib(device: torch.device) -> float | None:
    """Return the most memory in use so far: of the card by tensors, of this process on a CPU; None if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return None  # the standard library does not know it there
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return float(peak) / 2**30


@contextmanager
def explained_while(doing: Callable[[], str], run: Run) -> Iterator[None]:
    """Raise OutOfMemoryError where the block, in which nothing is trained yet, runs out of memory.

    doing: says what is done when it does.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        lever = f"; model.dtype = {_half(run)} halves what the weights take" if _may_halve(run) else ""
        what = f"too little for {doing()}{memory_used(run.device)}; close other programs on this device{lever}"
        raise OutOfMemoryError(str(run.folder), [Problem("memory", what)]) from error


def explained(model: Model, run: Run, trainable: Trainable, step: int) -> OutOfMemoryError:
    """Return what is told of too little memory in a step: how much was used for what, and which setting saves how much.

    All settings that it names can be changed with `--resume`. step: the number of the step that failed.
    """
    weights = sum(p.numel() * p.element_size() for network in model.networks.values() for p in network.parameters())
    gradients = sum(p.numel() * p.element_size() for p in trainable.named_parameters().values())
    what = (
        f"too little for this step{memory_used(model.device)}; weights take {_gib(weights)}, gradients "
        f"{_gib(gradients)}. What helps, with `--resume`: {'; '.join(_levers(run, weights, gradients)) or NO_LEVERS}"
    )
    return OutOfMemoryError(f"step {step}", [Problem("memory", what)])


NO_LEVERS = "nothing more of the settings that a run may change; close other programs on this device"


def _levers(run: Run, weights: int, gradients: int) -> Sequence[str]:
    config, memory, data = run.config, run.config.memory, run.config.data
    levers = []
    if not memory.gradient_checkpointing:
        levers.append(
            f"memory.gradient_checkpointing = true keeps few activations, which mostly take the most ({RECOMPUTING})"
        )
    if data.batch_size % 2 == 0 and not memory.fused_back_pass:
        half, twice = data.batch_size // 2, 2 * data.gradient_accumulation
        levers.append(
            f"data.batch_size = {half} with data.gradient_accumulation = {twice} halves the activations, with the same "
            "pictures in a step"
        )
    if memory.on_oom == "stop":
        levers.append('memory.on_oom = "adapt" does these two as far as needed')
    if isinstance(config.method, FullConfig) and not memory.fused_back_pass and data.gradient_accumulation == 1:
        levers.append(f"memory.fused_back_pass = true saves the gradients, {_gib(gradients)}")
    if run.dtype == torch.float32 and isinstance(config.method, LoraConfig):
        word = _half(run)
        levers.append(f"model.dtype = {word} halves the frozen weights, by {_gib(weights // 2)}, and the activations")
    if config.model.base_precision == "full" and isinstance(config.method, LoraConfig):
        levers.append('model.base_precision = "int8" takes about half of the frozen weights, "nf4" two fifths')
    return levers


def _half(run: Run) -> str:
    return "float16" if lacks_bfloat16(run.device) else "bfloat16"


def _may_halve(run: Run) -> bool:
    """Return whether the networks need not be in float32; under float16 those that are trained must be."""
    return run.dtype == torch.float32 and not computes_in_float16(run.config, run.device)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
