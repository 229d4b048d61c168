"""Merging: what is added is what the files say, in any order, and what nothing touches stays byte for byte."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from sdtrain.adapters.formats.lora_file import read_lora, write_lora
from sdtrain.adapters.formats.metadata import FileFacts
from sdtrain.adapters.kinds import Adapters, AdapterWeights, DoraWeights, LohaWeights, LoraWeights, delta
from sdtrain.adapters.layers import layer_names
from sdtrain.adapters.shares import Share, share_of
from sdtrain.cli import app
from sdtrain.commands.files.merge import Merged, merge, read_base
from sdtrain.commands.files.sums import merge_loras
from sdtrain.errors import UserError
from sdtrain.families.modelspec import Description
from sdtrain.models.model import Model

FOLDER = "builtin:tiny-sdxl"
NO_TOKENIZERS = ""
"""A merge of one single file into another needs none."""


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, UserError):
        return result.exception.exit_code, result.exception.text()
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merge")


@pytest.fixture(scope="module")
def base(folder: Path, tiny: Model) -> Path:
    """The tiny model as a single file in float32, with a tensor that no network has."""
    path = folder / "plain.safetensors"
    tiny.write_checkpoint(
        path,
        Description("base", (128, 128), author="Ada", license="CC-BY-4.0"),
        layout="single-file",
        dtype=torch.float32,
    )
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    whole = folder / "base.safetensors"
    save_file(tensors | {"model_ema.decay": torch.tensor(0.75)}, whole, metadata)
    return whole


def some(networks: dict[str, nn.Module] | Model, seed: int, kind: str = "lora", rank: int = 2) -> Adapters:
    """Random adapters on every so manieth layer, convolutions and fused projections among them."""
    made: dict[str, dict[str, AdapterWeights]] = {}
    trees = networks.networks if not isinstance(networks, dict) else networks
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    for component, network in trees.items():
        names = [name for name in layer_names(network) if name != "text_projection"]
        for module in names[:: 2 + seed] + [name for name in names if name.endswith("q_proj")][:1]:
            weight = network.get_parameter(f"{module}.weight")
            out, inside = weight.shape[0], weight.shape[1:]
            flat = inside.numel()
            lora = LoraWeights(random(rank, *inside), random(out, rank, *[1] * (len(inside) - 1)), 1.5)
            found: AdapterWeights = lora
            if kind == "dora":
                found = DoraWeights(lora, weight.detach().float().flatten(1).norm(dim=1) * 1.1)
            if kind == "loha":
                found = LohaWeights(random(out, rank), random(rank, flat), random(out, rank), random(rank, flat), 3.0)
            made.setdefault(component, {})[module] = found
    return made


def write(path: Path, tiny: Model, adapters: Adapters, **words: str) -> Path:
    facts = FileFacts(path.stem, "2026-01-01T00:00:00Z", more={f"modelspec.{key}": word for key, word in words.items()})
    write_lora(path, adapters, tiny.networks, names="sd-scripts", facts=facts)
    return path


@pytest.fixture(scope="module")
def loras(folder: Path, tiny: Model) -> dict[str, Path]:
    kinds = {"a": "lora", "b": "lora", "dora": "dora", "loha": "loha"}
    words = {
        "a": {"author": "Bob", "trigger_phrase": "zorbit, ring"},
        "b": {"license": "MIT", "trigger_phrase": "ring"},
    }
    return {
        name: write(folder / f"{name}.safetensors", tiny, some(tiny, seed, kind, rank=2 + seed), **words.get(name, {}))
        for seed, (name, kind) in enumerate(kinds.items())
    }


@pytest.fixture
def out(tmp_path: Path) -> Callable[..., tuple[dict[str, Tensor], Merged]]:
    numbers: Iterator[int] = iter(range(99))

    def merged(base: Path, *files: tuple[Path, str]) -> tuple[dict[str, Tensor], Merged]:
        path = tmp_path / f"{next(numbers)}.safetensors"
        done = merge(str(base), [(file, share_of(text)) for file, text in files], path, "single-file", NO_TOKENIZERS)
        return load_file(path), done

    return merged


def unet_of(path: Path) -> dict[str, Tensor]:
    return dict(read_base(str(path), FOLDER)[0].networks["unet"].state_dict())


@pytest.mark.slow
def test_what_is_added_is_the_change_of_each_file_times_its_weight(
    base: Path, tiny: Model, loras: dict[str, Path], tmp_path: Path
) -> None:
    done = merge(
        str(base),
        [(loras[name], Share(0.5)) for name in ("a", "dora", "loha")],
        tmp_path / "m.safetensors",
        "single-file",
    )
    after = read_base(str(tmp_path / "m.safetensors"), FOLDER)[0]
    changed = set()
    for component, network in tiny.networks.items():
        for name, before in network.named_parameters():
            expected = before.detach().double()
            for file in ("a", "dora", "loha"):
                adapters = read_lora(loras[file], tiny.networks).adapters.get(component, {})
                module = name.removesuffix(".weight")
                if module in adapters and name.endswith(".weight"):
                    expected = expected + 0.5 * delta(adapters[module], before.detach()).double()
                    changed.add((component, module))
            found = after.networks[component].get_parameter(name).detach().double()
            assert (found - expected).abs().max() <= 4e-7 * expected.abs().max(), (component, name)
    assert done.changed == len(changed) > 60


def test_tensors_that_nothing_touches_are_byte_for_byte_the_base_s(
    base: Path, loras: dict[str, Path], out: Callable[..., tuple[dict[str, Tensor], Merged]]
) -> None:
    before = load_file(base)
    half = base.with_name("mixed.safetensors")
    types = (torch.float32, torch.float16, torch.bfloat16)
    mixed = {
        key: tensor.to(types[index % 3]) if tensor.is_floating_point() else tensor
        for index, (key, tensor) in enumerate(before.items())
    }
    with safe_open(base, "pt") as file:
        save_file(mixed, half, file.metadata())
    after, done = out(half, (loras["a"], "1"))
    assert after.keys() == mixed.keys() >= {"model_ema.decay"}
    assert all(after[key].dtype == mixed[key].dtype for key in mixed)
    different = {key for key in mixed if not torch.equal(after[key], mixed[key])}
    assert 0 < len(different) <= done.changed
    assert not {key for key in different if key.startswith(("first_stage_model.", "model_ema."))}


def test_of_a_fused_matrix_the_other_thirds_stay(
    base: Path, tiny: Model, tmp_path: Path, out: Callable[..., tuple[dict[str, Tensor], Merged]]
) -> None:
    modules = some(tiny, 0)["text_encoder_2"]
    name = next(module for module in modules if module.endswith("k_proj"))
    lora = write(tmp_path / "k.safetensors", tiny, {"text_encoder_2": {name: modules[name]}})
    before, (after, done) = load_file(base), out(base, (lora, "1"))
    (key,) = [key for key in before if not torch.equal(after[key], before[key])]
    assert key.endswith("in_proj_weight") and done.changed == 1
    first, middle, last = (torch.equal(*pair) for pair in zip(after[key].chunk(3), before[key].chunk(3), strict=True))
    assert (first, middle, last) == (True, False, True)


def test_twice_with_two_weights_is_once_with_their_sum(
    base: Path, loras: dict[str, Path], out: Callable[..., tuple[dict[str, Tensor], Merged]], tmp_path: Path
) -> None:
    first = tmp_path / "first.safetensors"
    merge(str(base), [(loras["a"], Share(0.3))], first, "single-file")
    twice, _ = out(first, (loras["a"], "0.45"))
    once, _ = out(base, (loras["a"], "0.75"))
    for key, tensor in once.items():
        assert (twice[key] - tensor).abs().max() <= 3 * 2**-24 * tensor.abs().max() if tensor.numel() else True, key
    plain = load_file(base)
    assert any((once[key] - plain[key]).abs().max() > 1e-3 for key in once if once[key].numel())


def test_the_order_of_the_files_changes_no_bit(
    base: Path, loras: dict[str, Path], out: Callable[..., tuple[dict[str, Tensor], Merged]]
) -> None:
    files = [(loras["a"], "0.7"), (loras["b"], "-0.4,mid_block.*=1.3"), (loras["loha"], "0.9"), (loras["a"], "0.1")]
    one, first = out(base, *files)
    other, second = out(base, *files[::-1])
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert first.hash == second.hash


def test_weights_count_by_network_and_block_and_0_leaves_a_block_bit_for_bit(
    base: Path, tiny: Model, loras: dict[str, Path], tmp_path: Path
) -> None:
    share = "0.8,text_encoder=0.5,down_blocks.*=0,down_blocks.1.*=0.25,text_encoder_2=0"
    path = tmp_path / "m.safetensors"
    code, said = run("merge", base, loras["a"], "--weight", share, "--out", path)
    assert code == 0, said
    after = read_base(str(path), FOLDER)[0]
    adapters = read_lora(loras["a"], tiny.networks).adapters
    seen = set()
    for component, modules in adapters.items():
        for module, weights in modules.items():
            times = {"text_encoder": 0.5, "text_encoder_2": 0.0}.get(component, 0.8)
            if component == "unet" and module.startswith("down_blocks."):
                times = 0.25 if module.startswith("down_blocks.1.") else 0.0
            before = tiny.networks[component].get_parameter(f"{module}.weight").detach()
            found = after.networks[component].get_parameter(f"{module}.weight").detach()
            if times == 0:
                assert torch.equal(found, before), module
            else:
                change = times * delta(weights, before)
                assert ((found - before) - change).norm() <= 1e-5 * change.norm(), module
            seen.add(times)
    assert seen == {0.8, 0.5, 0.25, 0.0}


def test_every_layout_gives_the_same_merged_model(base: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    for number, (source, layout) in enumerate(
        [(str(base), "single-file"), (str(base), "folder"), (FOLDER, "single-file"), (FOLDER, "folder")]
    ):
        components = FOLDER if source != FOLDER else ""
        merge(
            source,
            [(loras["a"], Share(2.0))],
            tmp_path / f"{number}{'' if layout == 'folder' else '.safetensors'}",
            layout,
            components,
        )
    found = [unet_of(tmp_path / name) for name in ("0.safetensors", "1", "2.safetensors", "3")]
    plain = unet_of(base)
    for key in plain:
        assert torch.equal(found[0][key], found[1][key]), key
        assert torch.equal(found[2][key], found[3][key]), key
        assert torch.allclose(found[0][key], found[2][key], atol=2e-3), "the built-in folder is in float16"


# ---------------------------------------------------------------------- LoRA into LoRA


def summed_delta(tiny: Model, files: list[tuple[Path, float]], component: str, module: str) -> Tensor:
    before = tiny.networks[component].get_parameter(f"{module}.weight").detach()
    total = torch.zeros(before.shape, dtype=torch.float64)
    for path, times in files:
        weights = read_lora(path, tiny.networks).adapters.get(component, {}).get(module)
        total += 0 if weights is None else times * delta(weights, before).double()
    return total


def test_a_sum_of_loras_at_full_rank_is_the_sum_of_their_changes(
    tiny: Model, loras: dict[str, Path], tmp_path: Path
) -> None:
    pairs = [(loras["a"], 0.7), (loras["b"], -1.2)]
    path = tmp_path / "sum.safetensors"
    done = merge_loras([(file, Share(times)) for file, times in pairs], FOLDER, path, None, 1.0)
    assert done.error < 1e-6
    both = read_lora(path, tiny.networks).adapters
    shared = 0
    for component, modules in both.items():
        for module, weights in modules.items():
            expected = summed_delta(tiny, pairs, component, module)
            found = delta(weights, expected.float()).double()
            assert (found - expected).norm() <= 1e-6 * expected.norm(), (component, module)
            shared += weights.rank == 5
    assert shared > 5, "some layers are in both, and get the ranks of both"
    assert done.hash == f"0x{sha256(data_of(path)).hexdigest()}"


def data_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_a_smaller_rank_is_the_nearest_and_its_error_is_told(
    tiny: Model, loras: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "sum.safetensors"
    code, said = run("merge", loras["a"], loras["b"], "--base", FOLDER, "--rank", 2, "--out", path)
    assert code == 0, said
    both = read_lora(path, tiny.networks).adapters
    loss = change = 0.0
    for component, modules in both.items():
        for module, weights in modules.items():
            expected = summed_delta(tiny, [(loras["a"], 1), (loras["b"], 1)], component, module)
            values = torch.linalg.svdvals(expected.flatten(1))
            lost = (delta(weights, expected.float()).double() - expected).square().sum()
            assert float(lost) == pytest.approx(
                float(values[2:].square().sum()), rel=1e-3, abs=1e-9 * float(values.square().sum())
            )
            loss, change = loss + float(lost), change + float(expected.square().sum())
    told = f"miss {(loss / change) ** 0.5:.2%} of the sum"
    assert told in said and (loss / change) ** 0.5 > 0.05, (told, said)


@pytest.mark.slow
def test_other_kinds_are_summed_with_a_rank_and_asked_for_one(
    tiny: Model, loras: dict[str, Path], tmp_path: Path
) -> None:
    pairs = [(loras["dora"], 1.0), (loras["a"], 0.5), (loras["loha"], 0.5)]
    shares = [(file, Share(times)) for file, times in pairs]
    with pytest.raises(UserError, match="--rank"):
        merge_loras(shares, FOLDER, tmp_path / "no.safetensors", None, 1.0)
    done = merge_loras(shares, FOLDER, tmp_path / "sum.safetensors", 64, 1.0)
    both = read_lora(tmp_path / "sum.safetensors", tiny.networks).adapters
    loss = change = 0.0
    for component, modules in both.items():
        for module, weights in modules.items():
            expected = summed_delta(tiny, pairs, component, module)
            loss += float((delta(weights, expected.float()).double() - expected).square().sum())
            change += float(expected.square().sum())
    assert done.error == pytest.approx((loss / change) ** 0.5, rel=0.01, abs=1e-5)


# ---------------------------------------------------------------------- what is said of it


def test_a_merged_file_says_what_it_is_made_of_and_under_which_licence(
    base: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    merge(
        str(base),
        [(loras["a"], Share(0.5)), (loras["b"], share_of("1,mid_block.*=0"))],
        tmp_path / "m.safetensors",
        "single-file",
    )
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        said = file.metadata()
    hashes = [sha256(data_of(path)).hexdigest() for path in (base, loras["a"], loras["b"])]
    assert said["modelspec.merged_from"].split(", ") == [
        f"base.safetensors 0x{hashes[0]}",
        f"a.safetensors 0x{hashes[1]} x 0.5",
        f"b.safetensors 0x{hashes[2]} x 1 mid_block.*=0",
    ]
    told = json.loads(said["sdtrain.merged_from"])
    assert [one["hash"] for one in told] == hashes
    assert [one["weight"] for one in told] == ["1", "0.5", "1,mid_block.*=0"]
    assert (said["modelspec.author"], said["modelspec.license"]) == ("Ada", "CC-BY-4.0")
    assert said["modelspec.trigger_phrase"] == "zorbit, ring"
    assert said["modelspec.resolution"] == "128x128"
    assert said["modelspec.hash_sha256"] == f"0x{sha256(data_of(tmp_path / 'm.safetensors')).hexdigest()}"
    merge_loras([(loras["a"], Share()), (loras["b"], Share())], FOLDER, tmp_path / "s.safetensors", 2, 1.0)
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        said = file.metadata()
    assert (said["modelspec.author"], said["modelspec.license"]) == ("Bob", "MIT")
    assert said["modelspec.merged_from"] == f"a.safetensors 0x{hashes[1]}, b.safetensors 0x{hashes[2]}"
    assert "made of" in run("info", tmp_path / "s.safetensors")[1]


def test_how_far_it_has_come_is_shown(base: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    for number, (source, layout) in enumerate([(str(base), "single-file"), (FOLDER, "folder")]):
        seen.clear()
        out = tmp_path / f"{number}{'' if layout == 'folder' else '.safetensors'}"
        pairs = [(loras["a"], Share()), (loras["b"], Share())]
        done = merge(source, pairs, out, layout, show=lambda *at: seen.append(at))  # type: ignore[arg-type]
        assert seen == [("layers", number, done.changed) for number in range(1, done.changed + 1)]
    seen.clear()
    done = merge_loras(pairs, FOLDER, tmp_path / "sum.safetensors", None, 1.0, show=lambda *at: seen.append(at))
    assert [number for _, number, _ in seen] == list(range(1, done.changed + 1))


def test_the_command_tells_the_hash(base: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    code, said = run("merge", base, loras["a"], "--out", tmp_path / "m.safetensors")
    assert code == 0
    assert f"hash 0x{sha256(data_of(tmp_path / 'm.safetensors')).hexdigest()}" in said.replace("\n", "")


def test_what_is_there_is_replaced_only_where_that_is_said(base: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"mine")
    commands = (
        ("merge", base, loras["a"]),
        ("merge", loras["a"], loras["b"], "--base", FOLDER),
        ("extract", FOLDER, FOLDER),
        ("resize", loras["a"], "--base", FOLDER),
    )
    for command in commands:
        code, said = run(*command, "--out", path)
        assert code == 2 and "--force" in said, said
        assert path.read_bytes() == b"mine"
    assert run("merge", base, loras["a"], "--out", path, "--force")[0] == 0
    assert path.stat().st_size > 1000


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "below a file", "another format"])
def test_where_nothing_can_be_written_no_work_is_begun(tmp_path: Path, kind: str) -> None:
    """The models that the work is about are not even looked for."""
    out = tmp_path / "out.safetensors"
    said = "is a device or a pipe, which is never replaced; name a file"
    match kind:
        case "folder":
            out.mkdir()
            said = "is a folder, which no file can replace; name a file in it"
        case "pipe":
            os.mkfifo(out)
        case "device":
            out.symlink_to("/dev/null")
        case "below a file":
            out.write_bytes(b"mine")
            out, said = out / "out.safetensors", "Not a directory; nothing was changed"
        case _:
            out, said = tmp_path / "out.ckpt", "choose a name that ends in .safetensors"
    none = tmp_path / "none"
    commands: list[tuple[object, ...]] = [
        ("merge", none, none, "--force"),
        ("extract", none, none, "--force"),
        ("resize", none, "--base", none, "--force"),
    ]
    for command in commands:
        code, found = run(*command, "--out", out)
        assert code == 2 and said in " ".join(found.split()), found
    for command in (("sample", none, "--prompt", "x"), ("compare", none)) if kind in ("pipe", "device") else ():
        code, found = run(*command, "--out", out)
        assert code == 2 and said in " ".join(found.split()), found


def test_all_that_is_wrong_is_told_at_once(base: Path, loras: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    out = tmp_path / "m.safetensors"
    code, said = run(
        "merge",
        base,
        loras["a"],
        tmp_path / "bad.safetensors",
        tmp_path / "none.safetensors",
        "--out",
        out,
        *["--weight", "1,donw_blocks.*=1", "--weight", "1", "--weight", "1"],
    )
    assert code == 2
    for text in ("donw_blocks.*", "`down_blocks.0.*`", "bad.safetensors", "none.safetensors", "no such file"):
        assert text in said, said
    code, said = run("merge", base, loras["a"], "--out", out, "--weight", "much", "--weight", "1,2")
    assert code == 2
    for text in ("given 2 times for 1 files", "`much`", "`2` behind a comma"):
        assert text in said, said
    assert not out.exists() and not list(tmp_path.glob(".*"))
    assert "--base" in run("merge", loras["a"], loras["b"], "--out", out)[1]
    assert "have no rank" in run("merge", base, loras["a"], "--rank", 3, "--out", out)[1]


@pytest.mark.parametrize("text", ["", "1,", "=1", "unet=", "nan", "inf", "1e9", "1,2", "a=b"])
def test_what_is_no_weight_is_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"^has `"):
        share_of(text)


def test_a_merge_that_takes_long_still_answers_programs_in_one_line(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sdtrain.training.watching.progress.LINE_EVERY_S", 0)
    lora = write(tmp_path / "a.safetensors", tiny, some(tiny, 1))
    for base, more in ((FOLDER, ["--components", FOLDER]), (lora, ["--base", FOLDER])):
        code, told = run("merge", base, lora, "--out", tmp_path / "out.safetensors", "--force", "--json", *more)
        assert code == 0 and len(told.splitlines()) == 1, told
        assert json.loads(told)["command"] == "merge"
