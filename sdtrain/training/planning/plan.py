"""The plan of a run: what it needs of the device and of the disk, and the arithmetic of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from sdtrain.config.schema import Config, LoraConfig
from sdtrain.data.buckets import bucket_sizes, place
from sdtrain.data.examples import Example
from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.training.keeping.disk import cache_needed
from sdtrain.training.keeping.disk import size as size_text
from sdtrain.training.keeping.room import needed
from sdtrain.training.keeping.standing import cache_folder
from sdtrain.training.planning.trace import CPU, Part, Phase, Traced, trace
from sdtrain.training.ranks.group import Exchanged, exchanged
from sdtrain.training.ranks.shards import NOTHING_TRAVELS, Travel
from sdtrain.training.run import Run, pick_dtype
from sdtrain.training.start import run_folder


@dataclass(frozen=True)
class Plan:
    """What a run will need."""

    device: str
    """What it is planned for, as a person says it."""
    bucket: tuple[int, int]
    """Width and height in pixels of the largest pictures, by which it is planned."""
    phases: tuple[Phase, ...]
    disk: Mapping[str, int]
    """Bytes by what for."""
    flops: int
    """Floating point operations of a step."""
    bases: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the frozen U-Net by `model.base_precision`; empty where it is trained."""
    parts: tuple[Part, ...] = ()
    """What could recompute its activations, each part by itself."""
    operations: int = 0
    """Operations of a micro-batch, which a processor launches one by one."""
    exchanged: Exchanged | None = None
    """What each of several processes would add up with the others in a step."""
    trained_bytes: int = 0
    """What is trained, its gradients and the optimizer's state, which `fsdp` splits over processes."""
    travel: Travel = NOTHING_TRAVELS
    """What travels between processes where that is split."""
    whole: Plan | None = None
    """What all processes need together, where this is what each of them needs."""

    @property
    def worst(self) -> Phase:
        """The phase that needs the most."""
        return max(self.phases, key=lambda phase: phase.peak_bytes)

    def of_each(self, processes: int, *, offload: bool = False) -> Plan:
        """Return what each of so many processes needs, where what is trained is split over them.

        offload: whether its share lies in the memory of the host.

        Pictures are encoded before. An average, which is set aside while another is looked at, takes as much as the
        gradients of a step.
        """
        if processes == 1:
            return self
        away = self.trained_bytes - (0 if offload else self.trained_bytes // processes)
        where = "that the other cards and the host hold" if offload else "that the other cards hold"
        encode, *others = self.phases
        more = {"a layer while it is whole": self.travel.layer_bytes, where: -away}
        split = [replace(one, parts={**one.parts, **more}) for one in others]
        return replace(self, phases=(encode, *split), whole=self)

    @property
    def tightest(self) -> Phase:
        """The phase that needs the most where everything leaves that can."""
        return max(self.phases, key=lambda phase: phase.least_bytes)


def plan_run(config: Config, opened: OpenedModel, examples: Sequence[Example]) -> Plan:
    """Plan a run from its settings, the headers of its model and the sizes of its pictures; nothing is written.

    It is planned for a GPU unless `device` is cpu, be there one here or not. Raises UserError as loading the model
    does.
    """
    on_gpu = config.device != "cpu"
    bucket = largest_bucket(config, examples)
    run = Run(run_folder(config.output, config.name), config, CPU, planned_dtype(config, on_gpu=on_gpu))
    num = len(examples), len({example.caption for example in examples})
    traced = trace(run, opened, bucket, on_gpu=on_gpu, num_examples=num)
    disk = {
        **cache_needed(cache_folder(config), config, examples),
        **needed(run.folder, config, opened, traced.trainable, 0),
    }
    name = f"a {'GPU' if on_gpu else 'CPU'}, {str(run.dtype).removeprefix('torch.')}"
    disk = {what: size for what, size in disk.items() if size}
    bases = traced.bases if isinstance(config.method, LoraConfig) else {}
    trained = [p for p in traced.trainable.named_parameters().values() if p.requires_grad]
    costs = traced.operations, exchanged(trained), _trained_bytes(traced, trained)
    return Plan(name, bucket, traced.phases, disk, traced.flops, bases, traced.parts, *costs, traced.travel)


def _trained_bytes(traced: Traced, trained: Sequence[nn.Parameter]) -> int:
    (train,) = (phase for phase in traced.phases if phase.name == "train")
    return 2 * sum(parameter.nbytes for parameter in trained) + train.parts.get("optimizer", 0)


def planned_dtype(config: Config, *, on_gpu: bool) -> torch.dtype:
    """Return the precision of the networks on a GPU that has bfloat16, or on the CPU."""
    if config.model.dtype == "float16":
        return pick_dtype(config, CPU)
    if config.model.dtype == "bfloat16" or (config.model.dtype == "auto" and on_gpu):
        return torch.bfloat16
    return torch.float32


def largest_bucket(config: Config, examples: Sequence[Example]) -> tuple[int, int]:
    """Return the size of the largest pictures, (width, height) in pixels, as they are trained."""
    data = config.data
    buckets = bucket_sizes(data.resolution_px, data.bucket_step_px, data.max_aspect)
    used = {place(example.width_px, example.height_px, buckets).bucket for example in examples}
    return max(used, key=lambda size: (size[0] * size[1], size))


def plan_answer(plan: Plan) -> dict[str, object]:
    """Return a plan for programs: all sizes in bytes."""
    width, height = plan.bucket
    phases = {
        phase.name: {"peak_bytes": phase.peak_bytes, "least_bytes": phase.least_bytes, "parts": phase.parts}
        for phase in plan.phases
    }
    return {
        "device": plan.device,
        "width_px": width,
        "height_px": height,
        "phases": phases,
        "peak_bytes": plan.worst.peak_bytes,
        "base_bytes": plan.bases,
        "disk_bytes": plan.disk,
        "flops_per_step": plan.flops,
    }


def lines_of(plan: Plan) -> dict[str, str]:
    """Return what a person reads of a plan, a row each."""
    width, height = plan.bucket
    rows = {"for": f"{plan.device}; the largest pictures are {width} x {height}"}
    for phase in plan.phases:
        away = f"; {size_text(phase.least_bytes)} where the U-Net leaves to decode" if phase.away_bytes else ""
        rows[phase.name] = f"{size_text(phase.peak_bytes)}: {listed(phase.parts)}{away}"
    rows["most"] = f"{size_text(plan.worst.peak_bytes)}, to {plan.worst.name}; a GPU's driver and allocator take more"
    if plan.bases:
        rows["the U-Net"] = f"{listed(plan.bases)}: see model.base_precision"
    rows["disk"] = f"{size_text(sum(plan.disk.values()))}: {listed(plan.disk)}"
    rows["a step"] = f"{plan.flops / 1e12:.3g} TFLOP"
    return rows


def listed(parts: Mapping[str, int]) -> str:
    """Return parts of a memory as a person reads them; what lies elsewhere is taken off."""
    return ", ".join(
        f"{what} {size_text(size)}" if size > 0 else f"less {size_text(-size)} {what}"
        for what, size in parts.items()
        if size
    )
