"""Which groups this scheduler is to own, so that the replicas of a cluster share them evenly and agree without talking.

Each replica computes the same assignment from the same two memberships: rendezvous hashing with a bound on the load, so that a replica that
joins or leaves moves few groups and none gets more than its share. Whether a group *is* owned is for discovery's claims to say.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Collection

from services.discovery import Discovery


def assign(group_ids: Collection[str], scheduler_ids: Collection[str]) -> dict[str, str]:
    """Scheduler by group. A group goes to the scheduler with the highest hash of the pair among those that have room left.

    Every scheduler gets as many groups as any other, or one more where they do not divide.
    """
    share, num_larger = divmod(len(group_ids), max(1, len(scheduler_ids)))
    load, owner_of = Counter[str](), dict[str, str]()
    pairs = sorted(((_weight(group, scheduler), group, scheduler) for group in group_ids for scheduler in scheduler_ids), reverse=True)
    for _, group, scheduler in pairs:
        if group not in owner_of and (load[scheduler] < share or (load[scheduler] == share and num_larger)):
            num_larger -= load[scheduler] == share
            owner_of[group] = scheduler
            load[scheduler] += 1
    return owner_of


def _weight(group_id: str, scheduler_id: str) -> bytes:
    return hashlib.blake2b(f"{scheduler_id}\0{group_id}".encode(), digest_size=8).digest()


class Ownership:
    """Follows the schedulers; `set_groups` says which groups there are. This scheduler always counts itself."""

    def __init__(self, scheduler_id: str, discovery: Discovery) -> None:
        self._scheduler_id = scheduler_id
        self._discovery = discovery
        self._schedulers: frozenset[str] = frozenset((scheduler_id,))
        self._groups: frozenset[str] = frozenset()
        self._owner_of: dict[str, str] = {}
        self._has_changed = asyncio.Event()

    async def run(self) -> None:
        async for members in self._discovery.watch("schedulers"):
            self._schedulers = frozenset((*members, self._scheduler_id))
            self._assign()

    def set_groups(self, group_ids: Collection[str]) -> None:
        self._groups = frozenset(group_ids)
        self._assign()

    def _assign(self) -> None:
        self._owner_of = assign(sorted(self._groups), sorted(self._schedulers))
        self._has_changed.set()
        self._has_changed = asyncio.Event()

    def rightful_owner(self, group_id: str) -> str:
        """Who should own the group; this scheduler where nobody says otherwise."""
        return self._owner_of.get(group_id, self._scheduler_id)

    def is_ours(self, group_id: str) -> bool:
        return self.rightful_owner(group_id) == self._scheduler_id

    async def wait_changed(self, timeout_s: float) -> None:
        """Returns when a membership has changed, or after so long."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._has_changed.wait()
        except TimeoutError:
            return
