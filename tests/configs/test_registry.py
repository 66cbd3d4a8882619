"""The door from Hydra: strictness, one-line errors that say what is accepted, and that every YAML composes."""

import functools
import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from configs import registry
from configs.checks import check_run, check_vocabulary
from configs.mapping import first_difference, from_mapping, to_mapping
from configs.registry import CONFIG_DIR, compose
from configs.schema import (
    AttentionConfig,
    BenchmarkConfig,
    CompareConfig,
    ConfigError,
    DataBenchmarkConfig,
    EvaluateConfig,
    FitConfig,
    LayerBenchmarkConfig,
    PlanConfig,
    PrepareConfig,
    RunConfig,
    StageConfig,
    SweepConfig,
)
from train.stages import place_of


def _run(*overrides: str) -> RunConfig:
    return compose(RunConfig, config_name="train", overrides=overrides)


# --- every file ------------------------------------------------------------------------------------------------------------------

GROUPS = {group: sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml")) for group in
          ("model", "attention", "stages", "data", "optim", "parallel", "logging", "experiment")}  # fmt: skip


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in GROUPS.items() for name in names])
def test_every_file_composes_and_passes_its_checks(group, name):
    """As a plan, which does not need the weights that some recipes begin with."""
    run = compose(PlanConfig, config_name="train", overrides=[f"{group}={name}", *_short_enough(name)])
    check_run(run, world_size=run.parallel.sequence_parallel)


_SHALLOW = itertools.product(("tiny", "law_1m5", "law_5m"), ("moba_last3_full",), GROUPS["stages"])  # no layer is left for the rest
_TOGETHER = set(itertools.product(GROUPS["model"], GROUPS["attention"], GROUPS["stages"])) - set(_SHALLOW)


@functools.cache
def _of(group: str, name: str) -> RunConfig:
    return _run(f"{group}={name}", *_short_enough(name))


@pytest.mark.parametrize(("model", "attention", "stages"), sorted(_TOGETHER))
def test_every_model_goes_with_every_attention(model, attention, stages):
    """Composed one by one: files of different groups set different keys."""
    rows, layers = _of("stages", stages).stages[0], _of("attention", attention).stages[0].attention
    seq_len = min(rows.seq_len, _of("model", model).stages[0].seq_len)
    check_run(replace(_of("model", model), stages=(replace(rows, seq_len=seq_len, attention=layers),)), world_size=1)


def _short_enough(model: str) -> tuple[str, ...]:
    return ("stages.0.seq_len=512",) if model == "tiny" else ()


def test_a_recipe_that_begins_with_weights_is_not_trained_without_them():
    with pytest.raises(ConfigError, match=r"^init_from=nowhere: no such folder$"):
        _run("experiment=llama8b_1m", "init_from=nowhere")


def test_without_arguments_a_run_fits_its_corpus():
    run = _run()
    check_run(run, world_size=1)
    check_vocabulary(run, corpus=run.data.prepared_dir, vocab_size=run.data.tokenizer.vocab_size)


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIG_DIR)))
def test_every_file_opens_by_saying_what_it_is(path):
    lines = path.read_text().splitlines()
    comments = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    said = [line for line in comments if "@package" not in line]
    assert said and len(said[0]) > 10
    if path.parent.name in ("experiment", "sweep"):
        assert "Question:" in path.read_text() and "Expected:" in path.read_text()


def test_every_root_composes():
    assert compose(PrepareConfig, config_name="prepare_data").data.name == "bundled"
    assert compose(EvaluateConfig, config_name="evaluate", overrides=["checkpoint=x"]).checkpoint == "x"
    assert compose(BenchmarkConfig, config_name="benchmark").output_dir == "outputs/benchmark"
    assert compose(DataBenchmarkConfig, config_name="benchmark_data").documents == 10_000_000
    assert compose(SweepConfig, config_name="sweep", overrides=["sweep=timewise"]).sweep_dir == "outputs/sweeps/timewise"
    assert compose(CompareConfig, config_name="compare", overrides=["results=x"]).resamples == 2000
    assert compose(FitConfig, config_name="fit", overrides=["results=x"]).results == "x"
    assert compose(LayerBenchmarkConfig, config_name="benchmark_layers").model.vocab_size == 128256


