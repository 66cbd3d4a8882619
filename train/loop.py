"""The training loop: set up, go from step to step, evaluate and save when due, stop when done or told to."""

import contextlib
import signal
import sys
from pathlib import Path

from configs.checks import check_vocabulary
from configs.schema import RunConfig
from data.loader import OpenCorpus, open_corpus
from model.init import initialise
from model.transformer import Transformer
from train import checkpoint
from train.distributed import Ranks, gather_objects, on_main, sum_over_ranks
from train.engine import Engine
from train.initial import begin_from, note_beginning
from train.kernels import check_attention, check_loss
from train.memory import check_host_memory, this_machine
from train.metrics import Metrics
from train.profiling import Profiler
from train.run_dir import CHECKPOINTS, own_run_dir, record_launch
from train.saving import Saver
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
    scored = run.evaluation.rows * max(stage.seq_len for stage in run.stages)
    corpus = on_main(ranks, lambda: open_corpus(run.data, heldout_tokens=scored))
    check_vocabulary(run, corpus=corpus.name, vocab_size=corpus.vocab_size)
    check_mixes(run, corpus)
    check_heldout(run, corpus)
    check_attention(run, ranks.device, world_size=ranks.world_size)
    check_loss(run, ranks.device)
    check_host_memory(run, gather_objects(this_machine()), gpu=ranks.device.type == "cuda")
    with contextlib.ExitStack() as held:
        folder = on_main(ranks, lambda: held.enter_context(own_run_dir(run)))
        _train(run, ranks, corpus, folder, interrupt)


def _train(run: RunConfig, ranks: Ranks, corpus: OpenCorpus, folder: Path, interrupt: _Interrupt) -> None:
    root = folder / CHECKPOINTS
    found = on_main(ranks, lambda: checkpoint.choose(run.resume, root, _say))
    state = checkpoint.read_state(found) if found else None
    if state:
        checkpoint.check_fits(state, run, tokenizer_hash=corpus.tokenizer_hash)
        change = checkpoint.describe_change(state, run, ranks.world_size)
        if change and ranks.is_main:
            _say(change)
    first_step = state.step if state else 0

    model = new_model(run)
    if run.init_from and not found:
        begin_from(run, model, corpus)
    else:
        initialise(model, run.model, run.seed)
    engine = Engine(model, parallel=run.parallel, optim=run.optim, ranks=ranks)
    if found and state:
        checkpoint.restore(found, state, engine, ranks)
    dry_run(run, engine, ranks, first_step)
    trainer = Trainer(run, ranks, corpus, engine, state)

    on_main(ranks, lambda: record_launch(run, folder, ranks.world_size))
    on_main(ranks, lambda: note_beginning(run, folder, corpus))
    on_main(ranks, lambda: checkpoint.set_aside(root, after=first_step))
    with (
        Metrics(run, folder, first_step=first_step, is_main=ranks.is_main) as metrics,
        Saver(root, engine, run.checkpoint, ranks) as saver,
        Profiler(run.profile, folder, ranks) as profiler,
    ):
        if found:
            metrics.event("resume", first_step, checkpoint=str(found))
        elif run.init_from:
            metrics.event("init", 0, weights=run.init_from)
        while trainer.done < run.last_step:
            profiler.before(trainer.done + 1)
            trainer.step(metrics)
            if trace := profiler.after(trainer.done):
                metrics.event("profile", trainer.done, path=str(trace))
            interrupted, failed = _on_any_rank([interrupt.seen, saver.failed], ranks)
            if failed:
                saver.wait()
            ended = trainer.done == run.last_step
            # An interrupted run has seconds left: it saves, and leaves the evaluation.
            if not interrupted and (ended or _due(trainer.done, run.evaluation.every_steps)):
                trainer.evaluate(metrics)
            if not interrupted and _due(trainer.done, run.evaluation.gate_every_steps):
                trainer.measure_gates(metrics)
            # A run in trouble would push its good checkpoints out by bad ones.
            last, due = ended and run.checkpoint.at_end, _due(trainer.done, run.checkpoint.every_steps)
            if interrupted or last or (due and not trainer.skipped_in_a_row):
                saver.save(trainer.state())
            if interrupted or ended:
                saver.wait()
            for saved in saver.collect():
                costs = {"held_seconds": saved.held_seconds, "written_seconds": saved.written_seconds}
                metrics.event("checkpoint", trainer.done, path=str(saved.path), **costs)
            if interrupted:
                break


def new_model(run: RunConfig) -> Transformer:
    """The model of a run as its first stage has it, with PyTorch's default weights."""
    first = run.stages[0]
    attention = first.attention.per_layer(run.model.num_layers)
    loss, tile = run.parallel.loss.value, run.parallel.ffn_tile
    backend, workspace = first.attention.backend.value, first.attention.workspace
    return Transformer(run.model, attention, first.rope, backend, workspace, loss=loss, ffn_tile=tile)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _on_any_rank(flags: list[bool], ranks: Ranks) -> list[bool]:
    """Each flag, raised on all ranks where it is on one."""
    return [count > 0 for count in sum_over_ranks([float(flag) for flag in flags], ranks.device)]
