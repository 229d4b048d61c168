"""Answers to the options about pictures, captions, buckets, caches and validation."""

from __future__ import annotations

from sdtrain.config.kohya.answers import Answers, becomes, missing, needless

_CACHED = "the encoded pictures, and the captions where no text encoder is trained, are always cached"
_THREADS = "pictures are read ahead by threads, without processes to count"
_TAGS = "tags are shuffled and left out alike from the first step to the last"
_AUGMENT = "pictures are encoded once and trained as they are; put changed copies into the folder instead"
_REGULAR = "as many of these pictures as of all others are seen"
_MASKS = "masks say so folder by folder; the mean is over the whole picture, as there"
_JSON = 'captions = "meta_cap" reads it where it stands in the folder of pictures as meta_cap.json'
_HELD_OUT = "validation counts in steps, validation.every, and looks at all pictures that are held out"
_MADE_ELSEWHERE = "pictures and captions are read as they lie in the folder, nothing is prepared before"

DATA: Answers = {
    **becomes("data.folder[0].path", "train_data_dir", "image_dir", "image_folder"),
    **becomes("data.folder[0].repeats", "num_repeats", "dataset_repeats"),
    **becomes("data.resolution_px", "resolution", "max_resolution", why="one number, the side of the square"),
    **becomes("data.batch_size", "train_batch_size", "batch_size"),
    **becomes("data.gradient_accumulation", "gradient_accumulation_steps"),
    **becomes("data.bucket_step_px", "bucket_reso_steps"),
    **becomes("data.max_aspect", "enable_bucket", why="buckets are always on, and max_aspect = 1 crops to the square"),
    **becomes("data.max_aspect", "min_bucket_reso", "max_bucket_reso", why="longest over shortest side of a bucket"),
    **becomes("data.folder[0].regularisation", "reg_data_dir", "is_reg", why=_REGULAR),
    **becomes("data.folder[0].loss_weight", "prior_loss_weight", why="in the folder with regularisation = true"),
    **becomes("data.folder[0].masks", "masked_loss", why=_MASKS),
    **becomes("data.folder[0].masks", "alpha_mask", why='masks = "alpha"'),
    **becomes("data.folder[0].mask_path", "conditioning_data_dir", why='with masks = "folder"; grey PNGs'),
    **becomes("data.caption_dropout", "caption_dropout_rate"),
    **becomes("data.caption_chunks", "max_token_length", why="in chunks of 75 tokens, so 225 is 3"),
    **becomes("data.folder[0].captions", "caption_extension", "caption_extention", why="txt or caption"),
    **becomes("data.folder[0].caption_prefix", "caption_prefix"),
    **becomes("data.folder[0].caption_suffix", "caption_suffix"),
    **becomes("data.folder[0].shuffle_tags", "shuffle_caption"),
    **becomes("data.folder[0].keep_tags", "keep_tokens"),
    **becomes("data.folder[0].keep_separator", "keep_tokens_separator"),
    **becomes("data.folder[0].tag_separator", "caption_separator"),
    **becomes("data.folder[0].tag_dropout", "caption_tag_dropout_rate"),
    **becomes("data.folder[0].wildcards", "enable_wildcard"),
    **becomes("validation.share", "validation_split"),
    **becomes("validation.seed", "validation_seed"),
    **becomes("validation.every", "validate_every_n_steps"),
    **needless(
        _CACHED,
        *("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"),
        *("sdxl_cache_text_encoder_outputs", "skip_cache_check", "cache_info", "vae_batch_size"),
        *("text_encoder_batch_size", "use_latent_files"),
    ),
    **needless(_THREADS, "max_data_loader_n_workers", "persistent_data_loader_workers", "n_workers"),
    **needless("`sdtrain check` tells what a run would see of the pictures", "debug_dataset", "enable_preview"),
    **needless("scaled with antialiasing, the same for all pictures", "resize_interpolation"),
    **needless(
        _MADE_ELSEWHERE,
        *("create_buckets", "create_caption", "generate_caption_database", "generate_image_buckets", "full_path"),
        *("train_dir", "latent_metadata_filename"),
    ),
    **needless("the settings of the data stand in the same file", "dataset_config"),
    **missing(_TAGS, "token_warmup_min", "token_warmup_step"),
    **missing("tags are separated by one sign, tag_separator", "secondary_separator"),
    **missing("a picture without a caption gets none; write the words into a caption file", "class_tokens"),
    **missing(
        "captions are dropped at random (data.caption_dropout), not in whole epochs", "caption_dropout_every_n_epochs"
    ),
    **missing("(word:1.3) is trained as it is written", "weighted_captions"),
    **missing("captions are padded as the model was trained", "no_token_padding"),
    **missing(_AUGMENT, "color_aug", "face_crop_aug_range"),
    **becomes("data.folder[0].flip", "flip_aug"),
    **becomes("data.folder[0].crops", "random_crop", why="so many crops are cached, of which one is drawn"),
    **becomes("data.enlarge", "bucket_no_upscale", why="enlarge = false"),
    **missing(_JSON, "in_json", "metadata_file", "caption_metadata_filename", "prefer_json_caption"),
    **becomes("data.min_side_px", "skip_image_resolution", why="the shorter side; they are refused, not skipped"),
    **missing("pictures come from folders only", "dataset_class"),
    **missing("all pictures of a folder have the same weight", "network_multiplier", "custom_attributes"),
    **missing(
        _HELD_OUT,
        *("validate_every_n_epochs", "max_validation_steps"),
    ),
    **missing("inpainting models are not trained", "train_inpainting"),
}
