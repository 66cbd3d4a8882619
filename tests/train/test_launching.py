"""The launch recipes, as they are written: `scripts/slurm.sbatch` under a stand-in for Slurm, a hostfile of two nodes without ssh."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from configs.registry import REPOSITORY
from tests.train.helpers import environment, events, free_port, overrides, steps

SBATCH = REPOSITORY / "scripts" / "slurm.sbatch"
# srun runs its command once a task, and ends with a task's failure; scontrol names the nodes.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do echo "$1" >> "$SAID"; shift; done
tasks=()
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) "$@" & tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || exit $?; done
"""
SCONTROL = '#!/usr/bin/env bash\n[[ $* == "show hostnames $SLURM_JOB_NODELIST" ]] && printf "localhost\\nanother\\n"\n'
PYTHON = """#!/usr/bin/env bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $(pwd)" "$@" >> "$SAID"
"""


def _submit(folder: Path, root: Path, *arguments: str, num_tasks: int, per_node: int, python: str = "") -> tuple[int, list[str]]:
    """Exit status of the job submitted from `root`, and what its stand-ins were called with, sorted."""
    programs = {"srun": SRUN, "scontrol": SCONTROL} | ({"python": python} if python else {})
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    said = folder / "said"
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_SUBMIT_DIR": str(root)}
    slurm |= {"SLURM_NTASKS": str(num_tasks), "SLURM_NTASKS_PER_NODE": str(per_node), "SAID": str(said)}
    own = environment()
    path = {"PATH": f"{folder}:{own['PATH']}"}
    spooled = Path(shutil.copy(SBATCH, folder / "slurm_script"))  # Slurm runs a copy of its own, from another folder
    done = subprocess.run(["bash", spooled, *arguments], cwd=folder, env=own | slurm | path, timeout=240, check=False)
    return done.returncode, sorted(said.read_text().splitlines())


def test_slurm_starts_a_rank_a_task(tmp_path):
    status, (option, *ranks) = _submit(
        tmp_path, tmp_path, "experiment=x", "stages.0.attention.rule='a b'", num_tasks=4, per_node=2, python=PYTHON
    )
    assert status == 0 and option == "--kill-on-bad-exit=1"
    called = [line.split(maxsplit=5) for line in ranks]
    assert [rank[:4] for rank in called] == [[str(n), str(n % 2), "4", "localhost"] for n in range(4)]
    assert {rank[5] for rank in called} == {f"{tmp_path} -m train.main experiment=x stages.0.attention.rule='a b'"}
    assert len({rank[4] for rank in called}) == 1


def test_slurms_end_of_time_comes_to_the_ranks_and_leaves_them_time_to_save():
    options = [line.removeprefix("#SBATCH ") for line in SBATCH.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert "--signal=TERM@120" in options and "--requeue" in options  # without B: the tasks get it, not the script


def test_the_scripts_are_clean():
    shellcheck = shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, SBATCH], check=True)


@pytest.mark.slow
def test_a_slurm_job_trains(corpus, tmp_path):
    status, _ = _submit(tmp_path, REPOSITORY, *overrides(corpus, tmp_path / "run"), num_tasks=2, per_node=2)
    assert status == 0 and len(steps(tmp_path / "run")) == 8


@pytest.mark.slow
def test_two_nodes_of_a_hostfile_train_without_ssh(corpus, tmp_path):
    (tmp_path / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n")
    launcher = [shutil.which("deepspeed", path=environment()["PATH"]) or "deepspeed", "--hostfile", str(tmp_path / "hostfile"), "--no_ssh"]
    port = str(free_port())

    def start(node: int) -> subprocess.Popen[bytes]:
        where = ["--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", port]
        command = [*launcher, *where, "--module", "--no_local_rank", "train.main", *overrides(corpus, tmp_path / "run")]
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment())

    nodes = [start(node) for node in range(2)]
    assert [node.wait(240) for node in nodes] == [0, 0]
    assert len(steps(tmp_path / "run")) == 8 and len(events(tmp_path / "run", "checkpoint")) == 2