@pytest.fixture
def configs(tmp_path, monkeypatch) -> Path:
    """A copy of the config files that a test may spoil."""
    shutil.copytree(CONFIG_DIR, tmp_path / "configs")
    monkeypatch.setattr(registry, "CONFIG_DIR", tmp_path / "configs")
    return tmp_path / "configs"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b"model: {hiden_size: 5}",
            r"^model.hiden_size: no such key, did you mean 'model.hidden_size'\? \(in configs/experiment/mine.yaml\)$",
        ),
        (b"stagess: []", r"^stagess: no such key, did you mean 'stages'\? \(in configs/experiment/mine.yaml\)$"),
        (b"name: [1", r"^a config file is not YAML: .*experiment/mine.yaml"),
        (b"name: \xe9", r"^one of train, experiment=mine cannot be read: 'utf-8' codec"),
        (b"5", r"^one of train, experiment=mine cannot be read: Invalid loaded object type: int$"),
        (b"[1, 2]", r"^Cannot merge DictConfig with ListConfig \(in configs/experiment/mine.yaml\)$"),
        (b"stages: []", r"^stages=\[\]: must hold at least one stage$"),
        (b"stages: 5", r"^stages=5: must be a list$"),
        (b"stages: [5]", r"^stages.0=5: must be a mapping with keys name"),
        (b"stages: [{tokns: 5}]", r"^stages.0.tokns: no such key, did you mean 'stages.0.tokens'\?"),
        (b"model:", r"^model=None: must be a mapping with keys vocab_size"),
        (b"attention:", r"^attention=None: must be a mapping with keys rule"),
        (b"name: ${nothing}", r"^name: Interpolation key 'nothing' not found$"),
        (b"defaults: [{override /model: huge}]", r"^Could not find 'model/huge'"),
    ],
)
def test_a_mistake_in_a_file_is_named(configs, text, message):
    (configs / "experiment" / "mine.yaml").write_bytes(b"# @package _global_\n" + text)
    with pytest.raises(ConfigError, match=message) as caught:
        _run("experiment=mine")
    assert "\n" not in str(caught.value)


def test_stages_of_a_file_have_the_attention_of_the_run(configs):
    stages = "[{tokens: 8192, attention: {rule: full}}, {tokens: 8192}]"
    (configs / "experiment" / "mine.yaml").write_text(f"# @package _global_\nstages: {stages}\n")
    run = _run("experiment=mine", "attention.topk=5", "stages.1.seq_len=1024")
    assert [stage.attention for stage in run.stages] == [AttentionConfig(rule=rule, topk=5) for rule in ("full", "moba")]
    assert [stage.seq_len for stage in run.stages] == [2048, 1024]


