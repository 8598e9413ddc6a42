"""The shape of a model, read from its config.json alone (transformers 4 or 5). What we can't build is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from clipo_megatron.errors import ConfigError
from clipo_megatron.weights.families import FAMILIES, ONLY_VALUES, ExpertKeys, Family, OnlyValue
from clipo_megatron.weights.rules import Sizes

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3RopeScaling:
    """The `llama3` rope type: long wavelengths are slowed down by `factor`, short ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int
    """Tokens; wavelengths are compared with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """The mixture of experts that each layer has in place of one MLP.

    A token's weights of its experts are the softmax over their logits alone.
    """

    num_experts: int
    """Of one layer."""
    experts_per_token: int
    ffn_size: int
    """Width of an expert's gate and of its up projection, each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """All that a policy is built from."""

    family: str
    """Key of families.FAMILIES."""
    hidden_size: int
    num_layers: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    """Width of the gate and of the up projection, each; no weight has it where there are experts."""
    vocab_size: int
    """Rows of the embedding in the Hugging Face folder, not padded for tp."""
    tied: bool
    """The output layer is the embedding."""
    rope_base: float
    rope_scaling: Llama3RopeScaling | None
    rms_eps: float
    qkv_bias: bool
    qk_norm: bool
    max_positions: int
    """Tokens."""
    dtype: str
    """Of the stored weights: "float32", "bfloat16" or "float16"."""
    eos_ids: tuple[int, ...]
    """Token ids that end a response: those of generation_config.json, if it has any, else of config.json."""
    experts: Experts | None = None
    """None in a dense model."""

    @property
    def sizes(self) -> Sizes:
        """Numbers behind the dims of the name tables."""
        of_experts = (
            {} if self.experts is None else {"experts": self.experts.num_experts, "expert_ffn": self.experts.ffn_size}
        )
        return of_experts | {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.ffn_size,
            "query": self.num_heads * self.head_dim,
            "kv": self.num_kv_heads * self.head_dim,
            "head_dim": self.head_dim,
        }


def read_architecture(folder: Path) -> Architecture:
    """Read `folder`/config.json (and the eos ids of generation_config.json).

    Raises:
        ConfigError: no such file, a key is missing, or the project can't build such a model; all faults at once.
    """
    path = folder / CONFIG_FILE
    keys = _Keys(str(path), read_json_object(path), [])
    family = _family(keys)
    rope_base, rope_scaling = _rope(keys)
    num_heads, hidden_size = keys.count("num_attention_heads"), keys.count("hidden_size")
    architecture = Architecture(
        family=family.name,
        hidden_size=hidden_size,
        num_layers=keys.count("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=keys.count("num_key_value_heads"),
        head_dim=_head_dim(keys, hidden_size, num_heads),
        ffn_size=keys.count("intermediate_size"),
        vocab_size=keys.count("vocab_size"),
        tied=keys.flag("tie_word_embeddings"),
        rope_base=rope_base,
        rope_scaling=rope_scaling,
        rms_eps=keys.number("rms_norm_eps"),
        qkv_bias=family.has("linear_qkv.bias"),
        qk_norm=family.has("q_layernorm.weight"),
        max_positions=keys.count("max_position_embeddings"),
        dtype=_dtype(keys),
        eos_ids=_eos_ids(keys, folder / GENERATION_CONFIG_FILE),
        experts=_experts(keys, family.expert_keys) if family.has_experts else None,
    )
    if architecture.num_heads % architecture.num_kv_heads:
        keys.refuse("num_key_value_heads", f"must divide num_attention_heads = {architecture.num_heads}")
    for only in ONLY_VALUES + family.only_values:
        _check_value(keys, only)
    layer_types = keys.get("layer_types")
    if isinstance(layer_types, list) and set(cast("list[str]", layer_types)) - {"full_attention"}:
        keys.refuse("layer_types", "only full_attention is supported; take another model")
    if keys.problems:
        raise ConfigError(keys.problems)
    return architecture


class _Keys:
    """A JSON object's keys, read with their types. Faults are collected; a faulty key reads as 1, 1.0 or False."""

    def __init__(self, where: str, values: dict[str, object], problems: list[str]) -> None:
        self.where = where
        self.values = values
        self.problems = problems

    def get(self, key: str) -> object:
        """The value, or None."""
        return self.values.get(key)

    def refuse(self, key: str, rule: str) -> None:
        found = f"{key} = {json.dumps(self.get(key))}" if key in self.values else f"{key} is missing"
        self.problems.append(f"{self.where}: {found}: {rule}")

    def count(self, key: str) -> int:
        value = self.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        self.refuse(key, "must be a whole number >= 1")
        return 1

    def number(self, key: str) -> float:
        value = self.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return float(value)
        self.refuse(key, "must be a number > 0")
        return 1.0

    def flag(self, key: str) -> bool:
        """A missing flag is False, as in transformers' classes of all our families."""
        value = self.get(key)
        if value is None or isinstance(value, bool):
            return value is True
        self.refuse(key, "must be true or false")
        return False

    def child(self, key: str) -> _Keys:
        """The keys of the object at `key`; its faults go to this one's list."""
        value = self.get(key)
        if not isinstance(value, dict):
            self.refuse(key, "must be an object")
            value = {}
        return _Keys(f"{self.where}: {key}", cast("dict[str, object]", value), self.problems)


def read_json_object(path: Path) -> dict[str, object]:
    """The object in a JSON file.

    Raises:
        ConfigError: no such file, not JSON, or not an object.
    """
    try:
        values: object = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a Hugging Face model folder is needed") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: can't be read as JSON ({error}); copy the file again") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no JSON object; copy the file again")
    return cast("dict[str, object]", values)


