"""Captions as the text encoders read them: chunks of 75 tokens between a start and an end token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Tokenizer(Protocol):
    """The part of a CLIP tokenizer that is used."""

    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    model_max_length: int

    def get_vocab(self) -> dict[str, int]: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


def token_chunks(tokenizer: Tokenizer, captions: Sequence[str], num_chunks: int) -> Tensor:
    """Return the token ids of n captions, (n, num_chunks, 77) int64; what goes beyond the last chunk is cut.

    Every caption gets the same number of chunks, so that captions of any length stack. One chunk is exactly what
    the tokenizer makes with padding and truncation to its maximum length.
    """
    length = min(tokenizer.model_max_length, 77) - 2
    rows = []
    for caption in captions:
        ids = tokenizer.encode(caption, add_special_tokens=False)
        chunks = [ids[start * length : (start + 1) * length] for start in range(num_chunks)]
        rows.append([_framed(tokenizer, chunk, length) for chunk in chunks])
    return torch.tensor(rows, dtype=torch.int64)


def _framed(tokenizer: Tokenizer, chunk: list[int], length: int) -> list[int]:
    padding = [tokenizer.pad_token_id] * (length - len(chunk))
    return [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id, *padding]
