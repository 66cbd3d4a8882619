"""Parts of a layer, in all ways that compute them: that they are the same function, and what is reported of them."""

import re

import pytest
import torch

from configs.registry import compose
from configs.schema import ConfigError, LayerBenchmarkConfig
from scripts.layer_benchmark.rows import measure


def config(*overrides: str) -> LayerBenchmarkConfig:
    sizes = ["model=tiny", "lengths=[60]", "ffn_tiles=[25,60]", "repeats=1"]
    return compose(LayerBenchmarkConfig, config_name="benchmark_layers", overrides=[*sizes, *overrides])


def differences(device: str, *overrides: str) -> dict[str, float]:
    """By row; of the first way of each part there is none."""
    figures = list(measure(config(*overrides), torch.device(device)))
    assert all(figure.value > 0 for figure in figures)
    found = {figure.name: re.search(r"differs by (.*)", figure.note) for figure in figures}
    return {name: float(match[1]) for name, match in found.items() if match}


def test_all_ways_agree(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # takes half a minute here
    found = differences("cpu")
    parts = {"norm": ["compiled"], "rope": ["compiled"], "swiglu": ["compiled"], "ffn": ["compiled", "tiles of 25"], "loss": ["torch"]}
    assert list(found) == [f"{part}, 60 tokens: {way}" for part, ways in parts.items() for way in ways]
    assert all(difference < 1e-2 for difference in found.values())


def test_all_logits_at_once_only_where_they_fit():
    assert not differences("cpu", "parts=[loss]", "reference_up_to=59")  # one way is left


@pytest.mark.gpu
def test_all_ways_agree_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = differences("cuda", "model.hidden_size=256", "model.vocab_size=5000", "lengths=[2048]", "ffn_tiles=[1000]")
    assert {"loss, 2,048 tokens: triton", "ffn, 2,048 tokens: tiles of 1000"} <= found.keys()
    assert all(difference < 2e-2 for difference in found.values())


def test_mistakes():
    for wrong, message in (
        ("lengths=[]", r"^lengths=\[\]: must hold at least one$"),
        ("ffn_tiles=[0]", r"^ffn_tiles=0: must be at least 1$"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(wrong)
