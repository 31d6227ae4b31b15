"""This module tells which host names mean this machine."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Return whether a host name or address means this machine itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
