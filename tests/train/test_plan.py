"""The plan of a run: what the engine holds, what steps cost, where MoBA pays, every experiment, and mistakes."""

import json
import re

import pytest
import yaml

from configs.layers import LayerAttention
from configs.registry import CONFIG_DIR, compose
from configs.schema import ConfigError, ModelConfig, ParallelConfig, PlanConfig, Precision
from data.shards import Corpus
from model.accounting import parameter_counts
from tests.train.engine_bytes import LAYOUTS, MODEL, count
from tests.train.helpers import start_ranks
from train import crossover as crossover_module
from train.calibrate import calibrate
from train.crossover import crossover
from train.distributed import Ranks
from train.gpus import GPUS
from train.plan import Plan, make_plan, state_bytes
from train.plan_report import describe_layers, digits, gigabytes, markdown
from train.traffic import traffic

EXPERIMENTS = sorted(path.stem for path in CONFIG_DIR.glob("experiment/*.yaml"))


def _config(*overrides: str) -> PlanConfig:
    """Of a run whose corpus is not prepared, whatever this checkout has, unless `overrides` say otherwise."""
    return compose(PlanConfig, config_name="train", overrides=["data.prepared_dir=nowhere", *overrides])


def _plan(*overrides: str) -> Plan:
    return make_plan(_config("num_gpus=1", *overrides))


# --- memory: against the engine's own tensors ----------------------------------------------------------------------------------------


def _check_states(found: dict[str, int], stage: int, precision: Precision, *, world_size: int, accumulates: bool) -> None:
    parallel, whole = ParallelConfig(zero_stage=stage, precision=precision), parameter_counts(MODEL).total
    states = state_bytes(parallel, num_parameters=whole, world_size=world_size, accumulates=accumulates)
    assert found["optimizer"] == pytest.approx(states.optimizer, rel=0.01)
    reckoned = states.weights + states.gradients + states.optimizer
    if stage == 3 and world_size > 1:  # a hook sees the parameters that are gathered at its moment, never more than all
        gathered = (2 if precision is Precision.BF16 else 4) * whole
        assert (reckoned - gathered) * 0.99 < found["all"] < reckoned * 1.02
    else:
        assert found["weights"] == pytest.approx(states.weights, rel=0.01)
        assert found["all"] == pytest.approx(reckoned, rel=0.02)


def test_two_ranks_hold_and_send_what_is_reckoned(tmp_path):
    done = start_ranks(["tests.train.engine_bytes", str(tmp_path / "bytes.json")], num_ranks=2)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bytes.json").read_text())
    for (stage, precision), bytes_found in zip(LAYOUTS, found, strict=True):
        _check_states(bytes_found, stage, precision, world_size=2, accumulates=True)
        layout = ParallelConfig(zero_stage=stage, precision=precision)
        sent = traffic(layout, num_parameters=parameter_counts(MODEL).total, world_size=2, micro_batches=2)
        assert bytes_found["sent_gradients"] == pytest.approx(sent.gradients, rel=0.01)
        assert bytes_found["sent_weights"] == pytest.approx(sent.weights, rel=0.01)


@pytest.mark.parametrize(
    ("stage", "precision", "accumulates"), [(1, Precision.FP32, False), (2, Precision.BF16, True), (0, Precision.FP32, False)]
)
def test_one_rank_holds_what_is_reckoned(ranks: Ranks, stage, precision, accumulates):
    _check_states(count(stage, precision, ranks, accumulates=accumulates), stage, precision, world_size=1, accumulates=accumulates)


# --- cost ------------------------------------------------------------------------------------------------------------------------------

ONE_LAYER = ("model=tiny", "model.num_layers=1", "stages.0.seq_len=512", "stages.0.batch_tokens=2048", "stages.0.tokens=20_480")


