"""Traces a run on tensors without numbers, phase by phase, with the functions that train it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from optim import ProdigyPlusScheduleFree, averaged
from sdtrain.adapters.quantised.layer import base_bytes
from sdtrain.adapters.quantised.packing import Packing, packed_shapes
from sdtrain.config.schema import BasePrecision, Config, FullConfig
from sdtrain.data.batches import Batch
from sdtrain.data.cache import HELD_BYTES
from sdtrain.data.order import Piece
from sdtrain.families.words import DENOISER
from sdtrain.models.checkpoints.components import Components, load_components
from sdtrain.models.checkpoints.fill import fill_with_shapes
from sdtrain.models.checkpoints.inspect import OpenedModel
from sdtrain.models.load import model_of
from sdtrain.models.model import Model
from sdtrain.training.computing.graphs import wants_graphs
from sdtrain.training.computing.objective import Objective
from sdtrain.training.computing.preservation import Preservation, prepare_preservation
from sdtrain.training.ending.guard import backward
from sdtrain.training.optimizers import build_optimizer, sets_aside_on_cpu
from sdtrain.training.parameters import Trainable, train_parameters
from sdtrain.training.planning.recomputing import watch_parts
from sdtrain.training.planning.tracking import Tracker, movable_modules
from sdtrain.training.prepare import pack_base
from sdtrain.training.ranks.shards import NOTHING_TRAVELS, Travel, travel_of
from sdtrain.training.run import Run, autocast
from sdtrain.training.start import trains_text
from sdtrain.training.watching.preview import PICTURES_AT_ONCE, Prompts, prepare_prompts, sampling_settings

CPU = torch.device("cpu")
PACKINGS: dict[BasePrecision, Packing | None] = {"full": None, "int8": "int8", "fp8": "fp8", "nf4": "nf4"}


@dataclass(frozen=True)
class Phase:
    """A part of a run: the most bytes that it holds at once, and what these are.

    away_bytes: how much less it needs where the U-Net leaves the device while pictures are decoded.
    """

    name: str
    parts: Mapping[str, int]
    away_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The most bytes that it holds at once."""
        return sum(self.parts.values())

    @property
    def least_bytes(self) -> int:
        """The least that it can do with."""
        return self.peak_bytes - self.away_bytes


@dataclass(frozen=True)
class Part:
    """A part of the U-Net that could recompute its activations: the bytes it would not keep, and what it would cost in
    floating point operations of a micro-batch."""

    name: str
    saved_bytes: int
    flops: int


@dataclass(frozen=True)
class Traced:
    """What was found out about a run: its phases, and the arithmetic of a step in floating point operations."""

    phases: tuple[Phase, ...]
    flops: int
    trainable: Trainable
    bases: Mapping[str, int]
    """Bytes of the U-Net by `model.base_precision`."""
    parts: tuple[Part, ...] = ()
    """What could recompute its activations; nothing where something does already."""
    operations: int = 0
    """Operations of forward and backward of a micro-batch, which a processor launches one by one."""
    travel: Travel = NOTHING_TRAVELS
    """What would travel in a micro-batch if what is trained were split over processes."""

    @property
    def worst(self) -> Phase:
        """The phase that needs the most."""
        return max(self.phases, key=lambda phase: phase.peak_bytes)


def trace(
    run: Run, opened: OpenedModel, bucket: tuple[int, int], *, on_gpu: bool, num_examples: tuple[int, int] = (0, 0)
) -> Traced:
    """Trace a run's phases: encode, train, preview and save.

    Args:
        run: its settings and precision; its device must be the CPU, on which the fake tensors lie.
        opened: the model, of which the headers are read alone.
        bucket: width and height in pixels of the largest pictures.
        on_gpu: whether it is planned for a GPU, from which the VAE and the encoders leave when they are not needed.
        num_examples: how many pictures and different captions there are; what the cache holds of them in memory is
            counted on the CPU.

    Raises UserError as loading the model does.
    """
    assert run.device == CPU, "fake tensors lie on the CPU"
    with FakeTensorMode(allow_non_fake_inputs=True), movable_modules():
        components = load_components(opened, run.dtype, fill_with_shapes)
        bases: dict[str, int] = {word: base_bytes(components.unet, packing) for word, packing in PACKINGS.items()}
        pack_base(components, run, _unread(components), packed_shapes)
        tracker = Tracker(on_gpu=on_gpu)
        tracker.leave_out(tensor for network in components.networks.values() for tensor in _tensors(network))
        with tracker:
            model = model_of(components, run.config.model, device=CPU, caption_chunks=run.config.data.caption_chunks)
            weights = _Weights.of(components, run.config, on_gpu=on_gpu)
            tracing = _Trace(run, model, weights, tracker)
            phases, step, trainable = tracing.all_phases(bucket, (0, 0) if on_gpu else num_examples)
    flops = step.flops * run.config.data.gradient_accumulation
    travel = NOTHING_TRAVELS
    if isinstance(run.config.method, FullConfig):
        travel = travel_of(model.networks[name] for name in run.config.method.train)
    return Traced(phases, flops, trainable, bases, tuple(tracing.parts.values()), step.operations, travel)


