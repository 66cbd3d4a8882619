"""Models of transformers with random weights against ours with the same: logits, names, and both ways through config.json."""

import json

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from configs.model_file import ModelFile
from configs.schema import AttentionConfig, ConfigError, ModelConfig, RopeConfig, RopeScaling
from model.hf import from_config, is_computed, parameter_shapes, to_config, to_theirs
from model.transformer import Transformer
from tests.model.helpers import pack, tiny_config

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
ORIGINAL = 64  # positions that the scaled forms were trained at
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn_all": {
        "rope_type": "yarn",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "original_max_position_embeddings": ORIGINAL,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
    },
    "yarn_scales": {
        "rope_type": "yarn",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "original_max_position_embeddings": ORIGINAL,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "original_max_position_embeddings": ORIGINAL,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


def make_theirs(family: str, rope: dict, *, tied: bool = False, **changes):
    """A model of transformers whose every parameter is random: norms and biases too, their defaults of 1 and 0 would hide a mistake."""
    config_class, model_class = FAMILIES[family]
    values = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    values |= {"head_dim": 16, "intermediate_size": 48, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "bos_token_id": 1}
    values |= {"tie_word_embeddings": tied, "rope_parameters": dict(rope), **({"sliding_window": None} if family == "mistral" else {})}
    theirs = model_class(config_class(**(values | changes))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return theirs


def config_values(theirs) -> dict:
    """What `save_pretrained` writes into config.json."""
    return json.loads(theirs.config.to_json_string())


def load_ours(theirs, values: dict) -> Transformer:
    described = from_config(values)
    ours = Transformer(described.model, described.attention.per_layer(described.model.num_layers), described.rope)
    state = theirs.state_dict()
    tensors = {name: state[to_theirs(name)] for name in parameter_shapes(described.model)}
    if described.model.tie_embeddings:
        tensors["head.weight"] = tensors["embedding.weight"]
    ours.load_state_dict(tensors)
    return ours.eval()


@torch.no_grad()
def assert_equal_logits(ours: Transformer, theirs, length: int) -> None:
    tokens, positions, cu_seqlens = pack([length])
    expected = theirs(tokens[None]).logits[0]
    assert expected.std() > 0.5
    torch.testing.assert_close(ours(tokens, positions, cu_seqlens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_within_and_beyond_the_original_context(family, rope):
    theirs = make_theirs(family, ROPES[rope], tied=family in ("qwen2", "qwen3"))
    ours = load_ours(theirs, config_values(theirs))
    for length in (50, 150, 400):
        assert_equal_logits(ours, theirs, length)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_tied_or_not_the_tensors_and_logits_are_the_same(family, tied):
    theirs = make_theirs(family, ROPES["default"], tied=tied)
    ours = load_ours(theirs, config_values(theirs))
    assert_equal_logits(ours, theirs, 200)
    shapes = parameter_shapes(ours.config)
    assert {to_theirs(name) for name in shapes} == {name for name, _ in theirs.named_parameters()}
    assert all(tuple(theirs.get_parameter(to_theirs(name)).shape) == shape for name, shape in shapes.items())
    assert ("head.weight" in shapes) is not tied


@pytest.mark.parametrize("rope", [name for name in ROPES if name != "yarn_scales"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_an_equivalent_config(family, rope):
    theirs = make_theirs(family, ROPES[rope])
    described = from_config(config_values(theirs))
    back = to_config(described, dtype="float32", token_ids={"bos_token_id": 1})
    assert from_config(back) == described
    plain = "llama" if family == "mistral" else family  # without a window they are one
    assert back["model_type"] == plain and "auto_map" not in back
    again = FAMILIES[plain][1](FAMILIES[plain][0].from_dict(back)).eval()
    again.load_state_dict(theirs.state_dict())
    tokens = pack([300])[0][None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize(
    ("family", "changes", "rule"),
    [
        ("mistral", {"sliding_window": 24}, "sliding(24)"),
        ("qwen2", {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 2}, "layers 2 sliding(24), rest full"),
        (
            "qwen3",
            {"sliding_window": 9, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
            "every 2 full, rest sliding(9)",
        ),
    ],
)
def test_windows_are_sliding_layers_in_both_directions(family, changes, rule):
    layers = 4 if family == "qwen3" else 3
    theirs = make_theirs(family, ROPES["default"], num_hidden_layers=layers, **changes)
    ours = load_ours(theirs, config_values(theirs))
    for length in (9, 24, 25, 200):
        assert_equal_logits(ours, theirs, length)
    described = from_config(config_values(theirs))
    assert described.attention.per_layer(layers) == AttentionConfig(rule=rule).per_layer(layers)
    back = to_config(described, dtype="float32", token_ids={})
    assert back["model_type"] == family and "auto_map" not in back
    again = FAMILIES[family][1](FAMILIES[family][0].from_dict(back)).eval()
    again.load_state_dict(theirs.state_dict())
    assert_equal_logits(ours, again, 200)


def test_a_window_that_mistral_takes_for_granted_is_read():
    values = LLAMA | {"model_type": "mistral", "num_key_value_heads": 4}
    assert from_config(values).attention.rule == "sliding(4096)"
    assert from_config(values | {"sliding_window": None}).attention.rule == "full"


def test_ntk_is_exported_as_the_base_that_it_is():
    described = ModelFile(model=tiny_config(), rope=RopeConfig(scaling=RopeScaling.NTK, factor=4.0), attention=AttentionConfig())
    values = to_config(described, dtype="float32", token_ids={})
    assert (values["max_position_embeddings"], values["rope_parameters"]["rope_type"]) == (1024, "default")
    theirs = LlamaForCausalLM(LlamaConfig.from_dict(values)).eval()
    ours = load_ours(theirs, values)
    ours.set_rope(described.rope)
    tokens, positions, cu_seqlens = pack([700])
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens, positions, cu_seqlens), theirs(tokens[None]).logits[0], rtol=0, atol=1e-5)


def test_heads_that_do_not_divide_the_width_are_a_mistral():
    described = ModelFile(model=tiny_config(hidden_size=40, num_heads=6), attention=AttentionConfig())
    values = to_config(described, dtype="float32", token_ids={})
    theirs = MistralForCausalLM(MistralConfig.from_dict(values)).eval()
    assert values["architectures"] == ["MistralForCausalLM"] and theirs.config.sliding_window is None
    shapes = {to_theirs(name): shape for name, shape in parameter_shapes(described.model).items()}
    assert shapes == {name: tuple(parameter.shape) for name, parameter in theirs.named_parameters()}


LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "torch_dtype": "float16",
}


def test_released_spellings_are_read():
    # Llama 2: neither head_dim nor key/value heads, an epsilon by default.
    plain = from_config(LLAMA)
    assert (plain.model.num_kv_heads, plain.model.head_dim, plain.model.norm_eps) == (4, 8, 1e-6)
    assert plain.rope == RopeConfig(theta=10000.0) and plain.attention == AttentionConfig(rule="full")
    # Llama 3.2 as transformers 4 wrote it, and as 5 does.
    scaling = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64}
    expected = RopeConfig(theta=5e5, scaling=RopeScaling.LLAMA3, factor=32.0, original_max_seq_len=64)
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}}
    new = LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    assert from_config(old).rope == from_config(new).rope == from_config(old | new).rope == expected
    # The note that turns a Qwen2.5 into its yarn form.
    qwen = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": False, "sliding_window": 131072}
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    described = from_config(qwen | {"rope_theta": 1e6, "rope_scaling": yarn})
    assert described.model.qkv_bias and described.rope.scaling is RopeScaling.YARN
    # transformers takes these two for no scaling at all.
    assert from_config(LLAMA | {"rope_scaling": {"type": "linear", "factor": 1.0}}).rope == RopeConfig()
    assert from_config(LLAMA | {"rope_scaling": None, "rope_parameters": {}}).rope == RopeConfig()
    assert is_computed("model.layers.0.self_attn.rotary_emb.inv_freq") and not is_computed("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gpt2"}, "model_type=gpt2: no family .*accepted: llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': accepted: 'silu'"),
        ({"attention_bias": True}, "attention_bias=True: accepted: False; it puts a bias on o_proj"),
        ({"mlp_bias": True}, "mlp_bias=True: accepted: False"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1: accepted: 0; we train without dropout"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.*dequantised"),
        ({"logits_scaling": 8.0}, "logits_scaling=8.0: accepted: 1"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0: accepted: None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: accepted: 1"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar=256: is not known here; .*take it out"),
        ({"num_attention_heads": 5}, "head_dim: is not given, and num_attention_heads=5 does not divide"),
        ({"vocab_size": "many"}, "vocab_size='many': must be an integer"),
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"num_key_value_heads": 3}, "^num_attention_heads=4: must be a multiple of num_key_value_heads=3"),
        ({"num_key_value_heads": 0}, "^num_key_value_heads=0: must be at least 1"),
        ({"num_hidden_layers": 10**30}, f"^num_hidden_layers={10**30}: must be at most 4096"),
        ({"hidden_size": 10**17, "head_dim": 8}, f"^hidden_size={10**17}: must be at most 1048576"),
        ({"vocab_size": 10**17}, f"^vocab_size={10**17}: must be at most 2147483647"),
        ({"max_position_embeddings": 2**31}, "^max_position_embeddings=2147483648: must be at most 2147483647"),
        ({"initializer_range": 0}, "^initializer_range=0.0: must be positive"),
        ({"initializer_range": 10**400}, "^initializer_range=10+: must be a finite number"),
        ({"rms_norm_eps": 1e30}, r"^rms_norm_eps=1e\+30: must be positive and less than 1"),
        ({"bos_token_id": "1"}, "^bos_token_id='1': must be an integer, a list of integers, or null"),
        ({"rope_theta": -1}, "^rope_parameters: rope_theta=-1.0: must be greater than 1"),
        ({"rope_theta": True}, "^rope_parameters: rope_theta=True: must be a finite number"),
        ({"rope_theta": 1e39}, r"^rope_parameters: rope_theta=1e\+39: must be a finite number"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type=dynamic: accepted: .*ours are fixed"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0, "short_factor": 1}},
            "rope_type=longrope: accepted: .*a factor for each pair",
        ),
        ({"rope_scaling": {"type": "linear"}}, "factor: is missing"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2': must be a finite number"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mystery": 1}}, "mystery=1.0: is not known here for rope_type=linear"),
        ({"rope_scaling": {"factor": 2.0}}, "factor=2.0: is not known here for rope_type=default; .*give the rope_type that it is of"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64.5}},
            "original_max_position_embeddings=64.5: must be an integer",
        ),
        (
            {"rope_scaling": {"type": "llama3", "factor": 2.0, "original_max_position_embeddings": 10**30}},
            f"original_max_position_embeddings={10**30}: must be at most 2147483647",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate=False"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": -1.0}}, "attention_factor=-1.0: must be positive"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor=0.5: must be greater than 1"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 500000.0 in one place and 10000.0 in another"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention=.* differs between kinds of layers"),
        ({"model_type": "qwen2"}, "num_key_value_heads: is missing"),
        ({"model_type": "qwen2", "num_key_value_heads": 4, "layer_types": ["full_attention"]}, "layer_types: names 1 layers"),
        ({"model_type": "qwen2", "num_key_value_heads": 4, "layer_types": ["linear", "linear"]}, "layer_types=linear: accepted"),
        ({"model_type": "moba_llama", "attention_layers": ["full"]}, "attention_layers=.*must be a list of 2 texts"),
        ({"model_type": "moba_llama", "attention_layers": ["full", "sparse"]}, "does not end in an attention kind"),
        ({"model_type": "moba_llama", "nope_layers": [2]}, r"^nope_layers='layers 2': layers \[2\] do not exist"),
        ({"model_type": "moba_llama", "position_interpolation": 0.5}, "^position_interpolation=0.5: rope_type=none has no use for it"),
    ],
)
def test_what_our_model_does_not_compute_is_refused_by_name(changes, says):
    with pytest.raises(ConfigError, match=says) as refusal:
        from_config(LLAMA | changes)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "moba_llama"])
