"""What is measured: one training run for each length, attention and program."""

from dataclasses import dataclass, replace

from configs.checks import check_run, check_vocabulary
from configs.registry import override
from configs.schema import (
    CheckpointConfig,
    ConfigError,
    EvaluationConfig,
    LoggingConfig,
    MixConfig,
    ScheduleKind,
    StageConfig,
    TrainBenchmarkConfig,
    TrainingRow,
)
from data.shards import Corpus
from model.accounting import FULL
from scripts.training_benchmark.checks import check_training
from scripts.training_benchmark.peer import class_config
from train.distributed import choose_device
from train.trainer import check_mixes


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of one stage, as long as what is measured of it, and the program that trains it."""

    row: TrainingRow
    run: TrainBenchmarkConfig

    @property
    def stage(self) -> StageConfig:
        """The run's only one."""
        return self.run.stages[0]

    @property
    def attention(self) -> str:
        """The attention of all layers, `moba(512, 3)`, or the rule where they differ."""
        kinds = {str(kind) for kind in self.stage.attention.per_layer(self.run.model.num_layers)}
        return kinds.pop() if len(kinds) == 1 else self.stage.attention.rule

    @property
    def num_ranks(self) -> int:
        """Processes, one a GPU."""
        return self.run.num_ranks if self.row is TrainingRow.FRAMEWORK else 1


def all_cases(config: TrainBenchmarkConfig) -> list[Case]:
    """What the config asks for, short rows first. Raises ConfigError for a case that training would refuse on this machine, and where there
    is none."""
    cases = []
    for length in sorted(config.lengths):
        changes = [setting for change in config.changes if length >= change.from_length for setting in change.settings]
        changed = override(config, changes)
        runs = [_run(changed, length, rule) for rule in config.attentions]
        if TrainingRow.FRAMEWORK in config.rows:
            cases += [Case(row=TrainingRow.FRAMEWORK, run=run) for run in runs if length <= config.dense_up_to or not _is_dense(run)]
        if TrainingRow.TRANSFORMERS in config.rows and length <= config.dense_up_to:
            alone = replace(changed, num_ranks=1, parallel=replace(changed.parallel, sequence_parallel=1, ffn_tile=0))
            cases.append(Case(row=TrainingRow.TRANSFORMERS, run=_run(alone, length, str(FULL))))
    if not cases:
        raise ConfigError(f"dense_up_to={config.dense_up_to}: leaves none of lengths={list(config.lengths)}; raise it, or add an attention")
    corpus = Corpus.open(config.data.prepared_dir) if config.real_data else None
    for case in cases:
        try:
            _check(case, corpus)
        except ConfigError as error:
            raise ConfigError(f"{case.row.value}, {case.attention} at {case.stage.seq_len} tokens: {error}") from None
    return cases


def _check(case: Case, corpus: Corpus | None) -> None:
    if case.row is TrainingRow.FRAMEWORK:
        check_training(case.run, num_ranks=case.num_ranks)
    else:
        check_run(case.run, world_size=case.num_ranks)
        choose_device(case.run.device)
        try:
            class_config(case.run)
        except ConfigError as error:
            raise ConfigError(f"{error}; rows=[framework] leaves transformers out") from None
    if corpus:
        check_vocabulary(case.run, corpus=corpus.name, vocab_size=corpus.vocab_size)
        check_mixes(case.run, corpus)


def _run(config: TrainBenchmarkConfig, length: int, rule: str) -> TrainBenchmarkConfig:
    """The config's run at a length and attention, without all that is not a training step; no schedule could be at odds with so few."""
    stage = config.stages[0]
    batch_tokens = length * max(1, config.batch_tokens // length)
    traced = config.traced_steps if config.num_ranks > 1 else 0
    stage = replace(
        stage,
        seq_len=length,
        batch_tokens=batch_tokens,
        tokens=batch_tokens * (config.warmup_steps + config.steps + traced),
        attention=replace(stage.attention, rule=rule),
        mix=stage.mix if config.real_data else MixConfig(),
    )
    return replace(
        config,
        stages=(stage,),
        model=replace(config.model, max_seq_len=max(config.model.max_seq_len, length)),
        optim=replace(config.optim, schedule=ScheduleKind.CONSTANT, warmup_fraction=0.0, warmup_tokens=0, decay_tokens=0),
        evaluation=EvaluationConfig(rows=0),
        checkpoint=CheckpointConfig(every_steps=0, at_end=False),
        logging=LoggingConfig(progress=False),
    )


def _is_dense(run: TrainBenchmarkConfig) -> bool:
    return set(run.stages[0].attention.per_layer(run.model.num_layers)) == {FULL}
