"""Which parameters can be optimized, and why others cannot."""

import torch
from torch import Tensor

from optim.ranks import sharding
from optim.settings import Settings

FLOATING = (torch.float32, torch.bfloat16)


def parameter_problems(name: str, params: list[object], known: list[Tensor], settings: Settings) -> list[str]:
    """What is wrong with the parameters of group `name`, as sentences. known: those of earlier groups."""
    if not params:
        return [f"group {name!r} holds no parameters"]
    problems = []
    seen = {id(p) for p in known}
    device = known[0].device if known else None
    for place, p in enumerate(params):
        where = f"parameter {place} of group {name!r}"
        if not isinstance(p, Tensor):
            problems.append(f"{where} is a {type(p).__name__}: must be a tensor")
            continue
        if id(p) in seen:
            problems.append(f"{where} appears more than once")
        seen.add(id(p))
        device = device or p.device
        if p.dtype not in FLOATING:
            problems.append(f"{where} is {p.dtype}: must be torch.float32 or torch.bfloat16")
        if p.layout != torch.strided:
            problems.append(f"{where} is {p.layout}: must be dense")
        if p.device != device:
            problems.append(f"{where} is on {p.device}, others on {device}: all must be on one device")
        problems += [f"{where}: {problem}" for problem in sharding.problems(p, settings)]
    return problems
