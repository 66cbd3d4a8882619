"""Checks that need two objects of a run, or the world it runs in; every message holds both numbers."""

import math

from configs.mapping import nearest
from configs.schema import ConfigError, MixConfig, RunConfig, StageConfig, TokenizerKind


def check_run(run: RunConfig, *, world_size: int) -> None:
    """Raises ConfigError where stages do not fit the model, the micro-batch or the number of ranks, or schedule, profile or tile not the
    stages."""
    degree, num_heads = run.parallel.sequence_parallel, run.model.num_heads
    for number, what in ((world_size, f"the {world_size} ranks"), (num_heads, f"the {num_heads} query heads of model.num_heads")):
        if number % degree:
            raise ConfigError(f"parallel.sequence_parallel={degree}: does not divide {what}; accepted: {divisors(number)}")
    total, warmup, decay = run.total_tokens, run.optim.warmup(run.total_tokens), run.optim.decay(run.total_tokens)
    if warmup + decay > total:
        key, given = ("decay_tokens", run.optim.decay_tokens) if run.optim.decay_tokens else ("warmup_tokens", run.optim.warmup_tokens)
        raise ConfigError(
            f"optim.{key}={given}: warm-up of {warmup:.0f} and decay of {decay:.0f} tokens are more than the {total} of all stages; "
            f"set {key} to at most {max(0, int(total - (warmup if key == 'decay_tokens' else decay)))}, or lengthen a stage"
        )
    if run.profile.steps and run.profile.window[-1] > run.total_steps:
        raise ConfigError(f"profile.steps={run.profile.steps}: the run has {run.total_steps} steps")
    for index, stage in enumerate(run.stages):
        check_stage(run, stage, index, world_size)
    rows, seq_len = max(((run.micro_batch_rows(stage, world_size), stage.seq_len) for stage in run.stages), key=math.prod)
    tokens = rows * seq_len // degree
    if run.parallel.ffn_tile >= tokens:
        shared = f" / sequence_parallel={degree}" if degree > 1 else ""
        raise ConfigError(
            f"parallel.ffn_tile={run.parallel.ffn_tile}: is no less than the {tokens} tokens of the largest micro-batch "
            f"({rows} × seq_len={seq_len}{shared}), so nothing would be tiled; a smaller tile, or 0 for none"
        )
    if run.data.streaming:
        _check_streaming(run)


def check_stage(run: RunConfig, stage: StageConfig, index: int, world_size: int) -> None:
    """One stage of `check_run`."""
    key = f"stages.{index}"
    try:
        attention = stage.attention.per_layer(run.model.num_layers)
    except ConfigError as error:
        raise ConfigError(f"{key}.attention.{error}") from None
    too_long = next((layer for layer in attention if layer.block_size > stage.seq_len), None)
    if too_long:
        raise ConfigError(
            f"{key}.attention.rule={stage.attention.rule!r}: {too_long} has blocks longer than the rows of {key}.seq_len={stage.seq_len}, "
            f"so that it is full attention; blocks of at most {stage.seq_len}, or the rule full"
        )
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
        factor = math.ceil(stage.seq_len / ((stage.rope.original_max_seq_len or max_seq_len) * stage.rope.interpolation))
        scaled = f", which {key}.rope.scaling={stage.rope.scaling.value} takes to {longest}" if longest > max_seq_len else ""
        raise ConfigError(
            f"{key}.seq_len={stage.seq_len}: is beyond the positions RoPE is set up for, model.max_seq_len={max_seq_len}{scaled}; "
            f"shorten the rows, set {key}.rope.scaling and a factor of {factor}, or raise max_seq_len"
        )
    degree = run.parallel.sequence_parallel
    if stage.seq_len % degree:
        near = max(1, round(stage.seq_len / degree)) * degree
        raise ConfigError(
            f"{key}.seq_len={stage.seq_len}: is not a multiple of parallel.sequence_parallel={degree}, the ranks that share a row; "
            f"{near} is the nearest"
        )
    groups, micro_batch_rows = run.parallel.data_parallel(world_size), run.micro_batch_rows(stage, world_size)
    derived = run.parallel.micro_batch_tokens > 0  # micro-batches then divide what a group gets, whatever that is
    together = groups if derived else groups * micro_batch_rows
    if stage.rows % together != 0:
        near = max(1, round(stage.rows / together)) * together * stage.seq_len
        sharing = f"{groups} groups of {degree} ranks" if degree > 1 else f"{world_size} ranks"
        does_not = "do not" if derived else f"× parallel.micro_batch_rows={micro_batch_rows} = {together} does not"
        raise ConfigError(
            f"{key}.batch_tokens={stage.batch_tokens}: is {stage.rows} rows of {stage.seq_len}, which {sharing} {does_not} divide; "
            f"{near} is the nearest that {'they do' if derived else 'it does'}"
        )


def _check_streaming(run: RunConfig) -> None:
    """Raises ConfigError where a run that streams its sources asks for what only a prepared corpus can give."""
    if not run.data.sources:
        raise ConfigError("data.sources=[]: must name at least one source for data.streaming=true")
    run.data.require_paths()
    if run.data.tokenizer.kind is TokenizerKind.TRAIN:
        raise ConfigError(
            "data.tokenizer.kind=train: data.streaming=true tokenises with a tokenizer that exists; "
            "accepted: sentencepiece, huggingface, with data.tokenizer.path"
        )
    names, first = [source.name for source in run.data.sources], run.stages[0].mix
    for index, mix in enumerate(stage.mix for stage in run.stages):
        key = f"stages.{index}.mix"
        unknown: dict[str, object] = {
            "buckets": [bucket.min_tokens for bucket in mix.buckets],
            "temperature": mix.temperature if mix.temperature != MixConfig.temperature else None,
            "sources": next((f"epochs of {source.name}" for source in mix.sources if source.epochs), None),
        }
        for asked, value in unknown.items():
            if value:
                raise ConfigError(f"{key}.{asked}={value}: needs the lengths of all documents, which data.streaming=true does not know")
        for number, source in enumerate(mix.sources):
            if source.name not in names:
                near = nearest(source.name, names)
                raise ConfigError(f"{key}.sources.{number}.name={source.name}: no such source{near}; data.sources has {', '.join(names)}")
        drawn = [source.name for source in mix.sources] or names
        if len(drawn) > 1 and not any(source.weight for source in mix.sources):
            raise ConfigError(f"{key}.sources: must give weights to {', '.join(drawn)}, whose sizes data.streaming=true does not know")
        for limit in ("min_document_tokens", "max_document_tokens"):
            if getattr(mix, limit) != getattr(first, limit):
                raise ConfigError(
                    f"{key}.{limit}={getattr(mix, limit)}: must be {getattr(first, limit)} as in stages.0, with data.streaming=true"
                )


def divisors(number: int) -> str:
    """All divisors of a number, as a message lists what is accepted."""
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)


def check_vocabulary(run: RunConfig, *, corpus: str, vocab_size: int) -> None:
    """Raises ConfigError where the corpus has token ids that the model's embedding does not."""
    if vocab_size > run.model.vocab_size:
        raise ConfigError(f"model.vocab_size={run.model.vocab_size}: is smaller than the {vocab_size} tokens of {corpus}")
