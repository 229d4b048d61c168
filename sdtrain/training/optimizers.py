"""From settings to the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from optim import GroupMetrics, ProdigyPlusScheduleFree
from sdtrain.config.presets import d_coef_of
from sdtrain.config.schema import Config
from sdtrain.training.parameters import Trainable
from sdtrain.training.watching.records import GroupRecord


def build_optimizer(trainable: Trainable, config: Config, *, compiled: bool | None = None) -> ProdigyPlusScheduleFree:
    """Prodigy + Schedule-Free over the named groups. compiled: whether its step is; None: where it is worth it."""
    settings = config.optimizer
    groups = [
        {
            "name": group.name,
            "params": list(group.parameters.values()),
            "lr": settings.lr * group.lr,
            "d0": max(settings.d0, group.d),
        }
        for group in trainable.groups
    ]
    return ProdigyPlusScheduleFree(
        groups,
        lr=settings.lr,
        betas=settings.betas,
        beta3=None if settings.beta3 == "auto" else settings.beta3,
        beta4=None if settings.beta4 == "auto" else settings.beta4,
        weight_decay=settings.weight_decay,
        d0=settings.d0,
        d_coef=d_coef_of(config),
        d_limiter=settings.d_limiter,
        prodigy_steps=settings.prodigy_steps,
        freeze_after=round(settings.freeze_share * config.steps),
        eps=settings.eps or None,
        split_groups=settings.split_groups,
        split_groups_mean=None if settings.split_groups_mean == "off" else settings.split_groups_mean,
        factored=settings.factored,
        schedulefree_c=settings.schedulefree_c,
        stochastic_rounding=settings.stochastic_rounding,
        fused_back_pass=config.memory.fused_back_pass,
        set_aside_on_cpu=sets_aside_on_cpu(config),
        seed=config.seed,
        compile=compiled,
    )


def sets_aside_on_cpu(config: Config) -> bool:
    """Return whether the weights in training wait in the host's memory while the averaged ones are looked at.

    So where memory is so short that weights are moved within backward: else looking would need more of the card than
    training does, by all that is trained once more.
    """
    return config.memory.fused_back_pass


def group_records(optimizer: ProdigyPlusScheduleFree) -> tuple[GroupRecord, ...]:
    """What the optimizer does with every network; waits for the device, once.

    Without `split_groups` all share one d, which starts at the first network's d0.
    """
    return group_records_later(optimizer)()


def group_records_later(optimizer: ProdigyPlusScheduleFree) -> Callable[[], tuple[GroupRecord, ...]]:
    """As `group_records`, of this moment; but only who calls what is returned waits for the device."""
    read = optimizer.metrics_later()
    groups = optimizer.param_groups
    trained = [any(parameter.requires_grad for parameter in group["params"]) for group in groups]
    return lambda: _records(optimizer, read(), trained)


def _records(
    optimizer: ProdigyPlusScheduleFree, metrics: Sequence[GroupMetrics], trained: Sequence[bool]
) -> tuple[GroupRecord, ...]:
    groups = optimizer.param_groups
    return tuple(
        GroupRecord(
            name=now.name,
            d=now.d,
            found_d=now.found_d,
            applied_d=now.applied_d,
            effective_lr=now.effective_lr,
            frozen=now.frozen,
            stopped=not now.active and not is_trained,
            climbing=now.climbing,
            settled=now.settled,
            weight=group["initial_lr"] * group["d_coef"],
            gradient=now.gradient,
            at_zero=now.at_zero,
            skipped=now.skipped,
            given=optimizer.settings.prodigy_steps == 1,
            start_d=float((group if optimizer.settings.split_groups else groups[0])["d0"]),
        )
        for now, group, is_trained in zip(metrics, groups, trained, strict=True)
    )
