"""Settings that people bring from other tools and that do not exist here, and what to do instead."""

from __future__ import annotations

_NO_SCHEDULE = "there is no schedule to choose: Schedule-Free averaging takes its place; leave it out"
_NO_CLIPPING = "gradient clipping has no effect on this optimizer, whose update does not depend on the gradient's scale"
_NO_RATE = "there is no learning rate to choose: the optimizer estimates its step size d; leave it out"
_NO_EMA = "an average of the weights is kept already (Schedule-Free), and is what every file holds; leave it out"
_LAYERS = "set `method.layer_weights`, with patterns such as `down_blocks.*`"

REFUSED = {
    "lr_scheduler": _NO_SCHEDULE,
    "scheduler": _NO_SCHEDULE,
    "lr_scheduler_type": _NO_SCHEDULE,
    "lr_warmup_steps": _NO_SCHEDULE,
    "lr_warmup": _NO_SCHEDULE,
    "warmup": _NO_SCHEDULE,
    "warmup_steps": _NO_SCHEDULE,
    "warmup_ratio": _NO_SCHEDULE,
    "cosine_restarts": _NO_SCHEDULE,
    "max_grad_norm": _NO_CLIPPING + "; leave it out",
    "grad_clip": _NO_CLIPPING + "; leave it out",
    "gradient_clipping": _NO_CLIPPING + "; leave it out",
    "clip_grad_norm": _NO_CLIPPING + "; leave it out",
    "learning_rate": _NO_RATE,
    "unet_lr": _NO_RATE + ", or weigh networks against each other with `method.lr`",
    "text_encoder_lr": _NO_RATE + ", or weigh networks against each other with `method.lr`",
    "use_ema": _NO_EMA,
    "ema_decay": _NO_EMA,
    "network_dropout": "set `method.dropout`",
    "block_lr": _LAYERS,
    "down_lr_weight": _LAYERS,
    "mid_lr_weight": _LAYERS,
    "up_lr_weight": _LAYERS,
    "loss_type": "set `loss.kind`",
    "huber_c": "set `loss.huber_delta`",
    "debiased_estimation_loss": 'set `loss.weighting` to "debiased_kohya", or to "debiased" as in the paper',
    "scale_v_pred_loss_like_noise_pred": 'set `loss.weighting` to "scale_v_like_noise"',
    "epochs": "a run is measured in steps; set `steps`",
    "max_train_epochs": "a run is measured in steps; set `steps`",
    "max_train_steps": "set `steps`",
}
