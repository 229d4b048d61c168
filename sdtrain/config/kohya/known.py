"""Every option of sd-scripts and kohya_ss that is known, with its answer.

The names are those of `train_network.py`, `sdxl_train_network.py`, `sdxl_train.py`, `train_db.py` and `fine_tune.py`
of sd-scripts, of its dataset config, and of the files that kohya_ss saves. A new one is a line in one of the tables.
"""

from __future__ import annotations

from sdtrain.config.kohya.answers import Answers, becomes, missing, needless
from sdtrain.config.kohya.known_data import DATA
from sdtrain.config.kohya.known_network import MODEL, NETWORK
from sdtrain.config.kohya.known_training import MACHINE, OBJECTIVE, OUTPUT, STEPS_AND_RATES

KNOWN: Answers = {**DATA, **MODEL, **NETWORK, **STEPS_AND_RATES, **OBJECTIVE, **OUTPUT, **MACHINE}

NETWORK_ARGS: Answers = {
    **becomes("method.targets", "preset"),
    **becomes("method.rank", "dim"),
    **becomes("method.alpha", "alpha"),
}
"""Words that mean this inside `network_args` only."""

OPTIMIZER_ARGS: Answers = {
    **becomes("optimizer.weight_decay", "weight_decay"),
    **becomes("optimizer.d0", "d0"),
    **becomes("optimizer.d_coef", "d_coef"),
    **needless(
        "the preset's value is chosen for Prodigy + Schedule-Free",
        *("betas", "beta3", "beta4", "eps", "momentum", "beta1", "beta2"),
    ),
    **needless("weight decay is decoupled always", "decouple", "weight_decouple"),
    **needless(
        "the averaging of Schedule-Free needs no warm-up", "safeguard_warmup", "use_bias_correction", "warmup_steps"
    ),
    **needless("d grows by at most 2^(1/4) a step", "growth_rate"),
    **missing(
        "it belongs to another optimizer",
        *("relative_step", "scale_parameter", "warmup_init", "clip_threshold", "decay_rate", "lr", "block_wise"),
    ),
}
"""Words that mean this inside `optimizer_args` only."""

NETWORK_MARKS = ("network_module", "LoRA_type", "network_dim", "network_alpha", "network_weights", "lycoris_algo")
"""Options that say that an adapter is trained."""

FULL_MARKS = (
    *("train_text_encoder", "learning_rate", "learning_rate_te", "learning_rate_te1", "optimizer_type", "optimizer"),
    *("pretrained_model_name_or_path", "block_lr", "max_train_steps", "max_train_epochs"),
)
"""Options of a training; where they stand without those above, all weights are trained."""

OTHER_MODELS = ("flux1_checkbox", "sd3_checkbox", "lumina_checkbox", "hunyuan_image_checkbox", "anima_checkbox")
"""Options that, when on, say that a model is trained which sdtrain does not know."""

EMBEDDINGS = ("token_string", "init_word", "num_vectors_per_token")
"""Options of textual inversion."""

NEUTRAL = {
    "factor": ("-1", "-1.0"),
    "lokr_factor": ("-1", "-1.0"),
    "unit": ("1", "1.0"),
    "train_on_input": ("true",),
    "prior_loss_weight": ("1", "1.0"),
    "num_processes": ("1",),
    "num_machines": ("1",),
    "token_warmup_min": ("1",),
    "network_multiplier": ("1.0", "1"),
    "dynamo_backend": ("no",),
    "caption_separator": (",",),
}
"""Values that change nothing, as kohya_ss writes them for options that are not used; in small letters."""