def _family(keys: _Keys) -> Family:
    by_class = {family.hf_class: family for family in FAMILIES.values()}
    found = keys.get("architectures")
    names = cast("list[object]", found) if isinstance(found, list) else []
    if len(names) == 1 and isinstance(names[0], str) and names[0] in by_class:
        family = by_class[names[0]]
        if keys.get("model_type") not in (None, family.name):
            # transformers builds the model that model_type names.
            keys.refuse("model_type", f"must be {family.name}, as architectures = [{names[0]}]; correct the wrong one")
        return family
    # Without the family the other keys have no meaning, so this fault comes alone.
    keys.refuse("architectures", f"must be one of {', '.join(by_class)}; take a model of these families")
    raise ConfigError(keys.problems)


def _rope(keys: _Keys) -> tuple[float, Llama3RopeScaling | None]:
    """Transformers 5 has one key, `rope_parameters`; 4 has `rope_theta` and `rope_scaling`; `type` is an old key."""
    is_new = keys.get("rope_parameters") is not None
    key = "rope_parameters" if is_new else "rope_scaling"
    if not is_new and keys.get(key) is None:
        return keys.number("rope_theta"), None
    rope = keys.child(key)
    base = rope.number("rope_theta") if "rope_theta" in rope.values else keys.number("rope_theta")
    if "rope_theta" in keys.values and keys.number("rope_theta") != base:
        keys.refuse("rope_theta", f"differs from {key}.rope_theta = {base}; remove the wrong one")
    type_key = "type" if "rope_type" not in rope.values and "type" in rope.values else "rope_type"
    if rope.get(type_key) == "default":
        return base, None
    if rope.get(type_key) != "llama3":
        rope.refuse(type_key, "only default and llama3 are supported; take another model")
        return base, None
    return base, _llama3(rope)


def _check_value(keys: _Keys, only: OnlyValue) -> None:
    found = keys.get(only.key)
    is_right = not only.is_required if found is None else found == only.value
    if not is_right:
        meaning = f" ({only.meaning})" if only.meaning else ""
        keys.refuse(only.key, f"only {json.dumps(only.value)} is supported{meaning}; take another model")


def _experts(keys: _Keys, names: ExpertKeys) -> Experts:
    """Published folders of Qwen3 count the experts in `num_experts`, transformers 5 writes `num_local_experts`."""
    found = [name for name in names.num_experts if name in keys.values] or [names.num_experts[0]]
    key = found[0]
    for other in found[1:]:
        if keys.get(other) != keys.get(key):
            keys.refuse(other, f"differs from {key} = {json.dumps(keys.get(key))}; remove the wrong one")
    experts = Experts(
        num_experts=keys.count(key),
        experts_per_token=keys.count(names.experts_per_token),
        ffn_size=keys.count(names.ffn_size),
    )
    if experts.experts_per_token > experts.num_experts:
        keys.refuse(names.experts_per_token, f"must be <= {key} = {experts.num_experts}")
    return experts


def _llama3(rope: _Keys) -> Llama3RopeScaling:
    scaling = Llama3RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_positions=rope.count("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        rope.refuse("high_freq_factor", f"must be > low_freq_factor = {scaling.low_freq_factor}")
    return scaling


def _head_dim(keys: _Keys, hidden_size: int, num_heads: int) -> int:
    if keys.get("head_dim") is not None:
        return keys.count("head_dim")
    if hidden_size % num_heads:
        keys.refuse("head_dim", f"hidden_size = {hidden_size} is no multiple of num_attention_heads = {num_heads}")
    return hidden_size // num_heads


def _dtype(keys: _Keys) -> str:
    key = "dtype" if "dtype" in keys.values else "torch_dtype"
    value = keys.get(key)
    if isinstance(value, str) and value in DTYPES:
        return value
    keys.refuse(key, f"must be one of {', '.join(DTYPES)}; write the number format of the weights")
    return DTYPES[0]


def _eos_ids(keys: _Keys, generation_file: Path) -> tuple[int, ...]:
    value = keys.get("eos_token_id")
    if generation_file.exists():
        own = read_json_object(generation_file).get("eos_token_id")
        value = value if own is None else own
    ids = cast("list[object]", value) if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        keys.refuse("eos_token_id", "must be a token id or a list of them")
        return ()
    return tuple(cast("list[int]", ids))
