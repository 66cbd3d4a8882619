"""For every test: no name but this machine's own is reached, since nothing may be fetched after the installation.

And, without a CUDA device, Triton's kernels run on the CPU, in Python.
"""

import importlib
import ipaddress
import socket

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides as it is imported, and any test, or another conftest, may be the first to do so. Child processes of tests shall not
    # inherit it.
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("model.ops.moba.triton.operator")
        importlib.import_module("model.ops.loss.kernel")


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Connections that leave the machine fail; loopback, which process groups need, works."""
    plain = socket.socket.connect

    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not ipaddress.ip_address(socket.gethostbyname(address[0])).is_loopback:
            raise OSError(f"a test tried to reach {address}")
        return plain(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", connect)
    yield
    patch.undo()
