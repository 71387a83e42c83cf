"""Ports for servers that must come back where they were, or that cannot say which port they took."""

import os
import random
import socket
from pathlib import Path

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
LOWEST, USUAL_EPHEMERAL = 10_000, 32_768
# Test processes that run side by side draw from ports of their own.
PLACE, NUM_PLACES = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_given: set[int] = set()  # by this process; whoever asked may not listen yet


def free_port() -> int:
    """A port on which nobody listens, from below those that the kernel gives out by itself: no connection takes it in between."""
    highest = int(EPHEMERAL.read_text().split()[0]) if EPHEMERAL.exists() else USUAL_EPHEMERAL
    if highest < LOWEST + 1000:  # a kernel that gives out nearly all of them leaves no better choice
        highest = USUAL_EPHEMERAL
    while True:
        # Not from the seed that a test may have set, or two would draw the same.
        port = random.SystemRandom().randrange(LOWEST + PLACE, highest, NUM_PLACES)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _given:
            _given.add(port)
            return port
