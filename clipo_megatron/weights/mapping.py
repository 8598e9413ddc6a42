"""Both directions HF <-> Megatron: a rank's share from a folder, and Hugging Face tensors from the shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipo_megatron.errors import CheckError, ConfigError
from clipo_megatron.weights.architecture import Architecture
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.names import OUTPUT_LAYER, find_rule
from clipo_megatron.weights.rules import Split, hf_shape, local_shape, pieces


def local_parameter(
    reader: HFReader,
    megatron_name: str,
    arch: Architecture,
    *,
    tp: int,
    tp_rank: int,
    padded_vocab: int,
    etp: int = 1,
    etp_rank: int = 0,
) -> Tensor:
    """One rank's parameter, from only those rows and columns of the Hugging Face tensors that it holds.

    Args:
        reader: the model folder.
        megatron_name: as in GPTModel, with the numbers of layer and expert in the whole model.
        arch: of the folder.
        tp: tensor parallel degree.
        tp_rank: 0 <= tp_rank < tp.
        padded_vocab: rows of the trainer's embedding over all tp ranks, see `padded_vocab_size`; the extra ones are 0.
        etp: tensor parallel degree of an expert.
        etp_rank: 0 <= etp_rank < etp.

    Returns:
        On the CPU, in the folder's number format, not shared with the file.

    Raises:
        CheckError: the family's table has no such parameter.
        ConfigError: a tensor is missing or of another shape, or tp (etp) does not divide it.
    """
    rule, where = find_rule(megatron_name, arch)
    degree, place = (etp, etp_rank) if rule.is_of_expert else (tp, tp_rank)
    dim = 0 if rule.split_dim is None else rule.split_dim
    parts: list[Tensor] = []
    for piece in pieces(rule, arch.sizes, degree=degree, place=place, padded_vocab=padded_vocab):
        tensor = rule.hf[piece.tensor]
        name, shape = where.fill(tensor.name), hf_shape(tensor, arch.sizes)
        if reader.shape(name) != shape:
            raise ConfigError(f"{reader.folder}: {name} has shape {reader.shape(name)}: config.json asks for {shape}")
        parts.append(reader.slice(name, dim=dim, start=piece.start, stop=piece.stop))
    shape = local_shape(rule, arch.sizes, degree=degree, padded_vocab=padded_vocab)
    missing = shape[dim] - sum(part.shape[dim] for part in parts)
    if missing:
        parts.append(parts[0].new_zeros(missing, *shape[1:]))
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def hf_tensors_of(megatron_name: str, shards: Sequence[Tensor], arch: Architecture) -> list[tuple[str, Tensor]]:
    """The Hugging Face tensors of one parameter: the inverse of `local_parameter`, without the vocabulary's padding.

    Args:
        megatron_name: as in GPTModel, with the numbers of layer and expert in the whole model.
        shards: the parameter on each tp rank (etp rank for an expert's), in rank order; of a replicated one the first
            counts.
        arch: of the model.

    Returns:
        (name, tensor), on the device and in the number format of the shards. Empty for the output layer of a tied
        model, whose tensor comes with the embedding. A replicated parameter is returned as it is, not copied.

    Raises:
        CheckError: the family's table has no such parameter, or a shard has another shape than its rank holds.
    """
    rule, where = find_rule(megatron_name, arch)
    if arch.tied and megatron_name == OUTPUT_LAYER:
        return []
    degree = len(shards)
    padded_vocab = sum(shard.shape[0] for shard in shards)
    shape = local_shape(rule, arch.sizes, degree=degree, padded_vocab=padded_vocab)
    too_small = rule.split is Split.VOCAB_PARALLEL and padded_vocab < arch.vocab_size
    if too_small or any(tuple(shard.shape) != shape for shard in shards):
        found = [tuple(shard.shape) for shard in shards]
        raise CheckError(f"{megatron_name}: shards of shapes {found} on {degree} ranks: the rule asks for {shape} each")
    if rule.split_dim is None:
        return [(where.fill(rule.hf[0].name), shards[0].detach())]
    wholes = [shards[0].new_empty(hf_shape(tensor, arch.sizes)) for tensor in rule.hf]
    for place, shard in enumerate(shards):
        offset = 0
        for piece in pieces(rule, arch.sizes, degree=degree, place=place, padded_vocab=padded_vocab):
            length = piece.stop - piece.start
            part = shard.detach().narrow(rule.split_dim, offset, length)
            wholes[piece.tensor].narrow(rule.split_dim, piece.start, length).copy_(part)
            offset += length
    return [(where.fill(tensor.name), whole) for tensor, whole in zip(rule.hf, wholes, strict=True)]
