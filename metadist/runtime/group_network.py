"""Ray Train's process group of torch, over the network that Ray itself uses.

Left to itself gloo takes the address that a host's own name stands for. On many hosts that is the loopback, or none,
and ranks of other hosts find nobody there.
"""

import contextlib
import os
import socket
import struct
from typing import Any

from ray.train.torch import TorchConfig

GET_ADDRESS = 0x8915
"""SIOCGIFADDR of Linux."""


class OverRaysNetwork(TorchConfig().backend_cls):  # type: ignore[misc]
    """Tells every rank the interface before they connect."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Called by Ray Train when all ranks are there."""
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


class GroupConfig(TorchConfig):  # type: ignore[misc]
    """Of the process group."""

    @property
    def backend_cls(self) -> type[OverRaysNetwork]:
        """What starts the group."""
        return OverRaysNetwork


def choose_interface() -> None:
    """In a rank: that of its node's address; a GLOO_SOCKET_IFNAME in the environment wins."""
    import ray

    found = interface_of(ray.util.get_node_ip_address())
    if found is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", found)


def interface_of(address: str) -> str | None:
    """The network interface of this host that has an IPv4 address; None where it is not known."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # one without an address, or a system that does not tell
                told = fcntl.ioctl(asked.fileno(), GET_ADDRESS, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(told[20:24]) == address:
                    return name
    return None
