"""Names of machines."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether it is a name of this machine for itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
