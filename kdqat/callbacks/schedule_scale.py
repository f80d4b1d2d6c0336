"""The rest of a learning rate's schedule, times a factor.

torch's schedules either compute a rate from base rates of their own, or change the optimizer's present one; some also
hold an end, a top or a floor as a number. Each kind is listed with the numbers that are rates. One that is not listed
may hold its rates anywhere: it is refused, and not scaled in part.
"""

from __future__ import annotations

from typing import Any

from torch.optim import lr_scheduler as schedules

# rates that an instance holds, besides those in the optimizer's groups (OneCycleLR has all of its own there)
RATES: dict[type, tuple[str, ...]] = {
    schedules.LambdaLR: ("base_lrs",),
    schedules.MultiplicativeLR: ("base_lrs",),
    schedules.StepLR: ("base_lrs",),
    schedules.MultiStepLR: ("base_lrs",),
    schedules.ConstantLR: ("base_lrs",),
    schedules.LinearLR: ("base_lrs",),
    schedules.ExponentialLR: ("base_lrs",),
    schedules.PolynomialLR: ("base_lrs",),
    schedules.CosineAnnealingLR: ("base_lrs", "eta_min"),
    schedules.CosineAnnealingWarmRestarts: ("base_lrs", "eta_min"),
    schedules.CyclicLR: ("base_lrs", "max_lrs"),
    schedules.OneCycleLR: ("base_lrs",),
    schedules.ReduceLROnPlateau: ("min_lrs",),
}
SEVERAL = (schedules.SequentialLR, schedules.ChainedScheduler)


def require_scalable(scheduler: Any) -> None:
    """
    Raises:
        ValueError: naming the class, if it is not known where this schedule holds its rates.
    """
    if isinstance(scheduler, SEVERAL):
        for part in scheduler._schedulers:
            require_scalable(part)
    elif not isinstance(scheduler, tuple(RATES)):
        known = ", ".join(sorted(kind.__name__ for kind in (*RATES, *SEVERAL)))
        raise ValueError(
            f"Divergence: action reduce_lr cannot scale the rest of a {type(scheduler).__name__}: use a schedule of "
            f"torch's ({known}) or WarmupCosine, or action warn or stop"
        )


def scale_schedule(scheduler: Any, factor: float) -> None:
    """Multiply the rates that `scheduler` holds; those in the optimizer's groups are the caller's."""
    if isinstance(scheduler, SEVERAL):
        for part in scheduler._schedulers:
            scale_schedule(part, factor)
        return
    for name in next(names for kind, names in RATES.items() if isinstance(scheduler, kind)):
        rates = getattr(scheduler, name)
        setattr(scheduler, name, [rate * factor for rate in rates] if isinstance(rates, list) else rates * factor)
