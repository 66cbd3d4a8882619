"""The small twins of the recipes, really trained: every stage and every switch, on budgets of one step or three a stage, rows of 2048
at most and a small vocabulary. And the recipes of continual training against the models that they begin with."""

import pytest

from configs.checks import check_run
from configs.model_file import MODEL_FILE
from configs.registry import compose
from configs.schema import PlanConfig, RunConfig
from model.hf import from_config
from tests.train.helpers import events, lines
from train.loop import train

TWINS = {
    "moba90_full10_small": ["moba(64, 4)", "full"],
    "layerwise_last3_full_small": ["moba(64, 4)"],
    "warmup_8k_32k_128k_small": ["moba(32, 3)", "moba(64, 6)", "moba(128, 12)", "full"],
}


@pytest.mark.parametrize("name", TWINS)
def test_a_small_twin_trains_through_all_its_stages(name, corpus, ranks, tmp_path):
    whole = compose(RunConfig, config_name="train", overrides=[f"experiment={name}"])
    counts = [3] + [1] * (len(whole.stages) - 1)  # steps
    lengths = [min(stage.seq_len, 2048) for stage in whole.stages]
    budgets = [
        f"stages.{index}={{tokens: {count * 2048}, seq_len: {length}, batch_tokens: 2048}}"
        for index, (count, length) in enumerate(zip(counts, lengths, strict=True))
    ]
    where = [
        "model.vocab_size=512",
        f"data.prepared_dir={corpus}",
        f"run_dir={tmp_path / 'run'}",
        "device=cpu",
        "logging.progress=false",
        "evaluation.rows=1",
    ]
    run = compose(RunConfig, config_name="train", overrides=[f"experiment={name}", *budgets, *where])
    assert [str(stage.attention.per_layer(run.model.num_layers)[0]) for stage in run.stages] == TWINS[name]
    train(run, ranks)
    done = [line for line in lines(tmp_path / "run") if "event" not in line]
    assert [line["context"] for line in done] == [length for count, length in zip(counts, lengths, strict=True) for _ in range(count)]
    assert done[-1]["loss"] < done[0]["loss"] and not done[-1]["skipped_steps"]
    switches = events(tmp_path / "run", "switch")
    assert [switch["step"] for switch in switches] == list(range(3, sum(counts)))
    # No spike: what a switch alone does to the loss, on the same rows, is small beside what a step of training does.
    assert all(abs(switch["loss_after"] - switch["loss_before"]) < 0.05 for switch in switches)


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_has_the_stages_of_its_recipe(name):
    small, large = (
        compose(RunConfig, config_name="train", overrides=[f"experiment={each}"]) for each in (name, name.removesuffix("_small"))
    )
    assert len(small.stages) == len(large.stages)
    for ours, theirs in zip(small.stages, large.stages, strict=True):
        mine, big = ours.attention.per_layer(small.model.num_layers), theirs.attention.per_layer(large.model.num_layers)
        assert {kind.kind for kind in mine} == {kind.kind for kind in big}
        assert (ours.seq_len < theirs.seq_len) and (mine[0].kind == "full" or mine[0].topk * mine[0].block_size < ours.seq_len)


_LLAMA = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
_LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False}
_STRETCHED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_STRETCHED |= {"original_max_position_embeddings": 8192}
RELEASED = {
    "llama8b_1m": _LLAMA | {"max_position_embeddings": 131072, "rope_scaling": _STRETCHED},
    "prolong_512k": _LLAMA | {"max_position_embeddings": 8192, "rope_scaling": None},
    "qwen_1m_style": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False,
        "max_position_embeddings": 131072, "sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28,
    },
}  # fmt: skip
"""What the config.json of Llama 3.1 8B, Llama 3 8B and Qwen2.5-7B say of shapes and positions."""


@pytest.mark.parametrize("name", RELEASED)
def test_a_recipe_of_continual_training_fits_the_model_it_begins_with(name, tmp_path):
    """The run is the same whether the weights are there or not."""
    (tmp_path / MODEL_FILE).write_text(from_config(RELEASED[name]).text())
    begun = compose(RunConfig, config_name="train", overrides=[f"experiment={name}", f"init_from={tmp_path}"])
    planned = compose(PlanConfig, config_name="train", overrides=[f"experiment={name}", f"init_from={tmp_path / 'none'}"])
    assert begun.model == planned.model and begun.stages == planned.stages
    check_run(begun, world_size=64 if name == "llama8b_1m" else 8)
