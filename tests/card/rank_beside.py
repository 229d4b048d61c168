"""`sdtrain` as a rank of a run whose ranks share one card, where NCCL wants one each: gloo adds up for them."""

from typing import Any

import torch.distributed as dist

from sdtrain.cli import main

_begin = dist.init_process_group


def _on_gloo(backend: str, **options: Any) -> None:
    _begin("cpu:gloo,cuda:gloo" if "cuda" in backend else backend, **options)


if __name__ == "__main__":
    dist.init_process_group = _on_gloo
    main()
