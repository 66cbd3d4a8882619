"""The model and attention files: what they say about their own sizes."""

from pathlib import Path

import pytest
import yaml

from configs.checks import check_run
from configs.registry import compose
from configs.schema import AttentionConfig, ModelConfig, RunConfig
from model.accounting import parameter_counts

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {  # millions of parameters: without embeddings, total
    "tiny": (0.092, 0.125),
    "quickstart": (0.788, 1.836),
    "small_50m": (50.15, 71.12),
    "small_51m": (40.64, 51.13),
    "paper_545m": (545.97, 604.69),
    "paper_822m": (822.15, 889.26),
    "paper_1b1": (1098.9, 1174.4),
    "paper_1b5": (1507.4, 1591.3),
    "paper_2b1": (2101.5, 2193.8),
    "flashmoba_340m": (308.33, 341.10),
    "flashmoba_1b": (1610.7, 1676.2),
    "llama_8b": (6979.3, 8030.3),
    "qwen2_7b": (6525.6, 7615.6),
    "llama_1b9": (1586.1, 1914.4),
    "law_1m5": (1.511, 3.608),
    "law_5m": (5.311, 8.457),
    "law_13m": (12.85, 17.04),
    "law_25m": (24.79, 30.04),
    "law_66m": (65.84, 73.18),
}
PAPER = {"paper_545m": 545, "paper_822m": 822, "paper_1b1": 1100, "paper_1b5": 1500, "paper_2b1": 2100}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("model/*.yaml")), ids=lambda path: path.stem)
def test_model_files_have_the_size_they_state(path):
    assert path.read_text().startswith("# ")
    counts = parameter_counts(ModelConfig(**yaml.safe_load(path.read_text())))
    assert (counts.non_embedding / 1e6, counts.total / 1e6) == pytest.approx(SIZES[path.stem], rel=1e-2)


@pytest.mark.parametrize("name", PAPER)
def test_models_of_the_paper_have_its_sizes(name):
    config = ModelConfig(**yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text()))
    assert parameter_counts(config).non_embedding / 1e6 == pytest.approx(PAPER[name], rel=5e-3)
    assert config.num_layers == config.num_heads == config.num_kv_heads
    assert config.hidden_size == config.num_heads * config.head_dim and config.head_dim == 128


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("model/law_*.yaml")), ids=lambda path: path.stem)
def test_small_models_of_the_scaling_law_are_shaped_as_the_papers(path):
    config = ModelConfig(**yaml.safe_load(path.read_text()))
    assert config.num_layers == config.num_heads == config.num_kv_heads and config.head_dim == 128
    assert config.hidden_size == 128 * config.num_heads and 2.4 < config.ffn_size / config.hidden_size < 2.8


@pytest.mark.parametrize("name", ["flashmoba_340m", "flashmoba_1b"])
def test_flashmoba_is_a_config(name):
    """Odd layers, counted from 1: a window of 256 with RoPE. Even layers: MoBA without positions. So 64K needs no scaling."""
    settings = [f"model={name}", "attention=flashmoba", "rope.nope='every 2'", "model.key_conv=3", "stages.0.seq_len=65536"]
    run = compose(RunConfig, config_name="train", overrides=[*settings, "stages.0.batch_tokens=65536"])
    check_run(run, world_size=1)
    layers = run.stages[0].attention.per_layer(run.model.num_layers)
    assert [str(layer) for layer in layers] == ["sliding(256)", "moba(128, 8)"] * 12
    assert run.stages[0].rope.nope_layers(24) == set(range(1, 24, 2))
    assert run.model.key_conv == 3


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("attention/*.yaml")), ids=lambda path: path.stem)
def test_attention_files_fit_a_model(path):
    assert path.read_text().startswith("# ")
    assert len(AttentionConfig(**yaml.safe_load(path.read_text())).per_layer(14)) == 14
