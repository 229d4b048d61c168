"""Answers to the options about steps, step sizes, loss, noise, previews, saving, logs and machines."""

from __future__ import annotations

from sdtrain.config.kohya.answers import Answers, becomes, missing, needless

_NO_SCHEDULE = "there is no schedule to choose: Schedule-Free averaging takes its place; leave it out"
_NO_CLIPPING = (
    "gradient clipping has no effect on this optimizer, whose update does not depend on the gradient's scale; "
    "leave it out"
)
_NO_RATE = "there is no learning rate to choose: the optimizer estimates its step size d; leave it out"
_WEIGHTS = ", or weigh networks against each other with `method.lr`"
_BUILT_IN = "Prodigy + Schedule-Free is built in; its values are in [optimizer]"
_ATTENTION = "PyTorch's own fast attention is used"
_LOGS = "each step is a line of the run's log.jsonl"
_METADATA = "a file says how it was trained, and what [export.about] says"
_HUB = "no training uploads anything; `sdtrain push RUN REPO` does afterwards"
_ONE_PROCESS = "a run is one process on one device"
_RESUME = "`sdtrain fit CONFIG --resume` goes on from this run's own states; those of other tools are not read"
_RUN_FOLDER = "a run's folder holds its config, states and weights"

STEPS_AND_RATES: Answers = {
    **becomes("steps", "max_train_steps"),
    **becomes("steps", "max_train_epochs", "epoch", "epochs", why="a run is measured in steps"),
    **becomes("seed", "seed"),
    **needless(_NO_RATE, "learning_rate"),
    **needless(
        _NO_RATE + _WEIGHTS,
        *("unet_lr", "text_encoder_lr", "text_encoder_lr1", "text_encoder_lr2"),
        *("learning_rate_te", "learning_rate_te1", "learning_rate_te2"),
    ),
    **needless(
        _NO_SCHEDULE,
        *("lr_scheduler", "lr_scheduler_type", "lr_scheduler_args", "lr_scheduler_num_cycles", "lr_scheduler_power"),
        *("lr_scheduler_timescale", "lr_scheduler_min_lr_ratio", "lr_warmup", "lr_warmup_steps", "lr_decay_steps"),
        *("lr_warmup_steps_ratio", "lr_restart_cycles", "lr_warmup_ratio"),
    ),
    **needless(_NO_CLIPPING, "max_grad_norm"),
    **needless(
        _BUILT_IN,
        *("optimizer_type", "optimizer", "optimizer_args", "use_8bit_adam", "use_lion_optimizer"),
        *("optimizer_schedulefree_wrapper", "schedulefree_wrapper_args", "prodigy_d0", "prodigy_d_coef"),
    ),
    **missing(
        "epochs are drawn anew; a run begins at its first step",
        *("skip_until_initial_step", "initial_epoch", "initial_step"),
    ),
    **missing(_RESUME, "resume"),
}

OBJECTIVE: Answers = {
    **becomes("loss.kind", "loss_type"),
    **becomes("loss.huber_delta", "huber_c"),
    **becomes("loss.min_snr_gamma", "min_snr_gamma", why='with loss.weighting = "min_snr"'),
    **becomes("loss.weighting", "debiased_estimation_loss", why='"debiased_kohya", or "debiased" as in the paper'),
    **becomes("loss.weighting", "scale_v_pred_loss_like_noise_pred", why='"scale_v_like_noise"'),
    **becomes("noise.offset", "noise_offset"),
    **becomes("noise.input_perturbation", "ip_noise_gamma"),
    **becomes("noise.pyramid_discount", "multires_noise_discount", "multires_noise_iterations"),
    **becomes("timesteps.first", "min_timestep"),
    **becomes("timesteps.last", "max_timestep", why="the last that is trained, so 1000 is 999"),
    **needless("what is set in [noise] is used", "noise_offset_type"),
    **missing("delta follows huber_schedule alone", "huber_scale"),
    **missing("the error of v is not added to that of the noise", "v_pred_like_loss"),
    **missing(
        "the strength of the noise is the same for every picture",
        *("adaptive_noise_scale", "noise_offset_random_strength", "ip_noise_gamma_random_strength"),
    ),
    **missing(
        "there is no contrastive loss",
        *("enable_contrastive", "negative_sampling_method", "noise_strength", "contrastive_weight"),
        "contrastive_warmup_steps",
    ),
}

