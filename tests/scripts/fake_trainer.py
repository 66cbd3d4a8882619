"""What a sweep starts in place of the deepspeed CLI: leaves the files that a training leaves, at once. Standard library alone.

Told by files beside the run folder: in `fail` and `hang` a word each, of jobs that end in a mistake, and that stop half-way until killed;
where there is `together`, none ends before two have begun.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

settings = dict(text.partition("=")[::2] for text in sys.argv[1:] if "=" in text)
run_dir = Path(settings["run_dir"].strip("'"))
steps = -(-int(float(settings["stages.0.tokens"])) // int(settings["stages.0.batch_tokens"]))
metrics, beside = run_dir / "metrics.jsonl", run_dir.parent


def told(what: str) -> bool:
    file = beside / what
    return file.is_file() and file.read_text() in run_dir.name


def write(**values: object) -> None:
    with metrics.open("a") as file:
        file.write(json.dumps(values) + "\n")


began = time.monotonic()
if told("fail"):
    print("error: stages.0: [cannot] be", flush=True)
    sys.exit(2)
run_dir.mkdir(exist_ok=True)
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
for step in range(done + 1, steps + 1):
    if told("hang") and step > steps // 2:
        time.sleep(300)
    rates = {"tokens_per_second": 100.0, "flops_executed_per_second": 1e6, "step_seconds": 2.0}
    write(step=step, loss=7 - step / steps, tokens=step * int(settings["stages.0.batch_tokens"]), epochs={"all": 0.1}, **rates)
while (beside / "together").is_file() and len(list(beside.glob("*/metrics.jsonl"))) < 2:
    time.sleep(0.05)
lr = float(settings["optim.lr"])
loss = 6 + abs(lr - 0.003) * 100  # a search finds 0.003
write(event="evaluation", step=steps, heldout_loss=loss, context=128, by_position={"0": loss + 0.1, "64": loss - 0.1})
rows = {
    "step": steps,
    "position_bucket": 64,
    "checksums": [7, 8],
    "documents": [[0], [3, 1]],
    "targets": [[64, 63]] * 2,
    "nats": [[6.1 * 64, 5.9 * 63]] * 2,
}
(run_dir / "heldout_rows.json").write_text(json.dumps(rows))
(run_dir / "checkpoints" / f"step_{steps:08d}").mkdir(parents=True)
with (beside / "launches.jsonl").open("a") as file:
    seen = {"job": re.sub("-......$", "", run_dir.name), "resumed_from": done, "began": began, "ended": time.monotonic()}
    file.write(json.dumps(seen | {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "arguments": sys.argv[1:]}) + "\n")
