"""Our decoder against transformers' Llama, Qwen2 and Qwen3, with their random weights copied in."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.model.helpers import build, pack, tiny_config

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"qkv_bias": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"qk_norm": True}),
}
OUR_NAMES = {
    "model.embed_tokens": "embedding",
    "model.layers": "layers",
    "model.norm": "final_norm",
    "lm_head": "head",
    "self_attn": "attention",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp": "ffn",
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tied):
    config_class, model_class, extras = FAMILIES[family]
    config, theta, length = tiny_config(tie_embeddings=tied, norm_eps=1e-6, **extras), 5000.0, 200
    theirs = model_class(
        config_class(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.ffn_size,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms and biases too: their defaults of 1 and 0 would hide a mistake
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    ours = build(config, theta=theta)
    ours.load_state_dict({_our_name(name): tensor for name, tensor in theirs.state_dict().items()})

    tokens, positions, cu_seqlens = pack([length])
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        assert expected.std() > 0.5
        torch.testing.assert_close(ours(tokens, positions, cu_seqlens), expected, rtol=1e-4, atol=1e-4)


def _our_name(name: str) -> str:
    for theirs, ours in OUR_NAMES.items():
        name = name.replace(theirs, ours)
    return name
