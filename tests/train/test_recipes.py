"""The small twins of the recipes, really trained: every stage and every switch, on budgets of one step or three a stage, rows of 2048 at most and a small vocabulary."""

import pytest

from configs.registry import compose
from configs.schema import RunConfig
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
