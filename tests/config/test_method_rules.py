"""What adapters, losses and guidance cannot do together is refused with the reason, all in one round."""

from __future__ import annotations

from typing import Any

import pytest

from sdtrain.config.read import resolve
from sdtrain.errors import UserError


def table(**sections: Any) -> dict[str, Any]:
    plain = {"name": "a", "steps": 10, "model": {"path": "builtin:tiny-sdxl"}, "method": {"kind": "lora"}}
    return plain | {"data": {"folder": [{"path": "pictures"}]}} | sections


def told(**sections: Any) -> list[tuple[str, str]]:
    try:
        resolve(table(**sections), "test")
    except UserError as error:
        return [(problem.where, problem.what) for problem in error.problems]
    return []


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"method": {"kind": "lora", "dropout": 1.0}}, "method.dropout", "found 1.0"),
    ({"method": {"kind": "lora", "rank_dropout": -0.1}}, "method.rank_dropout", "found -0.1"),
    ({"method": {"kind": "lora", "module_dropout": 1}}, "method.module_dropout", "found 1"),
    ({"method": {"kind": "lora", "scale_weight_norms": -1}}, "method.scale_weight_norms", "found -1"),
    ({"method": {"kind": "lora", "layer_weights": {"*": -1}}}, 'method.layer_weights."*"', "found -1"),
    ({"method": {"kind": "lora", "layer_weights": 0.5}}, "method.layer_weights", "found 0.5"),
    (
        {"method": {"kind": "lora", "adapter": "loha", "dropout": 0.1}},
        "method.dropout",
        "0.1, but loha has no place for it; it is for lora and rslora, or use module_dropout",
    ),
    (
        {"method": {"kind": "lora", "adapter": "dora", "rank_dropout": 0.1}},
        "method.rank_dropout",
        "0.1, but dora has no place for it; it is for lora and rslora",
    ),
    (
        {"method": {"kind": "lora", "adapter": "dora", "module_dropout": 0.1}},
        "method.module_dropout",
        "0.1, but dora changes weights by no product",
    ),
    (
        {"method": {"kind": "lora", "adapter": "dora", "scale_weight_norms": 1}},
        "method.scale_weight_norms",
        "1, but dora changes weights by no product",
    ),
    (
        {"method": {"kind": "lora", "adapter": "oft", "layer_weights": {"*": 0.5}}, "export": {"names": "diffusers"}},
        'method.layer_weights."*"',
        "0.5, but oft changes weights by no product that could be scaled; use 0 or 1",
    ),
    (
        {"method": {"kind": "full", "layer_weights": {"mid_block.*": 0.5}}},
        'method.layer_weights."mid_block.*"',
        "0.5, but all layers of a full fine-tune move at one pace; 0 freezes a layer",
    ),
    (
        {"method": {"kind": "lora", "dropout": 0.1, "module_dropout": 0.1}, "memory": {"compile": True}},
        "memory.compile",
        "method.dropout and method.module_dropout would change it every step",
    ),
    ({"loss": {"huber_schedule": "snr"}}, "loss.huber_schedule", "snr, but loss.kind = l2 has no delta"),
    ({"loss": {"huber_schedule": "cosine", "kind": "huber"}}, "loss.huber_schedule", "found 'cosine'"),
    ({"loss": {"weighting": "debiased_estimation"}}, "loss.weighting", "found 'debiased_estimation'"),
    ({"preview": {"guidance_rescale": 1.5}}, "preview.guidance_rescale", "found 1.5"),
    (
        {"preview": {"guidance_rescale": 0.7, "guidance_scale": 1.0}},
        "preview.guidance_rescale",
        "0.7, but preview.guidance_scale = 1 leaves nothing to take back; set 0",
    ),
]


@pytest.mark.parametrize(("sections", "where", "what"), REFUSED)
def test_each_is_refused_alone_and_with_its_reason(sections: dict[str, Any], where: str, what: str) -> None:
    ((place, text),) = told(**sections)
    assert place == where
    assert what in text


def test_all_are_told_together() -> None:
    method = {"kind": "lora", "adapter": "dora", "dropout": 0.1, "module_dropout": 0.1, "scale_weight_norms": 1.0}
    found = told(
        method=method,
        loss={"huber_schedule": "snr"},
        preview={"guidance_scale": 1.0, "guidance_rescale": 0.5},
        memory={"compile": True},
    )
    assert [where for where, _ in found] == [
        "method.dropout",
        "method.module_dropout",
        "method.scale_weight_norms",
        "loss.huber_schedule",
        "preview.guidance_rescale",
        "memory.compile",
    ]


@pytest.mark.parametrize(
    "sections",
    [
        {"method": {"kind": "lora", "dropout": 0.1, "rank_dropout": 0.1, "module_dropout": 0.1}},
        {"method": {"kind": "lora", "adapter": "lokr", "module_dropout": 0.1, "scale_weight_norms": 1.0}},
        {"method": {"kind": "lora", "adapter": "dora", "layer_weights": {"mid_block.*": 0, "*to_q": 1}}},
        {"method": {"kind": "full", "layer_weights": {"mid_block.*": 0, "mid_block.resnets.*": 1}}},
        {"loss": {"kind": "smooth_l1", "huber_schedule": "exponential", "weighting": "debiased_kohya"}},
        {"preview": {"guidance_rescale": 0.7}},
    ],
)
def test_what_goes_together_is_let_through(sections: dict[str, Any]) -> None:
    assert told(**sections) == []


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("network_dropout", "method.dropout"),
        ("down_lr_weight", "method.layer_weights"),
        ("huber_c", "loss.huber_delta"),
        ("debiased_estimation_loss", "debiased_kohya"),
        ("scale_v_pred_loss_like_noise_pred", "scale_v_like_noise"),
    ],
)
def test_names_of_sd_scripts_are_answered_with_ours(setting: str, hint: str) -> None:
    ((_, text),) = told(**{setting: 0.1})
    assert hint in text


def test_a_weighting_for_v_is_refused_for_a_model_that_predicts_epsilon(tmp_path: Any) -> None:
    import json
    import shutil

    from sdtrain.config.draft import draft_of
    from sdtrain.config.read import overridden
    from sdtrain.files.locations import BUILTIN_FOLDER
    from sdtrain.training.start import inspect_run

    base = tmp_path / "epsilon"
    shutil.copytree(BUILTIN_FOLDER / "tiny-sdxl", base)
    path = base / "scheduler" / "scheduler_config.json"
    changed = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    for model in (str(base), "builtin:tiny-sdxl"):
        sections: dict[str, Any] = {"model": {"path": model}, "loss": {"weighting": "scale_v_like_noise"}}
        sections |= {"data": {"resolution_px": 64, "folder": [{"path": "builtin:quickstart"}]}}
        draft = draft_of(overridden(table(**sections), "test", ()))
        if model != str(base):
            inspect_run(draft, decode=False)
            continue
        with pytest.raises(UserError, match="the model predicts epsilon, whose error is that of the noise already"):
            inspect_run(draft, decode=False)
