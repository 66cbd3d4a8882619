"""What a machine refuses, asked before a benchmark starts the first of its trainings."""

from configs.checks import check_run
from configs.schema import RunConfig
from train.distributed import choose_device
from train.kernels import check_attention, check_loss
from train.memory import check_host_memory, this_machine


def check_training(run: RunConfig, *, num_ranks: int) -> None:
    """Raises ConfigError where training would refuse the run on so many ranks of this machine, whatever its corpus."""
    check_run(run, world_size=num_ranks)
    device = choose_device(run.device, num_ranks - 1)
    check_attention(run, device, world_size=num_ranks)
    check_loss(run, device)
    check_host_memory(run, [this_machine()] * num_ranks, gpu=device.type == "cuda")
