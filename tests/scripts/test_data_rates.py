"""The rows of the data benchmark that fill and load rows, on little text and in this process."""

import contextlib
import io
import json

from configs.schema import DataBenchmarkConfig
from scripts.data_benchmark import loading, packing


def test_loaders_are_measured_beside_datasets(tmp_path, monkeypatch):
    def in_process(*arguments):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            loading.main(*arguments)
        found = json.loads(out.getvalue())
        counted[arguments[2]] = found
        return found

    counted = {}
    monkeypatch.setattr(loading, "_in_process", in_process)
    monkeypatch.setattr(loading, "_VOCAB", 512)
    figures = loading.loading(DataBenchmarkConfig(text_bytes=1_200_000, num_workers=1), tmp_path)
    assert [figure.name for figure in figures[:3]] == [f"loader, {name}" for name in loading._LOADERS]
    assert all(figure.value > 0 and figure.unit == "M tokens/s" for figure in figures)
    tokens = {name: int(found[0]) for name, found in counted.items()}
    assert len(set(tokens.values()) - {tokens["parquet"], tokens["arrow"]}) <= 1 and tokens["parquet"] == tokens["arrow"]
    assert 0 < tokens["parquet"] <= next(iter(tokens.values()))  # whole rows of the same corpus
    assert counted["all documents, concat"][2] == 0 <= counted["all documents, best_fit"][2] <= 0.01


def test_best_fit_is_measured_with_its_padding(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "SHUFFLE_TOKENS", 2**21)
    figures = packing.packing(DataBenchmarkConfig(), tmp_path)
    assert len(figures) == 4 and all(figure.value > 0 and figure.note.startswith("padding 0.") for figure in figures)
