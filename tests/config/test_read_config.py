"""Reading settings: what is right comes back the same, what is wrong is named with what is allowed."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sdtrain.config.foreign_settings import FOREIGN
from sdtrain.config.mistakes import all_settings
from sdtrain.config.presets import LEAST_TRAVEL, first_useful_step
from sdtrain.config.read import differences, overridden, read_config, resolve
from sdtrain.config.schema import Config
from sdtrain.config.write import config_to_toml
from sdtrain.errors import UserError

BOTH = ["unet", "text_encoder"]


def small(**changes: Any) -> dict[str, Any]:
    table: dict[str, Any] = {
        "name": "small",
        "steps": 100,
        "model": {"path": "builtin:tiny-sdxl"},
        "method": {"kind": "lora"},
        "data": {"folder": [{"path": "pictures"}]},
    }
    return table | changes


def problems(table: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(UserError) as caught:
        resolve(table, "test")
    return {problem.where: problem.what for problem in caught.value.problems}


@given(
    prompts=st.lists(st.text(max_size=20), max_size=3),
    steps=st.integers(1, 10**6),
    d0=st.floats(1e-9, 1e-2),
    weight=st.floats(0.01, 10),
    seeds=st.lists(st.integers(0, 2**40), min_size=1, max_size=3),
)
def test_a_written_config_reads_back_as_the_same_config(
    prompts: list[str], steps: int, d0: float, weight: float, seeds: list[int]
) -> None:
    table = small(
        steps=steps,
        optimizer={"d0": d0},
        method={"kind": "lora", "lr": {"unet": weight}, "targets": ["*.to_q"]},
        preview={"prompts": prompts, "seeds": seeds},
    )
    config = resolve(table, "test")
    assert resolve(tomllib.loads(config_to_toml(config)), "again") == config


def test_every_misspelt_key_gets_the_nearest_name() -> None:
    found = problems(small(method={"kind": "lora", "rnak": 4}, stepz=3, data={"folder": [{"paht": "x"}]}))
    assert "`rank`" in found["method.rnak"]
    assert "`steps`" in found["stepz"]
    assert "`path`" in found["data.folder[0].paht"]
    assert "missing" in found["data.folder[0].path"]


def test_a_key_in_the_wrong_table_is_sent_to_the_right_one() -> None:
    assert "data.batch_size" in problems(small(batch_size=4))["batch_size"]


def test_settings_of_other_tools_are_refused_with_the_reason() -> None:
    ours = {path.rpartition(".")[2] for path in all_settings()} | set(Config.model_fields)
    keys = sorted(set(FOREIGN) - ours)
    assert len(keys) > 350
    told = problems(small(optimizer=dict.fromkeys(keys, 1), **dict.fromkeys(keys, 1)))
    for key in keys:
        assert told[f"optimizer.{key}"] == told[key] == FOREIGN[key].sentence()


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"steps": "many"}, "steps", "'many'"),
        ({"steps": 0}, "steps", "greater than or equal to 1"),
        ({"steps": True}, "steps", "True"),
        ({"method": {"kind": "lora", "targets": "some"}}, "method.targets", "'attention'"),
        ({"method": {"kind": "loar"}}, "method.kind", '"lora", "full"'),
        ({"method": {}}, "method.kind", "missing"),
        ({"method": {"kind": "full", "rank": 4}}, "method.rank", "unknown setting"),
        ({"name": "a/b"}, "name", "'a/b'"),
        ({"data": {"folder": []}}, "data.folder", "at least 1"),
        ({"optimizer": {"preset": "best"}}, "optimizer.preset", "'lora'"),
        ({"optimizer": {"d0": 0}}, "optimizer.d0", "greater than 0"),
        ({"optimizer": {"prodigy_steps": 101}}, "optimizer.prodigy_steps", "beyond steps = 100"),
        ({"optimizer": {"split_groups": False, "split_groups_mean": "mean"}}, "optimizer.split_groups_mean", "one d"),
        ({"timesteps": {"first": 500, "last": 500}}, "timesteps.first", "not below"),
        ({"data": {"folder": [{"path": "x"}], "bucket_step_px": 20}}, "data.bucket_step_px", "multiple of 8"),
        ({"preview": {"width_px": 100}}, "preview.width_px", "multiple of 8"),
        (
            {"model": {"path": "x", "prediction": "epsilon", "zero_terminal_snr": "on"}},
            "model.zero_terminal_snr",
            "nothing is left to learn",
        ),
        ({"method": {"kind": "lora", "lr": {"text_encoder": 0.5}}}, "method.lr", "not trained"),
        ({"model": {"path": "x", "dtype": "mixed"}}, "model.dtype", "use bfloat16"),
        (
            {"method": {"kind": "lora", "adapter": "oft"}, "export": {"form": "native"}},
            "method.adapter",
            'export.names = "diffusers"',
        ),
        ({"export": {"form": "diff", "names": "diffusers"}}, "export.form", "no words in diffusers names"),
        ({"method": {"kind": "lora", "stop": {"text_encoder": 5}}}, "method.stop", "not trained"),
        ({"method": {"kind": "lora", "stop": {"unet": 50}}}, "method.stop", "before steps = 100"),
        ({"method": {"kind": "lora", "train": ["unet", "unet"]}}, "method.train", "twice"),
        ({"memory": {"fused_back_pass": True}}, "memory.fused_back_pass", "full fine-tune"),
        (
            {"memory": {"recompute": ["mid_block"], "gradient_checkpointing": True}},
            *("memory.recompute", "leave out one of the two"),
        ),
        ({"memory": {"recompute": ["time_embedding"]}}, "memory.recompute[0]", "such as mid_block, up_blocks.0 or"),
        (
            {"optimizer": {"preset": "full"}},
            "optimizer.preset",
            'method.kind = "lora"; leave it out, and lora is chosen',
        ),
        (
            {"method": {"kind": "full", "train": ["unet", "text_encoder"]}, "optimizer": {"preset": "lora"}},
            "optimizer.preset",
            'method.kind = "full"; leave it out, and full-text-encoders is chosen',
        ),
        (
            {"optimizer": {"preset": "lora-text-encoders"}},
            "optimizer.preset",
            "no text encoder is trained: method.train = ['unet']; leave it out, and lora is chosen",
        ),
        (
            {"optimizer": {"preset": "never-freeze", "freeze_share": 0.5}},
            "optimizer.freeze_share",
            "prodigy_steps = 0 is never",
        ),
        ({"method": {"kind": "lora", "lr": {"unet": 0}}}, "method.lr.unet", "is left out of method.train"),
        ({"method": {"kind": "lora", "lr": {"unet": -0.5}}}, "method.lr.unet", "found -0.5; allowed: greater than 0"),
        ({"optimizer": {"lr": 0.0}}, "optimizer.lr", "leave it at 1"),
        ({"optimizer": {"d_coef": -1.0}}, "optimizer.d_coef", "greater than 0; it is a factor"),
        (
            {"method": {"kind": "lora", "train": BOTH, "stop": {"text_encoder": 5}}, "optimizer": {"d0": 1e-6}},
            "method.stop",
            "stops text_encoder after 5 steps, before its first useful one: d begins at optimizer.d0 = 1e-06",
        ),
    ],
)
def test_bad_values_are_named_with_what_was_found_and_what_is_allowed(
    changes: dict[str, Any], where: str, what: str
) -> None:
    assert what in problems(small(**changes))[where]


def test_the_preset_freezes_at_rest_from_a_quarter_of_the_steps_on_and_the_user_wins() -> None:
    optimizer = resolve(small(), "test").optimizer
    assert (optimizer.prodigy_steps, optimizer.freeze_share) == ("auto", 0.25)
    optimizer = resolve(small(optimizer={"prodigy_steps": 7}), "test").optimizer
    assert (optimizer.prodigy_steps, optimizer.freeze_share) == (7, 0.0)
    assert resolve(small(optimizer={"preset": "auto-freeze"}), "test").optimizer.prodigy_steps == "auto"
    assert resolve(small(method={"kind": "full"}), "test").optimizer.preset == "full"


@pytest.mark.parametrize(
    ("kind", "train", "preset"),
    [
        ("lora", ["unet"], "lora"),
        ("lora", BOTH, "lora-text-encoders"),
        ("full", ["unet"], "full"),
        ("full", BOTH, "full-text-encoders"),
    ],
)
def test_the_preset_that_fits_is_chosen_and_is_no_problem_when_it_is_named(
    kind: str, train: list[str], preset: str
) -> None:
    method = {"kind": kind, "train": train}
    chosen = resolve(small(method=method), "test").optimizer
    assert chosen.preset == preset
    assert resolve(small(method=method, optimizer={"preset": preset}), "test").optimizer == chosen
    for anyones in ("never-freeze", "auto-freeze"):
        assert resolve(small(method=method, optimizer={"preset": anyones}), "test").optimizer.preset == anyones


@pytest.mark.parametrize("train", ["unet", {"unet": 1}, [["unet"]], 3, []])
def test_networks_that_cannot_be_read_do_not_hide_behind_the_preset(train: Any) -> None:
    (where,) = problems(small(method={"kind": "lora", "train": train}))
    assert where.startswith("method.train")


@pytest.mark.parametrize(
    ("optimizer", "first"), [({"d0": 1e-4}, 1), ({"d0": 1e-5}, 7), ({"d0": 1e-6, "prodigy_steps": 3}, 72)]
)
def test_the_first_useful_step_is_the_earliest_that_a_network_may_stop_after(
    optimizer: dict[str, Any], first: int
) -> None:
    method = {"kind": "lora", "train": BOTH}
    resolve(small(method=method | {"stop": {"text_encoder": first}}, optimizer=optimizer), "test")
    if first > 1:
        found = problems(small(method=method | {"stop": {"text_encoder": first - 1}}, optimizer=optimizer))
        assert f"stop it at {first} or later" in found["method.stop"]
    warm = method | {"stop": {"text_encoder": 1}, "init_from": "a.safetensors"}
    resolve(small(method=warm, optimizer=optimizer), "test")


@given(d0=st.floats(1e-9, 1e-2), fixed=st.integers(1, 200))
def test_the_first_useful_step_is_where_a_weight_can_have_moved_enough(d0: float, fixed: int) -> None:
    def travel(steps: int) -> float:
        return sum(d0 * 2 ** (min(step, fixed - 1) / 4) for step in range(steps))

    first = first_useful_step(d0, fixed)
    assume(first < 10_000)
    assert travel(first) >= LEAST_TRAVEL * (1 - 1e-9)
    assert first == 1 or travel(first - 1) < LEAST_TRAVEL * (1 + 1e-9)


def test_a_share_beside_a_step_is_refused() -> None:
    found = problems(small(optimizer={"prodigy_steps": 7, "freeze_share": 0.5}))
    assert "prodigy_steps = 7 is the step itself" in found["optimizer.freeze_share"]


@pytest.mark.parametrize(
    ("override", "value"),
    [("steps=7", 7), ('name="x"', "x"), ("name=cats", "cats"), ("preview.seeds=[1, 2]", [1, 2]), ("a.b.c=true", True)],
)
def test_overrides_are_toml_values_or_bare_words(override: str, value: Any) -> None:
    table: Any = overridden({}, "test", [override]).table
    for name in override.partition("=")[0].split("."):
        table = table[name]
    assert table == value


def test_all_bad_overrides_are_told() -> None:
    given = ["steps", "steps.more=1", "=3"]
    with pytest.raises(UserError) as caught:
        resolve(small(), "test", given)
    assert [problem.where for problem in caught.value.problems] == ["--set steps", "--set steps.more=1", "--set =3"]


@pytest.mark.parametrize(
    ("content", "what"), [(b"a = ", "syntax"), (b"\xff\xfe", "UTF-8"), (b"name = x", "syntax")], ids=str
)
def test_files_that_are_not_toml_are_refused_in_one_line(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=what):
        read_config(path)
    with pytest.raises(UserError, match="no such file"):
        read_config(tmp_path / "other.toml")
    with pytest.raises(UserError, match="folder"):
        read_config(tmp_path)


def test_every_setting_is_described() -> None:
    def walk(model: type) -> None:
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            inner = [kind for kind in (field.annotation,) if hasattr(kind, "model_fields")]
            if inner:
                walk(inner[0])
            elif name not in ("kind", "model"):
                assert field.description, f"{model.__name__}.{name}"

    walk(Config)
    assert "data.folder[0].path" in all_settings()


def test_differences_name_the_setting() -> None:
    before, after = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4, "d": 3, "e": 5}}
    assert differences(before, after) == [("b.c", 2, 4), ("b.e", None, 5)]


def test_several_mistakes_deep_in_a_section_are_all_told() -> None:
    """One that is mended takes nothing from the next: they may stand in the same table."""
    about = {"licence": "x", "tags": "a", "author": 3}
    validation = {"folder": [{"path": "a", "captions": "x", "rpeats": 2}]}
    table = {
        "name": "x",
        "steps": 1,
        "model": {"path": "m"},
        "method": {"kind": "lora"},
        "data": {"folder": [{"path": "p"}]},
        "export": {"about": about},
        "validation": validation,
    }
    with pytest.raises(UserError) as raised:
        resolve(table, "test")
    told = {problem.where: problem.what for problem in raised.value.problems}
    assert told.keys() == {
        "export.about.licence",
        "export.about.tags",
        "export.about.author",
        "validation.folder[0].captions",
        "validation.folder[0].rpeats",
    }
    assert "did you mean `license`?" in told["export.about.licence"]
