"""Configs of sd-scripts and kohya_ss become configs of ours that mean the same."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from sdtrain.config.kohya.importing.convert import Imported, convert
from sdtrain.config.kohya.importing.options import foreign_config
from sdtrain.config.kohya.known import KNOWN, NETWORK_ARGS, OPTIMIZER_ARGS
from sdtrain.config.mistakes import all_settings
from sdtrain.config.read import resolve
from sdtrain.config.schema import Config, FullConfig, LoraConfig
from sdtrain.errors import UserError

GUI = {
    "LoRA_type": "Standard",
    "max_resolution": "1024,1024",
    "learning_rate": 1.0,
    "unet_lr": 1.0,
    "text_encoder_lr": 1.0,
    "network_dim": 32,
    "network_alpha": 16,
    "train_batch_size": 8,
    "enable_bucket": True,
    "sdxl": True,
}
"""A little of what kohya_ss saves."""

SCRIPT = """
[model_arguments]
pretrained_model_name_or_path = "models/sd_xl_base_1.0.safetensors"
[network]
network_module = "networks.lora"
network_dim = 8
network_alpha = 4
network_train_unet_only = true
[training]
max_train_steps = 900
train_batch_size = 2
resolution = "1024,1024"
enable_bucket = true
"""
"""A little of what sd-scripts reads, in sections of any name."""


def imported(*tables: dict[str, Any], pictures: int | None = None) -> Imported:
    named = [(f"file{index}.json", table) for index, table in enumerate(tables)]
    return convert(foreign_config(named), lambda path: pictures)


def meaning(*tables: dict[str, Any], pictures: int | None = None) -> Config:
    """The config that our own reader makes of what was written."""
    return resolve(tomllib.loads(imported(*tables, pictures=pictures).text), "imported")


def script(**more: Any) -> dict[str, Any]:
    return {**tomllib.loads(SCRIPT), "more": more}


def lora(config: Config) -> LoraConfig:
    assert isinstance(config.method, LoraConfig)
    return config.method


def sort_of(result: Imported, place: str) -> tuple[str, str]:
    return next((one.sort, one.text) for one in result.outcomes if one.option.place == place)


def test_a_training_of_sd_scripts_keeps_its_numbers() -> None:
    config = meaning(script(seed=7, gradient_accumulation_steps=3, gradient_checkpointing=True, max_token_length=225))
    assert config.model.path == "models/sd_xl_base_1.0.safetensors"
    assert (config.steps, config.seed) == (900, 7)
    assert (lora(config).rank, lora(config).alpha, lora(config).train) == (8, 4.0, ["unet"])
    assert (config.data.batch_size, config.data.gradient_accumulation, config.data.resolution_px) == (2, 3, 1024)
    assert config.data.caption_chunks == 3
    assert config.memory.gradient_checkpointing
    assert config.optimizer.preset == "lora"


def test_numbers_that_kohya_ss_writes_as_text_are_numbers() -> None:
    config = meaning(
        GUI | {"seed": "12345", "train_batch_size": "2", "noise_offset": "0.05", "max_token_length": "150"}
    )
    assert (config.seed, config.data.batch_size, config.noise.offset, config.data.caption_chunks) == (12345, 2, 0.05, 2)


@pytest.mark.parametrize(
    ("options", "section", "setting", "value"),
    [
        ({"max_resolution": "512,650"}, "data", "resolution_px", 577),
        ({"max_resolution": "768"}, "data", "resolution_px", 768),
        ({"bucket_reso_steps": 32}, "data", "bucket_step_px", 32),
        ({"bucket_reso_steps": 1}, "data", "bucket_step_px", 8),
        ({"enable_bucket": False}, "data", "max_aspect", 1.0),
        ({"min_bucket_reso": 256, "max_bucket_reso": 2048}, "data", "max_aspect", 4.0),
        ({"min_bucket_reso": 640, "max_bucket_reso": 2048}, "data", "max_aspect", 2.56),
        ({"min_bucket_reso": 256, "max_bucket_reso": 1024}, "data", "max_aspect", 2.5),
        ({"caption_dropout_rate": 0.1}, "data", "caption_dropout", 0.1),
        ({"min_snr_gamma": 5}, "loss", "weighting", "min_snr"),
        ({"min_snr_gamma": 8}, "loss", "min_snr_gamma", 8.0),
        ({"debiased_estimation_loss": True}, "loss", "weighting", "debiased_kohya"),
        (
            {"scale_v_pred_loss_like_noise_pred": True, "v_parameterization": True},
            "loss",
            "weighting",
            "scale_v_like_noise",
        ),
        ({"loss_type": "smooth_l1"}, "loss", "kind", "smooth_l1"),
        ({"loss_type": "smooth_l1"}, "loss", "huber_schedule", "snr"),
        ({"loss_type": "huber", "huber_schedule": "exponential"}, "loss", "huber_schedule", "exponential"),
        ({"loss_type": "l2", "huber_schedule": "exponential"}, "loss", "huber_schedule", "constant"),
        ({"network_dropout": 0.3}, "method", "dropout", 0.3),
        ({"rank_dropout": "0.1"}, "method", "rank_dropout", 0.1),
        ({"module_dropout": 0.2}, "method", "module_dropout", 0.2),
        ({"scale_weight_norms": 1}, "method", "scale_weight_norms", 1.0),
        ({"loss_type": "huber", "huber_c": 0.2}, "loss", "huber_delta", 0.2),
        ({"huber_c": 0.2}, "loss", "huber_delta", 0.1),
        ({"noise_offset": 0.05, "noise_offset_type": "Original"}, "noise", "offset", 0.05),
        ({"noise_offset": 0.05, "noise_offset_type": "Multires"}, "noise", "offset", 0.0),
        ({"multires_noise_iterations": 8, "multires_noise_discount": 0.2}, "noise", "pyramid_discount", 0.2),
        ({"multires_noise_iterations": 0, "multires_noise_discount": 0.2}, "noise", "pyramid_discount", 0.0),
        (
            {"multires_noise_iterations": 8, "multires_noise_discount": 0.2, "noise_offset_type": "Original"},
            "noise",
            "pyramid_discount",
            0.0,
        ),
        ({"ip_noise_gamma": 0.1}, "noise", "input_perturbation", 0.1),
        ({"min_timestep": 100, "max_timestep": 900}, "timesteps", "first", 100),
        ({"min_timestep": 100, "max_timestep": 900}, "timesteps", "last", 899),
        ({"max_timestep": 1000}, "timesteps", "last", 999),
        ({"mixed_precision": "bf16"}, "model", "dtype", "bfloat16"),
        ({"mixed_precision": "no"}, "model", "dtype", "float32"),
        ({"mixed_precision": "fp16"}, "model", "dtype", "auto"),
        ({"v_parameterization": True, "zero_terminal_snr": True}, "model", "prediction", "v_prediction"),
        ({"v_parameterization": True, "zero_terminal_snr": True}, "model", "zero_terminal_snr", "on"),
        ({"vae": "vae.safetensors"}, "model", "vae", "vae.safetensors"),
        ({"save_precision": "fp16"}, "export", "dtype", "float16"),
        ({"save_every_n_steps": 250}, "checkpoint", "every", 250),
        ({"save_every_n_steps": 250, "save_last_n_steps": 1000}, "checkpoint", "keep", 4),
        ({"save_last_n_epochs": 3}, "checkpoint", "keep", 3),
        ({"sample_every_n_steps": 50}, "preview", "every", 50),
        ({"sample_prompts": "a cat"}, "preview", "prompts", ["a cat"]),
        ({"sample_sampler": "k_euler_a"}, "preview", "sampler", "euler_a"),
        ({"sample_sampler": "ddim"}, "preview", "sampler", "euler"),
        ({"torch_compile": True}, "memory", "compile", True),
        ({"output_dir": "out"}, "output", "", "out"),
        ({"output_name": "My cat, v1"}, "name", "", "My-cat-v1"),
    ],
)
def test_an_option_becomes_the_setting_that_means_the_same(
    options: dict[str, Any], section: str, setting: str, value: Any
) -> None:
    plain = meaning(GUI | options).model_dump()
    assert (plain[section][setting] if setting else plain[section]) == value


@pytest.mark.parametrize(
    ("options", "adapter", "targets"),
    [
        ({"network_module": "networks.lora"}, "lora", "attention+ff"),
        ({"network_module": "networks.lora", "network_args": ["conv_dim=4", "conv_alpha=2"]}, "lora", "all"),
        ({"network_module": "lycoris.kohya", "network_args": ["algo=locon"]}, "lora", "all"),
        ({"network_module": "lycoris.kohya", "network_args": ["algo=loha", "preset=attn-mlp"]}, "loha", "attention+ff"),
        ({"network_module": "lycoris.kohya", "network_args": "algo=lokr preset=attn-only"}, "lokr", "attention"),
        ({"network_module": "lycoris.kohya", "network_args": ["algo=lora", "dora_wd=True"]}, "dora", "all"),
        ({"network_module": "lycoris.kohya", "network_args": ["algo=diag-oft"]}, "oft", "all-linear"),
        ({"network_module": "networks.loha"}, "loha", "attention+ff"),
        ({"LoRA_type": "LyCORIS/LoKr", "LyCORIS_preset": "full-lin"}, "lokr", "all-linear"),
        ({"LoRA_type": "Standard", "conv_dim": 32}, "lora", "attention+ff"),
        ({"LoRA_type": "Kohya LoCon", "conv_dim": 32}, "lora", "all"),
        ({"LoRA_type": "LyCORIS/iA3"}, "lora", "all"),
    ],
)
def test_networks_become_adapters(options: dict[str, Any], adapter: str, targets: str) -> None:
    config = meaning({"network_dim": 8, "network_alpha": 8, **options})
    assert (lora(config).adapter, lora(config).targets) == (adapter, targets)
    assert config.export.names == ("diffusers" if adapter == "oft" else "sd-scripts")


def test_ranks_of_convolutions_are_kept() -> None:
    config = meaning({"network_module": "networks.lora", "network_args": ["conv_dim=4", "conv_alpha=2"]})
    assert (lora(config).ranks, lora(config).alphas) == ({"*conv*": 4}, {"*conv*": 2.0})


def test_what_sd_scripts_takes_where_nothing_is_said_is_written_out() -> None:
    config = meaning({"network_module": "networks.lora", "resolution": 1024})
    assert (lora(config).rank, lora(config).alpha, config.steps) == (4, 1.0, 1600)
    assert (config.data.batch_size, config.data.max_aspect) == (1, 1.0)


@pytest.mark.parametrize(
    ("options", "train", "weights"),
    [
        ({}, ["unet", "text_encoder", "text_encoder_2"], {}),
        ({"unet_lr": 1e-4, "text_encoder_lr": 5e-5}, ["unet", "text_encoder", "text_encoder_2"], 0.5),
        (
            {"unet_lr": "", "learning_rate": 1e-4, "text_encoder_lr": 5e-5},
            ["unet", "text_encoder", "text_encoder_2"],
            0.5,
        ),
        ({"text_encoder_lr": 0}, ["unet"], {}),
        ({"unet_lr": 0}, ["text_encoder", "text_encoder_2"], {}),
        ({"unet_lr": 0, "text_encoder_lr": 0}, ["unet", "text_encoder", "text_encoder_2"], {}),
        (
            {"text_encoder_lr": [0.5, 0.25]},
            ["unet", "text_encoder", "text_encoder_2"],
            {"text_encoder": 0.5, "text_encoder_2": 0.25},
        ),
        ({"network_train_unet_only": True}, ["unet"], {}),
        ({"network_train_text_encoder_only": True}, ["text_encoder", "text_encoder_2"], {}),
        ({"sdxl_cache_text_encoder_outputs": True}, ["unet"], {}),
        ({"sdxl": False}, ["unet", "text_encoder"], {}),
        ({"sdxl": "", "pretrained_model_name_or_path": "v1-5-pruned.safetensors"}, ["unet", "text_encoder"], {}),
        ({"sdxl": "", "max_resolution": "512,512"}, ["unet", "text_encoder"], {}),
    ],
)
def test_learning_rates_say_what_is_trained_and_become_weights(
    options: dict[str, Any], train: list[str], weights: Any
) -> None:
    config = meaning(GUI | options)
    if isinstance(weights, float):
        weights = dict.fromkeys(["text_encoder", "text_encoder_2"], weights)
    assert (config.method.train, config.method.lr) == (train, weights)
    assert config.optimizer.preset == ("lora" if train == ["unet"] else "lora-text-encoders")


@pytest.mark.parametrize(
    ("options", "train", "weights"),
    [
        ({}, ["unet"], {}),
        ({"train_text_encoder": True}, ["unet", "text_encoder", "text_encoder_2"], {}),
        (
            {"train_text_encoder": True, "learning_rate_te1": 5e-6, "learning_rate_te2": 0},
            ["unet", "text_encoder"],
            {"text_encoder": 0.5},
        ),
    ],
)
def test_a_file_without_a_network_trains_all_weights(
    options: dict[str, Any], train: list[str], weights: dict[str, float]
) -> None:
    config = meaning({"sdxl_checkbox": True, "learning_rate": 1e-5, "mixed_precision": "bf16", **options})
    assert isinstance(config.method, FullConfig)
    assert (config.method.train, config.method.lr, config.model.dtype) == (train, weights, "mixed")
    assert meaning({"learning_rate": 1e-5, "full_bf16": True}).model.dtype == "bfloat16"


def test_a_base_in_eight_bits_is_brought_over_to_adapters() -> None:
    assert meaning(GUI | {"fp8_base": True}).model.base_precision == "fp8"
    assert meaning(GUI | {"fp8_base": False}).model.base_precision == "full"
    assert meaning({"learning_rate": 1e-5, "fp8_base": True}).model.base_precision == "full"


def test_learning_rates_and_schedules_are_answered_with_the_reason() -> None:
    result = imported(GUI | {"lr_scheduler": "cosine", "max_grad_norm": 1.0})
    assert sort_of(result, "learning_rate")[0] == sort_of(result, "lr_scheduler")[0] == "not needed"
    assert "estimates its step size d" in sort_of(result, "unet_lr")[1]
    assert "Schedule-Free" in sort_of(result, "lr_scheduler")[1]


def test_epochs_become_steps_where_the_pictures_are_here() -> None:
    table = script(max_train_epochs=10, save_every_n_epochs=2, sample_every_n_epochs=1, train_data_dir="somewhere")
    config = meaning(table, pictures=25)
    assert config.steps == 10 * 13
    assert (config.checkpoint.every, config.preview.every) == (26, 13)


def test_epochs_are_told_in_a_comment_where_the_pictures_are_not_here() -> None:
    result = imported(script(max_train_epochs=10, save_every_n_epochs=2, train_data_dir="somewhere"))
    assert tomllib.loads(result.text)["steps"] == 900
    assert "stands in for the steps of 10 epochs" in " ".join(result.text.replace("#", "").split())
    assert sort_of(result, "more.save_every_n_epochs")[0] == "no counterpart"


def test_folders_named_by_their_repeats_become_folders(tmp_path: Path) -> None:
    for name in ("10_sks dog", "2_other", "0_none", "no number"):
        (tmp_path / name).mkdir()
    config = meaning(GUI | {"train_data_dir": str(tmp_path)}, pictures=6)
    assert [(folder.path, folder.repeats) for folder in config.data.folder] == [
        (f"{tmp_path}/10_sks dog", 10),
        (f"{tmp_path}/2_other", 2),
    ]


def test_regularisation_folders_of_the_command_line_are_folders_that_say_so(tmp_path: Path) -> None:
    for name in ("train/10_sks dog", "reg/2_dog"):
        (tmp_path / name).mkdir(parents=True)
    given = {"train_data_dir": f"{tmp_path}/train", "reg_data_dir": f"{tmp_path}/reg", "prior_loss_weight": 0.5}
    result = imported(script(**given))
    data = resolve(tomllib.loads(result.text), "test").data
    assert [(folder.path, folder.repeats, folder.regularisation, folder.loss_weight) for folder in data.folder] == [
        (f"{tmp_path}/train/10_sks dog", 10, False, 1.0),
        (f"{tmp_path}/reg/2_dog", 2, True, 0.5),
    ]
    assert sort_of(result, "more.reg_data_dir")[0] == "setting"
    empty = imported(script(train_data_dir=f"{tmp_path}/train", reg_data_dir=""))
    assert len(resolve(tomllib.loads(empty.text), "test").data.folder) == 1


def test_random_crops_become_crops_that_are_cached() -> None:
    result = imported(script(train_data_dir="there", random_crop=True))
    assert [one.crops for one in resolve(tomllib.loads(result.text), "test").data.folder] == [4]
    assert sort_of(result, "more.random_crop")[0] == "setting"
    without = imported(script(train_data_dir="there", random_crop=False))
    assert [one.crops for one in resolve(tomllib.loads(without.text), "test").data.folder] == [1]


DATASETS = {
    "general": {"flip_aug": True, "caption_extension": ".txt", "keep_tokens": 1},
    "datasets": [
        {
            "resolution": 768,
            "batch_size": 3,
            "num_repeats": 2,
            "subsets": [
                {"image_dir": "one", "class_tokens": "sks dog"},
                {"image_dir": "two", "num_repeats": 5},
                {"image_dir": "regular", "is_reg": True},
            ],
        },
        {"resolution": [1024, 1024], "subsets": [{"image_dir": "one"}, {"image_dir": "three"}]},
    ],
}


def test_a_dataset_config_counts_before_the_training_beside_it() -> None:
    result = imported(script(train_data_dir="unused"), DATASETS)
    data = resolve(tomllib.loads(result.text), "test").data
    assert [(folder.path, folder.repeats) for folder in data.folder] == [
        ("one", 2),
        ("two", 5),
        ("regular", 2),
        ("three", 1),
    ]
    assert [folder.regularisation for folder in data.folder] == [False, False, True, False]
    assert (data.resolution_px, data.batch_size) == (768, 3)
    assert all(folder.flip for folder in data.folder)
    assert sort_of(result, "file0.json: more.train_data_dir")[0] == "not needed"
    counts = ("not needed", "file1.json: datasets[0].batch_size counts, there too")
    assert sort_of(result, "file0.json: training.train_batch_size") == counts
    lost = {one.option.place for one in result.outcomes if one.sort == "no counterpart"}
    assert lost == {
        "file1.json: general.keep_tokens",
        "file1.json: datasets[0].subsets[0].class_tokens",
        "file1.json: datasets[1].resolution",
        "file1.json: datasets[1].subsets[0].image_dir",
    }


def test_a_folder_that_switches_off_what_the_others_do_is_told() -> None:
    folders = [{"image_dir": "one", "caption_dropout_rate": 0.1}, {"image_dir": "two", "caption_dropout_rate": 0}]
    result = imported({"datasets": [{"subsets": folders}]})
    assert sort_of(result, "datasets[0].subsets[1].caption_dropout_rate")[0] == "no counterpart"


def test_masks_there_are_masks_here() -> None:
    subsets = [{"image_dir": "one", "conditioning_data_dir": "masks"}, {"image_dir": "two"}]
    config = meaning({"masked_loss": True, "alpha_mask": True, "datasets": [{"subsets": subsets}]})
    masks = [(folder.path, folder.masks, folder.mask_path) for folder in config.data.folder]
    assert masks == [("one", "folder", "masks"), ("two", "alpha", "")]


def test_captions_vary_as_they_did_folder_by_folder() -> None:
    general = {"shuffle_caption": True, "keep_tokens": 2, "caption_extension": ".caption"}
    folders = [
        {"image_dir": "one", "caption_prefix": "by somebody, ", "enable_wildcard": True},
        {"image_dir": "two", "shuffle_caption": False, "keep_tokens": 0, "caption_suffix": ", oil"},
        {
            "image_dir": "three",
            "keep_tokens_separator": "|||",
            "caption_tag_dropout_rate": 0.25,
            "caption_separator": ";",
        },
    ]
    one, two, three = meaning({"general": general, "datasets": [{"subsets": folders}]}).data.folder
    assert {folder.captions for folder in (one, two, three)} == {"caption"}
    assert (one.shuffle_tags, one.keep_tags, one.caption_prefix, one.wildcards) == (True, 2, "by somebody,", True)
    assert (two.shuffle_tags, two.keep_tags, two.caption_suffix) == (False, 0, ", oil")
    assert (three.keep_separator, three.tag_dropout, three.tag_separator) == ("|||", 0.25, ";")


DEFAULT_OF_SCRIPTS = "no caption_extension in the file; there it is .caption then"


@pytest.mark.parametrize(
    ("tables", "captions"),
    [
        ([script(train_data_dir="here")], "caption"),
        ([script(), {"datasets": [{"subsets": [{"image_dir": "one"}]}]}], "caption"),
        ([script(caption_extension=".txt"), {"datasets": [{"subsets": [{"image_dir": "one"}]}]}], "txt"),
        ([GUI | {"train_data_dir": "here"}], "txt"),
        ([GUI | {"train_data_dir": "here", "caption_extension": ""}], "caption"),
    ],
)
def test_captions_stand_where_they_stood_when_no_suffix_is_said(tables: list[dict[str, Any]], captions: str) -> None:
    (folder,) = meaning(*tables).data.folder
    assert folder.captions == captions
    assert (DEFAULT_OF_SCRIPTS in imported(*tables).text) == (captions == "caption")


def test_pictures_that_were_held_out_are_held_out() -> None:
    result = meaning(script(validation_split=0.1, validation_seed=7, validate_every_n_steps=50)).validation
    assert (result.share, result.seed, result.every) == (0.1, 7, 50)


def test_a_suffix_of_captions_that_is_not_read_is_told() -> None:
    result = imported(script(train_data_dir="here", caption_extension=".tags"))
    sort, why = sort_of(result, "more.caption_extension")
    assert (sort, why) == ("unreadable", '".txt" or ".caption"; rename the files')


def test_a_dataset_config_alone_invents_no_training() -> None:
    config = meaning(DATASETS)
    assert config.method == LoraConfig(kind="lora")


def test_arguments_of_prodigy_become_ours_and_those_of_others_do_not() -> None:
    arguments = "weight_decay=0.5 d_coef=2 d0=1e-5 decouple=True betas=0.9,0.999"
    optimizer = meaning(GUI | {"optimizer": "Prodigy", "optimizer_args": arguments}).optimizer
    assert (optimizer.weight_decay, optimizer.d_coef, optimizer.d0) == (0.5, 2.0, 1e-5)
    assert optimizer.betas == (0.9, 0.99)
    plain = meaning(GUI | {"optimizer": "AdamW8bit", "optimizer_args": arguments}).optimizer
    assert (plain.weight_decay, plain.d_coef) == (0.0, "auto")


def test_arguments_of_prodigy_plus_schedule_free_are_ours() -> None:
    table = script(
        optimizer_type="prodigyplus.ProdigyPlusScheduleFree",
        optimizer_args=[
            "betas=(0.95, 0.98)",
            "prodigy_steps=100",
            "split_groups=False",
            "beta3=None",
            "use_speed=True",
        ],
    )
    result = imported(table)
    optimizer = resolve(tomllib.loads(result.text), "test").optimizer
    assert (optimizer.betas, optimizer.prodigy_steps, optimizer.split_groups) == ((0.95, 0.98), 100, False)
    assert sort_of(result, "more.optimizer_args: use_speed")[0] == "unknown"


def test_prompts_bring_their_flags() -> None:
    text = "a cat --n blurry, dark --w 770 --h 512 --d 5 --l 7.5 --s 28\n# not this\na dog --d 3"
    preview = meaning(GUI | {"sample_prompts": text}).preview
    assert preview.prompts == ["a cat", "a dog"]
    assert (preview.negative_prompt, preview.width_px, preview.height_px) == ("blurry, dark", 768, 512)
    assert (preview.seeds, preview.guidance_scale, preview.num_inference_steps) == ([3, 5], 7.5, 28)


def test_prompts_are_read_from_their_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --w 512\n\n# no\n", encoding="utf-8")
    assert meaning(GUI | {"sample_prompts": str(tmp_path / "prompts.txt")}).preview.prompts == ["a cat"]
    assert sort_of(imported(GUI | {"sample_prompts": "gone/prompts.txt"}), "sample_prompts")[0] == "no counterpart"


def test_text_encoders_stop_where_they_did() -> None:
    base = {"learning_rate": 1e-5, "train_text_encoder": True, "sdxl": False, "max_train_steps": 1000}
    assert meaning(base | {"stop_text_encoder_training": 300}).method.stop == {"text_encoder": 300}
    assert meaning(base | {"stop_text_encoder_training_pct": 30}).method.stop == {"text_encoder": 300}
    assert meaning(base | {"stop_text_encoder_training": 1000}).method.stop == {}


def test_values_that_cannot_be_read_are_told_with_what_they_take() -> None:
    options = {"train_batch_size": "many", "seed": -1, "enable_bucket": "perhaps", "noise_offset": "inf"}
    result = imported(GUI | options)
    assert sort_of(result, "noise_offset") == ("unreadable", "a number from 0 on")
    assert sort_of(result, "train_batch_size") == ("unreadable", "a whole number from 1 to 1,000,000,000")
    assert sort_of(result, "seed") == ("unreadable", "a whole number from 0 on")
    assert sort_of(result, "enable_bucket") == ("unreadable", "true or false")
    assert "it takes a whole number from 1 to 1,000,000,000" in " ".join(result.text.split())


def test_a_setting_that_our_reader_refuses_is_left_out_and_told() -> None:
    result = imported(GUI | {"max_resolution": 64, "bucket_reso_steps": 128})
    assert sort_of(result, "bucket_reso_steps")[0] == "no counterpart"
    assert "is above data.resolution_px = 64" in sort_of(result, "bucket_reso_steps")[1]


def test_an_unknown_option_is_told_with_the_name_that_is_near() -> None:
    result = imported(GUI | {"network_dimm": 3, "zzz": 1})
    assert sort_of(result, "network_dimm") == ("unknown", "perhaps `network_dim` was meant")
    assert sort_of(result, "zzz") == ("unknown", "")


def test_of_an_option_that_stands_twice_the_last_counts() -> None:
    result = imported({"network_module": "networks.lora", "a": {"seed": 1}, "b": {"seed": 2}})
    assert tomllib.loads(result.text)["seed"] == 2
    assert sort_of(result, "a.seed") == ("not needed", "b.seed counts, there too")


def test_keys_to_other_services_are_not_copied() -> None:
    text = imported(GUI | {"wandb_api_key": "secret-one", "huggingface_token": "secret-two"}).text
    assert "wandb_api_key" in text
    assert "secret" not in text


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"flux1_checkbox": True}, "flux1_checkbox"),
        ({"LoRA_type": "Flux1"}, "LoRA_type"),
        ({"network_module": "networks.lora_sd3"}, "network_module"),
        ({"token_string": "sks"}, "token_string"),
    ],
)
def test_what_sdtrain_does_not_train_is_refused(options: dict[str, Any], place: str) -> None:
    with pytest.raises(UserError) as caught:
        imported(GUI | options)
    assert [problem.where for problem in caught.value.problems] == [place]


def test_json_and_toml_with_the_same_options_mean_the_same() -> None:
    table = tomllib.loads(SCRIPT)
    assert meaning(json.loads(json.dumps(table))) == meaning(table)


def test_learning_rates_of_blocks_are_told_to_be_written_as_weights_of_layers() -> None:
    result = imported(GUI | {"down_lr_weight": "1,0.5", "up_lr_weight": ""})
    assert sort_of(result, "down_lr_weight")[0] == "no counterpart"
    assert "method.layer_weights" in sort_of(result, "down_lr_weight")[1]
    assert sort_of(result, "up_lr_weight")[0] == "off"


def test_every_setting_that_an_answer_names_exists() -> None:
    named = {answer.setting for table in (KNOWN, NETWORK_ARGS, OPTIMIZER_ARGS) for answer in table.values()} - {""}
    assert named <= set(all_settings())


def test_what_the_author_says_is_brought_over() -> None:
    said = {
        "metadata_author": "Ada",
        "metadata_license": "CC-BY-4.0",
        "metadata_description": "rings",
        "metadata_usage_hint": "0.8",
        "metadata_tags": "rings, shapes",
        "metadata_trigger_phrase": "zorbit, a ring",
        "metadata_thumbnail": "ring.png",
    }
    about = meaning(GUI | said).export.about
    assert (about.author, about.license, about.description, about.usage_hint) == ("Ada", "CC-BY-4.0", "rings", "0.8")
    assert (about.tags, about.trigger_words, about.thumbnail) == (["rings", "shapes"], ["zorbit", "a ring"], "ring.png")
    inline = imported(GUI | {"metadata_thumbnail": "data:image/png;base64,AAAA"}).text
    assert "name the file of the picture" in inline
