"""`python -m scripts.report`: a page on a run or a sweep.

`page.py` and `page.html` say what a page is made of and how it looks, `charts.py` draws, `runs.py` and `sweeps.py` say what is shown,
`left.py` takes in what other commands have written. To show more of a run: give `run_page` another `Section`.
"""
