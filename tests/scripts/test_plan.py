"""The planner as it is typed."""

import re
import sys

from tests.train.helpers import execute


def test_a_plan_is_printed_as_tables_and_writes_nothing(tmp_path):
    run_dir = tmp_path / "run"
    done = execute([sys.executable, "-m", "scripts.plan", "experiment=moba90_full10", "num_gpus=4", "mfu=0.3", f"run_dir={run_dir}"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("# moba90_full10: 1.59B parameters") and "4 × H200, mfu 0.3 of 989 TFLOP/s" in done.stdout
    assert [len(re.findall(rf"^\| {stage} +\|", done.stdout, re.MULTILINE)) for stage in ("moba", "full")] == [4, 4]
    assert not run_dir.exists()


def test_the_flag_measures_on_this_machine():
    shape = ["model=tiny", "stages.0.seq_len=512", "num_gpus=1", "device=cpu", "data.prepared_dir=nowhere"]
    done = execute([sys.executable, "-m", "scripts.plan", "--measure", *shape])
    assert (done.returncode, done.stderr) == (0, "") and "Measured on " in done.stdout


def test_a_mistake_ends_in_one_line_and_status_2():
    done = execute([sys.executable, "-m", "scripts.plan", "experiment=moba90_full10", "num_gpus=6"])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error: stages.0.batch_tokens=1048576: is 32 rows of 32768, which 6 ranks × parallel.micro_batch_rows=1 = 6 does not divide; "
        "983040 is the nearest that it does\n"
    )
