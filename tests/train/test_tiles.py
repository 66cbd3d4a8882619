"""Loss and feed-forward in tiles through DeepSpeed: weights after a step at every ZeRO stage on two ranks; and a user's mistakes."""

import json

import pytest
import torch

from configs.schema import ConfigError
from tests.train.helpers import make_run, start_ranks
from tests.train.tiled_steps import CASES
from train.loop import train


def test_two_ranks_take_the_same_step_with_and_without_tiles(tmp_path):
    done = start_ranks(["tests.train.tiled_steps", str(tmp_path / "steps.json")], num_ranks=2)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "steps.json").read_text())
    assert len(found) == len(CASES)
    for tied in (True, False):
        first, *others = [each for each in found if each["case"]["tied"] is tied]
        for other in others:
            assert other.keys() == first.keys()
            assert sum(other["losses"]) == pytest.approx(sum(first["losses"]), rel=1e-6)
            for name in first.keys() - {"case", "losses"}:
                weights = (torch.tensor(each[name]) for each in (other, first))
                torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6, msg=lambda text, at=(other["case"], name): f"{at}: {text}")


@pytest.mark.parametrize("loss", ["triton", "liger"])
def test_a_loss_that_needs_a_gpu_is_refused_before_anything_is_written(corpus, ranks, tmp_path, loss):
    with pytest.raises(ConfigError, match=rf"^parallel.loss={loss}: the device is cpu; accepted: cuda; auto takes what serves here$"):
        train(make_run(corpus, tmp_path / "run", f"parallel.loss={loss}"), ranks)
    assert not (tmp_path / "run").exists()
