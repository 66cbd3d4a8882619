"""Windows, layers without positions and scaled positions in a whole model, against the models of transformers that have them."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

from configs.schema import RopeConfig, RopeScaling
from tests.model.helpers import build, pack, tiny_config

OUR_NAMES = {
    "model.embed_tokens": "embedding",
    "model.layers": "layers",
    "model.norm": "final_norm",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn": "attention",
    "mlp": "ffn",
    "lm_head": "head",
}
LENGTH = 200
LONG = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
CASES = {
    "mistral's window": (
        (MistralConfig, MistralForCausalLM, {"sliding_window": 24}),
        ("sliding(24)", RopeConfig()),
    ),
    "smollm3's layers without positions": (
        (SmolLM3Config, SmolLM3ForCausalLM, {"no_rope_layers": [1, 1, 1, 0], "pad_token_id": None}),
        ("full", RopeConfig(nope="every 4")),
    ),
    "smollm3's layers without positions, the others with windows": (
        (
            SmolLM3Config,
            SmolLM3ForCausalLM,
            {
                "no_rope_layers": [1, 0, 1, 0],
                "use_sliding_window": True,
                "sliding_window": 24,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "pad_token_id": None,
            },
        ),
        ("every 2 full, rest sliding(24)", RopeConfig(nope="every 2")),
    ),
    "llama with yarn": (
        (LlamaConfig, LlamaForCausalLM, {"rope_parameters": {"rope_type": "yarn", **LONG}}),
        ("full", RopeConfig(scaling=RopeScaling.YARN, factor=4.0, original_max_seq_len=64)),
    ),
    "llama 3.1": (
        (
            LlamaConfig,
            LlamaForCausalLM,
            {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LONG}},
        ),
        ("full", RopeConfig(scaling=RopeScaling.LLAMA3, factor=4.0, original_max_seq_len=64)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case):
    (config_class, model_class, extras), (rule, rope) = CASES[case]
    config = tiny_config(num_layers=4, norm_eps=1e-6)
    theirs = model_class(
        config_class(
            **{
                "vocab_size": config.vocab_size,
                "hidden_size": config.hidden_size,
                "num_hidden_layers": config.num_layers,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "head_dim": config.head_dim,
                "intermediate_size": config.ffn_size,
                "max_position_embeddings": config.max_seq_len,
                "rms_norm_eps": config.norm_eps,
                "tie_word_embeddings": True,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                **extras,
            }
        )
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    ours = build(config, rule)
    ours.load_state_dict({_our_name(name): tensor for name, tensor in theirs.state_dict().items()})
    tokens, positions, cu_seqlens = pack([LENGTH])
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        unlike = build(config)  # the same weights under full attention and plain RoPE
        unlike.load_state_dict(ours.state_dict())
        assert (unlike(tokens, positions, cu_seqlens) - expected)[-50:].abs().max() > 0.1
        ours.set_rope(rope)
        torch.testing.assert_close(ours(tokens, positions, cu_seqlens), expected, rtol=1e-4, atol=1e-4)


def _our_name(name: str) -> str:
    for theirs, ours in OUR_NAMES.items():
        name = name.replace(theirs, ours)
    return name
