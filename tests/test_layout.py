"""The shape of the repository: rooms, one-way imports, and the traps that a name can set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.train.helpers import execute

ROOT = Path(__file__).parent.parent
TOP = {"train", "model", "data", "configs", "scripts", "tests", "docs", "requirements.txt", "README.md", "LICENSE", "pyproject.toml"}
ROOMS = ("configs", "data", "model", "train", "scripts", "tests")
# Names that would shadow, or be shadowed by, something installed.
# Below the top a package is only ever imported by its full name; the fast backend is called what it is.
ALLOWED = Path("model/ops/moba/triton")
TRAPS = {"logging", "types", "datasets", "profile", "queue", "tokenize", "random", "wandb", "triton", "deepspeed", "hydra"}


def _tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [Path(line) for line in listed.stdout.splitlines()]


def test_the_top_level_is_fixed():
    assert {path.parts[0] for path in _tracked() if not path.parts[0].startswith(".")} <= TOP


def test_every_folder_of_code_is_a_package():
    folders = {path.parent for path in _tracked() if path.suffix == ".py"}
    assert [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()] == []


def test_no_module_has_a_name_that_shadows():
    files = [path for path in _tracked() if path.suffix == ".py" and path.parent != ALLOWED]
    assert [str(path) for path in files if set(path.with_suffix("").parts) & TRAPS] == []


def test_ignore_patterns_hide_no_source():
    hidden = subprocess.run(
        ["git", "check-ignore", *(f"{room}/x.py" for room in ROOMS)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert hidden.stdout == ""


def test_imports_go_one_way():
    done = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_ruff_is_content():
    done = subprocess.run(
        [Path(sys.executable).with_name("ruff"), "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


# --- the program as it is typed --------------------------------------------------------------------------------------------------------


def test_a_mistake_ends_in_one_line_and_status_2(tmp_path):
    done = execute([sys.executable, "-m", "train.main", "model.hiden_size=5", f"run_dir={tmp_path / 'run'}"])
    assert (done.returncode, done.stderr) == (2, "error: model.hiden_size: no such key, did you mean 'model.hidden_size'?\n")
    assert not (tmp_path / "run").exists()


def test_help_shows_every_key():
    done = execute([sys.executable, "-m", "train.main", "--help"])
    assert done.returncode == 0 and "train.main" in done.stdout and "optim:" in done.stdout


@pytest.mark.parametrize("flag", ["-m", "--multirun", "--verbose"])
def test_an_unknown_flag_is_one_line(flag):
    done = execute([sys.executable, "-m", "train.main", flag, "seed=1,2"])
    assert (done.returncode, done.stderr) == (2, f"error: {flag}: no such flag; accepted: --help, --cfg, and key=value\n")


@pytest.mark.parametrize(
    ("ending", "status", "error"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("model=null 2>&-", 2, ""),
        ("| head -n 1", 0, ""),
        (">/dev/full", 2, "error: standard output: No space left on device; the work itself is done\n"),
    ],
)
def test_an_output_that_nobody_takes_leaves_no_traceback(ending, status, error):
    done = execute(["bash", "-o", "pipefail", "-c", f"'{sys.executable}' -m train.main --cfg job {ending}"])
    assert (done.returncode, done.stderr) == (status, error)
    assert "error" not in done.stdout


def test_cfg_shows_the_run_that_the_arguments_make():
    done = execute([sys.executable, "-m", "train.main", "--local_rank=0", "--cfg", "job", "stages.0.attention.rule=full"])
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["stages"][0]["attention"]["rule"] == "full"


def test_started_by_its_path_from_another_folder_it_works(tmp_path):
    arguments = ["experiment=quickstart", f"data.prepared_dir={tmp_path / 'none'}", f"run_dir={tmp_path / 'run'}"]
    done = execute([sys.executable, str(ROOT / "train" / "main.py"), *arguments], cwd=tmp_path)
    assert done.returncode == 2 and "scripts.prepare_data" in done.stderr and "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    done = execute([sys.executable, "-m", "train.main", "device=cuda", f"run_dir={tmp_path / 'run'}"])
    assert done.returncode == 2
    assert done.stderr.startswith("error: device=cuda: rank 0 of this machine needs a GPU and torch sees 0")
