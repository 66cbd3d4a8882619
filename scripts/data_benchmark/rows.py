"""All rows of the data benchmark, in the order they are printed."""

from collections.abc import Callable, Mapping
from pathlib import Path

from configs.schema import DataBenchmarkConfig, DataRow
from scripts.data_benchmark.loading import loading
from scripts.data_benchmark.opening import opening
from scripts.data_benchmark.packing import packing
from scripts.data_benchmark.preparing import preparing
from scripts.data_benchmark.report import Measured

MEASURES: Mapping[DataRow, Callable[[DataBenchmarkConfig, Path], list[Measured]]] = {
    DataRow.PREPARING: preparing,
    DataRow.OPENING: opening,
    DataRow.PACKING: packing,
    DataRow.LOADING: loading,
}
