"""What attention's kernels do not take is said of every stage before a run begins, and by the plan."""

import re

import pytest
import torch

from configs.registry import compose
from configs.schema import ConfigError, PlanConfig
from tests.train.helpers import make_run
from train.kernels import check_attention
from train.loop import train
from train.plan import make_plan

GPU = torch.device("cuda")
SETTINGS = (
    "stages=moba90_full10",
    "model=tiny",
    "model.head_dim=64",
    "model.max_seq_len=8192",
    "parallel=zero1",
    "parallel.precision=bf16",
    "data.prepared_dir=nowhere",
    "num_gpus=1",
    "stages.1.seq_len=8192",
    "stages.1.batch_tokens=8192",
    "attention.rule='moba(64, 3)'",
    "stages.1.attention.rule='moba(64, 3)'",
)
# Of the second stage.
REFUSED = {
    "block size": (
        "stages.1.attention.rule='every 2 moba(100, 3), rest moba(64, 2)'",
        "block_size=100; accepted: multiples of 64 up to 32768",
    ),
    "topk": ("stages.1.attention.rule='last 1 moba(64, 65), rest full'", "topk=65; accepted: 1 to 64"),
    "head dimension": ("model.head_dim=48", "q has head dimension 48; accepted: 64, 128"),
    "dtype": ("parallel.precision=fp32", "q has dtype torch.float32; accepted: torch.bfloat16, torch.float16"),
}


def plan_config(*overrides: str) -> PlanConfig:
    return compose(PlanConfig, config_name="train", overrides=[*SETTINGS, *overrides])


@pytest.mark.parametrize("case", REFUSED)
def test_a_backend_that_is_named_takes_every_layer_of_every_stage(case):
    setting, says = REFUSED[case]
    config = plan_config(setting, "stages.1.attention.backend=triton")
    for check in (lambda: check_attention(config, GPU, world_size=1), lambda: make_plan(config)):
        with pytest.raises(ConfigError) as refusal:
            check()
        start, end = (
            r"stages\.1\.attention\.backend=triton: does not take moba\(\d+, \d+\) in",
            f"on cuda: {says}; auto takes what serves here",
        )
        assert re.fullmatch(rf"{start} (bf16|fp32) {re.escape(end)}", str(refusal.value))


def test_what_the_kernels_take_is_not_refused():
    for settings in (
        ["stages.0.attention.backend=triton", "stages.1.attention.rule='moba(100, 3)'"],
        ["attention.backend=triton", "attention.rule='every 2 sliding(9), rest full'", "stages.1.attention.rule=full", "model.head_dim=48"],
    ):
        check_attention(plan_config(*settings), GPU, world_size=1)


@pytest.mark.parametrize("case", REFUSED)
def test_the_plan_says_where_auto_leaves_the_kernels(case):
    setting, says = REFUSED[case]
    said = [
        note for note in make_plan(plan_config(setting)).notes if note.startswith("stages.1.attention.backend=auto: takes torch for moba(")
    ]
    assert len(said) == 1 and said[0].endswith(f", slow on a GPU, as triton does not: {says}")


@pytest.mark.parametrize(
    "setting", ["attention.backend=auto", "stages.1.attention.rule='moba(100, 82)'", "stages.1.attention.backend=torch"]
)
def test_the_plan_says_nothing_where_auto_leaves_none(setting):
    """Where the kernels serve, documents are seen whole and full attention takes them, or another backend is named."""
    assert not any("takes torch" in note for note in make_plan(plan_config(setting)).notes)


def test_a_run_without_a_gpu_does_not_begin_where_a_later_stage_asks_for_one(corpus, ranks, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    lengths = [f"stages.{index}.{key}" for index in (0, 1) for key in ("tokens=512", "seq_len=128", "batch_tokens=512")]
    asked = ("stages.1.attention.backend=triton", "stages.1.attention.rule='moba(64, 1)'")
    run = make_run(corpus, tmp_path / "run", "stages=moba90_full10", *lengths, *asked)
    says = (
        r"^stages.1.attention.backend=triton: does not take moba\(64, 1\) in fp32 on cpu: q is on cpu; accepted: a CUDA device; auto takes"
    )
    with pytest.raises(ConfigError, match=says):
        train(run, ranks)
    assert not (tmp_path / "run").exists()
