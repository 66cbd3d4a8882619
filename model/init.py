"""All initialisation, in one function."""

import hashlib

import torch
from torch import Generator, nn

from configs.schema import ModelConfig
from model.layers import KeyConvolution, RMSNorm
from model.transformer import Transformer

_OUTPUT_PROJECTIONS = ("attention.o_proj", "ffn.down_proj")


@torch.no_grad()
def initialise(model: Transformer, config: ModelConfig, seed: int) -> None:
    """Set every parameter in place: matrices N(0, init_std²), norm weights 1, biases 0, key convolutions 0.

    With weights of 0 a key convolution changes nothing yet, and learns from the first step: SiLU has slope 1/2 there.
    The two matrices of each layer that write to the residual stream get init_std / sqrt(2 num_layers), so that its variance
    does not grow with depth (GPT-2, Radford et al. 2019, section 2.3). Each parameter is drawn on the CPU in fp32 from a
    generator of its own, seeded by (seed, name): the same on any device and in any order of construction.
    """
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if not parameters or (name == "head" and config.tie_embeddings):
            continue
        if isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, KeyConvolution):
            module.weight.zero_()
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            is_output = name.endswith(_OUTPUT_PROJECTIONS)
            std = config.init_std / (2 * config.num_layers) ** 0.5 if is_output else config.init_std
            weight = torch.empty(module.weight.shape).normal_(0.0, std, generator=_generator(seed, name))
            module.weight.copy_(weight)
            if "bias" in parameters:
                parameters["bias"].zero_()
        else:
            raise AssertionError(f"no initialisation is written for {name} ({type(module).__name__})")


def _generator(seed: int, name: str) -> Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
