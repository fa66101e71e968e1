"""How the processes of one start of a run find each other, also after others have died."""

import fcntl
import os
import socket
import struct
import time
import uuid
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface, see netdevice(7)


def connect_store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The key-value store of this start of the run, free of what earlier starts have left.

    Raises a DistStoreError if some rank does not come in time.
    """
    if size == 1:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return agree_on_prefix(store, rank, size, timeout) if shared else store


def agree_on_prefix(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """A part of `store` that only the processes of this start know.

    torchrun's agents keep one store as long as they live, in which killed workers leave keys behind: addresses among
    them, at which nobody answers any more. The number of the restart does not tell starts apart, because each host
    counts its own: a host that comes back counts from zero. So every process leaves a random word under its rank, and
    rank 0 answers each word with a random prefix of its own until all ranks have taken it. An answer to a dead
    process's word does no harm, and nobody takes a dead rank 0's answer, because the words are new.
    """
    if rank:
        own = uuid.uuid4().hex
        store.set(f"word/{rank}", own)
        store.wait([f"prefix/{own}"], timeout)
        prefix = store.get(f"prefix/{own}").decode()
        store.add(f"{prefix}/joined", 1)
        return dist.PrefixStore(prefix, store)
    prefix, deadline = f"start-{uuid.uuid4().hex}", time.monotonic() + timeout.total_seconds()
    answered: dict[int, bytes] = {}
    while (joined := store.add(f"{prefix}/joined", 0)) < size - 1:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"{size - 1 - joined} of {size} processes did not come; see parallel.timeout")
        for other in range(1, size):
            if store.check([f"word/{other}"]) and (word := store.get(f"word/{other}")) != answered.get(other):
                store.set(f"prefix/{word.decode()}", prefix)
                answered[other] = word
        time.sleep(0.01)
    return dist.PrefixStore(prefix, store)


def choose_network_interface() -> None:
    """Make gloo use the network through which this host reaches the others, unless GLOO_SOCKET_IFNAME says which.

    Left alone, gloo takes the address that the host's own name resolves to, which in a container is often the
    loopback. Where the way to the rendezvous host is not told from the address, nothing is changed.
    """
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := _interface_towards(os.environ.get("MASTER_ADDR", ""))):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _interface_towards(host: str) -> str | None:
    """The IPv4 interface whose address packets to `host` would carry; None for the loopback and where it is unknown."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # any port: this chooses a route and sends nothing
        address = probe.getsockname()[0]
        names = [] if address.startswith("127.") else [name for _, name in socket.if_nameindex()]
        return next((name for name in names if _address_of(probe, name) == address), None)
    return None


def _address_of(probe: socket.socket, interface: str) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])
    try:
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
    except OSError:  # an interface without an IPv4 address
        return None
