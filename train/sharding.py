"""Where DeepSpeed keeps a rank's share of the training state: fp32 weights and Adam's moments, at every ZeRO stage.

Stage 0 has whole parameters on every rank. Stages 1 and 2 lay the parameters of an optimizer group end to end and cut that into one
stretch a rank; stage 3 cuts each parameter into one stretch a rank, the last of them padded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.fragments import MOMENTS, WEIGHT, Fragment, FragmentFolder
from train.weights import Shape


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Elements [start, start + count) of a flattened parameter are those from `offset` on in `held`, which the optimizer steps."""

    name: str
    shape: Shape
    start: int
    count: int
    held: Tensor
    offset: int

    def values(self, whole: Tensor) -> Tensor:
        """This place's elements of `held`, or of a moment of it; a view."""
        return whole.detach().view(-1)[self.offset : self.offset + self.count]


def fragments(module: nn.Module, optimizer: Any, *, zero_stage: int) -> list[Fragment]:
    """This rank's share of weights and moments, as views that the next step changes; together the ranks have each element once.

    `optimizer` is DeepSpeed's, or AdamW itself at stage 0. Before its first update there are no moments.
    """
    places = list(_places(module, optimizer, zero_stage))
    if zero_stage == 0:
        places = [share for share in map(_share, places) if share.count]
    states = _inner(optimizer, zero_stage).state
    return [
        Fragment(part=part, name=place.name, shape=place.shape, start=place.start, values=place.values(whole))
        for place in places
        for part, whole in ((WEIGHT, place.held), *((part, states[place.held][part]) for part in MOMENTS if place.held in states))
    ]


@torch.no_grad()
def load_fragments(module: nn.Module, optimizer: Any, saved: FragmentFolder, *, zero_stage: int, updates: int) -> None:
    """Gives this rank its share of what any layout has saved after so many updates of the weights; every rank calls it.

    Raises ConfigError where something of it lacks.
    """
    states = _inner(optimizer, zero_stage).state
    for place in _places(module, optimizer, zero_stage):
        if updates and place.held not in states:  # as AdamW's first step would
            moments = {part: torch.zeros_like(place.held) for part in MOMENTS}
            states[place.held] = {"step": torch.tensor(float(updates))} | moments
        for part, whole in ((WEIGHT, place.held), *((part, states[place.held][part]) for part in MOMENTS if updates)):
            place.values(whole).copy_(saved.read(part, place.name, place.start, place.start + place.count))
    if zero_stage in (1, 2):
        optimizer.update_lp_params()
    elif zero_stage == 3:
        for compute, master in zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True):
            compute.copy_(master)
        if whole := optimizer.persistent_parameters:  # small ones, gathered for good
            whole[0].partition(whole)
            whole[0].all_gather(whole)


def _inner(optimizer: Any, zero_stage: int) -> torch.optim.Optimizer:
    return optimizer.optimizer if zero_stage else optimizer


def _places(module: nn.Module, optimizer: Any, zero_stage: int) -> Iterator[_Place]:
    parameter: Any  # DeepSpeed hangs its own attributes on it
    for name, parameter in module.named_parameters():
        if zero_stage == 0:
            yield _Place(name=name, shape=tuple(parameter.shape), start=0, count=parameter.numel(), held=parameter, offset=0)
        elif zero_stage == 3:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = size * dist.get_rank(optimizer.dp_process_group)
            count = min(size, parameter.ds_numel - start)
            if count > 0:
                held = optimizer.fp32_partitioned_groups_flat[group]
                yield _Place(name=name, shape=tuple(parameter.ds_shape), start=start, count=count, held=held, offset=offset)
        elif parameter._hp_mapping is not None:  # else other ranks have all of it
            found = parameter._hp_mapping
            (held,) = optimizer.optimizer.param_groups[found.param_group_index]["params"]
            at, of = found.hp_fragment_address, found.lp_fragment_address
            yield _Place(name=name, shape=tuple(parameter.shape), start=of.start, count=of.numel, held=held, offset=at.start)


def _share(place: _Place) -> _Place:
    """Of what all ranks have whole, this rank's part."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    first, last = (place.count * number // world_size for number in (rank, rank + 1))
    return _Place(name=place.name, shape=place.shape, start=first, count=last - first, held=place.held, offset=first)
