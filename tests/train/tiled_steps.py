"""One step of plain SGD at every ZeRO stage, with and without tiles, and with one or three micro-batches: `tiled_steps OUT.json`.

All take the same six rows, so that all must come to the same weights; SGD shows any factor that Adam would hide. ZeRO-3 shards even
the smallest parameter.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

from configs.schema import AttentionConfig, Device, LossBackend, ModelConfig, OptimConfig, ParallelConfig, RopeConfig
from data.loader import Batch
from model.init import initialise
from model.ops.loss import IGNORE, rows, tiled
from model.transformer import Transformer
from tests.train.shared_rows import gathered
from train import engine
from train.distributed import Ranks, find_ranks, run_to_end
from train.engine import Engine, deepspeed_config, processes

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "ffn_size": 24}
ROWS, ROW, TILE = 6, 20, 8  # rows of a step over all ranks, tokens in a row and in a tile
# Stage, tied, in tiles, micro-batches: what is not tiled first.
CASES = [(0, True, False, 1), (0, False, False, 1), (3, True, False, 3)]
CASES += [(stage, True, True, accumulation) for stage in (0, 1, 2, 3) for accumulation in (1, 3)]
CASES += [(3, False, True, 1), (3, False, True, 3)]


def batches(ranks: Ranks, accumulation: int) -> list[Batch]:
    """This rank's rows in `accumulation` micro-batches; rows differ in how many of their tokens are masked, one tile is all masked."""
    tokens = torch.randint(64, (ROWS, ROW), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, dims=1)
    for row in range(ROWS):
        labels[row, ROW - 2 * row :] = IGNORE
    labels[0, :TILE] = IGNORE
    mine = slice(ranks.rank * ROWS // ranks.world_size, (ranks.rank + 1) * ROWS // ranks.world_size)
    parts = zip(tokens[mine].chunk(accumulation), labels[mine].chunk(accumulation), strict=True)
    return [_batch(*part, step_targets=int((labels != IGNORE).sum())) for part in parts]


def _batch(tokens: torch.Tensor, labels: torch.Tensor, step_targets: int) -> Batch:
    return Batch(
        tokens=tokens,
        labels=labels,
        positions=torch.arange(ROW).expand(tokens.shape),
        cu_seqlens=torch.arange(0, tokens.numel() + 1, ROW, dtype=torch.int32),
        max_length=ROW,
        documents=(),
        num_targets=int((labels != IGNORE).sum()),
        step_targets=step_targets,
    )


def step(ranks: Ranks, *, stage: int, tied: bool, in_tiles: bool, accumulation: int) -> dict[str, list]:
    """Losses of the rank's micro-batches, and each weight after the step; in tiles, their logits are computed once."""
    config = ModelConfig(tie_embeddings=tied, init_std=0.3, **SIZES)
    ways = {"loss": LossBackend.TORCH if in_tiles else LossBackend.REFERENCE, "ffn_tile": TILE if in_tiles else 0}
    parallel = ParallelConfig(zero_stage=stage, **ways)
    model = Transformer(config, AttentionConfig().per_layer(2), RopeConfig(), loss=parallel.loss.value, ffn_tile=parallel.ffn_tile)
    initialise(model, config, 0)
    built = Engine(model, parallel=parallel, optim=OptimConfig(clip_norm=0.0), ranks=ranks)
    micro_batches = batches(ranks, accumulation)
    with patch("model.ops.loss.api.torch_rows", wraps=rows.torch_rows) as counted:
        losses = []
        for batch in micro_batches:
            losses.append(float(built.micro_step(batch, weight=ranks.world_size / batch.step_targets, last=batch is micro_batches[-1])))
    assert counted.call_count == (sum(-(-batch.tokens.numel() // TILE) for batch in micro_batches) if in_tiles else 0)
    built.step(1.0)
    with gathered(model) if stage == 3 else nullcontext():
        return {"losses": losses, **{name: weight.tolist() for name, weight in model.named_parameters()}}


def main() -> None:
    plain_config = deepspeed_config

    def config(*args: object) -> dict:
        made = plain_config(*args)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return {**made, "zero_allow_untested_optimizer": True}

    ranks, found = find_ranks(Device.CPU), []
    sgd = patch.object(engine, "build_optimizer", lambda model, optim: torch.optim.SGD(model.parameters(), lr=1.0))
    with processes(ranks), sgd, patch.object(engine, "deepspeed_config", config), patch.object(tiled, "LOGITS_BYTES", TILE * 64 * 4):
        for stage, tied, in_tiles, accumulation in CASES:
            case = {"stage": stage, "tied": tied, "in_tiles": in_tiles, "accumulation": accumulation}
            found.append({"case": case, **step(ranks, **case)})
        if ranks.is_main:
            Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    run_to_end(main)
