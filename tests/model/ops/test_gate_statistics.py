"""Statistics of the gate against a dense oracle, query by query, and against keys that are made as FlashMoBA's model has them."""

import itertools
import math
from statistics import NormalDist

import pytest
import torch

from model.ops.moba import GATE_STATISTICS, GateStatistics, gate_statistics
from model.ops.moba.reference import seen_blocks
from tests.model.ops.helpers import cu_seqlens, make_inputs

USE = ("entropy", "never_chosen")


def oracle(q, k, bounds, block_size, topk) -> dict[str, list[float]]:
    """Every statistic of every head over all queries that have a choice, one at a time, from whole score matrices in fp64."""
    group = q.shape[1] // k.shape[1]
    found = {name: [] for name in GATE_STATISTICS}
    for head in range(q.shape[1]):
        values = {name: [] for name in GATE_STATISTICS}
        weights = []
        for start, end in itertools.pairwise(bounds):
            queries, keys = q[start:end, head], k[start:end, head // group]
            seen = seen_blocks(queries[:, None], keys[:, None], block_size, topk)[:, 0]
            candidates = (len(queries) - 1) // block_size
            if candidates < topk:
                continue
            own = torch.arange(len(queries)) // block_size
            use = (seen & (torch.arange(seen.shape[1]) < own[:, None]))[:, :candidates].sum(0).double()
            share = use[use > 0] / use.sum()
            weights.append(candidates)
            values["entropy"].append(float(-(share * share.log()).sum()) / math.log(candidates))
            values["never_chosen"].append(float((use == 0).double().mean()))
            for t in range(topk * block_size, len(queries)):
                logits = keys[: t + 1] @ queries[t] / math.sqrt(q.shape[2])
                mass = [float(part.sum()) for part in logits.softmax(0).split(block_size)]
                past, chosen = range(own[t]), {block for block in range(own[t]) if seen[t, block]}
                score = {block: float(logits[block * block_size : (block + 1) * block_size].mean()) for block in past}
                signal = max(past, key=lambda block: mass[block])
                noise = torch.cat([part for block, part in enumerate(logits.split(block_size)) if block in past and block != signal])
                unit = float(noise.std(correction=0)) * math.sqrt(2 / block_size)
                snr = (score[signal] - float(noise.mean())) / unit
                p, others = NormalDist().cdf(-math.sqrt(2) * snr), len(past) - 1
                values["mass"].append(mass[-1] + sum(mass[block] for block in chosen))
                values["best_mass"].append(mass[-1] + sum(sorted((mass[block] for block in past), reverse=True)[: topk - 1]))
                values["margin"].append((min(score[b] for b in chosen) - max(score[b] for b in past if b not in chosen)) / unit)
                values["snr"].append(snr)
                values["recall"].append(signal in chosen)
                values["predicted_recall"].append(sum(math.comb(others, x) * p**x * (1 - p) ** (others - x) for x in range(topk - 1)))
        for name, of in values.items():
            weighted = sum(w * v for w, v in zip(weights, of, strict=True)) / sum(weights) if name in USE else sum(of) / len(of)
            found[name].append(weighted)
    return found


@pytest.mark.parametrize(("block_size", "topk"), [(4, 2), (4, 3), (5, 4), (1, 3), (16, 2)])
@pytest.mark.parametrize("bounds", [[0, 61], [0, 3, 40, 41, 90]])
def test_statistics_are_those_of_the_dense_oracle(block_size, topk, bounds):
    q, k, _, _ = make_inputs(bounds[-1], 4, 2, 8, seed=topk)
    found = gate_statistics(q, k, block_size=block_size, topk=topk, num_queries=bounds[-1], cu_seqlens=cu_seqlens(bounds)).means()
    expected = oracle(q.detach(), k.detach(), bounds, block_size, topk)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=1e-9), name


def test_pieces_calls_and_samples_add_up(monkeypatch):
    q, k, _, _ = make_inputs(90, 4, 2, 8, seed=1)
    sizes = {"block_size": 4, "topk": 3, "cu_seqlens": cu_seqlens([0, 50, 90])}
    whole = gate_statistics(q, k, num_queries=90, **sizes)
    monkeypatch.setattr("model.ops.moba.statistics._BUDGET", 1)
    torch.testing.assert_close(gate_statistics(q, k, num_queries=90, **sizes).sums, whole.sums)
    alone = [gate_statistics(q[a:b], k[a:b], block_size=4, topk=3, num_queries=90) for a, b in ((0, 50), (50, 90))]
    both = alone[0] + alone[1]
    torch.testing.assert_close(both.sums, whole.sums)
    assert torch.equal(both.counts, whole.counts)
    few = gate_statistics(q, k, num_queries=7, **sizes)
    names = list(GATE_STATISTICS)
    assert {name: int(count) for name, count in zip(names, few.counts)} == {name: 21 if name in USE else 7 for name in names}
    assert few.means()["mass"] != whole.means()["mass"] and few.means()["entropy"] == whole.means()["entropy"]


@pytest.mark.parametrize(("topk", "length"), [(1, 64), (3, 12), (16, 64)])
def test_where_nothing_is_chosen_nothing_is_counted(topk, length):
    q, k, _, _ = make_inputs(length, 2, 1, 4, seed=0)
    found = gate_statistics(q, k, block_size=4, topk=topk, num_queries=8)
    assert found.means() == GateStatistics.none(2, q.device).means() == {} and not found.counts.any()


@pytest.mark.parametrize("shift", [8.0, 16.0])
def test_independent_keys_are_found_as_often_as_the_model_predicts(shift):
    """Keys of one document are independent; each query's own signal lies in one past key, which its score stands out by."""
    generator = torch.Generator().manual_seed(0)
    block_size, blocks, width = 16, 24, 64
    length = block_size * blocks
    k = torch.randn(length, 1, width, generator=generator, dtype=torch.float64)
    q = torch.randn(length, 1, width, generator=generator, dtype=torch.float64)
    q /= q.norm(dim=-1, keepdim=True)  # so that a key's score has a standard deviation of 1
    signal = torch.randint(block_size, (length,), generator=generator)  # in the first block: every query has it behind it
    q = q + shift * torch.nn.functional.normalize(k[signal], dim=-1) / k[signal].norm(dim=-1, keepdim=True)
    found = gate_statistics(8 * q, k, block_size=block_size, topk=3, num_queries=length).means()
    assert found["recall"][0] == pytest.approx(found["predicted_recall"][0], abs=0.06)
    assert 0.2 < found["recall"][0] < 1 and found["snr"][0] > 1


def test_a_smaller_block_routes_better_by_the_square_root():
    """One strong key in otherwise independent ones: the SNR goes with 1 / sqrt(2 block_size)."""
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(2048, 1, 64, generator=generator, dtype=torch.float64)
    direction = torch.nn.functional.normalize(torch.randn(64, generator=generator, dtype=torch.float64), dim=0)
    k[37, 0] += 400 * direction
    q = (4 * direction).expand(2048, 1, 64)
    found = [gate_statistics(q, k, block_size=size, topk=2, num_queries=2048).means()["snr"][0] for size in (16, 64)]
    assert found[0] / found[1] == pytest.approx(2, rel=0.05)
    assert found[0] == pytest.approx(400 / math.sqrt(2 * 16), rel=0.05)
