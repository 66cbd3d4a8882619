"""The training loop: set up, go from step to step, evaluate and save when due, stop when done or told to."""

import contextlib
import signal
import sys
from pathlib import Path

from configs.checks import check_vocabulary
from configs.schema import RunConfig
from data.shards import Corpus
from model.init import initialise
from model.transformer import Transformer
from train import checkpoint
from train.distributed import Ranks, on_main, sum_over_ranks
from train.engine import Engine
from train.initial import begin_from, note_beginning
from train.metrics import Metrics
from train.run_dir import CHECKPOINTS, own_run_dir, record_launch
from train.trainer import Trainer, check_heldout, check_mixes, dry_run


class _Interrupt:
    """Remembers SIGTERM, SIGINT or SIGHUP, so that the step in hand is finished and saved before the process ends."""

    def __init__(self) -> None:
        self.seen = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: object) -> None:
        self.seen = True


def train(run: RunConfig, ranks: Ranks) -> None:
    """Trains `run` from its newest checkpoint, or from the start, to its end. Raises ConfigError for a user's mistake."""
    interrupt = _Interrupt()
    corpus = on_main(ranks, lambda: Corpus.open(run.data.prepared_dir))
    check_vocabulary(run, corpus=run.data.prepared_dir, vocab_size=corpus.vocab_size)
    check_mixes(run, corpus)
    check_heldout(run, corpus)
    with contextlib.ExitStack() as held:
        folder = on_main(ranks, lambda: held.enter_context(own_run_dir(run)))
        _train(run, ranks, corpus, folder, interrupt)


def _train(run: RunConfig, ranks: Ranks, corpus: Corpus, folder: Path, interrupt: _Interrupt) -> None:
    root = folder / CHECKPOINTS
    found = on_main(ranks, lambda: checkpoint.choose(run.resume, root, lambda text: print(text, file=sys.stderr)))
    state = checkpoint.read_state(found) if found else None
    if state:
        checkpoint.check_fits(state, run, tokenizer_hash=corpus.tokenizer_hash, ranks=ranks)
    first_step = state.step if state else 0

    first = run.stages[0].attention
    attention = first.per_layer(run.model.num_layers)
    model = Transformer(run.model, attention, run.stages[0].rope, first.backend.value, first.workspace)
    if run.init_from and not found:
        begin_from(run, model, corpus)
    else:
        initialise(model, run.model, run.seed)
    engine = Engine(model, parallel=run.parallel, optim=run.optim, ranks=ranks)
    if found:
        checkpoint.restore(found, engine, ranks)
    dry_run(run, engine, ranks, first_step)
    trainer = Trainer(run, ranks, corpus, engine, state)

    on_main(ranks, lambda: record_launch(run, folder, ranks.world_size))
    on_main(ranks, lambda: note_beginning(run, folder, corpus))
    on_main(ranks, lambda: checkpoint.set_aside(root, after=first_step))
    with Metrics(run, folder, first_step=first_step, is_main=ranks.is_main) as metrics:
        if found:
            metrics.event("resume", first_step, checkpoint=str(found))
        elif run.init_from:
            metrics.event("init", 0, weights=run.init_from)
        end = min(run.total_steps, run.max_steps or run.total_steps)
        while trainer.done < end:
            trainer.step(metrics)
            interrupted, ended = _on_any_rank(interrupt.seen, ranks), trainer.done == end
            # An interrupted run has seconds left: it saves, and leaves the evaluation.
            if not interrupted and (ended or _due(trainer.done, run.evaluation.every_steps)):
                trainer.evaluate(metrics)
            if not interrupted and _due(trainer.done, run.evaluation.gate_every_steps):
                trainer.measure_gates(metrics)
            # A run in trouble would push its good checkpoints out by bad ones.
            if interrupted or ended or (_due(trainer.done, run.checkpoint.every_steps) and not trainer.skipped_in_a_row):
                path = checkpoint.save(root, engine, trainer.state(), run.checkpoint, ranks)
                metrics.event("checkpoint", trainer.done, path=str(path))
            if interrupted:
                break


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _on_any_rank(flag: bool, ranks: Ranks) -> bool:
    return sum_over_ranks([float(flag)], ranks.device)[0] > 0
