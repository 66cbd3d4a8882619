"""`python -m scripts.benchmark train`: speed and memory of training steps, beside what else there is, over context lengths.

A case is one run at one length and attention, in processes of its own, which write `metrics.jsonl` as training does: what ran out of
memory leaves nothing behind for the next, and what was measured is on the disk. To add a row: write a function `(run, folder)` that
takes the run's steps and writes a line for each, name it in `TrainingRow` (configs/schema.py) and in `STEPS` (steps.py).
"""