def test_flops_time_and_tokens_by_brute_force():
    """Every (query, key) pair of every row counted one by one, every matrix by its sides."""
    plan = _plan(*ONE_LAYER, "attention.rule='moba(64, 3)'", "num_gpus=2", "gpu=A100", "mfu=0.5")
    (stage,) = plan.stages
    seen = sum(sum(1 for key in range(query + 1) if key // 64 == query // 64) + 64 * min(query // 64, 2) for query in range(512))
    scored = sum(query // 64 for query in range(512))
    matrices = 64 * (4 + 2 + 2 + 4) * 16 + 3 * 64 * 176 + 512 * 64  # q, k, v, o; FFN; head
    row = 512 * 6 * matrices + 4 * 16 * (12 * seen + 2 * scored) + 512 * 2 * 16
    assert stage.flops.executed == 4 * row
    assert stage.flops.dense_equivalent == 4 * (512 * 6 * matrices + 4 * 16 * 12 * 512 * 513 // 2)
    assert stage.seconds == pytest.approx(4 * row / (2 * 312e12 * 0.5))
    assert (stage.stage.steps, stage.tokens, stage.micro_batches) == (10, 20_480, 2)
    assert stage.days == pytest.approx(10 * stage.seconds / 86400)


def test_the_days_of_a_run_are_those_of_its_stages():
    plan = _plan("experiment=moba90_full10_small")
    total = sum(stage.flops.executed * stage.stage.steps for stage in plan.stages) / (GPUS["H200"].peak_flops * 0.4)
    assert sum(stage.days for stage in plan.stages) * 86400 == pytest.approx(total)


def test_layers_are_shown_as_they_lie():
    def shown(rule: str, count: int) -> str:
        return describe_layers(_config(f"attention.rule='{rule}'").stages[0].attention.per_layer(count))

    assert shown("last 3 full, rest moba(64, 2)", 32) == "0-28 moba(64, 2), 29-31 full"
    assert shown("every 2 moba(64, 2), rest sliding(16)", 24) == "0, 2, … 22 sliding(16), 1, 3, … 23 moba(64, 2)"
    assert shown("layers 0 1 5 full, rest moba(64, 2)", 8) == "0-1 5 full, 2-4 6-7 moba(64, 2)"
    assert shown("full", 8) == "all full"


# --- communication --------------------------------------------------------------------------------------------------------------------

EIGHT_B = ("model=llama_8b", "parallel.precision=bf16", "stages.0.seq_len=8192", "stages.0.batch_tokens=33554432")


def test_what_ranks_exchange_by_hand():
    """8.03B parameters on 8 nodes of 8: bytes of each ZeRO stage in bf16, over links of 450 GB/s inside and 8 x 50 GB/s out of a node."""
    parameters, share = parameter_counts(_config(*EIGHT_B).model).total, 63 / 64
    for zero, passes in (("zero1", 2 + 1), ("zero2", 8 * 2 + 1), ("zero3", 8 * 1 + 8 * (2 - 1e9 / parameters))):
        (stage,) = _plan(*EIGHT_B, f"parallel={zero}", "num_gpus=64", "parallel.micro_batch_rows=8").stages
        assert stage.micro_batches == 8
        assert stage.sent.total == pytest.approx(passes * share * 2 * parameters)
        assert stage.exchange.inside == pytest.approx(stage.sent.total / 450e9)
        assert stage.exchange.between == pytest.approx(stage.sent.total / 400e9)
        assert stage.exchange.exposed == (0 if zero == "zero3" else stage.exchange.between)


def test_a_slow_network_is_exposed_beyond_computing_and_a_node_alone_has_none():
    plan = _plan(*EIGHT_B, "parallel=zero3", "num_gpus=64", "network=0.25", "gpus_per_node=4")
    (stage,) = plan.stages
    assert stage.exchange.between > stage.seconds and stage.exchange.between == pytest.approx(stage.sent.total / 1e9)
    assert stage.exchange.exposed == pytest.approx(stage.exchange.between - stage.seconds)
    assert "at 450 GB/s a GPU inside a node of 4 and 0.25 GB/s a GPU between nodes" in markdown(plan)
    (one_node,) = _plan(*EIGHT_B, "num_gpus=8").stages
    assert one_node.exchange.between == 0 and one_node.exchange.exposed == one_node.exchange.inside > 0
    (alone,) = _plan(*EIGHT_B).stages
    assert alone.sent.total == alone.exchange.exposed == 0


def test_the_plan_that_the_docs_show_fits_and_has_the_figures_that_they_give():
    text = (CONFIG_DIR.parent / "docs" / "scale.md").read_text()
    (command,) = re.findall(r"python -m scripts.plan (model=llama_8b(?:[^`\n]|\n    )+)", text)
    plan = _plan(*command.replace("\\", "").split())
    (stage,) = plan.stages
    assert not [note for note in plan.notes if "needs" in note]
    row = next(line for line in text.splitlines() if re.match(r"\| 8B at 128K +\| +3 \| +64 \| +8 \|", line))
    parts = [*(gigabytes(part) for part in (stage.sent.gradients, stage.sent.weights, stage.sent.rows)), digits(stage.exchange.exposed)]
    assert set(parts) | {gigabytes(stage.memory)} <= {cell.strip() for cell in row.split("|")}


SHARED = (*EIGHT_B, "stages.0.seq_len=131072", "parallel=zero3")


@pytest.mark.parametrize(("kept", "passes"), [("none", 32 * 2), ("full", 32 * 3), ("last 8 none, rest selective", 8 * 2 + 24 * 3)])
def test_what_ranks_that_share_rows_exchange_by_hand(kept, passes):
    """Of 16384 tokens of a rank's own, 32 query and 8 KV heads of 128, q, k, v and output in bf16, 7 of 8 to others; and nothing of it
    is covered by computing, nor leaves a node."""
    plan = _plan(*SHARED, "num_gpus=64", "parallel.sequence_parallel=8", f"activation.rule='{kept}'")
    (stage,), (alone,) = plan.stages, _plan(*SHARED, "num_gpus=64").stages
    assert stage.micro_batches == 32
    assert stage.sent.rows == 32 * passes * 16384 * (2 * 32 + 2 * 8) * 128 * 2 * 7 // 8 and alone.sent.rows == 0
    seconds = stage.sent.rows / 450e9
    assert stage.exchange.exposed == pytest.approx(seconds)
    assert stage.exchange.inside == pytest.approx((stage.sent.total - stage.sent.rows) / 450e9 + seconds)
    assert stage.exchange.between == pytest.approx((stage.sent.total - stage.sent.rows) / 400e9)
    head, _, row = markdown(plan).partition("| GB sent")[2].splitlines()[:3]
    shown = {name.strip(): cell.strip() for name, cell in zip(head.split("|"), row.split("|")[1:])}
    assert shown["shared rows"] == f"{stage.sent.rows / 1e9:,.0f}" and shown["together"] == f"{stage.sent.total / 1e9:,.0f}"
    assert "what the 8 ranks that share a row exchange" in markdown(plan)


def test_rows_that_nodes_share_travel_by_the_gpus_own_adapter():
    """Groups of 8 on nodes of 4: 3 others are near, 4 far. Groups of 4 on nodes of 6 lie 4, 2 + 2, 4: the second has but one near."""
    for of_node, number, degree, near in ((4, 64, 8, 3), (6, 12, 4, 1)):
        more = (f"num_gpus={number}", f"gpus_per_node={of_node}", f"parallel.sequence_parallel={degree}")
        (stage,) = _plan(*SHARED, "parallel=zero1", "stages.0.batch_tokens=12582912", *more).stages
        by_zero, to_each = stage.sent.gradients + stage.sent.weights, stage.sent.rows / (degree - 1)
        inside, between = to_each * near / 450e9, to_each * (degree - 1 - near) / 50e9
        assert stage.exchange.inside == pytest.approx(by_zero / 450e9 + inside)
        assert stage.exchange.between == pytest.approx(by_zero / (of_node * 50e9) + between)
        assert stage.exchange.exposed == pytest.approx(max(by_zero / 450e9, by_zero / (of_node * 50e9)) + between)


# --- crossover -------------------------------------------------------------------------------------------------------------------------


def _moba(block_size: int, topk: int) -> LayerAttention:
    return LayerAttention(kind="moba", block_size=block_size, topk=topk)


def test_the_crossover_is_read_from_the_measured_table():
    shapes = ModelConfig(head_dim=128)
    found = crossover(shapes, _moba(512, 3), gpu="H200")
    assert found and found.is_bound and found.length == 8192 and "measured on one H200" in found.source
    bound = crossover(shapes, _moba(128, 8), gpu="H200")
    assert bound and bound.is_bound and bound.length == 32_768
    for other in (
        crossover(shapes, _moba(512, 3), gpu="A100"),
        crossover(ModelConfig(), _moba(512, 3), gpu="H200"),
        crossover(shapes, _moba(512, 5), gpu="H200"),
    ):
        assert other and "FLOPs" in other.source


def test_times_are_interpolated_on_logarithmic_scales(tmp_path, monkeypatch):
    """Dense grows as L², MoBA as L: equal where the lines cross, whatever lengths were measured."""
    lengths = (1024, 8192, 65536)
    table = [{"gpu": "H200", "date": "today", "head_dim": 64, "dense": {n: 2.0 * (n / 4096) ** 2 for n in lengths}, "moba": []}]
    table[0]["moba"] = [
        {"block_size": 64, "topk": 3, "milliseconds": {n: 2.0 * (n / 4096) for n in lengths}},
        {"block_size": 64, "topk": 5, "milliseconds": dict.fromkeys(lengths, 1e9)},
    ]
    (tmp_path / "measured.yaml").write_text(yaml.safe_dump(table))
    monkeypatch.setattr(crossover_module, "MEASURED", tmp_path / "measured.yaml")
    found = crossover(ModelConfig(), _moba(64, 3), gpu="H200")
    assert found and found.length == 4096
    assert crossover(ModelConfig(), _moba(64, 5), gpu="H200") is None


@pytest.mark.parametrize(("block_size", "topk"), [(16, 3), (1, 2), (64, 1), (8, 8)])
def test_counted_in_flops_the_crossover_is_where_fewer_are_executed(block_size, topk):
    """By counting one length after the other."""
    shapes = ModelConfig(num_layers=1, head_dim=16)
    found = crossover(shapes, _moba(block_size, topk), gpu="L40S")

    def saves(length: int) -> bool:
        pairs = sum(min(topk - 1, query // block_size) * block_size + query % block_size + 1 for query in range(length))
        scored = sum(query // block_size for query in range(length)) if topk > 1 and length > topk * block_size else 0
        means = shapes.num_kv_heads * shapes.head_dim * length if scored else 0
        heads = shapes.num_heads * shapes.head_dim
        return 12 * heads * pairs + 2 * heads * scored + means < 12 * heads * length * (length + 1) // 2

    assert found and saves(found.length) and not any(saves(length) for length in range(1, found.length))


# --- every experiment -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_planned_fits_and_takes_the_time_it_states(name):
    text = (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text()
    stated = re.search(
        r"^# Expected: (?P<days>[\d.]+) days on (?P<gpus>\d+) (?P<gpu>\w+) at an MFU of (?P<mfu>\d\.\d+)", text, re.MULTILINE
    )
    where = [f"num_gpus={stated['gpus']}", f"gpu={stated['gpu']}", f"mfu={stated['mfu']}"] if stated else ["num_gpus=1"]
    assert stated or name.endswith("_small") or name == "quickstart"
    plan = make_plan(_config(f"experiment={name}", *where))
    if stated:
        assert sum(stage.days for stage in plan.stages) == pytest.approx(float(stated["days"]), rel=5e-3)
    for size in re.findall(r"([\d,]+) GB a GPU", text):
        assert any(stage.memory / 1e9 == pytest.approx(float(size.replace(",", "")), abs=1) for stage in plan.stages)
    assert plan.config.total_tokens == sum(stage.tokens for stage in plan.stages)
    assert not [note for note in plan.notes if "needs" in note]  # more memory than a GPU has
    shown = markdown(plan)
    for stage in plan.stages:
        tables = 3 if plan.config.num_gpus == 1 else 4
        assert len(re.findall(rf"^\| {stage.stage.name} +\|", shown, re.MULTILINE)) == tables


def test_the_papers_recipe_is_as_the_paper_has_it():
    plan = _plan("experiment=llama8b_1m", "init_from=nowhere", "num_gpus=64")
    stages = plan.stages
    assert plan.notes[0] == ("init_from=nowhere: is not there yet, so model, RoPE and tokenizer were not checked against its weights")
    assert [stage.stage.seq_len for stage in stages] == [131072, 262144, 524288, 1048576, 1048576]
    assert describe_layers(stages[-1].attention) == "0-28 moba(4096, 12), 29-31 full"
    assert stages[-1].tokens == pytest.approx(100e9, rel=1e-3) and stages[-1].flops.executed < 0.25 * stages[-1].flops.dense_equivalent


# --- what it says ----------------------------------------------------------------------------------------------------------------------


def test_a_stage_that_moba_does_not_thin_out_and_one_that_does_not_fit_are_said():
    plan = _plan(
        "model=paper_1b5", "stages.0.seq_len=32768", "stages.0.batch_tokens=32768", "attention.block_size=4096", "attention.topk=12"
    )
    said = "\n".join(plan.notes)
    assert "stages.0.attention: moba(4096, 12) sees up to 49,152 tokens, and rows of stages.0.seq_len=32768 have no more" in said
    assert re.search(r"stages.0: needs \d+ GB a GPU, H200 has 141 GB; most of it are activations, \d+ GB: parallel.precision=bf16 or", said)
    assert plan.stages[0].flops.executed == plan.stages[0].flops.dense_equivalent


def test_the_workspace_of_a_stage_is_reckoned_with():
    settings = ("model=paper_545m", "parallel.precision=bf16", "stages.0.seq_len=32768", "stages.0.batch_tokens=32768", "attention=moba")
    (usual,), (small,) = (_plan(*settings, *more).stages for more in ((), ("stages.0.attention.workspace_mib=64",)))
    assert small.held.gate_and_slots < usual.held.gate_and_slots - (64 << 20)
    assert small.held.activations == usual.held.activations


def test_ranks_that_share_a_row_hold_a_part_of_it_each():
    settings = ("model=llama_8b", "parallel.precision=bf16", "stages.0.seq_len=131072", "stages.0.batch_tokens=1048576", "attention=moba")
    alone, shared = (_plan(*settings, "num_gpus=8", f"parallel.sequence_parallel={degree}") for degree in (1, 8))
    assert [plan.stages[0].micro_batches for plan in (alone, shared)] == [1, 8]
    assert shared.stages[0].states == alone.stages[0].states and shared.stages[0].seconds == alone.stages[0].seconds
    ratio = alone.stages[0].held.activations / shared.stages[0].held.activations
    assert 7 < ratio < 8  # positions are those of whole rows, and the attention's output is there twice


def test_a_prepared_corpus_is_checked_as_training_does(corpus):
    prepared = f"data.prepared_dir={corpus}"
    assert "not prepared" in " ".join(_plan().notes)
    assert "not prepared" not in " ".join(_plan("model=tiny", "stages.0.seq_len=512", prepared).notes)
    with pytest.raises(ConfigError, match=r"model.vocab_size=300: is smaller than the \d+ tokens of"):
        _plan("model=tiny", "stages.0.seq_len=512", "model.vocab_size=300", prepared)
    with pytest.raises(ConfigError, match=r"seq_len=262144: the held-out documents"):
        _plan("model.max_seq_len=262144", "stages.0.seq_len=262144", "stages.0.batch_tokens=262144", prepared)
    with pytest.raises(ConfigError, match=r"stages.0.seq_len=1048576: the documents of the train split have"):
        _plan("model.max_seq_len=1048576", "stages.0.seq_len=1048576", "stages.0.batch_tokens=1048576", prepared)
    with pytest.raises(ConfigError, match=r"nowhere: no such checkpoint"):
        _plan("model=tiny", "stages.0.seq_len=512", prepared, "resume=nowhere")


def test_a_plan_says_what_each_stage_reads_of_a_prepared_corpus(corpus):
    mix = "stages.0.mix.sources=[{name: sotu, weight: 0.6}, {name: python, weight: 0.4}]"
    plan = _plan("model=tiny", "stages.0.seq_len=512", f"data.prepared_dir={corpus}", mix)
    table = Corpus.open(corpus).split("train")
    (found,) = plan.mixes
    for pool, share in zip(found.pools, (0.6, 0.4), strict=True):
        tokens = int(table.lengths[table.source_numbers == table.sources.index(pool.name)].sum())
        assert (pool.tokens, pool.share) == (tokens, pytest.approx(share)) and pool.epochs == pytest.approx(
            share * plan.stages[0].tokens / tokens
        )
    shown = " ".join(markdown(plan).split())
    assert "| main | sotu | " in shown and "| 60.0% |" in shown and "of documents ≥ 8,192" in shown
    assert "documents ≥" not in markdown(_plan())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["gpu=H20"], r"^gpu=H20: is not known, did you mean .*; accepted: H200, H100"),
        (["gpu=h200"], r"^gpu=h200: is not known, did you mean 'H200'\?; accepted: H200, H100"),
        (["attention.rule='last 100 full, rest moba'"], r"^stages.0.attention.rule=.*'last 100' is more layers than the \d+ of the model$"),
        (["rope.scaling=yarn", "rope.factor=4"], r"original_max_seq_len=0: scaling=yarn needs the length, in tokens, that the model"),
        (
            [
                "rope.scaling=yarn",
                "rope.factor=2",
                "rope.original_max_seq_len=8192",
                "rope.interpolation=2",
                "stages.0.seq_len=65536",
                "stages.0.batch_tokens=65536",
            ],
            r"^stages.0.seq_len=65536: .*takes to 32768; .* a factor of 4,",
        ),
        (["mfu=0"], r"^mfu=0.0: must lie in \(0, 1\]$"),
        (["num_gpus=0"], r"^num_gpus=0: must be at least 1$"),
        (["gpus_per_node=0"], r"^gpus_per_node=0: must be at least 1$"),
        (["network=-1"], r"^network=-1.0: must be at least 0$"),
        (["parallel.sequence_parallel=2", "num_gpus=3"], r"^parallel.sequence_parallel=2: does not divide the 3 ranks; accepted: 1, 3$"),
        (["parallel.sequence_parallel=2", "measure=true"], r"^measure=True: .*; parallel.sequence_parallel=2$"),
        (
            ["num_gpus=3"],
            r"^stages.0.batch_tokens=8192: is 4 rows of 2048, which 3 ranks × parallel.micro_batch_rows=1 = 3 does not divide; 6144 is",
        ),
        (
            ["num_gpus=3", "parallel.micro_batch_tokens=2048"],
            r"^stages.0.batch_tokens=8192: is 4 rows of 2048, which 3 ranks do not divide; 6144 is the nearest that they do$",
        ),
        (["stages.0.batch_tokens=5000"], r"^stages.0.batch_tokens=5000: must be a multiple of seq_len=2048; 4096 and 6144 are$"),
        (["stages.0.batch_tokens=500"], r"^stages.0.batch_tokens=500: must be a multiple of seq_len=2048; 2048 is the least$"),
        (["stages.0.seq_len=16384", "stages.0.batch_tokens=16384"], r"^stages.0.seq_len=16384: is beyond the positions RoPE .*=8192"),
        (["attention.rule='last 1 full, rest moba, last 2 full'"], r"^stages.0.attention.rule=.*'last 2 full' names no layer"),
        (["optim.no_decay=[bias]"], r"^optim.no_decay=\[bias\]: this model has no such parameter"),
        (
            ["optim=adamw_wsd", "optim.decay_tokens=2e6"],
            r"^optim.decay_tokens=2000000: warm-up of \d+ and decay of 2000000 tokens are more than the 1007616 of all stages; "
            r"set decay_tokens to at most \d+, or lengthen a stage$",
        ),
        (["optim.warmup_tokens=2e6"], r"^optim.warmup_tokens=2000000: .* set warmup_tokens to at most 1007616"),
        (["optim.decay_tokens=5"], r"^optim.decay_tokens=5: only schedule=wsd decays over set tokens, this is cosine$"),
    ],
)
def test_a_mistake_is_refused_as_in_training(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        _plan("model=quickstart", *overrides)
    assert "\n" not in str(caught.value)


def test_measured_figures_stand_beside_the_reckoned():
    rule = "attention.rule='last 1 full, every 2 sliding(16), rest moba(32, 2)'"
    kept = "activation.rule='first 2 none, last 1 full, rest selective'"
    plan = _plan("model=tiny", "model.num_layers=5", "model.key_conv=3", "rope.nope=every 2", rule, kept, *ONE_LAYER[2:], "device=cpu")
    device, (found,) = calibrate(plan)
    layers = ["moba(32, 2) none", "sliding(16) none", "moba(32, 2) selective", "sliding(16) selective", "full full"]
    assert [f"{kind} {kept}" for kind, kept in found.layers] == layers
    assert found.activations == pytest.approx(found.reckoned, rel=1e-3)
    layers = sum(found.layers[kind].seconds for kind in zip(plan.stages[0].attention, 2 * ["none"] + 2 * ["selective"] + ["full"]))
    assert 0 < found.step_seconds == pytest.approx(plan.stages[0].micro_batches * (found.ends.seconds + layers))
    assert f"Measured on {device}" in markdown(plan, (device, (found,)))


def test_what_this_machine_cannot_hold_is_not_measured():
    plan = _plan("model=llama_8b", "stages.0.seq_len=131072", "stages.0.batch_tokens=8388608", "parallel.micro_batch_rows=64", "device=cpu")
    with pytest.raises(ConfigError, match=r"measure=true: two layers of moba\(512, 3\) at stages.0.seq_len=131072 hold about"):
        calibrate(plan)
