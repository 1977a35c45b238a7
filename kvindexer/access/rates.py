"""How often each caller asks: a bucket of tokens each, filled at an even rate up to a second's worth.

Invariant: at most so many callers are remembered; who is forgotten was quiet longest, and starts with a full bucket.
"""

from __future__ import annotations

from collections import OrderedDict
from ipaddress import IPv6Address, ip_address
from typing import Final

_NETWORK: Final = 64
"""Leading bits of an IPv6 address that tell two networks apart: one host may have all addresses of its own."""


class Rates:
    """All buckets."""

    def __init__(self, per_s: float, max_callers: int) -> None:
        self._per_s = per_s
        self._burst = max(1.0, per_s)
        self._most = max_callers
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        """How many callers are remembered."""
        return len(self._buckets)

    def take(self, caller: str, now_s: float) -> float:
        """One request of this caller; 0: it may go on, else the seconds after which one more will be let in."""
        left, since_s = self._buckets.pop(caller, (self._burst, now_s))
        left = min(self._burst, left + max(0.0, now_s - since_s) * self._per_s)
        wait_s = 0.0
        if left >= 1.0:
            left -= 1.0
        else:
            wait_s = (1.0 - left) / self._per_s
        self._buckets[caller] = (left, now_s)
        if len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        return wait_s


def network_of(host: str) -> str:
    """By what a caller without a name is told apart: its address, of IPv6 the network."""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if isinstance(address, IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped) if mapped else f"{int(address) >> _NETWORK:x}::/{_NETWORK}"
    return str(address)
