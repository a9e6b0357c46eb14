"""What our Trainer adds to the optimizer and to the order of the rows. Knows nothing of runs or events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices


def loraplus_optimizer(model: Any, arguments: TrainingArguments, ratio: float) -> torch.optim.Optimizer:
    """The optimizer that Trainer would make, with the B sides learning at `ratio` times the rate."""
    kind, its_arguments = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
        model, kind, loraplus_lr_ratio=ratio, loraplus_weight_decay=arguments.weight_decay, **its_arguments
    )
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]  # a schedule counts empty ones too
    return optimizer


class LengthGroups(Sampler[int]):
    """Trainer's order by length, drawn from the seed and the epoch: a resumed run meets the rows that it would have met."""

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = sampler.lengths, sampler.batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
