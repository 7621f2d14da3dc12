"""Prints a port of this machine that stays free until the process it is for gets to it, seconds later."""

import random
import socket
from pathlib import Path

OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")  # the system takes the ports of connections from here
LOWEST = 10_000  # below are those of known services


def free_port() -> int:
    """Below the ports of outgoing connections, any of which might take it meanwhile; random, for jobs side by side."""
    first = int(OUTGOING.read_text().split()[0]) if OUTGOING.exists() else 32768
    below = range(LOWEST, first)
    for port in (*random.sample(below, min(100, len(below))), 0):  # 0: any, where all of these are taken
        with socket.socket() as probe:
            try:
                probe.bind(("localhost", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise SystemExit("error: no free port")


if __name__ == "__main__":
    print(free_port())
