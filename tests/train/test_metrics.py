"""Where figures go when something is in the way: a full disk, a reader that has left, wandb without its server."""

import io
import sys
import types

import pytest

from configs.registry import compose
from configs.schema import ConfigError, RunConfig
from tests.train.helpers import small_disk
from train.metrics import Metrics

STEP = {"step": 10, "loss": 2.5, "lr": 1e-3, "grad_norm": 1.0, "tokens": 5120, "context": 512, "tokens_per_second": 1000.0} | {
    "mfu_executed": None, "memory_gib": 0.5, "skipped_steps": 0
}  # fmt: skip


def _metrics(folder, *overrides: str) -> Metrics:
    run = compose(RunConfig, config_name="train", overrides=overrides)
    return Metrics(run, folder, first_step=0, is_main=True)


# --- metrics.jsonl -------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_named(tmp_path):
    refused = pytest.raises(ConfigError, match=r"metrics.jsonl: the disk is full")
    with _metrics(tmp_path, "logging.progress=false") as metrics, refused, small_disk():
        for _ in range(10):
            metrics.step(STEP)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"metrics.jsonl: cannot be written"):
        _metrics(tmp_path, "logging.progress=false")


# --- the terminal --------------------------------------------------------------------------------------------------------------------


class _Broken(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def _closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [_Broken(), _closed()], ids=["broken", "closed"])
def test_a_stderr_that_nobody_reads_ends_no_training(tmp_path, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with _metrics(tmp_path) as metrics:
        metrics.step(STEP)
        metrics.event("evaluation", 10, heldout_loss=2.0)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_wide_terminal_shows_the_whole_line_and_the_name_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as far as rich can tell
    monkeypatch.setenv("COLUMNS", "160")
    with _metrics(tmp_path, "name='[red]x[/nope]'") as metrics:
        metrics.step(STEP)
    shown = capsys.readouterr().err
    assert "[red]x[/nope]" in shown and "step 10 loss 2.5000" in shown and "mem 0.5G" in shown


# --- wandb ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """A stand-in whose server is out of reach, and which like the real one holds on to a run that failed until it is torn down."""
    fake = types.SimpleNamespace(modes=[], held=False, Settings=dict, errors=types.SimpleNamespace(Error=type("Error", (Exception,), {})))

    def init(*, mode, **_):
        fake.modes.append(mode)
        assert not fake.held, "run ID is in use"
        if mode == "online":
            fake.held = True
            raise fake.errors.Error("no\nnetwork")
        return types.SimpleNamespace(finish=lambda: None)

    fake.init, fake.teardown = init, lambda: setattr(fake, "held", False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_wandb_out_of_reach_is_said_and_the_run_goes_on_offline(wandb, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "key")
    with _metrics(tmp_path, "logging.wandb=true", "logging.progress=false"):
        pass
    assert wandb.modes == ["online", "offline"]
    assert capsys.readouterr().err == "wandb cannot be reached (no network); logging offline\n"


@pytest.mark.parametrize(
    ("netrc", "modes"),
    [
        ("", ["offline"]),
        ("machine example.com login me password p\n", ["offline"]),
        ("machine api.wandb.ai login user password p\n", ["online", "offline"]),
    ],
)
def test_wandb_is_offline_where_no_key_is_kept(wandb, tmp_path, netrc, modes):
    (tmp_path / ".netrc").write_text(netrc)
    with _metrics(tmp_path, "logging.wandb=true", "logging.progress=false"):
        pass
    assert wandb.modes == modes


def test_what_wandb_cannot_do_is_one_line(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(ConfigError, match=r"^WANDB_MODE=onlin: accepted: online, offline, disabled$"):
        _metrics(tmp_path, "logging.wandb=true", "logging.progress=false")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"^logging.wandb=True: the package wandb is not installed"):
        _metrics(tmp_path, "logging.wandb=true", "logging.progress=false")
