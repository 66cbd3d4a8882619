"""The model and attention files: what they say about their own sizes."""

from pathlib import Path

import pytest
import yaml

from configs.schema import AttentionConfig, ModelConfig
from model.accounting import parameter_counts

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {  # millions of parameters: without embeddings, total
    "tiny": (0.092, 0.125),
    "quickstart": (0.788, 1.836),
    "small_50m": (50.15, 71.12),
    "paper_545m": (545.97, 604.69),
    "llama_1b9": (1586.1, 1914.4),
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("model/*.yaml")), ids=lambda path: path.stem)
def test_model_files_have_the_size_they_state(path):
    assert path.read_text().startswith("# ")
    counts = parameter_counts(ModelConfig(**yaml.safe_load(path.read_text())))
    assert (counts.non_embedding / 1e6, counts.total / 1e6) == pytest.approx(SIZES[path.stem], rel=1e-2)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("attention/*.yaml")), ids=lambda path: path.stem)
def test_attention_files_fit_a_model(path):
    assert path.read_text().startswith("# ")
    assert len(AttentionConfig(**yaml.safe_load(path.read_text())).per_layer(14)) == 14
