"""What data sheets say of the GPUs that figures are given for."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Dense bf16 peak in FLOP/s, and memory in bytes."""

    peak_flops: float
    memory: float


# The vendor's data sheets (SXM where there are several); memory in their GB of 10^9 bytes.
GPUS = {
    "H200": Gpu(peak_flops=989e12, memory=141e9),
    "H100": Gpu(peak_flops=989e12, memory=80e9),
    "H800": Gpu(peak_flops=989e12, memory=80e9),
    "A100": Gpu(peak_flops=312e12, memory=80e9),
    "A800": Gpu(peak_flops=312e12, memory=80e9),
    "L40S": Gpu(peak_flops=362e12, memory=48e9),
    "B200": Gpu(peak_flops=2250e12, memory=180e9),
}


def gpu_name(device: torch.device) -> str | None:
    """The key in `GPUS` of a device; None where it is no GPU or not among them."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((key for key in GPUS if key in name), None)


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak of the device in FLOP/s, None where it is not known (CPUs among others)."""
    name = gpu_name(device)
    return GPUS[name].peak_flops if name else None
