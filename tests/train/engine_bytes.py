"""What the engine really holds and sends: `engine_bytes OUT.json`, a launch that counts its tensors and collectives in each of `LAYOUTS`.

Counted is each storage once that Python can reach; saved activations, which it cannot, are a few rows here.
"""

import gc
import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from configs.schema import AttentionConfig, Device, ModelConfig, OptimConfig, ParallelConfig, Precision, RopeConfig
from data.loader import Batch
from model.init import initialise
from model.transformer import Transformer
from train.distributed import Ranks, find_ranks, run_to_end
from train.engine import Engine, processes

# Matrices above the 100,000 elements that ZeRO-3 keeps whole, norms below. The gradient of a tied head would wait for the embedding's:
# that is counted with the backward pass (`model.memory`).
MODEL = ModelConfig(
    vocab_size=1024, hidden_size=512, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=64, ffn_size=1024, tie_embeddings=False
)
LAYOUTS = [(0, Precision.FP32), (1, Precision.FP32), (1, Precision.BF16), (2, Precision.BF16), (3, Precision.BF16), (3, Precision.FP32)]


def count(stage: int, precision: Precision, ranks: Ranks, *, accumulates: bool) -> dict[str, int]:
    """Bytes in all (at the fullest moment of the second step's backward passes), of the weights, and of the optimizer; and those that
    this rank sends in a step, of gradients and of weights."""
    gc.collect()
    gc.freeze()  # what there is so far is not counted, nor looked through
    parallel, optim = ParallelConfig(zero_stage=stage, precision=precision), OptimConfig()
    model = Transformer(MODEL, AttentionConfig().per_layer(MODEL.num_layers), RopeConfig())
    initialise(model, MODEL, 0)
    engine = Engine(model, parallel=parallel, optim=optim, ranks=ranks)
    fullest, armed = 0, False

    def look(*_: object) -> None:
        nonlocal fullest
        if armed:
            dist.barrier()  # a gloo thread lets go of the tensors of its last collective a moment after it is over
            fullest = max(fullest, sum(_reachable().values()))

    model.layers[0].register_full_backward_hook(look)  # the last to come: gradients of all the others are there

    def step() -> None:
        if accumulates:
            engine.micro_step(_batch(), weight=1.0, last=False)
        engine.micro_step(_batch(), weight=1.0, last=True)
        look()
        engine.step(1e-3)

    step()
    armed = True  # the moments are there from now on
    step()
    armed = False  # what watches collectives makes tensors reachable that are not else
    with _Collectives() as collectives:
        step()
    weights = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes() for parameter in model.parameters()}
    inner = engine._engine.optimizer.optimizer if stage else engine._optimizer
    held = [value for state in inner.state.values() for value in state.values() if value.numel() > 1]
    if stage == 3:
        held += engine._engine.optimizer.fp32_partitioned_groups_flat
    elif stage:
        held += [parameter for group in inner.param_groups for parameter in group["params"]]
    gc.unfreeze()
    sizes = {"all": fullest, "weights": sum(weights.values()), "optimizer": sum(tensor.nbytes for tensor in held)}
    return sizes | collectives.sent(ranks.world_size)


class _Collectives(TorchDispatchMode):
    """Bytes of the tensors that go through each collective."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "c10d":
            self._bytes[function._opname] += max(_num_bytes(argument) for argument in arguments)
        return function(*arguments, **(options or {}))

    def sent(self, world_size: int) -> dict[str, int]:
        """What a ring makes a rank send for them."""
        assert self._bytes.keys() <= {"allreduce_", "_reduce_scatter_base_", "_allgather_base_", "broadcast_", "barrier"}, self._bytes
        share = (world_size - 1) / world_size
        gradients = 2 * self._bytes["allreduce_"] + self._bytes["_reduce_scatter_base_"]
        return {"sent_gradients": int(share * gradients), "sent_weights": int(share * self._bytes["_allgather_base_"])}


def _num_bytes(argument: object) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    return sum(map(_num_bytes, argument)) if isinstance(argument, (list, tuple)) else 0


def _reachable() -> dict[int, int]:
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            tensors = [thing] if thing.grad_fn is not None or thing.grad is None else [thing, thing.grad]
            for tensor in tensors:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


def _batch() -> Batch:
    tokens = torch.arange(16)[None]
    bounds = torch.tensor([0, 16], dtype=torch.int32)
    return Batch(
        tokens=tokens, labels=tokens, positions=tokens, cu_seqlens=bounds, max_length=16, documents=(), num_targets=16, step_targets=16
    )


def main() -> None:
    ranks = find_ranks(Device.CPU)
    with processes(ranks):
        found = [count(stage, precision, ranks, accumulates=True) for stage, precision in LAYOUTS]
        if ranks.is_main:
            Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    run_to_end(main)
