"""New weights into a running vLLM model, layer by layer. The one file that knows vLLM's reload functions.

vLLM keeps weights repacked for its kernels; writing into them directly gives wrong numbers. Its layerwise reload takes
a layer in checkpoint format, repacks it and copies the result into the old memory.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process, get_layerwise_info
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers

from clipo_megatron.errors import EngineError
from clipo_megatron.rollout.cpu_reload import repack_after_reload

# At every reload it warns of each layer without tensors of its own (rotary embedding, tied head). That an update is
# complete is checked by the engine.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


def by_module(names: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Parameters of a model by module, in order.

    Args:
        names: name in a plan -> name in the model.

    Returns:
        Path of the module -> name in the module -> name in the plan.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name, of_model in names.items():
        path, _, attribute = of_model.rpartition(".")
        found[path][attribute] = name
    return found


class LayerwiseReload:
    """One reload of one worker's model: `begin`, any number of `load` or `take`, then `finish` or `abandon`."""

    def __init__(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Nothing is touched yet.

        Args:
            model: the worker's model.
            model_config: vLLM's description of it.
        """
        self._model = model
        self._model_config = model_config
        self._is_open = False

    def begin(self) -> None:
        """Get every layer ready to be loaded; what an unfinished reload left behind is dropped first."""
        self.abandon()
        initialize_layerwise_reload(self._model)
        self._is_open = True

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load whole Hugging Face tensors; each worker takes its own share of them.

        A layer keeps the tensors given until its last one has come, possibly in a later call: their memory must stay as
        it is until then.
        """
        self._model.load_weights(tensors)  # pyright: ignore[reportCallIssue]

    def take(self, module: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Take all parameters of one module, in loading format; their memory is free again on return.

        Args:
            module: of the model.
            tensors: every parameter by its name in the module.

        Raises:
            EngineError: the module holds something else as well.
        """
        parameters, buffers = get_layer_params_buffers(module)
        kept = {name for name in buffers if name not in module._non_persistent_buffers_set}
        if parameters.keys() | kept != tensors.keys():
            raise EngineError(
                f"{type(module).__name__}: holds {sorted(parameters.keys() | kept)}, the plan fills {sorted(tensors)}: this "
                "vLLM release or model has more; set sync.transport to stream"
            )
        for name, parameter in parameters.items():
            if parameter.is_meta:
                placed = tensors[name].detach()
                placed.__class__ = parameter.__class__
                placed.__dict__ = parameter.__dict__.copy()  # pyright: ignore[reportAttributeAccessIssue]
                setattr(module, name, placed)
            else:  # a bias stays where it is, perhaps in another number format
                parameter.data.copy_(tensors[name])
        _layerwise_process(module, get_layerwise_info(module))

    def finish(self) -> None:
        """Make the loaded weights the ones that are used."""
        finalize_layerwise_reload(self._model, self._model_config)
        repack_after_reload(self._model)
        self._is_open = False

    def abandon(self) -> None:
        """Close an unfinished reload. With old, new and partial layers the model is good for another reload only."""
        if not self._is_open:
            return
        # Without it, what a layer has got of its tensors would count for the next reload.
        finalize_layerwise_reload(self._model, self._model_config)
        self._is_open = False
