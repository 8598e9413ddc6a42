"""New weights into a running vLLM model, layer by layer. The one file that knows vLLM's reload functions.

vLLM keeps weights repacked for its kernels; writing into them directly gives wrong numbers. Its layerwise reload takes
a layer in checkpoint format, repacks it and copies the result into the old memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from vllm.config import ModelConfig
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from clipo_megatron.rollout.cpu_reload import repack_after_reload

# At every reload it warns of each layer without tensors of its own (rotary embedding, tied head). That an update is
# complete is checked by the engine.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


class LayerwiseReload:
    """One reload of one worker's model: `begin`, any number of `load`, then `finish` or `abandon`."""

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

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load whole Hugging Face tensors; each worker takes its own share of them.

        A layer keeps the tensors given until its last one has come, possibly in a later call: their memory must stay as
        it is until then.
        """
        self._model.load_weights(tensors)  # pyright: ignore[reportCallIssue]

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
