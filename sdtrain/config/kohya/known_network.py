"""Answers to the options about the model and the network that is trained."""

from __future__ import annotations

from sdtrain.config.kohya.answers import Answers, becomes, missing, needless

_BLOCKS = "layers are chosen by patterns of their names: `method.ranks`, `method.alphas`, `method.targets`"
_PLUS = "the step size is found for all matrices of an adapter together"
_FORMULA = "the adapter is computed in one way only"
_OTHER_MODELS = "it belongs to another model; SDXL and Stable Diffusion 1.x and 2.x are trained"
_EMBEDDING = "sdtrain trains weights of networks, not embeddings (textual inversion)"

LAYER_RATES = ("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr", "network_reg_lrs")
"""Options that give blocks of the U-Net other learning rates than the rest."""

MODEL: Answers = {
    **becomes("model.path", "pretrained_model_name_or_path"),
    **becomes("model.vae", "vae"),
    **becomes("model.prediction", "v_parameterization", why='true is "v_prediction"'),
    **becomes("model.zero_terminal_snr", "zero_terminal_snr", why='true is "on"'),
    **becomes("model.dtype", "mixed_precision", "full_bf16", "full_fp16", why="bfloat16 in the place of float16"),
    **needless("the family of the model is read from its files", "v2", "sdxl", "sdxl_checkbox", "model_train_type"),
    **needless("the model is named by its path or hub id alone", "model_list"),
    **needless("tokenizers come from the model, `model.components` or the hub cache", "tokenizer_cache_dir"),
    **needless("the VAE encodes in float32", "no_half_vae", "sdxl_no_half_vae", "vae_dtype"),
    **needless("files are mapped into memory and read once", "disable_mmap_load_safetensors"),
    **becomes("model.base_precision", "fp8_base", "fp8_base_unet", why='true is "fp8"'),
    **missing("it is an option of other models; here `fp8` always has a scale an output", "fp8_scaled", "fp8_vl"),
    **missing("the text encoders are read at the layer that the model was trained with", "clip_skip"),
    **missing(
        _OTHER_MODELS,
        *("flux1_checkbox", "sd3_checkbox", "lumina_checkbox", "hunyuan_image_checkbox", "anima_checkbox"),
        *("ae", "clip_l", "clip_g", "t5xxl", "t5xxl_dtype", "t5xxl_device", "t5xxl_max_token_length"),
        *("apply_t5_attn_mask", "discrete_flow_shift", "model_prediction_type", "mode_scale"),
        *("guidance_scale", "logit_mean", "logit_std"),
        *("timestep_sampling", "sigmoid_scale", "weighting_scheme", "training_shift", "split_mode", "train_blocks"),
        *("flux1_cache_text_encoder_outputs", "flux1_cache_text_encoder_outputs_to_disk", "blocks_to_swap"),
        *("single_blocks_to_swap", "double_blocks_to_swap"),
    ),
    **missing(
        _EMBEDDING, "token_string", "init_word", "num_vectors_per_token", "use_object_template", "use_style_template"
    ),
}

NETWORK: Answers = {
    **becomes("method.kind", "network_module", "LoRA_type", why='"lora" or "full"'),
    **becomes("method.adapter", "lycoris_algo", "algo", "dora_wd", "use_dora", "rs_lora", "use_rslora"),
    **becomes("method.rank", "network_dim"),
    **becomes("method.alpha", "network_alpha"),
    **becomes("method.ranks", "conv_dim", why='of the convolutions, `{ "*conv*" = 8 }`'),
    **becomes("method.alphas", "conv_alpha", why='of the convolutions, `{ "*conv*" = 4 }`'),
    **becomes("method.targets", "LyCORIS_preset"),
    **becomes("method.init_from", "network_weights", "lora_network_weights"),
    **becomes("method.train", "network_train_unet_only", "network_train_text_encoder_only", "train_text_encoder"),
    **becomes("method.stop", "stop_text_encoder_training", "stop_text_encoder_training_pct"),
    **needless("adapters are named by their settings in [method]", "network_args"),
    **missing("method.rank is to be that of the file; `sdtrain info FILE` tells it", "dim_from_weights"),
    **becomes("method.dropout", "network_dropout", "dropout"),
    **becomes("method.rank_dropout", "rank_dropout"),
    **becomes("method.module_dropout", "module_dropout"),
    **becomes("method.scale_weight_norms", "scale_weight_norms"),
    **missing("ranks that are left out are made up for by a factor always", "rank_dropout_scale"),
    **missing("merge them first: `sdtrain merge BASE LORA --out FILE`", "base_weights", "base_weights_multiplier"),
    **missing(
        _BLOCKS,
        *("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "conv_dims", "conv_alphas"),
        *("in_dims", "emb_dims", "train_block_indices", "include_patterns", "exclude_patterns", "network_reg_dims"),
        *("network_reg_alphas", "train_norm"),
    ),
    **becomes("method.layer_weights", *LAYER_RATES, why="with patterns such as `down_blocks.*`"),
    **missing("no weight is too small to count", "block_lr_zero_threshold"),
    **missing(_PLUS, "loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
    **missing(
        _FORMULA,
        *("factor", "lokr_factor", "use_cp", "use_tucker", "use_conv_cp", "disable_conv_cp", "use_scalar"),
        *("decompose_both", "full_matrix", "constrain", "constraint", "rescaled", "train_on_input", "bypass_mode"),
        *("wd_on_output", "unit", "unbalanced_factorization", "rs_lora_scale", "ggpo_sigma", "ggpo_beta"),
    ),
}
