"""`python -m scripts.prepare_data` as a user types it; the recipes in configs/data."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs.registry import compose
from configs.schema import ConfigError, PrepareConfig
from tests.data.conftest import make_texts, write_jsonl

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "configs" / "data").glob("*.yaml"))


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "scripts.prepare_data", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_composes_and_asks_for_what_only_the_user_knows(name):
    assert (ROOT / "configs" / "data" / f"{name}.yaml").read_text().startswith("# ")
    if name in ("bundled", "hub_fineweb_edu"):
        config = compose(PrepareConfig, config_name="prepare_data", overrides=[f"data={name}"])
    else:
        with pytest.raises(ConfigError, match=r"data.sources.*path"):
            compose(PrepareConfig, config_name="prepare_data", overrides=[f"data={name}"])
        config = compose(PrepareConfig, config_name="prepare_data", overrides=[f"data={name}", "data.sources.0.path=here"])
        assert config.data.sources[0].path == "here"
    assert config.data.name == name and config.data.prepared_dir == f"outputs/data/{name}"


def test_the_command_prepares_reuses_and_refuses(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(60))
    arguments = ["data=jsonl", f"data.sources.0.path={source}", f"data.prepared_dir={tmp_path / 'corpus'}"]
    arguments += ["data.tokenizer.vocab_size=384", "data.heldout_fraction=0.2", "data.num_workers=1"]
    first = run(*arguments)
    assert first.returncode == 0 and first.stderr == "" and ": prepared" in first.stdout and "tokens from" in first.stdout
    again = run(*arguments)
    assert again.stdout == first.stdout.replace(": prepared", ": already prepared")
    other = run(*arguments, "data.min_document_tokens=9")
    assert (other.returncode, other.stdout, other.stderr.count("\n")) == (2, "", 1) and "data.min_document_tokens=9" in other.stderr
