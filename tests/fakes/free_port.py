"""Ports for servers that must come back where they were, or that cannot say which port they took."""

import random
import socket
from pathlib import Path

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST = 10_000


def free_port() -> int:
    """A port on which nobody listens, from below those that the kernel gives out by itself: no connection takes it in between."""
    highest = int(EPHEMERAL.read_text().split()[0]) if EPHEMERAL.exists() else 32_768
    while True:
        port = random.SystemRandom().randrange(LOWEST, highest)  # not from the seed that a test may have set, or two would draw the same
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
