"""Hugging Face's names, shapes and configs, and ours: Llama 2 and 3, Mistral, Qwen2, Qwen3. Pure maps: no files, no tensors.

Our rotation turns the pairs (i, i + D/2) as transformers does, so no weight is permuted. A `config.json` is read strictly: every field
is mapped, known to leave the results as they are, or refused.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch

from configs.layers import LayerAttention
from configs.model_file import ModelFile
from configs.schema import AttentionConfig, ConfigError, ModelConfig, RopeConfig, RopeScaling
from model.transformer import Transformer

T = TypeVar("T")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields that go along into an export."""
MODELLING_FILE = "modeling_moba.py"
"""Name in an export of the source of `model.hf_moba`."""

_NAMES = (  # theirs, ours
    ("model.embed_tokens.", "embedding."),
    ("model.layers.", "layers."),
    ("model.norm.", "final_norm."),
    ("lm_head.", "head."),
    (".self_attn.", ".attention."),
    (".input_layernorm.", ".attention_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".mlp.", ".ffn."),
)


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What transformers' classes of one `model_type` do and what they take for an absent field."""

    name: str
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    has_window: bool = False
    """Its `sliding_window` counts without `use_sliding_window`."""


_FAMILIES = {
    "llama": _Family(name="Llama"),
    "mistral": _Family(name="Mistral", has_window=True),
    "qwen2": _Family(name="Qwen2", qkv_bias=True),
    "qwen3": _Family(name="Qwen3", qk_norm=True, head_dim=128),
}
_OWN = "moba_"  # our exports with MoBA layers: model_type moba_llama, ...

_MAPPED = {  # config.json to ModelConfig, where nothing but the name differs
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "ffn_size",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
_MAPPED_ROPE = {  # and to RopeConfig
    "rope_type": "scaling",
    "rope_theta": "theta",
    "original_max_position_embeddings": "original_max_seq_len",
    "position_interpolation": "interpolation",
    "nope_layers": "nope",
}
_ABSENT = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}  # the same in all four families
_THETA = 10000.0
_LARGEST = 3.4e38  # what is more is infinite in fp32, which angles and norms are computed in

# Fields that our model has no counterpart of, and the value under which they do nothing.
_NEUTRAL: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "hidden_dropout": 0,
    "rope_interleaved": False,
    "use_mrope": False,
    "quantization_config": None,
    "logit_scale": 1,
    "logits_scaling": 1,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
}
_WHY = {
    "hidden_act": "our feed-forward is SwiGLU",
    "attention_bias": "it puts a bias on o_proj too, which our attention has not",
    "attention_dropout": "we train without dropout; where that is meant, set it to 0 in config.json",
    "quantization_config": "quantised weights are not read; save the model dequantised",
}
_SCALED = "we do not scale or cap hidden states and logits"
# Fields that say nothing of the logits: book-keeping, generation, outputs, and how transformers computes.
_IRRELEVANT = frozenset(
    (
        *("architectures", "auto_map", "dtype", "torch_dtype", "model_type", "name_or_path", "transformers_version", "use_cache"),
        *("pretraining_tp", "is_llama_config", "unsloth_version", "unsloth_fixed", "transformers.js_config", "tokenizer_class", "prefix"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id"),
        *("output_attentions", "output_hidden_states", "return_dict", "torchscript", "tf_legacy_loss", "use_bfloat16"),
        *("chunk_size_feed_forward", "finetuning_task", "task_specific_params", "problem_type", "id2label", "label2id", "num_labels"),
        *("tie_encoder_decoder", "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
        *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores"),
        *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "suppress_tokens"),
        *("begin_suppress_tokens", "exponential_decay_length_penalty"),
    )
)
_ROPE_FIELDS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor"})
_WINDOW_FIELDS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"})
_FORMS = ("default", "linear", "yarn", "llama3")
_ROPE_TYPES: dict[str, type] = {"original_max_position_embeddings": int, "truncate": bool}  # the others are numbers
_REFUSED_ROPE = {
    "dynamic": "its frequencies follow the length of each sequence, ours are fixed (rope.scaling=ntk is the fixed form)",
    "longrope": "it has a factor for each pair, which no scaling of ours has",
}


# --- tensors ------------------------------------------------------------------------------------------------------------------------


def to_theirs(name: str) -> str:
    """Their name of a tensor of ours: `layers.0.attention.q_proj.weight` is `model.layers.0.self_attn.q_proj.weight`."""
    for theirs, ours in _NAMES:
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
        elif ours.startswith("."):
            name = name.replace(ours, theirs)
    return name


def is_computed(name: str) -> bool:
    """Whether a tensor of theirs is one that files of early Llamas hold although it follows from the config."""
    return name.endswith(".rotary_emb.inv_freq")


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a file of weights holds, by our name; a tied head is the embedding and has no entry."""
    with torch.device("meta"):
        model = Transformer(config, (LayerAttention(kind="full"),) * config.num_layers, RopeConfig())
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


# --- their config to ours -----------------------------------------------------------------------------------------------------------


def from_config(values: Mapping[str, Any]) -> ModelFile:
    """The model that a `config.json` describes. Raises ConfigError naming the field, its value and what is accepted."""
    kind = str(values.get("model_type"))
    family = _FAMILIES.get(kind.removeprefix(_OWN))
    if family is None:
        accepted = ", ".join(_FAMILIES)
        raise ConfigError(f"model_type={kind}: no family that our model covers; accepted: {accepted}")
    _check_neutral(values, kind)
    model = _model(values, family)
    own, nope = values.get("attention_layers"), _typed(values, "nope_layers", list, [])
    if not all(type(layer) is int for layer in nope):
        raise ConfigError(f"nope_layers={nope!r}: must be a list of layers, counted from 0")
    layers = _windows(values, family, model.num_layers) if own is None else _own_layers(own, model.num_layers)
    attention = AttentionConfig(rule=_join(layers))
    attention.per_layer(model.num_layers)
    rope = _rope(values, model.max_seq_len)
    with _in_their_words(_MAPPED_ROPE):
        rope = replace(rope, interpolation=_typed(values, "position_interpolation", float, 1.0))
        rope = replace(rope, nope=f"layers {' '.join(map(str, nope))}" if nope else "")
        rope.nope_layers(model.num_layers)
    return ModelFile(model=model, rope=rope, attention=attention)


@contextmanager
def _in_their_words(names: Mapping[str, str], where: str = "") -> Iterator[None]:
    """Errors of our dataclasses with the keys that config.json has, behind `where`; `names` are theirs to ours."""
    theirs = {ours: name for name, ours in names.items()}
    try:
        yield
    except ConfigError as error:
        raise ConfigError(where + re.sub(r"\b\w+(?==)", lambda key: theirs.get(key[0], key[0]), str(error))) from None


_TYPES: dict[type, str] = {int: "an integer", float: "a finite number", bool: "true or false", list: "a list", dict: "an object"}


def _typed(values: Mapping[str, Any], key: str, hint: type[T], default: T | None) -> T:
    """The field `key` as `hint`; `default` where it is absent or null, which None says it may not be. Raises ConfigError."""
    value: Any = default if values.get(key) is None else values[key]
    if value is None:
        raise ConfigError(f"{key}: is missing; must be {_TYPES[hint]}")
    accepted = type(value) is hint
    if hint is float:
        accepted = type(value) in (int, float) and abs(value) <= _LARGEST  # which is false of NaN
    if not accepted:
        raise ConfigError(f"{key}={value!r}: must be {_TYPES[hint]}")
    return cast(T, float(value) if hint is float else value)


def _check_neutral(values: Mapping[str, Any], kind: str) -> None:
    known = {*_MAPPED, *_NEUTRAL, *_IRRELEVANT, *_ROPE_FIELDS, *_WINDOW_FIELDS, "head_dim"}
    if kind.startswith(_OWN):
        known |= {"attention_layers", "nope_layers", "position_interpolation"}
    for key, value in values.items():
        if key not in known and not key.startswith("_"):  # which are notes of transformers to itself
            raise ConfigError(f"{key}={value!r}: is not known here; if the model computes the same without it, take it out of config.json")
        if key == "attention_bias" and kind == "qwen2":  # which has its biases whatever this says
            continue
        if key in _NEUTRAL and value != _NEUTRAL[key] and value is not None:
            raise ConfigError(f"{key}={value!r}: accepted: {_NEUTRAL[key]!r}; {_WHY.get(key, _SCALED)}")
        tokens = value if isinstance(value, list) else [value]
        if key in TOKEN_IDS and value is not None and not all(type(token) is int for token in tokens):
            raise ConfigError(f"{key}={value!r}: must be an integer, a list of integers, or null")


def _model(values: Mapping[str, Any], family: _Family) -> ModelConfig:
    fields: dict[str, Any] = {}
    for theirs, ours in _MAPPED.items():
        value = values.get(theirs, _ABSENT.get(theirs))
        if value is None and theirs == "num_key_value_heads" and (theirs in values or family.name == "Llama"):
            value = values.get("num_attention_heads")
        fields[ours] = _typed({theirs: value}, theirs, type(getattr(ModelConfig, ours)), None)
    fields |= {"qkv_bias": family.qkv_bias, "qk_norm": family.qk_norm}
    if values.get("head_dim", family.head_dim) is None:
        if fields["hidden_size"] % max(fields["num_heads"], 1):
            raise ConfigError(f"head_dim: is not given, and num_attention_heads={fields['num_heads']} does not divide hidden_size")
        head_dim = fields["hidden_size"] // max(fields["num_heads"], 1)
    else:
        head_dim = _typed(values, "head_dim", int, family.head_dim)
    with _in_their_words(_MAPPED):
        return ModelConfig(**fields, head_dim=head_dim)


def _windows(values: Mapping[str, Any], family: _Family, num_layers: int) -> list[str]:
    """The attention of each layer as transformers gives it: `sliding(W)` where a window is in use, else `full`."""
    window = values.get("sliding_window", 4096)
    if not family.has_window and not _typed(values, "use_sliding_window", bool, False):
        window = None
    kinds = None if family.has_window else _typed(values, "layer_types", list, []) or None
    if kinds is None:
        first = 0 if family.has_window else _typed(values, "max_window_layers", int, 28)
        kinds = ["sliding_attention" if window is not None and layer >= first else "full_attention" for layer in range(num_layers)]
    if len(kinds) != num_layers:
        raise ConfigError(f"layer_types: names {len(kinds)} layers, num_hidden_layers={num_layers}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(f"layer_types={kind}: accepted: full_attention, sliding_attention")
        if kind == "sliding_attention" and (type(window) is not int or window < 1):
            raise ConfigError(f"sliding_window={window!r}: must be a number of tokens, at least 1; layer_types has sliding layers")
    return [f"sliding({window})" if kind == "sliding_attention" else "full" for kind in kinds]


def _rope(values: Mapping[str, Any], max_length: int) -> RopeConfig:
    given: dict[str, Any] = {}
    top = {key: values[key] for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings") if key in values}
    for part in (*(_typed(values, key, dict, {}) for key in ("rope_scaling", "rope_parameters")), top):
        for key, value in part.items():
            key = "rope_type" if key == "type" else key
            if key in given and given[key] != value:
                raise ConfigError(f"rope_parameters: {key} is {given[key]!r} in one place and {value!r} in another; keep the right one")
            given[key] = value
    with _in_their_words(_MAPPED_ROPE, "rope_parameters: "):
        for key, value in given.items():
            if isinstance(value, Mapping):
                raise ConfigError(f"{key}={value!r}: differs between kinds of layers; ours are the same in all")
        kind = str(given.pop("rope_type", "default"))
        if kind not in _FORMS:
            why = _REFUSED_ROPE.get(kind, "no scaling of ours computes it")
            raise ConfigError(f"rope_type={kind}: accepted: {', '.join(_FORMS)}; {why}")
        given.pop("finetuned", None)  # a note of the first yarn files
        read: dict[str, Any] = {key: _typed(given, key, _ROPE_TYPES.get(key, float), None) for key in given if given[key] is not None}
        return _scaled(kind, read, max_length)


def _scaled(kind: str, given: dict[str, Any], max_length: int) -> RopeConfig:
    """`given` are the parameters of the form `kind` as transformers names them; what is not read is refused."""
    if (partial := given.pop("partial_rotary_factor", 1)) != 1:
        raise ConfigError(f"partial_rotary_factor={partial}: accepted: 1; our rotation turns whole heads")
    theta = given.pop("rope_theta", _THETA)
    original = given.pop("original_max_position_embeddings", max_length)
    if original < 1:
        raise ConfigError(f"original_max_position_embeddings={original}: must be at least 1")
    fields: dict[str, Any] = {}
    factor = 1.0
    if kind != "default":
        factor = given.pop("factor", max_length / original if kind == "yarn" else None)
        if factor is None:
            raise ConfigError(f"factor: is missing; must be a finite number for rope_type={kind}")
    if kind == "llama3":
        fields |= {key: given.pop(key) for key in ("low_freq_factor", "high_freq_factor") if key in given}
    if kind == "yarn":
        fields |= _yarn(given, factor)
    if given:
        key, value = next(iter(given.items()))
        raise ConfigError(f"{key}={value!r}: is not known here for rope_type={kind}; take it out, or give the rope_type that it is of")
    if factor == 1 and "attention_factor" not in fields:
        return RopeConfig(theta=theta)
    lengths = {} if kind == "linear" else {"original_max_seq_len": original}
    return RopeConfig(theta=theta, scaling=RopeScaling(kind), factor=factor, **lengths, **fields)


def _yarn(given: dict[str, Any], factor: float) -> dict[str, float]:
    """The fields of our yarn besides lengths and factor; `given` loses what was read."""
    if not given.pop("truncate", True):
        raise ConfigError("truncate=False: our yarn rounds the ends of its ramp to whole pairs")
    fields = {key: value for key in ("beta_fast", "beta_slow") if (value := given.pop(key, 0))}  # 0 is absent to transformers
    scale, scale_all = given.pop("mscale", 0), given.pop("mscale_all_dim", 0)
    attention = given.pop("attention_factor", None)
    if attention is None and scale and scale_all and factor > 1:
        attention = (0.1 * scale * math.log(factor) + 1) / (0.1 * scale_all * math.log(factor) + 1)
    if attention is None or (attention == 1 and factor <= 1):
        return fields
    if attention <= 0:
        raise ConfigError(f"attention_factor={attention}: must be positive")
    return fields | {"attention_factor": attention}


def _own_layers(layers: Any, num_layers: int) -> list[str]:
    if not isinstance(layers, list) or len(layers) != num_layers or not all(isinstance(layer, str) for layer in layers):
        raise ConfigError(f"attention_layers={layers!r}: must be a list of {num_layers} texts such as full or moba(512, 3)")
    return layers


def _join(layers: list[str]) -> str:
    """The rule that gives each layer its attention: `full`, or `layers 0 2 full, rest moba(512, 3)`."""
    kinds = sorted(set(layers), key=lambda kind: (layers.count(kind), kind))
    named = [f"layers {' '.join(str(i) for i, layer in enumerate(layers) if layer == kind)} {kind}" for kind in kinds[:-1]]
    return ", ".join([*named, f"rest {kinds[-1]}" if named else kinds[-1]])


# --- our config to theirs -----------------------------------------------------------------------------------------------------------


def to_config(described: ModelFile, *, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of our model: a plain Llama, Mistral, Qwen2 or Qwen3 by the features it uses, which needs no code of ours, or,
    where no such class has its attention, one of `model.hf_moba` around it.

    `dtype` as torch names it without `torch.`; `token_ids` are bos_token_id, eos_token_id and what else the tokenizer has.
    Raises ConfigError for a model that no class of transformers computes.
    """
    model = described.model
    layers = [str(layer) for layer in described.attention.per_layer(model.num_layers)]
    kind = _family_of(model)
    windows = {layer for layer in layers if layer.startswith("sliding")}
    if kind == "llama" and len(windows) == 1 and windows == set(layers):
        kind = "mistral"
    in_one_form = windows == set(layers) if kind == "mistral" else kind != "llama"
    nope = sorted(described.rope.nope_layers(model.num_layers))
    stretched = described.rope.interpolation != 1
    plain = not (nope or stretched) and (
        set(layers) == {"full"} or (set(layers) <= {"full", *windows} and len(windows) == 1 and in_one_form)
    )
    name = _FAMILIES[kind].name
    values: dict[str, Any] = {
        "architectures": [f"{name}ForCausalLM" if plain else f"Moba{name}ForCausalLM"],
        "model_type": kind if plain else _OWN + kind,
        **{theirs: getattr(model, ours) for theirs, ours in _MAPPED.items()},
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        **_to_rope(described.rope, model.head_dim, old_spelling=plain),
        **token_ids,
    }
    if described.rope.scaling is RopeScaling.NTK:
        values["max_position_embeddings"] = int(model.max_seq_len * described.rope.factor)
    if kind in ("llama", "qwen3"):
        values["attention_bias"] = False
    if kind == "llama":
        values["mlp_bias"] = False
    else:
        values |= _to_windows(layers if plain else [], uses=kind != "mistral")
    if not plain:
        module = MODELLING_FILE.removesuffix(".py")
        values["auto_map"] = {"AutoConfig": f"{module}.Moba{name}Config", "AutoModelForCausalLM": f"{module}.Moba{name}ForCausalLM"}
        values |= {"attention_layers": layers, "nope_layers": nope, "position_interpolation": described.rope.interpolation}
    return values


def _family_of(model: ModelConfig) -> str:
    if model.qkv_bias and model.qk_norm:
        raise ConfigError("model.qkv_bias=True: no class of transformers has it beside model.qk_norm=True")
    if model.key_conv:
        raise ConfigError(
            f"model.key_conv={model.key_conv}: no class of transformers convolves keys, and its cache has no place for their past"
        )
    if model.qkv_bias or model.qk_norm:
        return "qwen2" if model.qkv_bias else "qwen3"
    # Mistral without a window is Llama, and leaves the number of heads free where Llama's config does not.
    return "mistral" if model.hidden_size % model.num_heads else "llama"


def _to_windows(layers: list[str], *, uses: bool) -> dict[str, Any]:
    window = next((int(layer[len("sliding(") : -1]) for layer in layers if layer != "full"), None)
    if not uses:
        return {"sliding_window": window}
    kinds = ["full_attention" if layer == "full" else "sliding_attention" for layer in layers]
    found: dict[str, Any] = {"sliding_window": window, "use_sliding_window": window is not None}
    return found | ({"layer_types": kinds} if window is not None else {})


def _to_rope(rope: RopeConfig, head_dim: int, *, old_spelling: bool) -> dict[str, Any]:
    """In the spelling of transformers 5, and in that of 4, which would take a base of 10000 without a word.

    The old one is not for a `model_type` that transformers does not know: it would stumble there as it looks for the tokenizer.
    """
    theta, parameters = rope.theta, {}
    if rope.scaling is RopeScaling.NTK:  # which is another base, see `model.rope.frequencies`
        theta *= rope.factor ** (head_dim / max(head_dim - 2, 1))
    if rope.scaling in (RopeScaling.LINEAR, RopeScaling.YARN, RopeScaling.LLAMA3):
        parameters["factor"] = rope.factor
    if rope.scaling in (RopeScaling.YARN, RopeScaling.LLAMA3):
        parameters["original_max_position_embeddings"] = rope.original_max_seq_len
    if rope.scaling is RopeScaling.YARN:
        parameters |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        parameters |= {"attention_factor": rope.attention_factor} if rope.attention_factor else {}
    if rope.scaling is RopeScaling.LLAMA3:
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    kind = rope.scaling.value if parameters else "default"
    new = {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters}}
    old = {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **parameters} if parameters else None}
    return new | (old if old_spelling else {})
