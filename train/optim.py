"""AdamW's parameter groups and the learning rate as a function of tokens."""

import math
from typing import Any

import torch
from torch import nn

from configs.schema import ConfigError, OptimConfig, ScheduleKind


def parameter_family(name: str, parameter: torch.Tensor) -> str:
    """`norm`, `bias`, `embedding` or `matrix` (key convolutions too), from a parameter's dotted name."""
    if name.endswith(".bias"):
        return "bias"
    if "norm" in name:
        return "norm"
    return "embedding" if "embedding" in name else "matrix"


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with a decayed and an undecayed group.

    Raises ConfigError where a group that is asked for would be empty, which would be a silent mistake: nothing is left to decay,
    or no parameter is of any family in `no_decay`. One of several may be absent: the default names biases, which few models have.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (undecayed if parameter_family(name, parameter) in config.no_decay else decayed).append(parameter)
    if config.weight_decay > 0 and not decayed:
        raise ConfigError(
            f"optim.weight_decay={config.weight_decay}: no parameter is left to decay after no_decay=[{', '.join(config.no_decay)}]"
        )
    if config.no_decay and not undecayed:
        names = ", ".join(config.no_decay)
        found = ", ".join(sorted({parameter_family(*item) for item in model.named_parameters()} - {"matrix"}))
        raise ConfigError(f"optim.no_decay=[{names}]: this model has no such parameter; it has {found}")
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    # An empty group would be refused by ZeRO.
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def learning_rate(config: OptimConfig, tokens: int, total_tokens: int) -> float:
    """Learning rate of the step that ends after `tokens` of `total_tokens`: never 0 in the warm-up, the floor in the last step.

    Linear warm-up over `OptimConfig.warmup` tokens, then: constant; linear to `min_lr_ratio`; half a cosine to `min_lr_ratio`
    (Loshchilov & Hutter 2017, eq. 5); or wsd: flat, then linear over the last `OptimConfig.decay` tokens (Hu et al. 2024).
    Warm-up and flat stretch depend on `tokens` alone where their lengths are given in tokens: runs of other lengths share them to the bit.
    """
    warmup, decay = config.warmup(total_tokens), config.decay(total_tokens)
    if tokens < warmup:
        return config.lr * tokens / warmup
    floor = config.min_lr_ratio
    after_warmup = (tokens - warmup) / max(total_tokens - warmup, 1e-12)
    if config.schedule is ScheduleKind.CONSTANT:
        scale = 1.0
    elif config.schedule is ScheduleKind.LINEAR:
        scale = 1 - (1 - floor) * after_warmup
    elif config.schedule is ScheduleKind.COSINE:
        scale = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * after_warmup))
    else:
        into_decay = (tokens - (total_tokens - decay)) / max(decay, 1e-12)
        scale = 1 - (1 - floor) * min(max(into_decay, 0.0), 1.0)
    return config.lr * scale
