"""Host memory behind one pool of device blocks: what is evicted there goes here, and comes back when it is asked for again. Pure.

Copies are only decided here. They are part of the step plan, which runs them in order before anything of the step is written.
"""

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class TierCopy:
    """One block's content from the device to the host, or back."""

    is_window: bool
    to_host: bool
    device_block_id: int
    host_block_id: int


class HostTier:
    """Host blocks 0 to num_blocks - 1, each with a name; the one used longest ago goes first."""

    def __init__(self, num_blocks: int, is_window: bool) -> None:
        self._is_window = is_window
        self._free = list(range(num_blocks - 1, -1, -1))
        self._block_of: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._pinned: set[bytes] = set()
        self.copies: list[TierCopy] = []  # decided since the last plan, in order

    def __contains__(self, name: bytes) -> bool:
        return name in self._block_of

    def names(self) -> list[bytes]:
        return list(self._block_of)

    def pin(self, names: set[bytes]) -> None:
        """These stay until the next call: they are about to be fetched."""
        self._pinned = names

    def store(self, name: bytes, device_block_id: int) -> bytes | None:
        """Takes in what a device block holds. Returns the name that had to go: another's, its own where there is no room, or None."""
        if name in self._block_of:
            self._block_of.move_to_end(name)
            return None
        lost = None
        if not self._free:
            lost = next((one for one in self._block_of if one not in self._pinned), None)
            if lost is None:
                return name
            self._free.append(self._block_of.pop(lost))
        self._block_of[name] = self._free.pop()
        self.copies.append(TierCopy(self._is_window, True, device_block_id, self._block_of[name]))
        return lost

    def fetch(self, name: bytes, device_block_id: int) -> None:
        """Brings the content back; the host keeps it too, so that the next eviction costs no copy."""
        self._block_of.move_to_end(name)
        self.copies.append(TierCopy(self._is_window, False, device_block_id, self._block_of[name]))

    def drop(self, name: bytes) -> None:
        if name in self._block_of:
            self._free.append(self._block_of.pop(name))

    def take_copies(self) -> list[TierCopy]:
        copies, self.copies = self.copies, []
        return copies

    def check_integrity(self, num_blocks: int) -> None:
        assert sorted([*self._free, *self._block_of.values()]) == list(range(num_blocks)), "host blocks lost or doubled"
