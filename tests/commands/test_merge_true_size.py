"""A merge into a checkpoint of SDXL's true size needs memory for its LoRAs and for one tensor, not for the model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sdtrain.adapters.formats.lora_file import read_lora, write_lora
from sdtrain.adapters.formats.metadata import FileFacts
from sdtrain.adapters.kinds import AdapterWeights, LoraWeights, delta
from sdtrain.adapters.targets import select_modules
from sdtrain.files.header import read_header
from sdtrain.files.tensors import read_tensor
from sdtrain.models.checkpoints.fill import read_parameter
from sdtrain.models.checkpoints.locate import open_checkpoint
from sdtrain.models.checkpoints.networks import trainable_outlines

ROOT = Path(__file__).parent.parent.parent
MERGE = """
import json, re, resource, sys, time
from pathlib import Path
from sdtrain.adapters.shares import share_of
from sdtrain.commands.files.merge import merge
import diffusers.models.unets.unet_2d_condition, diffusers.models.autoencoders.autoencoder_kl
import transformers.models.clip.modeling_clip
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before, began = peak(), time.monotonic()
base, one, other, out = map(Path, sys.argv[1:])
done = merge(str(base), [(one, share_of("0.7,up_blocks.*=0")), (other, share_of("0.4"))], out, "single-file")
told = {"before": before, "peak": peak(), "seconds": time.monotonic() - began, "hash": done.hash}
print(json.dumps(told | {"processor_s": sum(resource.getrusage(resource.RUSAGE_SELF)[:2])}))
"""
SPARE_MIB = 500
"""What a merge may take beside its LoRAs: tensors in float32, outlines of networks; about 400 is measured."""


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Path]:
    """Random weights in bfloat16 under the names and shapes of SDXL: 6.9 GB."""
    sys.path.insert(0, str(ROOT / "scripts"))
    from prove_true_size import write_model

    path = tmp_path / "model.safetensors"
    write_model(path, torch.bfloat16)
    yield path
    path.unlink()


@pytest.mark.slow
def test_a_true_size_merge_holds_one_tensor_of_the_model_at_a_time(model: Path, tmp_path: Path) -> None:
    networks = {name: outline.network for name, outline in trainable_outlines(open_checkpoint(model, ""), None).items()}
    generator = torch.Generator().manual_seed(1)
    files = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    for path in files:
        adapters: dict[str, dict[str, AdapterWeights]] = {}
        for component, network in networks.items():
            for module in select_modules(network, "attention+ff"):
                shape = network.get_parameter(f"{module}.weight").shape
                down = 0.02 * torch.randn(16, *shape[1:], generator=generator)
                up = 0.02 * torch.randn(shape[0], 16, *[1] * (len(shape) - 2), generator=generator)
                adapters.setdefault(component, {})[module] = LoraWeights(down.half(), up.half(), 16.0)
        write_lora(path, adapters, networks, names="sd-scripts", facts=FileFacts(path.stem, "2026-01-01T00:00:00Z"))
    out = tmp_path / "merged.safetensors"
    arguments = [sys.executable, "-c", MERGE, str(model), *map(str, files), str(out)]
    told = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    loras_mib = sum(path.stat().st_size for path in files) / 2**20
    print(f"\n{model.stat().st_size / 1e9:.2f} GB in {told['seconds']:.0f} s; LoRAs {loras_mib:.0f} MiB; {told}")
    assert told["peak"] - told["before"] < loras_mib + SPARE_MIB
    _require_right(model, out, files)
    out.unlink()


def _require_right(model: Path, out: Path, files: list[Path]) -> None:
    """Look at every tensor: what nothing touches is byte for byte the base's, what is touched is the exact sum."""
    before, after = read_header(model), read_header(out)
    outlines = trainable_outlines(open_checkpoint(model, ""), None)
    networks = {name: outline.network for name, outline in outlines.items()}
    one, other = (read_lora(path, networks).adapters for path in files)
    keys = {
        outlines[component].stored[f"{module}.weight"].place.key for component in other for module in other[component]
    }
    assert before.entries.keys() == after.entries.keys()
    with model.open("rb", buffering=0) as first, out.open("rb", buffering=0) as second:
        for key in before.entries.keys() - keys:
            assert torch.equal(read_tensor(first, before.entries[key]), read_tensor(second, after.entries[key])), key
        for component in other:
            for module in list(other[component])[::25]:
                stored = outlines[component].stored[f"{module}.weight"]
                shape = networks[component].get_parameter(f"{module}.weight").shape
                weight = read_parameter(first, stored, shape).float()
                expected = weight + 0.4 * delta(other[component][module], weight)
                if not module.startswith("up_blocks."):
                    expected = expected + 0.7 * delta(one[component][module], weight)
                third = stored.place.third
                found = read_tensor(second, after.entries[stored.place.key], third).view(shape)
                wrong = (found.float() - expected.bfloat16().float()).abs()
                assert wrong.max() <= 2**-7 * expected.abs().max(), module  # a last place of bfloat16, where sums tie
                assert (wrong > 0).float().mean() < 1e-3, module
                assert not torch.equal(found.float(), weight), module
