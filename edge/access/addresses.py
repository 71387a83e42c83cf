"""Which addresses may call. A refusal comes before anything else is looked at."""

import ipaddress
from collections.abc import Iterable
from urllib.parse import unquote

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def read_network(text: str) -> Network:
    """192.0.2.0/24 or one address. Raises ValueError."""
    return ipaddress.ip_network(text, strict=False)


class AddressRules:
    """What is denied is refused, then what is not allowed, where anything is listed as allowed.

    A proxy that is trusted is believed about whom it forwards; of a chain the last address that is no trusted proxy counts.
    """

    def __init__(self, allowed: Iterable[str] = (), denied: Iterable[str] = (), trusted_proxies: Iterable[str] = ()) -> None:
        self._allowed = tuple(map(read_network, allowed))
        self._denied = tuple(map(read_network, denied))
        self._trusted_proxies = tuple(map(read_network, trusted_proxies))

    def find_client(self, peer: str, forwarded_for: str) -> str:
        """The caller's address, from the connection's and the header x-forwarded-for."""
        chain = [part.strip() for part in forwarded_for.split(",")] if forwarded_for else []
        client = peer
        while chain and _lies_in(client, self._trusted_proxies):
            client = chain.pop()
        return client

    def admits(self, client: str) -> bool:
        if _lies_in(client, self._denied):
            return False
        return not self._allowed or _lies_in(client, self._allowed)


def peer_address(grpc_peer: str) -> str:
    """ipv4:127.0.0.1:5000 → 127.0.0.1, ipv6:%5B::1%5D:5000 → ::1"""
    kind, _, rest = unquote(grpc_peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else ""


def _lies_in(text: str, networks: tuple[Network, ...]) -> bool:
    address = _read_address(text)
    return address is not None and any(address in network for network in networks)


def _read_address(text: str) -> Address | None:
    """None for what is no address, which lies nowhere. An IPv4 address within IPv6 is that IPv4 address."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
