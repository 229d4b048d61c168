"""What several processes cannot train together, and what must be the same on all of them. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from sdtrain.config.draft import Draft
from sdtrain.config.method_rules import may_split
from sdtrain.config.rules import SHARDS
from sdtrain.config.schema import Config
from sdtrain.config.write import config_to_toml
from sdtrain.errors import Problem
from sdtrain.training.keeping.standing import Standing


def rank_problems(draft: Draft, ranks: int) -> Iterator[Problem]:
    """Yield a problem for each setting of a draft that does not go with so many ranks."""
    if ranks == 1:
        return
    if draft.knows("data.batch_size", "data.gradient_accumulation"):
        pictures = draft.config.data.batch_size * draft.config.data.gradient_accumulation
        settings = ("data.batch_size", "data.gradient_accumulation")
        if pictures % ranks:
            few = f"fewer than the {ranks} ranks" if pictures < ranks else f"which {ranks} ranks cannot share equally"
            what = (
                f"a step has batch_size x gradient_accumulation = {pictures} pictures, {few}; make it a multiple of "
                f"{ranks}, for a step has the same pictures on any number of ranks"
            )
            yield Problem("data.batch_size", what, settings)
    if draft.knows("memory.fused_back_pass") and draft.config.memory.fused_back_pass:
        what = "moves each weight within backward, before the gradients of the other ranks are there; set it to false"
        yield Problem("memory.fused_back_pass", f"true {what}")
    if draft.knows("parallel.replicas") and ranks % draft.config.parallel.replicas:
        replicas = draft.config.parallel.replicas
        what = f"{replicas}, but {ranks} ranks cannot be dealt out to so many groups; make it a divisor of {ranks}"
        yield Problem("parallel.replicas", what)
    if draft.knows("memory.on_oom", *SHARDS) and draft.config.memory.on_oom == "adapt" and may_split(draft.config):
        what = "adapt, but who runs out of memory leaves the other ranks within a layer that all put together; use "
        yield Problem("memory.on_oom", what + "stop and a smaller data.batch_size, or parallel.kind = ddp")


def facts_of(config: Config, standing: Standing, versions: Sequence[str]) -> dict[str, bytes]:
    """Return digests of what must be the same on all ranks, by a name for a sentence.

    versions: those of sdtrain and of what it stands on.
    """
    texts = {
        "version of sdtrain or PyTorch": "\n".join(versions),
        "config": config_to_toml(config),
        "model": standing.base,
        "set of pictures and captions": standing.register_text(),
        "training state": str(standing.step),
    }
    return {name: hashlib.blake2b(text.encode(), digest_size=16).digest() for name, text in texts.items()}
