"""A machine has several addresses, and its peers can reach it at one of them."""

import fcntl
import socket
import struct

# ioctl of Linux: the IPv4 address of an interface.
_SIOCGIFADDR = 0x8915
# Nothing is sent there; connecting a datagram socket only chooses the route.
_ANY_PORT = 9


def address_toward(host: str) -> str:
    """Return this machine's address on the route toward `host`. Raises OSError: no such host, or no
    route."""
    found = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)
    family, kind, protocol, _, target = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return probe.getsockname()[0]


def interface_of(address: str) -> str | None:
    """Return the name of the network interface with this IPv4 address; None if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def listening_at(host: str) -> tuple[socket.socket, str]:
    """Return a TCP socket that listens at a free port of this address, and `HOST:PORT` for others.
    Raises OSError: `host` is not an address of this machine."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.bind((host, 0))
    except OSError:
        listener.close()
        raise
    shown = f"[{host}]" if ":" in host else host
    return listener, f"{shown}:{listener.getsockname()[1]}"


def free_port(host: str) -> int:
    """Return a TCP port of this address that is free now."""
    listener, _ = listening_at(host)
    with listener:
        return listener.getsockname()[1]
