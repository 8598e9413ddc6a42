"""A plan as JSON, and back without a loss."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, cast

from clipo_megatron.errors import CheckError
from clipo_megatron.parallel.layout import ParallelLayout
from clipo_megatron.sync.placement import Placement
from clipo_megatron.sync.plan import Copy, EngineLayout, Flow, Shape, SyncPlan

_FORMAT = "clipo sync plan 2"
_FLOW = ("copy", "layers", "engine", "engine_rank", "sources")


def to_json(plan: SyncPlan) -> str:
    """One object; a flow is a list [copy, run of layers, engine, engine rank, [sources]] of numbers into the lists before."""
    runs = list(dict.fromkeys(flow.layers for flow in plan.flows))
    number = {layers: index for index, layers in enumerate(runs)}
    body = {
        "format": _FORMAT,
        "trainer": asdict(plan.trainer),
        "engines": asdict(plan.engines),
        "placement": asdict(plan.placement),
        "dtype": plan.dtype,
        "item_bytes": plan.item_bytes,
        "dtypes": plan.dtypes,
        "trainer_shapes": plan.trainer_shapes,
        "engine_shapes": plan.engine_shapes,
        "layers": runs,
        "copies": [asdict(copy) for copy in plan.copies],
        "flow_fields": _FLOW,
        "flows": [(flow.copy, number[flow.layers], flow.engine, flow.engine_rank, flow.sources) for flow in plan.flows],
    }
    return json.dumps(body, separators=(",", ":"))


def from_json(text: str) -> SyncPlan:
    """The inverse of `to_json`.

    Raises:
        CheckError: not a plan, or one of another format.
    """
    try:
        body = cast("dict[str, Any]", json.loads(text))
        if body["format"] != _FORMAT:
            raise CheckError(f"sync plan: format is {body['format']!r}, this release reads {_FORMAT!r}; plan again")
        runs = [tuple(layers) for layers in body["layers"]]
        return SyncPlan(
            trainer=ParallelLayout(**body["trainer"]),
            engines=EngineLayout(**body["engines"]),
            placement=Placement(**_tuples(body["placement"])),
            dtype=body["dtype"],
            item_bytes=body["item_bytes"],
            dtypes=dict(body["dtypes"]),
            trainer_shapes=_shapes(body["trainer_shapes"]),
            engine_shapes=_shapes(body["engine_shapes"]),
            copies=tuple(Copy(**_tuples(copy)) for copy in body["copies"]),
            flows=tuple(
                Flow(copy, engine, engine_rank, runs[layers], tuple(sources))
                for copy, layers, engine, engine_rank, sources in body["flows"]
            ),
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckError(f"sync plan: is no plan ({type(error).__name__}: {error}); dump it again") from error


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(cast("list[Any]", value)) if isinstance(value, list) else value for name, value in fields.items()
    }


def _shapes(lists: dict[str, list[int]]) -> dict[str, Shape]:
    return {name: tuple(shape) for name, shape in lists.items()}