# --- strictness --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle.hidden_size=5", r"^modle.hidden_size: no such key, did you mean 'model.hidden_size'\?$"),
        ("model.hiden_size=5", r"^model.hiden_size: no such key, did you mean 'model.hidden_size'\?$"),
        ("hidden_size=5", r"^hidden_size: no such key, did you mean 'model.hidden_size'\?$"),
        ("stages.0.tokns=5", r"^stages.0.tokns: no such key, did you mean 'stages.0.tokens'\?$"),
        ("+foo=1", r"^foo: no such key; accepted: attention, rope, activation, mix, name, run_dir"),
        (
            "hydra/launcher=basic",
            r"^hydra/launcher: no such key; settings of Hydra's launchers are taken by python -m scripts.sweep alone$",
        ),
        ("hydra.run.dir=x", r"^hydra.run.dir: no such key; settings of Hydra's launchers"),
        ("sweep=timewise", r"^sweep: no such key; python -m scripts.sweep has it$"),
        ("concurrent=2", r"^concurrent: no such key; python -m scripts.sweep has it$"),
        ("suite.gain_from=5", r"^suite.gain_from: no such key; python -m scripts.evaluate has it$"),
        ("num_gpus=8", r"^num_gpus: no such key; python -m scripts.plan has it$"),
        ("profile.step=5", r"^profile.step: no such key, did you mean 'profile.steps'\?$"),
        ("profile.steps=5", r"^profile.steps=5: must be FIRST..LAST, such as 10..12$"),
        ("attention.rule.0=full", r"^attention.rule.0: no such key, did you mean 'attention.rule'\?$"),
        ("stages.x.tokens=5", r"^stages.x.tokens: no such key, did you mean 'stages.0.tokens'\?$"),
        ("stages.0=5", r"^stages.0=5: must be a mapping with keys name, tokens"),
        ("stages.0.tokens=5,6", r"^stages.0.tokens=5,6: is several values"),
        ("stages.0.tokens=[}", r"^stages.0.tokens=\[\}: cannot be read as key=value"),
        ("stages.0.name=???", r"^stages.0.name: must be given; add stages.0.name=VALUE$"),
        ("stages.0.name=${nothing}", r"^stages.0.name: Interpolation key 'nothing' not found$"),
        ("~stages.0.tokens", r"^~stages.0.tokens: must be key=value$"),
        ("~attention", r"^~attention: must be key=value$"),
        ("model@other=tiny", r"^model@other=tiny: must be key=value$"),
        ("=5", r"^=5: must be key=value$"),
        ("rope=null", r"^rope=None: must be a mapping with keys theta, scaling"),
        ("seed=1e30", r"^seed=1000000000000000019884624838656: must be below 2\^63$"),
        ("experiment=quikstart", r"^experiment=quikstart: no such config, did you mean 'quickstart'\?; accepted: .*quickstart"),
        ("model=huge", r"^model=huge: no such config; accepted: .*tiny"),
        ("model.hidden_size=big", r"^model.hidden_size='big': must be an integer$"),
        ("model.hidden_size=1.5", r"^model.hidden_size=1.5: must be an integer$"),
        ("seed=true", r"^seed=True: must be an integer$"),
        ("optim.lr=fast", r"^optim.lr='fast': must be a number$"),
        ("optim.lr=-1", r"^optim.lr=-1.0: must be positive$"),
        ("name=5.5", r"^name=5.5: must be a text$"),
        ("logging.wandb=yess", r"^logging.wandb='yess': must be true or false$"),
        (
            "optim.schedule=cosin",
            r"^optim.schedule='cosin': no such choice, did you mean 'cosine'\?; accepted: cosine, wsd, linear, constant$",
        ),
        ("attention.backend=flash", r"^attention.backend='flash': no such choice; accepted: auto, reference, torch, triton$"),
        ("attention.workspace_mib=0", r"^attention.workspace_mib=0: must be at least 1$"),
        ("attention.rule=modba", r"^attention.rule='modba': 'modba' does not end in an attention kind"),
        ("stages.0.seq_len=0", r"^stages.0.seq_len=0: must be at least 1$"),
        ("stages.0.batch_tokens=5000", r"^stages.0.batch_tokens=5000: must be a multiple of seq_len=2048; 4096 and 6144 are$"),
        ("stages.1.tokens=5", r"^stages.1.tokens: no such item; stages has 1, counted from 0$"),
        ("stages.0.attention.rul=full", r"^stages.0.attention.rul: no such key, did you mean 'stages.0.attention.rule'\?"),
        ("stages=[]", r"^stages=\[\]: no such config; accepted: moba90_full10, single; a list's items are set as stages.0.KEY=VALUE$"),
        ("stages=[{tokens: 5}]", r"^stages=\[.*\]: no such config; accepted: moba90_full10, single; a list's items"),
        ("stages=5", r"^stages=5: no such config; accepted: moba90_full10, single$"),
        ("logging={wandb: true}", r"^logging=.*: no such config.*; accepted: console, tensorboard, wandb$"),
        ("model=null", r"^model=null: no such config; accepted: .*tiny"),
        ("attention=null", r"^attention=null: no such config.*; accepted: flashmoba, full, moba, moba_last3_full$"),
        ("optim.lr=inf", r"^optim.lr=inf: must be a finite number$"),
        ("optim.eps=nan", r"^optim.eps=nan: must be a finite number$"),
        ("data.prepared_dir=''", r"^data.prepared_dir='': must not be empty$"),
        ("model.key_conv=4", r"^model.key_conv=4: accepted: 0, 3, 5$"),
        ("rope.scaling=ntkk", r"^rope.scaling='ntkk': no such choice, did you mean 'ntk'\?; accepted: none, linear, ntk, yarn, llama3$"),
        ("rope.scaling=linear", r"^rope.factor=1.0: must be greater than 1 for scaling=linear$"),
        ("stages.0.rope.factor=2", r"^stages.0.rope.factor=2.0: scaling=none has no use for it; leave it out$"),
        ("rope.nope=evry 2", r"^rope.nope='evry 2': 'evry 2' does not select layers; accepted: all"),
        ("model.num_heads=3", r"^model.num_heads=3: must be a multiple of num_kv_heads=2$"),
        ("parallel.zero_stage=4", r"^parallel.zero_stage=4: accepted: 0, 1, 2, 3$"),
        ("parallel.ffn_tile=-1", r"^parallel.ffn_tile=-1: must be at least 0$"),
        (
            "parallel.loss=ligre",
            r"^parallel.loss='ligre': no such choice, did you mean 'liger'\?; accepted: auto, reference, torch, triton, liger$",
        ),
        ("data.sources=5", r"^data.sources=5: must be a list$"),
        ("data.sources={name: x}", r"^data.sources={'name': 'x'}: must be a list$"),
        ("data.sources.2.path=x", r"^data.sources.2.path: no such item; data.sources has 2, counted from 0$"),
        ("optim.no_decay=[norms]", r"^optim.no_decay=norms: accepted: norm, bias, embedding$"),
        ("attention.rule=last 3 full, rest moba", r"is several values .*quote a value that holds commas"),
        ("attention.rule=moba(64, 3)", r"cannot be read as key=value.*quote"),
    ],
)
def test_a_mistake_is_named_with_its_key_and_what_is_accepted(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        _run("model=quickstart", override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("overrides", [["data=text"], ["data.sources=[{name: x, format: text}]"]])
def test_preparation_needs_the_path_that_a_recipe_leaves_open(overrides):
    with pytest.raises(ConfigError, match=r"^data.sources.0.path='': must be given for format=text$"):
        compose(PrepareConfig, config_name="prepare_data", overrides=overrides)


def test_what_holds_for_every_stage_is_set_once_and_changed_where_it_differs():
    run = _run(
        "attention.rule=full", "attention.block_size=64", "stages.0.attention.rule=moba", "stages.0.rope.theta=5e5", "rope.theta=2e4"
    )
    assert run.stages[0].attention == AttentionConfig(rule="moba", block_size=64, topk=3)
    assert run.stages[0].rope.theta == 5e5


@pytest.mark.parametrize(
    "override", ["stages.0={tokens: 4096, seq_len: 512, batch_tokens: 512}", "stages.0.attention={topk: 5}", "stages.0.attention={}"]
)
def test_a_stage_that_leaves_attention_open_has_that_of_the_run(override):
    attention = _run("attention=moba", "attention.block_size=64", override).stages[0].attention
    assert (attention.rule, attention.block_size) == ("moba", 64)


def test_a_mapping_changes_the_keys_it_names():
    run = _run("experiment=quickstart", "checkpoint={keep_last: 7}", "++seed=3", "experiment=null", "stages.0.name=${name}")
    assert run.checkpoint.keep_last == 7 and run.seed == 3 and run.name == run.stages[0].name == "run"
    assert _run("experiment=quickstart", "checkpoint={keep_last: 7}").checkpoint.every_steps == 50


def test_a_list_of_one_may_be_written_as_its_item():
    assert compose(EvaluateConfig, config_name="evaluate", overrides=["checkpoint=x", "contexts=512"]).contexts == (512,)


def test_first_difference_names_the_leaf():
    assert first_difference({"a": [{"b": 1}]}, {"a": [{"b": 2}]}, "x") == ("x.a.0.b", 1, 2)
    assert first_difference({"a": 1}, {"a": 1}, "x") is None


def test_mapping_and_dataclasses_are_each_others_inverse():
    run = _run("model=quickstart", "optim=adamw_wsd", "optim.no_decay=[bias]")
    assert from_mapping(RunConfig, to_mapping(run)) == run


def test_numbers_may_be_written_as_people_write_them():
    run = _run("stages.0.tokens=2e6", "optim.lr=1")
    assert run.stages[0].tokens == 2_000_000 and run.optim.lr == 1.0


# --- checks across objects -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["model.max_seq_len=1024"], 1, r"stages.0.seq_len=2048: is beyond .* model.max_seq_len=1024"),
        ([], 3, r"stages.0.batch_tokens=8192: is 4 rows of 2048, which 3 ranks × parallel.micro_batch_rows=1 = 3 does not divide"),
        (["parallel.sequence_parallel=3"], 4, r"^parallel.sequence_parallel=3: does not divide the 4 ranks; accepted: 1, 2, 4$"),
        (["parallel.sequence_parallel=8"], 8, r"=8: does not divide the 4 query heads of model.num_heads; accepted: 1, 2, 4$"),
        (
            ["parallel.sequence_parallel=4", "stages.0.seq_len=2050", "stages.0.batch_tokens=4100"],
            4,
            r"^stages.0.seq_len=2050: is not a multiple of parallel.sequence_parallel=4, the ranks that share a row; 2048 is the nearest$",
        ),
        (
            ["parallel.sequence_parallel=2"],
            6,
            r"4 rows of 2048, which 3 groups of 2 ranks × parallel.micro_batch_rows=1 = 3 does not divide",
        ),
        (["parallel.micro_batch_rows=8"], 1, r"is 4 rows of 2048, which 1 ranks × parallel.micro_batch_rows=8 = 8 does not divide"),
        (
            ["attention.rule='layers 7 full, rest moba'"],
            1,
            r"stages.0.attention.rule=.*layers \[7\] do not exist; the model has layers 0..3",
        ),
        (
            ["attention.rule='moba(1024, 3)'", "stages.0.seq_len=512"],
            1,
            r"stages.0.attention.rule='moba\(1024, 3\)': moba\(1024, 3\) has blocks longer than the rows of stages.0.seq_len=512",
        ),
        (["attention.rule='sliding(3000000000)'"], 1, "attention.rule=.*: window must be at most 2147483647"),
        (
            ["model=tiny", "stages.0.seq_len=512", "attention=moba_last3_full"],
            1,
            r"^stages.0.attention.rule=.*: 'last 3' is more layers than the 2 of the model$",
        ),
        (["attention.rule='last 1 full'"], 1, r"layers \[0, 1, 2\] of 4 are named by no clause"),
        (
            ["parallel.ffn_tile=4096", "parallel.micro_batch_rows=2"],
            1,
            r"parallel.ffn_tile=4096: is no less than the 4096 tokens of the largest micro-batch \(2 × seq_len=2048\)",
        ),
    ],
)
def test_objects_must_fit_each_other(overrides, world_size, message):
    with pytest.raises(ConfigError, match=message):
        check_run(_run("model=quickstart", *overrides), world_size=world_size)


