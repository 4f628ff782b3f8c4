"""The interface over which ranks find one another."""

import pytest

# Ray reads its environment when it is imported, so not before there is a cluster.
pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster")]


def test_the_interface_of_an_address() -> None:
    from metadist.runtime.group_network import interface_of

    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.255") is None, "an address that no host has"


def test_what_the_environment_says_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    import ray

    from metadist.runtime.group_network import choose_interface

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
