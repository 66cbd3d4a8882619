"""What data sheets say of the GPUs that figures are given for."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Dense bf16 peak in FLOP/s, memory in bytes, and what it sends at most in bytes/s, one way."""

    peak_flops: float
    memory: float
    link: float
    """To the other GPUs of its node: NVLink, of which data sheets give the sum of both ways; PCIe 4.0 x16 where there is none."""
    network: float
    """To other nodes, its share of the adapters of the vendor's usual node (DGX and HGX: one of 200 or 400 Gb/s for each GPU; servers
    with L40S differ, one of 200 Gb/s for two is taken)."""


# The vendor's data sheets (SXM where there are several); memory in their GB of 10^9 bytes.
GPUS = {
    "H200": Gpu(peak_flops=989e12, memory=141e9, link=450e9, network=50e9),
    "H100": Gpu(peak_flops=989e12, memory=80e9, link=450e9, network=50e9),
    "H800": Gpu(peak_flops=989e12, memory=80e9, link=200e9, network=50e9),
    "A100": Gpu(peak_flops=312e12, memory=80e9, link=300e9, network=25e9),
    "A800": Gpu(peak_flops=312e12, memory=80e9, link=200e9, network=25e9),
    "L40S": Gpu(peak_flops=362e12, memory=48e9, link=32e9, network=12.5e9),
    "B200": Gpu(peak_flops=2250e12, memory=180e9, link=900e9, network=50e9),
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