def test_zero_0_with_bf16_is_refused():
    with pytest.raises(ConfigError, match="bf16 needs ZeRO 1, 2 or 3"):
        _run("parallel=zero0", "parallel.precision=bf16")


# --- derived values ------------------------------------------------------------------------------------------------------------------


def test_places_follow_the_stages():
    first = StageConfig(tokens=1000, seq_len=128, batch_tokens=256)
    second = replace(first, name="second", seq_len=256, batch_tokens=512, attention=AttentionConfig(rule="moba"))
    run = RunConfig(stages=(first, second))
    assert (first.steps, second.steps, run.total_steps, run.total_tokens) == (4, 2, 6, 4 * 256 + 2 * 512)
    places = [place_of(run, step) for step in range(6)]
    assert [place.index for place in places] == [0, 0, 0, 0, 1, 1]
    assert [place.tokens_before for place in places] == [0, 256, 512, 768, 1024, 1536]
    assert [place.is_switch for place in places] == [False, False, False, False, True, False]


def test_paths_mean_the_same_from_everywhere():
    assert CONFIG_DIR.is_absolute() and Path(CONFIG_DIR.parent, "train", "main.py").is_file()


def test_micro_batches_follow_the_rows_and_the_ranks():
    run = _run("model=paper_1b5", "parallel.micro_batch_tokens=32768", "stages.0.batch_tokens=98304")
    stages = [replace(run.stages[0], seq_len=length) for length in (2048, 8192, 32768)]
    assert [run.micro_batch_rows(stage, 1) for stage in stages] == [16, 4, 1]  # of 48, 12 and 3 rows
    assert [run.micro_batch_rows(stage, 3) for stage in stages] == [16, 4, 1]
    assert run.micro_batch_rows(stages[1], 4) == 3 and run.micro_batch_rows(stages[1], 6) == 2  # what fits and divides the share
    shared = replace(run, parallel=replace(run.parallel, sequence_parallel=2))  # twice the tokens fit where two ranks share them
    assert [shared.micro_batch_rows(stages[1], ranks) for ranks in (1 * 2, 3 * 2)] == [6, 4]
    check_run(replace(run, stages=tuple(stages)), world_size=3)
    with pytest.raises(
        ConfigError,
        match=r"stages.2.batch_tokens=98304: is 3 rows of 32768, which 4 ranks do not divide; 131072 is the nearest that they do$",
    ):
        check_run(replace(run, stages=tuple(stages)), world_size=4)
    with pytest.raises(ConfigError, match=r"^parallel.micro_batch_tokens=4096: leave it out, or micro_batch_rows=2$"):
        _run("parallel.micro_batch_tokens=4096", "parallel.micro_batch_rows=2")
