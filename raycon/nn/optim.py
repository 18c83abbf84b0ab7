"""Optimisers, parameter groups by module type, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from raycon.core.config import TrainConfig

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def parameter_groups(module: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """Trainable parameters, split by what they belong to (never by their names).

    decay = all: one group (PCL, MoCo). no-bias-bn: biases and normalisation parameters neither decay nor are they
    rescaled by LARS.
    """
    plain: list[nn.Parameter] = []
    bare: list[nn.Parameter] = []
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            exempt = train.decay == "no-bias-bn" and (isinstance(owner, _NORMS) or name == "bias")
            (bare if exempt else plain).append(parameter)
    groups: list[dict[str, Any]] = [{"params": plain, "weight_decay": train.weight_decay}]
    if bare:
        groups.append({"params": bare, "weight_decay": 0.0})
    return groups


def build_optimizer(module: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of ``train.*``. Fused: one kernel, and a step that a set ``found_inf`` turns into nothing."""
    groups = parameter_groups(module, train)
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, nesterov=train.nesterov, fused=True)
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.lr, fused=True)
    raise ValueError(f"train.optimizer = {train.optimizer!r}: choose sgd or adamw")


def base_lr(train: TrainConfig) -> float:
    """``train.lr`` scaled by the global batch as ``train.lr_scaling`` says."""
    factor = {"none": 1.0, "linear": train.batch / 256, "sqrt": math.sqrt(train.batch)}[train.lr_scaling]
    return train.lr * factor


def lr_at(train: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The learning rate of ``step`` (0-based, over the whole run).

    cosine: 0.5 lr (1 + cos(pi t)), t from 0 after the warm-up towards 1 at the end of the run, per step.
    cosine-epoch: the same with t = epoch / epochs, constant within an epoch (PCL, MoCo).
    step: lr x 0.1 for each milestone epoch passed. Warm-up: linear over ``warmup_epochs``.
    """
    peak = base_lr(train)
    warmup = train.warmup_epochs * steps_per_epoch
    if step < warmup:
        return peak * (train.warmup_start + (1 - train.warmup_start) * step / warmup)
    epoch = step // steps_per_epoch
    if train.schedule == "constant":
        return peak
    if train.schedule == "step":
        return peak * 0.1 ** sum(epoch >= m for m in train.milestones)
    if train.schedule == "cosine-epoch":
        return peak * 0.5 * (1 + math.cos(math.pi * epoch / train.epochs))
    done = (step - warmup) / (train.epochs * steps_per_epoch - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
