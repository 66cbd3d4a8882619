"""Initialisation: stated statistics, and the same numbers for a seed however the model was built."""

import pytest
import torch

from model.init import initialise
from tests.model.helpers import build, tiny_config

CONFIG = tiny_config(hidden_size=128, num_heads=8, num_kv_heads=4, ffn_size=256, vocab_size=512, num_layers=4, init_std=0.02)


@pytest.mark.parametrize("tied", [True, False])
def test_statistics(tied):
    config = tiny_config(**{**vars(CONFIG), "tie_embeddings": tied, "qkv_bias": True, "qk_norm": True})
    for name, parameter in build(config).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            scaled = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / 8**0.5 if scaled else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.mean().item()) < 4 * std / parameter.numel() ** 0.5, name


def test_every_matrix_has_numbers_of_its_own():
    matrices = [parameter.detach().flatten()[:64] for parameter in build(CONFIG).parameters() if parameter.dim() == 2]
    firsts = {round(float(matrix[0] / matrix.std()), 3) for matrix in matrices}
    assert len(firsts) == len(matrices)


def test_a_seed_decides_everything():
    torch.manual_seed(5)
    first = build(CONFIG, seed=3)
    state = torch.get_rng_state()
    again = build(CONFIG, "moba(8, 2)", seed=3)
    other = build(CONFIG, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    torch.set_rng_state(state)
    initialise(first, CONFIG, 3)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched


def test_a_parameter_does_not_depend_on_the_others():
    shallow, deep = build(tiny_config(num_layers=1)), build(tiny_config(num_layers=3))
    assert torch.equal(shallow.layers[0].ffn.up_proj.weight, deep.layers[0].ffn.up_proj.weight)
    tied, untied = build(tiny_config()), build(tiny_config(tie_embeddings=False))
    assert torch.equal(tied.embedding.weight, untied.embedding.weight)
    assert tied.head.weight is tied.embedding.weight
    assert not torch.equal(untied.head.weight, untied.embedding.weight)


def test_an_unknown_module_is_an_error():
    model = build(CONFIG)
    model.extra = torch.nn.Conv1d(2, 2, 3)
    with pytest.raises(AssertionError, match="extra"):
        initialise(model, CONFIG, 0)
