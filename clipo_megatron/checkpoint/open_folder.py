"""One folder opened for a reading of its bytes, and what its tensors say against each other and its config.json."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from clipo_megatron.checkpoint.conversion_record import CONFIG_FOLDER
from clipo_megatron.checkpoint.dist_index import METADATA
from clipo_megatron.checkpoint.dist_model import model_faults
from clipo_megatron.checkpoint.dist_reader import DistReader
from clipo_megatron.checkpoint.dist_tensors import DistTensors, state_keys
from clipo_megatron.checkpoint.tensor_slices import HFTensors, StoredTensors
from clipo_megatron.errors import CheckpointError, ConfigError
from clipo_megatron.weights.architecture import CONFIG_FILE, Architecture, read_architecture
from clipo_megatron.weights.families import FAMILIES
from clipo_megatron.weights.hf_folder import HFReader
from clipo_megatron.weights.names import EMBEDDING, OUTPUT_LAYER, Where

T = TypeVar("T")


class OpenFolder:
    """An open folder, the digests of its experts and, where both are stored, of its tied weights.

    Args:
        path: of the folder.
        architecture: of the model in it; None where no config.json tells.
        tensors: of the folder.
        companions: folder with config.json and tokenizer of the model; None where there is none.
        faults: what keeps the tensors from being those of its config.json.
    """

    def __init__(
        self,
        path: Path,
        architecture: Architecture | None,
        tensors: StoredTensors,
        *,
        companions: Path | None,
        faults: Sequence[str] = (),
    ) -> None:
        self.path = path
        self.companions = companions
        self.architecture = architecture
        self.tensors = tensors
        self.faults = tuple(faults)
        self.digests: dict[str, bytes] = {}
        self._names = set(tensors.names())
        self.digested: set[str] = set()
        """Names whose SHA-256 is kept once they were read to the end."""
        if architecture is not None:
            tied = [*_stored_names(architecture, EMBEDDING), *_stored_names(architecture, OUTPUT_LAYER)]
            wanted = {name for names in _expert_tensors(architecture) for name in names}
            if architecture.tied and self._names.issuperset(tied):
                wanted |= set(tied)
            self.digested = wanted & self._names

    def has(self, name: str) -> bool:
        """Whether the tensor is stored."""
        return name in self._names

    def file(self, name: str, place: tuple[int, ...] = ()) -> str:
        """Name of the file that holds an element of a tensor; empty where there is no such tensor."""
        return self.tensors.file(name, place) if self.has(name) else ""

    def read(self, name: str, buffer: memoryview) -> Iterator[memoryview]:
        """The bytes of a tensor, in parts of the length of `buffer`; each part is valid until the next one."""
        digest = hashlib.sha256()
        for part in self.tensors.read(name, buffer):
            if name in self.digested:
                digest.update(part)
            yield part
        if name in self.digested:
            self.digests[name] = digest.digest()


@contextlib.contextmanager
def opened_folders(paths: Sequence[Path], *, config: Path | None = None) -> Iterator[list[OpenFolder]]:
    """Open all folders. A training state belongs to a checkpoint where all folders hold one.

    Args:
        paths: Hugging Face folders and distributed checkpoints.
        config: folder with the config.json of checkpoints; None takes that which lies in them, else another folder's.

    Raises:
        ConfigError: all that is wrong with all of them.
    """
    problems: list[str] = []
    with contextlib.ExitStack() as stack:
        known = None if config is None else _collected(problems, lambda: read_architecture(config))
        own = [_own_architecture(path, known, problems) for path in paths]
        readers = [_collected(problems, lambda path=path: stack.enter_context(_reader(path))) for path in paths]
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))
        default = next((architecture for architecture in own if architecture is not None), None)
        with_state = all(isinstance(reader, DistReader) and state_keys(reader) for reader in readers)
        yield [
            _open_folder(path, reader, architecture or default, config, with_state=with_state)
            for path, reader, architecture in zip(paths, readers, own, strict=True)
            if reader is not None
        ]


def _own_architecture(path: Path, known: Architecture | None, problems: list[str]) -> Architecture | None:
    """Of the config.json that lies in a folder; `known` in place of a checkpoint's."""
    if not path.is_dir():
        return None  # the reader says so
    if not (path / METADATA).exists():
        return _collected(problems, lambda: read_architecture(path))
    inner = path / CONFIG_FOLDER
    if known is None and (inner / CONFIG_FILE).exists():
        return _collected(problems, lambda: read_architecture(inner))
    return known


def _reader(path: Path) -> HFReader | DistReader:
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; give a Hugging Face model folder or a distributed checkpoint")
    return DistReader(path) if (path / METADATA).exists() else HFReader(path)


def _collected(problems: list[str], read: Callable[[], T]) -> T | None:
    """What `read` gives; its error goes to `problems`."""
    try:
        return read()
    except ConfigError as error:
        problems += error.problems
    except CheckpointError as error:
        problems.append(str(error))
    return None


def _open_folder(
    path: Path,
    reader: HFReader | DistReader,
    architecture: Architecture | None,
    config: Path | None,
    *,
    with_state: bool,
) -> OpenFolder:
    if isinstance(reader, HFReader):
        return OpenFolder(path, architecture, HFTensors(reader), companions=path)
    own = path / CONFIG_FOLDER
    companions = config if config is not None else own if (own / CONFIG_FILE).exists() else None
    faults = [] if architecture is None else model_faults(reader, architecture, folder=path)
    known = None if faults else architecture
    tensors = DistTensors(reader, known, with_state=with_state)
    return OpenFolder(path, known, tensors, companions=companions, faults=faults)


def vocabulary_faults(folder: OpenFolder) -> list[str]:
    """Rows beyond config.json's vocab_size: of no use in a Hugging Face folder, zero in a distributed checkpoint."""
    if folder.architecture is None:
        return []
    if isinstance(folder.tensors, DistTensors):
        return folder.tensors.padding_faults(folder.path)
    vocab_size = folder.architecture.vocab_size
    return [
        f"{folder.path / folder.file(name)}: {name} has {rows} rows: vocab_size = {vocab_size} in config.json; rows that "
        "pad the vocabulary must be cut off"
        for megatron in (EMBEDDING, OUTPUT_LAYER)
        for name in _stored_names(folder.architecture, megatron)
        if folder.has(name) and (rows := (*folder.tensors.shape(name), 0)[0]) > vocab_size
    ]


def tie_faults(folder: OpenFolder) -> list[str]:
    """Weights that are tied or not, against what config.json says; the tensors must have been read."""
    architecture, digests = folder.architecture, folder.digests
    if architecture is None:
        return []
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
    for names in [] if folder.architecture is None else _expert_tensors(folder.architecture):
        by_digest: dict[bytes, list[str]] = {}
        for name in names:
            if name in folder.digests:
                by_digest.setdefault(folder.digests[name], []).append(name)
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
