"""Trains both text encoders of the built-in tiny SDXL alone, to say at their end token what a caption says.

Linear heads read the colour, shape, background and size a caption names and the letters of its unknown words. Frozen
afterwards, the encoders' outputs are computed once per caption, which makes a step of the U-Net's training cheap.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import picture_world as world
import tiny_sdxl_parts as parts
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Readers(nn.Module):
    """Linear heads that read a caption's meaning; needed for training only."""

    def __init__(self) -> None:
        super().__init__()
        # Read where SDXL reads: both penultimate layers, and the second encoder's pooled output.
        kinds = [*world_words(), LETTERS]
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, len(kind) + (kind is not LETTERS)) for kind in kinds)
            for width in (*parts.WIDTHS, parts.WIDTHS[1])
        )

    def forward(self, states: list[Tensor], labels: Tensor, letters: Tensor) -> Tensor:
        """Summed loss (); labels int (n, 4) with the number of words for "not said", letters float (n, 26)."""
        loss = torch.zeros(())
        for state, heads in zip(states, self.heads, strict=True):
            assert isinstance(heads, nn.ModuleList)
            *named, spelled = list(heads)
            loss = loss + sum(F.cross_entropy(head(state), labels[:, i]) for i, head in enumerate(named))
            loss = loss + F.binary_cross_entropy_with_logits(spelled(state), letters)
        return loss


def world_words() -> list[list[str]]:
    """The words for colours, shapes, backgrounds and sizes."""
    return [list(world.COLOURS), list(world.SHAPES), list(world.BACKGROUNDS), list(world.RADII)]


def read_caption(text: str) -> tuple[list[int], list[float]]:
    """What a caption says (the number of words of a kind for "not said"), and the letters of its unknown words."""
    words = text.replace(",", " ").split()
    labels = [next((kind.index(w) for w in words if w in kind), len(kind)) for kind in world_words()]
    known = {w for kind in world_words() for w in kind} | set(" ".join(t for t, _ in world.TEMPLATES).split()) | {"an"}
    unknown = "".join(w for w in words if w not in known)
    return labels, [float(letter in unknown) for letter in LETTERS]


def train_text(work: Path, steps: int, peak: float) -> None:
    """Trains both encoders and writes their state into the work folder."""
    if parts.read_state(work / "text.pt") is not None:
        print(f"{work / 'text.pt'} is finished")
        return
    rng = np.random.default_rng(2)
    pipeline = parts.make_pipeline(work)
    torch.manual_seed(2)  # for the heads' initial weights
    encoders, readers = (pipeline.text_encoder, pipeline.text_encoder_2), Readers()
    parameters = [p for module in (*encoders, readers) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, betas=(0.9, 0.99))
    began, losses = time.monotonic(), []
    for step in range(steps):
        captions = [world.random_caption(world.random_scene(rng), rng) for _ in range(64)]
        ids = pipeline.tokenizer(captions, padding=True, return_tensors="pt").input_ids
        end = (ids == pipeline.tokenizer.eos_token_id).int().argmax(1)
        first, second = (encoder(ids, output_hidden_states=True) for encoder in encoders)
        rows = torch.arange(len(ids))
        states = [first.hidden_states[-2][rows, end], second.hidden_states[-2][rows, end], second.text_embeds]
        labels, letters = zip(*map(read_caption, captions), strict=True)
        loss = readers(states, torch.tensor(labels), torch.tensor(letters))
        parts.update(optimizer, loss, parts.learning_rate(step, steps, peak))
        losses.append(loss.item())
        if step % 50 == 49:
            parts.report("text", step + 1, steps, losses, began)
    names = ("text_encoder", "text_encoder_2")
    parts.write_state(work / "text.pt", {name: e.state_dict() for name, e in zip(names, encoders, strict=True)})
