"""vLLM as the oracle of its own parameters: what its loaders write where, before anything is repacked.

vLLM's layerwise reload puts fresh parameters in loading format in place of the packed ones. Here they are given memory and
their own loaders back, so that `load_weights` fills them directly. The engine is of no use afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    import numpy as np
    from vllm.v1.worker.worker_base import WorkerBase

Found = dict[str, "np.ndarray"]
"""Name -> values."""


@torch.no_grad()
def load_in_loading_format(worker: WorkerBase, file: str, unwritten: float) -> Found:
    """All parameters of the worker's model after vLLM's own loading of a safetensors file; to be run in the worker.

    Args:
        worker: vLLM's.
        file: whole Hugging Face tensors.
        unwritten: what the parameters hold before.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import _get_original_loader, get_layerwise_info
    from vllm.model_executor.model_loader.reload.meta import materialize_layer
    from vllm.model_executor.model_loader.reload.utils import get_layer_tensors

    with set_current_vllm_config(worker.vllm_config):
        model = worker.model_runner.get_model()
        initialize_layerwise_reload(model)
        for module in model.modules():
            materialize_layer(module, get_layerwise_info(module))
            for tensor in get_layer_tensors(module).values():
                tensor.weight_loader = _get_original_loader(tensor)
        for parameter in model.parameters():
            parameter.data.fill_(unwritten)
        model.load_weights(load_file(file).items())
    return {name: parameter.data.clone().numpy() for name, parameter in model.named_parameters()}