def test_a_field_of_any_other_type_is_an_error_of_one_line_or_means_nothing(family):
    """Every field that is read, under values of every type that JSON has."""
    layers = {"attention_layers": ["full", "full"], "nope_layers": [0], "position_interpolation": 1.0} if family == "moba_llama" else {}
    windows = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1, "layer_types": None}
    good = LLAMA | windows | layers | {"model_type": family, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6}
    whole = [good | {"rope_parameters": rope} for rope in (*ROPES.values(), {"rope_type": "yarn", "factor": 2.0})]
    odd = (None, True, "16", 16.5, -1, 0, float("nan"), [1], ["x"], [[]], {"a": 1}, {}, [])
    for base in whole:
        from_config(base)
        changed = [base | {key: value} for key in base for value in odd]
        rope = base["rope_parameters"]
        changed += [base | {"rope_parameters": rope | {key: value}} for key in rope for value in odd]
        for values in changed:
            try:
                from_config(values)
            except ConfigError as error:
                assert "\n" not in str(error)


def test_a_model_that_no_class_computes_is_not_exported():
    for model, says in (
        (ModelConfig(qkv_bias=True, qk_norm=True), "model.qkv_bias=True: no class of transformers has it beside model.qk_norm=True"),
        (ModelConfig(key_conv=3), "model.key_conv=3: no class of transformers convolves keys"),
    ):
        with pytest.raises(ConfigError, match=says):
            to_config(ModelFile(model=model), dtype="float32", token_ids={})