def _unread(components: Components) -> Callable[[str], Tensor]:
    """Return what stands for reading a parameter of the U-Net again: its shape and type alone."""
    there = dict(components.unet.named_parameters())
    return lambda name: torch.empty_like(there[name])


@dataclass(frozen=True)
class _Weights:
    """The bytes of the networks that are on the device in each phase."""

    encoding: int
    training: int
    vae: int
    unet: int

    @classmethod
    def of(cls, components: Components, config: Config, *, on_gpu: bool) -> _Weights:
        sizes = {name: sum(map(_bytes, _tensors(network))) for name, network in components.networks.items()}
        everything, vae = sum(sizes.values()), sizes["vae"]
        if not on_gpu:
            return cls(everything, everything, 0, 0)
        away = sum(sizes[name] for name in components.text_encoders) if not trains_text(config) else 0
        return cls(everything - sizes[DENOISER], everything - vae - away, vae, sizes[DENOISER])


@dataclass(frozen=True)
class _Step:
    """What was found out about a step, in bytes: the gradients of other micro-batches, what is kept for backward, the
    largest moment beside that, and the optimizer's state; its floating point operations, and how many operations."""

    gradients: int
    kept: int
    moment: int
    state: int
    flops: int
    operations: int


class _Trace:
    def __init__(self, run: Run, model: Model, weights: _Weights, tracker: Tracker) -> None:
        self.run, self.config, self.model, self.weights, self.tracker = run, run.config, model, weights, tracker
        self.preservation: Preservation | None = None
        self.parts: dict[str, Part] = {}

    def all_phases(
        self, bucket: tuple[int, int], num_examples: tuple[int, int]
    ) -> tuple[tuple[Phase, ...], _Step, Trainable]:
        encode, batch, prompts = self.encode(bucket)
        held = _held_bytes(batch, num_examples) + _encoded_bytes(prompts)
        before = self.tracker.bytes_now
        trainable = train_parameters(self.model, self.run)
        adapters = self.tracker.bytes_now - before
        if not (self.config.memory.gradient_checkpointing or self.config.memory.recompute):
            watch_parts(self.model.networks[DENOISER], self._watched)
        optimizer = build_optimizer(trainable, self.config, compiled=False)
        step = self.step(trainable, optimizer, batch)
        parts = {"adapters": adapters, "optimizer": step.state, "pictures and captions": held}
        standing = {part: size for part, size in parts.items() if size}
        phases = [encode, self.train(step, standing), *self.look(trainable, optimizer, prompts, standing)]
        return tuple(phases), step, trainable

    def _watched(self, name: str, layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a layer of a part that also notes what it keeps for backward beside its inputs and its output."""

        def call(*inputs: Any) -> Tensor:
            held, flops = self.tracker.bytes_now, self.tracker.flops
            out = layer(*inputs)
            kept, cost = self.tracker.bytes_now - held - _bytes(out), self.tracker.flops - flops
            so_far = self.parts.get(name, Part(name, 0, 0))
            self.parts[name] = Part(name, so_far.saved_bytes + kept, so_far.flops + cost)
            return out

        return call

    def encode(self, bucket: tuple[int, int]) -> tuple[Phase, Batch, Prompts]:
        """Encode one picture and one caption, as the cache is filled, and all prompts together."""
        self.tracker.begin_peak()
        start, (width, height) = self.tracker.bytes_now, bucket
        text = None
        with torch.no_grad():
            latents = self.model.encode_pixels(torch.empty(1, 3, height, width))
            if not trains_text(self.config):
                text = self.model.encode_captions(["a"])
        prompts = prepare_prompts(self.model, self.config, trains_text=trains_text(self.config))
        self.preservation = prepare_preservation(self.model, self.config.preserve, trains_text=trains_text(self.config))
        phase = Phase("encode", {"weights": self.weights.encoding, "largest moment": self.tracker.peak_bytes - start})
        return phase, self._batch(latents, text), prompts

    def _batch(self, latents: Tensor, text: Mapping[str, Tensor] | None) -> Batch:
        num = self.config.data.batch_size
        return Batch(
            index=0,
            pieces=(Piece(0, 0, num, num),),
            latents=torch.empty(num, *latents.shape[1:]),
            captions=("a",) * num,
            text={name: torch.empty(num, *value.shape[1:]) for name, value in text.items()} if text else None,
            sizes=self.model.encode_sizes(torch.empty(num, 6)),
            examples=(),
        )

    def step(self, trainable: Trainable, optimizer: ProdigyPlusScheduleFree, batch: Batch) -> _Step:
        """Make one step, of which the last micro-batch is looked at: gradients of others are there by then.

        The optimizer makes its state while it steps, and where it does so within backward in a step before.
        """
        state = self._state(trainable, optimizer) if self.config.memory.fused_back_pass else 0
        tracker, flops, operations = self.tracker, self.tracker.flops, self.tracker.operations
        gradients = 0
        if self.config.data.gradient_accumulation > 1 or (self.tracker.on_gpu and wants_graphs(self.config)):
            gradients = _put_gradients(trainable)
        before = tracker.bytes_now
        tracker.begin_peak()
        objective = Objective(self.model, self.config, CPU, self.preservation)
        with trainable.dropout.drawn(partial(self.run.generator, "dropout", 0), batch.rows):
            loss = objective(batch, partial(self.run.generator, "noise", 0))
            kept = tracker.bytes_now - before
            backward(loss)
        flops, operations = tracker.flops - flops, tracker.operations - operations
        del loss
        backward_moment = tracker.peak_bytes - before
        without_state = tracker.bytes_now
        tracker.begin_peak()
        optimizer.step()
        made = max(0, tracker.bytes_now - without_state)  # less than before where that was a fused backward's end
        trainable.limit_norms(optimizer)
        moment = max(backward_moment, tracker.peak_bytes - before - made)
        optimizer.zero_grad(set_to_none=True)
        return _Step(gradients, kept, moment - kept, state + made, flops, operations)

    def _state(self, trainable: Trainable, optimizer: ProdigyPlusScheduleFree) -> int:
        """Let the optimizer make its state; return its bytes."""
        before = self.tracker.bytes_now
        _put_gradients(trainable)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return self.tracker.bytes_now - before

    def train(self, step: _Step, standing: Mapping[str, int]) -> Phase:
        """Return what a step holds at most."""
        others = " of other micro-batches" if self.config.data.gradient_accumulation > 1 else ""
        parts = {
            "weights": self.weights.training,
            **standing,
            f"gradients{others}": step.gradients,
            "kept for backward": step.kept,
            "largest moment, with gradients": step.moment,
        }
        return Phase("train", {name: size for name, size in parts.items() if size})

    def look(
        self, trainable: Trainable, optimizer: ProdigyPlusScheduleFree, prompts: Prompts, standing: Mapping[str, int]
    ) -> list[Phase]:
        """Put the averaged weights in the place of those in training, which are set aside; look through them, as saving
        does, and draw as many pictures as are drawn at once, in one step."""
        start = self.tracker.bytes_now
        if self.tracker.on_gpu and sets_aside_on_cpu(self.config):  # what is fake lies on the CPU already
            start += sum(map(_bytes, trainable.named_parameters().values()))
        self.tracker.begin_peak()
        phases: list[Phase] = []
        with averaged(optimizer):
            for parameter in trainable.named_parameters().values():
                parameter.detach().isfinite().all()
            moment = max(0, self.tracker.peak_bytes - start)
            save = Phase("save", {"weights": self.weights.training, **standing, "largest moment": moment})
            if prompts.texts and self.config.preview.every:
                self.tracker.begin_peak()
                latents, *held = self._predict(prompts)
                predicting = self.tracker.peak_bytes - start
                self.tracker.begin_peak()
                self.model.decode_latents(latents)
                decoding = self.tracker.peak_bytes - start
                del held
                weights, moment = self.weights.training + self.weights.vae, max(predicting, decoding)
                away = min(self.weights.unet, max(0, decoding - predicting))
                phases.append(Phase("preview", {"weights": weights, **standing, "largest moment": moment}, away))
        return [*phases, save]

    @torch.no_grad()
    def _predict(self, prompts: Prompts) -> list[Any]:
        """Do what `sample` does, in one step and without its scheduler, which asks for numbers; return the latents of
        one picture, and what is held while it is decoded."""
        settings = sampling_settings(self.config)
        rows = [row for row in range(len(prompts.texts)) for _ in self.config.preview.seeds][:PICTURES_AT_ONCE]
        channels, factor = self.model.latent_shape
        latents = torch.empty(len(rows), channels, settings.height_px // factor, settings.width_px // factor)
        positive, negative = prompts.conditioning(self.model)
        sizes = self.model.encode_sizes(torch.empty(len(rows), 6))
        wanted = {**{key: value[rows] for key, value in positive.items()}, **sizes}
        seen = latents
        if settings.guidance_scale != 1:
            unwanted = {**{key: value[rows] for key, value in negative.items()}, **sizes}
            wanted = {key: torch.cat([unwanted[key], wanted[key]]) for key in wanted}
            seen = torch.cat([latents, latents])
        with autocast(self.config, CPU):
            self.model.predict(seen, torch.zeros((), dtype=torch.int64), wanted).float()
        return [latents[:1], seen, wanted, positive, negative, sizes]


def _held_bytes(batch: Batch, num_examples: tuple[int, int]) -> int:
    """What the cache holds in memory of the pictures and captions, of which there are so many."""
    num_pictures, num_captions = num_examples
    captions = sum(_bytes(tensor[:1]) for tensor in (batch.text or {}).values())
    held = num_pictures * _bytes(batch.latents[:1]) + num_captions * captions
    return held if held <= HELD_BYTES else 0


def _encoded_bytes(prompts: Prompts) -> int:
    return sum(_bytes(tensor) for encoded in prompts.encoded or () for tensor in encoded.values())


def _put_gradients(trainable: Trainable) -> int:
    """Give every trained parameter a gradient; return their bytes."""
    parameters = trainable.named_parameters().values()
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    return sum(map(_bytes, parameters))


def _tensors(network: nn.Module) -> Iterable[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