OUTPUT: Answers = {
    **becomes("name", "output_name"),
    **becomes("output", "output_dir"),
    **becomes("checkpoint.every", "save_every_n_steps", "save_every_n_epochs"),
    **becomes("checkpoint.keep", "save_last_n_epochs", "save_last_n_steps"),
    **becomes("checkpoint.keep", "save_last_n_epochs_state", "save_last_n_steps_state", "keep_only_last_n_checkpoints"),
    **becomes("export.dtype", "save_precision"),
    **becomes("preview.every", "sample_every_n_steps", "sample_every_n_epochs"),
    **becomes("preview.prompts", "sample_prompts"),
    **becomes("preview.num_inference_steps", "sample_steps"),
    **becomes("preview.sampler", "sample_sampler"),
    **needless("the base model's pictures stand beside each preview", "sample_at_first"),
    **needless("states are saved with every checkpoint and at the end", "save_state", "save_state_on_train_end"),
    **needless("files are .safetensors; `sdtrain export` writes other layouts", "save_model_as", "use_safetensors"),
    **needless("the log holds every step", "logging_dir", "log_prefix", "log_config"),
    **missing("checkpoint.every sets how often states are saved", "save_n_epoch_ratio"),
    **missing(
        _LOGS,
        *("log_with", "log_tracker_name", "log_tracker_config", "use_wandb", "wandb_api_key", "wandb_run_name"),
    ),
    **becomes("export.about.author", "metadata_author"),
    **becomes("export.about.license", "metadata_license"),
    **becomes("export.about.description", "metadata_description"),
    **becomes("export.about.usage_hint", "metadata_usage_hint"),
    **becomes("export.about.tags", "metadata_tags", why="a list"),
    **becomes("export.about.trigger_words", "metadata_trigger_phrase", why="a list"),
    **becomes("export.about.thumbnail", "metadata_thumbnail", why="the path of a picture"),
    **needless("the title of a file is the name of its run", "metadata_title"),
    **missing(
        _METADATA,
        *("training_comment", "no_metadata", "metadata_merged_from"),
        *("metadata_preprocessor", "metadata_is_negative_embedding"),
    ),
    **missing(
        _HUB,
        *("huggingface_repo_id", "huggingface_repo_type", "huggingface_path_in_repo", "huggingface_token"),
        *("huggingface_repo_visibility", "save_state_to_huggingface", "resume_from_huggingface", "async_upload"),
    ),
    **needless(_RUN_FOLDER, "config_file", "output_config", "save_as_bool"),
    **needless(
        "nothing is printed but a line of progress", "console_log_level", "console_log_file", "console_log_simple"
    ),
}

MACHINE: Answers = {
    **becomes("memory.gradient_checkpointing", "gradient_checkpointing"),
    **becomes("memory.compile", "torch_compile"),
    **becomes("memory.fused_back_pass", "fused_backward_pass"),
    **needless("memory.fused_back_pass updates each weight by itself", "fused_optimizer_groups"),
    **needless(_ATTENTION, "xformers", "sdpa", "mem_eff_attn", "attn_mode", "diffusers_xformers", "split_attn"),
    **needless("memory.compile needs no further choice", "dynamo_backend", "dynamo_mode", "dynamo_use_fullgraph"),
    **needless("memory.compile needs no further choice", "dynamo_use_dynamic"),
    **needless("models that have done their work leave the card by themselves", "lowram", "lowvram", "highvram"),
    **needless(
        "there is no launcher; threads follow the machine (OMP_NUM_THREADS)",
        *("num_cpu_threads_per_process", "extra_accelerate_launch_args", "main_process_port", "additional_parameters"),
    ),
    **missing(
        _ONE_PROCESS,
        *("multi_gpu", "num_processes", "num_machines", "gpu_ids", "ddp_timeout", "ddp_gradient_as_bucket_view"),
        *("ddp_static_graph", "deepspeed", "zero_stage", "offload_optimizer_device", "offload_optimizer_nvme_path"),
        *("offload_param_device", "offload_param_nvme_path", "zero3_init_flag", "zero3_save_16bit_model"),
        *("fp16_master_weights_and_gradients", "machine_rank", "main_process_ip"),
    ),
    **missing(
        "activations are computed again, not moved", "cpu_offload_checkpointing", "unsloth_offload_checkpointing"
    ),
}
