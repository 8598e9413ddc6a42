"""This rank's parameters as parts of the global tensors of a Megatron checkpoint, and their reading from one."""

from __future__ import annotations

import torch
from torch import Tensor

from clipo_megatron.checkpoint.dist_model import VOCABULARY_KEYS, model_faults
from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.errors import CheckpointError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.policy.stage import Stage
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.finite import all_finite
from clipo_megatron.weights.flat_ranges import FlatPart, flat_parts
from clipo_megatron.weights.global_tensors import Box, boxes_of
from clipo_megatron.weights.names import OUTPUT_LAYER, is_expert, padded_vocab_size, split_dim


class Sharding:
    """How one rank of a layout holds the parameters of a model."""

    def __init__(self, architecture: Architecture, layout: ParallelLayout, *, rank: int) -> None:
        self.architecture = architecture
        self.layout = layout
        self.rank = rank
        self._padded_vocab = padded_vocab_size(architecture.vocab_size, layout.tp)

    def boxes(self, name: str) -> list[Box]:
        """Where the parts of a parameter of this rank lie; see `boxes_of`."""
        layout, rank = self.layout, self.rank
        return boxes_of(
            name,
            self.architecture,
            tp=layout.tp,
            tp_rank=layout.tp_rank(rank),
            padded_vocab=self._padded_vocab,
            etp=layout.etp,
            etp_rank=layout.etp_rank(rank),
        )

    def is_first_holder(self, name: str) -> bool:
        """Whether no rank before this one among those that split the model's tensors holds the same elements.

        Ranks with other tokens are not looked at: they hold the same tensors.
        """
        if self.architecture.tied and name == OUTPUT_LAYER:
            return False  # a copy of the first stage's embedding
        if is_expert(name) or split_dim(name, self.architecture) is not None:
            return True
        return self.layout.tp_rank(self.rank) == 0


@torch.no_grad()
def load_dist_weights(stage: Stage, reader: DistReader, sharding: Sharding) -> None:
    """Set this stage's parameters from a checkpoint of any layout; each rank reads only what it holds.

    Values are cast to the parameters' dtype.

    Raises:
        CheckpointError: a tensor is damaged or not finite, or the checkpoint is of another model, with all faults at once.
    """
    if faults := model_faults(reader, sharding.architecture, folder=reader.folder):
        raise CheckpointError("\n".join(faults))
    for name, parameter in stage.named_parameters():
        boxes = sharding.boxes(name)
        flat = torch.empty(parameter.numel(), dtype=getattr(torch, reader.dtype(boxes[0].key)))
        for part in flat_parts(boxes, 0, flat.numel()):
            read_part(reader, part, flat[part.offset : part.offset + part.numel])
        if not all_finite(flat):
            keys = ", ".join(dict.fromkeys(box.key for box in boxes))
            raise CheckpointError(f"{reader.folder}: {keys}: holds values that are not finite; take another checkpoint")
        parameter.copy_(flat.view(parameter.shape))


def read_part(reader: DistReader, part: FlatPart, out: Tensor, *, prefix: str = "") -> None:
    """Read one part of a global tensor. Rows of the vocabulary's padding that the checkpoint does not have are 0.

    Args:
        reader: open on the checkpoint.
        part: what to read.
        out: flat, contiguous, of the part's number of elements and of the checkpoint's dtype, on the host.
        prefix: of the key in the checkpoint.

    Raises:
        CheckpointError: the tensor has another shape or dtype, or is damaged.
    """
    key = prefix + part.key
    stored = reader.shape(key)
    padded = part.key in VOCABULARY_KEYS
    if stored[1:] != part.global_shape[1:] or (stored[0] != part.global_shape[0] and not padded):
        raise CheckpointError(
            f"{reader.folder}: {key} has shape {stored}, the model's is {part.global_shape}; take a checkpoint of the same "
            "model"
        )
    dtype = str(out.dtype).removeprefix("torch.")
    if reader.dtype(key) != dtype:
        raise CheckpointError(
            f"{reader.folder}: {key} is stored as {reader.dtype(key)}, the run has {dtype}; set model.dtype to the "
            "checkpoint's"
        )
    whole = out.view(part.shape)
    if not padded:
        reader.read_into(key, start=part.start, out=whole)
        return
    rows = max(0, min(part.shape[0], stored[0] - part.start[0]))
    whole[rows:].zero_()
    if rows:
        reader.read_into(key, start=part.start, out=whole[:rows])
