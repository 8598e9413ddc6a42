"""One model folder opened for a reading of its bytes, and what its tensors say against each other and its config.json."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from clipo_megatron.checkpoint.tensor_slices import TensorSlices
from clipo_megatron.errors import ConfigError
from clipo_megatron.weights.architecture import Architecture, read_architecture
from clipo_megatron.weights.families import FAMILIES
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.names import EMBEDDING, OUTPUT_LAYER, Where


class OpenFolder:
    """An open model folder, the digests of its experts and, where both are stored, of its tied weights."""

    def __init__(self, architecture: Architecture, reader: HFReader) -> None:
        self.path = reader.folder
        self.architecture = architecture
        self.reader = reader
        self._names = set(reader.names())
        tied = [*_stored_names(architecture, EMBEDDING), *_stored_names(architecture, OUTPUT_LAYER)]
        wanted = {name for names in _expert_tensors(architecture) for name in names}
        if architecture.tied and self._names.issuperset(tied):
            wanted |= set(tied)
        self.digested = wanted & self._names
        self.slices = TensorSlices(reader, digested=self.digested)

    def names(self) -> list[str]:
        """Names of all tensors in the order of the files, so that they are read from front to back."""
        return sorted(self._names, key=lambda name: (self.file(name), self.reader.stored(name)[1].start))

    def has(self, name: str) -> bool:
        """Whether the tensor is stored."""
        return name in self._names

    def file(self, name: str) -> str:
        """Name of the file that holds a tensor; empty where there is no such tensor."""
        return self.reader.stored(name)[0].name if self.has(name) else ""

    def num_bytes(self, name: str) -> int:
        """Bytes of a tensor."""
        return self.reader.stored(name)[1].num_bytes


@contextlib.contextmanager
def opened_folders(paths: Sequence[Path]) -> Iterator[list[OpenFolder]]:
    """Open all folders.

    Raises:
        ConfigError: all that is wrong with all of them.
    """
    problems: list[str] = []
    folders: list[OpenFolder] = []
    with contextlib.ExitStack() as stack:
        for path in paths:
            if not path.is_dir():
                problems.append(f"{path}: no such folder; give the folder of a Hugging Face model")
                continue
            architecture = reader = None
            try:
                architecture = read_architecture(path)
            except ConfigError as error:
                problems += error.problems
            try:
                reader = stack.enter_context(HFReader(path))
            except ConfigError as error:
                problems += error.problems
            if architecture is not None and reader is not None:
                folders.append(OpenFolder(architecture, reader))
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))
        yield folders


def vocabulary_faults(folder: OpenFolder) -> list[str]:
    """Rows beyond config.json's vocab_size in the embedding or the output layer: the trainer's padding, leaked."""
    vocab_size = folder.architecture.vocab_size
    return [
        f"{folder.path / folder.file(name)}: {name} has {rows} rows: vocab_size = {vocab_size} in config.json; rows that "
        "pad the vocabulary must be cut off"
        for megatron in (EMBEDDING, OUTPUT_LAYER)
        for name in _stored_names(folder.architecture, megatron)
        if folder.has(name) and (rows := (*folder.reader.shape(name), 0)[0]) > vocab_size
    ]


def tie_faults(folder: OpenFolder) -> list[str]:
    """Weights that are tied or not, against what config.json says; the tensors must have been read."""
    architecture, digests = folder.architecture, folder.slices.digests
    ((embedding,), (output,)) = (_stored_names(architecture, name) for name in (EMBEDDING, OUTPUT_LAYER))
    if not architecture.tied and not folder.has(output):
        return [f"{folder.path}: tie_word_embeddings = false, yet there is no {output}; export the folder again"]
    if architecture.tied and output in digests and digests[output] != digests[embedding]:
        return [
            f"{folder.path}: tie_word_embeddings = true, yet {output} is stored and differs from {embedding}; set it to "
            "false, or save the model again without that tensor"
        ]
    return []


def expert_faults(folder: OpenFolder) -> list[str]:
    """Experts of a layer that hold the same tensor: random or trained ones never do. They must have been read."""
    faults: list[str] = []
    for names in _expert_tensors(folder.architecture):
        by_digest: dict[bytes, list[str]] = {}
        for name in names:
            if name in folder.slices.digests:
                by_digest.setdefault(folder.slices.digests[name], []).append(name)
        faults += [
            f"{folder.path}: experts of one layer hold the same tensor: {', '.join(same)}; export the folder again"
            for same in by_digest.values()
            if len(same) > 1
        ]
    return faults


def _stored_names(architecture: Architecture, megatron: str) -> list[str]:
    """Hugging Face names of a parameter that is not of a layer, whether or not the folder has it."""
    return [
        tensor.name for rule in FAMILIES[architecture.family].rules if rule.megatron == megatron for tensor in rule.hf
    ]


def _expert_tensors(architecture: Architecture) -> list[list[str]]:
    """For each layer and each of an expert's tensors: its names in all experts of the layer."""
    if architecture.experts is None:
        return []
    return [
        [Where(layer=layer, expert=expert).fill(tensor.name) for expert in range(architecture.experts.num_experts)]
        for layer in range(architecture.num_layers)
        for rule in FAMILIES[architecture.family].rules
        if rule.is_of_expert
        for tensor in rule.hf
    ]
