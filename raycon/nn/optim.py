"""Optimisers, parameter groups by module type, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from raycon.core.config import TrainConfig
from raycon.core.types import Progress

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def parameter_groups(module: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """Trainable parameters in at most two groups: those that decay, and those that ``train.decay`` exempts.

    The exempt neither decay nor does LARS rescale them (``adapt`` False). Which ones these are:

    all            none (PCL, MoCo, MaskCon)
    no-bias-bn     biases and normalisation layers, by module type
    no-1d          tensors of one dimension: SCE's and MoCo v3's LARS
    no-bias-bn-by-name   those with "bias" or "bn" in their names: WCL's and Cl-InfoNCE's, whose BatchNorms in
                   down-sampling shortcuts (downsample.1.weight) slip through

    Raises ValueError for another word.
    """
    rule: str = train.decay
    plain: list[nn.Parameter] = []
    bare: list[nn.Parameter] = []
    for place, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad:
                (bare if _exempt(rule, owner, f"{place}.{name}", parameter) else plain).append(parameter)
    groups: list[dict[str, Any]] = [{"params": plain, "weight_decay": train.weight_decay}]
    if bare:
        groups.append({"params": bare, "weight_decay": 0.0, "adapt": False})
    return groups


def _exempt(rule: str, owner: nn.Module, name: str, parameter: Tensor) -> bool:
    if rule == "no-bias-bn":
        return isinstance(owner, _NORMS) or name.endswith(".bias")
    if rule == "no-bias-bn-by-name":
        return "bn" in name or "bias" in name
    if rule == "no-1d":
        return parameter.ndim <= 1
    if rule == "all":
        return False
    raise ValueError(f"train.decay = {rule!r}: choose all, no-bias-bn, no-1d or no-bias-bn-by-name")


class LARS(torch.optim.Optimizer):
    """SGD whose layers all move by the same share of their length (You et al. 2017, arXiv 1708.03888).

    Per tensor: g <- g + weight_decay p; in groups with ``adapt``, g <- g trust |p| / |g| (factor 1 where a norm is 0);
    mu <- momentum mu + g; p <- p - lr mu. This is the LARS of WCL, Cl-InfoNCE, SCE and MoCo v3. Parameters without a
    gradient stay as they are. A ``found_inf`` attribute other than 0 turns the step into nothing, without waiting for
    the device, as in PyTorch's fused optimisers.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, params: Any, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 0.001
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter once. ``closure`` is not supported."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            moving = [self.state[p]["momentum_buffer"] for p in parameters]
            change: list[Tensor] = [p.grad for p in parameters]
            if group["weight_decay"]:
                change = torch._foreach_add(change, parameters, alpha=group["weight_decay"])  # type: ignore[assignment]
            if group["adapt"]:
                own, slope = torch.stack(torch._foreach_norm(parameters)), torch.stack(torch._foreach_norm(change))
                factor = torch.where((own > 0) & (slope > 0), group["trust"] * own / slope, 1.0)
                change = torch._foreach_mul(change, list(factor.unbind()))  # type: ignore[assignment]
            if self.found_inf is None:
                torch._foreach_mul_(moving, group["momentum"])
                torch._foreach_add_(moving, change)
                torch._foreach_add_(parameters, moving, alpha=-group["lr"])
                continue
            good = self.found_inf == 0
            torch._foreach_mul_(moving, torch.where(good, group["momentum"], 1.0))
            torch._foreach_add_(moving, [torch.where(good, c, 0.0) for c in change])
            torch._foreach_add_(parameters, torch._foreach_mul(moving, torch.where(good, -group["lr"], 0.0)))


def build_optimizer(module: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of ``train.*``. Every one takes a ``found_inf`` attribute that, set, turns a step into nothing."""
    groups = parameter_groups(module, train)
    if train.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, nesterov=train.nesterov, fused=True)
        if train.momentum:
            # PyTorch makes them in the first step, of what has a gradient then; its fused form cannot add one later.
            for group in sgd.param_groups:
                for p in group["params"]:
                    sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.lr, fused=True)
    return LARS(groups, lr=train.lr, momentum=train.momentum, trust=train.trust)


def base_lr(train: TrainConfig) -> float:
    """``train.lr`` scaled by the global batch as ``train.lr_scaling`` says."""
    factor = {"none": 1.0, "linear": train.batch / 256, "sqrt": math.sqrt(train.batch)}[train.lr_scaling]
    return train.lr * factor


def lr_at(train: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of ``step`` (0-based, over the whole run).

    cosine: 0.5 lr (1 + cos(pi t)), t from 0 after the warm-up towards 1 at the end of the run, per step.
    cosine-closed: the same, but the warm-up reaches its end one step earlier (SCE).
    cosine-epoch: the same with t = epoch / epochs, constant within an epoch (PCL, MoCo).
    step: lr x 0.1 for each milestone epoch passed. Warm-up: linear over ``warmup_epochs``.
    """
    peak, schedule = base_lr(train), str(train.schedule)
    warmup = train.warmup_epochs * steps_per_epoch
    steps, start = train.epochs * steps_per_epoch, peak * train.warmup_start
    if step < warmup or schedule in ("cosine", "cosine-closed"):
        return warmup_cosine(step, warmup, steps, peak, start=start, closed=schedule == "cosine-closed")
    epoch = step // steps_per_epoch
    if schedule == "constant":
        return peak
    if schedule == "step":
        return peak * 0.1 ** sum(epoch >= m for m in train.milestones)
    return peak * 0.5 * (1 + math.cos(math.pi * epoch / train.epochs))


def warmup_cosine(
    step: int, warmup: float, steps: int, peak: float, start: float = 0.0, end: float = 0.0, closed: bool = False
) -> float:
    """Linear from ``start`` to ``peak`` over the first ``warmup`` steps, then half a cosine to ``end`` at ``steps``.

    Step t of the warm-up has start + (peak - start) t / warmup (WCL); ``closed``: t / (warmup - 1), so that its last
    step has the peak already, and the step after it once more (SCE, from PyTorch Lightning Bolts). A run of ``steps``
    steps does not reach ``end``; beyond it the cosine climbs again.
    """
    if step < warmup:
        length = warmup - 1 if closed else warmup
        return start + (peak - start) * (step / length if length > 0 else 0.0)
    done = (step - warmup) / (steps - warmup)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * done))


def momentum_at(schedule: str, start: float, progress: Progress, epochs: int) -> float:
    """The momentum of a teacher after ``progress.step``: ``start``, or on its way to 1.

    constant: always ``start``. cosine: 1 - (1 - start) (1 + cos(pi s / (T - 1))) / 2 with s the step of T, so that the
    last step leaves the teacher as it is (SCE with Lightning >= 1.6). cosine-lagging: the same with s one less, the
    first value twice (SCE with Lightning 1.5, whose hook saw the step count before it moved). cosine-epoch: with the
    epoch in place of the step. Raises ValueError for another word.
    """
    if schedule == "constant":
        return start
    place = {
        "cosine": (progress.step, progress.steps),
        "cosine-lagging": (max(progress.step - 1, 0), progress.steps),
        "cosine-epoch": (progress.epoch, epochs),
    }
    if schedule not in place:
        raise ValueError(f"momentum schedule {schedule!r}: choose constant or {', '.join(place)}")
    now, end = place[schedule]
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * now / max(end - 1, 1)))


def linear_at(start: float, end: float, step: int, length: float) -> float:
    """From ``start`` at step 0 to ``end`` at step ``length``, and ``end`` from then on: warm-up of a temperature."""
    return end if step >= length else start + (end - start) * step / length


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
