"""For every test: no name but this machine's own is reached, since nothing may be fetched after the installation."""

import ipaddress
import os
import socket

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported: kernels then run on the CPU, in Python


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
