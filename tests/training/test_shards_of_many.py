"""A true-size U-Net split over 8 and 64 processes that are not there: what each holds, and what travels in a step.

PyTorch's fake process group answers every collective at once. It is one of the whole process, so each case has its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from sdtrain.families.sdxl import SDXL
from sdtrain.families.published_configs import SDXL_UNET
from sdtrain.models.checkpoints.networks import empty_network
from sdtrain.training.ranks.place import Place
from sdtrain.training.ranks.shards import mesh_of, shard

size, replicas = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("fake", store=FakeStore(), rank=size - 1, world_size=size)
unet = empty_network(SDXL, "unet", SDXL_UNET)
whole = sum(p.numel() for p in unet.parameters())
shard(unet, mesh_of(Place(size - 1, size), replicas, torch.device("cpu")))
held = sum(p.to_local().numel() for p in unet.parameters())
groups = [part._get_fsdp_state()._fsdp_param_group for part in unet.modules() if hasattr(part, "reshard")]
largest = max(sum(p._orig_size.numel() for p in group.fsdp_params) for group in groups if group)
assert all(isinstance(p, DTensor) for p in unet.parameters())
print(json.dumps({"whole": whole, "held": held, "largest": largest, "groups": sum(map(bool, groups))}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("size", "replicas"), [(8, 1), (64, 1), (64, 8)])
def test_each_of_many_processes_holds_its_share_of_a_true_size_unet(size: int, replicas: int) -> None:
    command = [sys.executable, "-c", SCRIPT, str(size), str(replicas)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["whole"] == 2_567_463_684
    share = found["whole"] / (size / replicas)
    assert found["held"] <= share * 1.02, "the last process has no more than the others"
    assert found["held"] >= share * 0.9
    assert found["largest"] < found["whole"] / 20, "one layer is whole at a time, and it is small"
