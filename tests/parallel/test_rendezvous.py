import os
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from grpo.parallel import rendezvous
from grpo.parallel.rendezvous import agree_on_prefix, choose_network_interface

RANKS = 3


def start(store, timeout=20.0):
    """One start of the processes, each a thread; the stores that they end up with."""
    found = {}

    def join(rank):
        found[rank] = agree_on_prefix(store, rank, RANKS, timedelta(seconds=timeout))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in reversed(range(RANKS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(RANKS)]


def test_every_start_has_keys_of_its_own():
    store = dist.HashStore()
    store.set("word/1", "of a worker that was killed while it waited")
    first, second = start(store), start(store)
    for stores, value in ((first, "old"), (second, "new")):
        assert not stores[2].check(["address"])
        stores[0].set("address", value)
        assert [other.get("address").decode() for other in stores] == [value] * RANKS
    assert first[1].get("address") == b"old"


def test_a_rank_that_does_not_come_ends_the_wait():
    store = dist.HashStore()
    with pytest.raises(dist.DistStoreError, match="2 of 3 processes did not come"):
        agree_on_prefix(store, 0, RANKS, timedelta(seconds=0.2))
    with pytest.raises(dist.DistStoreError):
        agree_on_prefix(store, 1, RANKS, timedelta(seconds=0.2))


@pytest.mark.parametrize(
    ("given", "found", "chosen"), [(None, "eth7", "eth7"), ("ib0", "eth7", "ib0"), (None, None, None)]
)
def test_interface_is_chosen_where_the_user_has_not(monkeypatch, given, found, chosen):
    monkeypatch.setattr(rendezvous, "_interface_towards", lambda host: found)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", given or "")
    if given is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    choose_network_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid", ""])
def test_neither_the_loopback_nor_an_unknown_host_tells_an_interface(host):
    assert rendezvous._interface_towards(host) is None
