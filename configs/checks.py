"""Checks that need two objects of a run, or the world it runs in; every message holds both numbers."""

import math

from configs.schema import ConfigError, RunConfig, StageConfig


def check_run(run: RunConfig, *, world_size: int) -> None:
    """Raises ConfigError where stages do not fit the model, the micro-batch or the number of ranks, or the schedule not the stages."""
    total, warmup, decay = run.total_tokens, run.optim.warmup(run.total_tokens), run.optim.decay(run.total_tokens)
    if warmup + decay > total:
        key, given = ("decay_tokens", run.optim.decay_tokens) if run.optim.decay_tokens else ("warmup_tokens", run.optim.warmup_tokens)
        raise ConfigError(
            f"optim.{key}={given}: warm-up of {warmup:.0f} and decay of {decay:.0f} tokens are more than the {total} of all stages; "
            f"set {key} to at most {max(0, int(total - (warmup if key == 'decay_tokens' else decay)))}, or lengthen a stage"
        )
    for index, stage in enumerate(run.stages):
        check_stage(run, stage, index, world_size)


def check_stage(run: RunConfig, stage: StageConfig, index: int, world_size: int) -> None:
    """One stage of `check_run`."""
    key = f"stages.{index}"
    try:
        attention = stage.attention.per_layer(run.model.num_layers)
    except ConfigError as error:
        raise ConfigError(f"{key}.attention.{error}") from None
    try:
        stage.activation.per_layer(run.model.num_layers)
    except ConfigError as error:
        raise ConfigError(f"{key}.activation.{error}") from None
    max_seq_len = run.model.max_seq_len
    try:
        longest = stage.rope.max_context(max_seq_len, attention)
    except ConfigError as error:
        raise ConfigError(f"{key}.rope.{error}") from None
    if longest is not None and stage.seq_len > longest:
        factor = math.ceil(stage.seq_len / (stage.rope.original_max_seq_len or max_seq_len))
        scaled = f", which {key}.rope.scaling={stage.rope.scaling.value} takes to {longest}" if longest > max_seq_len else ""
        raise ConfigError(
            f"{key}.seq_len={stage.seq_len}: is beyond the positions RoPE is set up for, model.max_seq_len={max_seq_len}{scaled}; "
            f"shorten the rows, set {key}.rope.scaling and a factor of {factor}, or raise max_seq_len"
        )
    micro_batch_rows = run.micro_batch_rows(stage, world_size)
    together = world_size * micro_batch_rows
    if stage.rows % together != 0:
        near = max(1, round(stage.rows / together)) * together * stage.seq_len
        raise ConfigError(
            f"{key}.batch_tokens={stage.batch_tokens}: is {stage.rows} rows of {stage.seq_len}, which {world_size} ranks × "
            f"parallel.micro_batch_rows={micro_batch_rows} = {together} does not divide; {near} is the nearest that it does"
        )


def check_vocabulary(run: RunConfig, *, corpus: str, vocab_size: int) -> None:
    """Raises ConfigError where the corpus has token ids that the model's embedding does not."""
    if vocab_size > run.model.vocab_size:
        raise ConfigError(f"model.vocab_size={run.model.vocab_size}: is smaller than the {vocab_size} tokens of {corpus}")
