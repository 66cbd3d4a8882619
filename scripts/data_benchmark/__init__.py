"""`python -m scripts.benchmark data`: rates of the data pipeline on this machine's CPU.

A row is a function `(config, folder) -> list[Measured]` that measures one thing and leaves nothing outside the scratch `folder` it is
given. To add one: write it in a module of its own here, name it in `DataRow` (configs/schema.py) and in `MEASURES` (rows.py), in the
order in which rows are printed. A target goes into `Measured.target`, as words beside the figure; nothing here fails on a slow machine.
"""
