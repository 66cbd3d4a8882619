"""`python -m scripts.prepare_data` as a user types it; the recipes in configs/data."""

import functools
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.registry import compose
from configs.schema import ConfigError, PrepareConfig
from tests.data.conftest import make_texts, write_jsonl

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "configs" / "data").glob("*.yaml"))


COMMAND = [sys.executable, "-m", "scripts.prepare_data"]


def run(*arguments, command=COMMAND, cwd=ROOT, **given):
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | given
    return subprocess.run([*command, *arguments], cwd=cwd, text=True, timeout=60, **given)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_composes_and_asks_for_what_only_the_user_knows(name):
    assert (ROOT / "configs" / "data" / f"{name}.yaml").read_text().startswith("# ")
    if name in ("bundled", "hub_fineweb_edu", "hub_pg19", "linux"):
        config = compose(PrepareConfig, config_name="prepare_data", overrides=[f"data={name}"])
    else:
        with pytest.raises(ConfigError, match=r"data.sources.*path"):
            compose(PrepareConfig, config_name="prepare_data", overrides=[f"data={name}"])
        config = compose(PrepareConfig, config_name="prepare_data", overrides=[f"data={name}", "data.sources.0.path=here"])
        assert config.data.sources[0].path == "here"
    assert config.data.name == name and config.data.prepared_dir == f"outputs/data/{name}"


@pytest.fixture
def arguments(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [*make_texts(60), ""])
    places = [f"data.sources.0.path={source}", f"data.prepared_dir={tmp_path / 'corpus'}"]
    return ["data=jsonl", *places, "data.tokenizer.vocab_size=384", "data.heldout_fraction=0.2", "data.num_workers=1"]


def test_the_command_prepares_reuses_and_refuses(arguments, tmp_path):
    first = run(*arguments)
    assert first.returncode == 0 and first.stderr == "" and ": prepared" in first.stdout and "tokens from" in first.stdout
    assert f"left out: 1 empty ({tmp_path}/a.jsonl:61)\n" in first.stdout
    again = run(*arguments, command=[sys.executable, str(ROOT / "scripts" / "prepare_data.py")], cwd=tmp_path)
    assert again.stdout == first.stdout.replace(": prepared", ": already prepared")
    other = run(*arguments, "data.min_document_tokens=9")
    assert (other.returncode, other.stdout, other.stderr.count("\n")) == (2, "", 1) and "data.min_document_tokens=9" in other.stderr


def test_a_reader_that_leaves_is_no_mistake_and_a_full_disk_is(arguments, tmp_path):
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "wb") as pipe, open("/dev/full", "wb") as full:
        gone = run(*arguments, stdout=pipe)
        unsaid = run(*arguments, stdout=full)
    assert (gone.returncode, gone.stderr) == (0, "")
    assert (unsaid.returncode, unsaid.stderr) == (2, "error: standard output: No space left on device; the work itself is done\n")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    unkept = run(*arguments, f"data.prepared_dir={tmp_path}/new/corpus", preexec_fn=limit)
    assert (unkept.returncode, unkept.stdout, unkept.stderr.count("\n")) == (2, "", 1)
    assert f"error: data.prepared_dir={tmp_path}/new/corpus: the disk is full" in unkept.stderr and not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing_behind(tmp_path, number, model_file):
    """Sent to the whole process group, workers among it, as a terminal does."""
    kind = ["data.tokenizer.kind=sentencepiece", f"data.tokenizer.path={model_file}", "data.num_workers=2"]
    command = [*COMMAND, "data=bundled", f"data.prepared_dir={tmp_path}/new/corpus", *kind]
    heard = functools.partial(signal.signal, number, signal.SIG_DFL)  # a shell's background job, as the tests may be, ignores SIGINT
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes, start_new_session=True, preexec_fn=heard) as process:
        deadline = time.monotonic() + 30
        while not list(tmp_path.rglob("train-*.bin")):  # tokens have come from the workers
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, number)
        said = process.communicate(timeout=30)
    assert (process.returncode, *said) == (
        128 + number,
        "",
        f"interrupted by {number.name}: what was finished is kept, and the same command goes on from there\n",
    )
    assert not list(tmp_path.iterdir())
