"""From the routes that an engine gives for the tokens fed to it to those of a rollout."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clipo_megatron.errors import CheckError
from clipo_megatron.records import Routes


def rollout_routes(fed: NDArray[np.integer] | None, num_tokens: int) -> Routes:
    """Routes of all tokens of a prompt and its response.

    Args:
        fed: [n, layers, experts per token] of the first n tokens, n >= num_tokens - 1: the last token was sampled, but
            may never have been fed. None when the engine gave none.
        num_tokens: of prompt and response.

    Returns:
        [num_tokens, layers, experts per token]; -1 on the last token, whatever the engine did with it.

    Raises:
        CheckError: a token that the engine must have been fed has no routes.
    """
    needed = num_tokens - 1
    if fed is None or fed.ndim != 3 or len(fed) < needed:
        found = "no routed experts" if fed is None else f"routed experts of shape {fed.shape}"
        raise CheckError(
            f"engine: {found} for a prompt and response of {num_tokens} tokens; [{needed} or more, layers, experts per "
            "token] are needed to replay them: this vLLM release does not give them as the tested ones do; set "
            "experts.routing_replay=false to train without"
        )
    routes = np.full((num_tokens, *fed.shape[1:]), -1, dtype=np.int16)
    routes[:needed] = fed[:needed]
    return routes
