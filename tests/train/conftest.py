"""A small real corpus, and one process group for all runs inside the test process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from configs.schema import Device
from data.prepare import prepare
from tests.train.helpers import corpus_config
from train.distributed import Ranks, find_ranks
from train.engine import processes


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "bundled"
    prepare(corpus_config(folder))
    return folder


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    alone = find_ranks(Device.CPU)
    with processes(alone):
        torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
        yield alone
