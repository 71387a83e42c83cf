"""Names for KV blocks: a block's hash stands for every token from the prompt's start to the block's end.

Edge and schedulers compute equal names, so that one can ask the other what it holds. Equal prefixes have equal names only under the same
key: a tenant's cached prompts cannot be found, by time or otherwise, by another tenant.
"""

import hashlib
from array import array
from collections.abc import Sequence

HASH_BYTES = 16


def prefix_key(tenant: str, salt: bytes) -> bytes:
    """The key of all prefixes that this tenant shares under this salt."""
    return hashlib.blake2b(len(tenant).to_bytes(4) + tenant.encode() + salt, digest_size=32, person=b"ossia-prefix").digest()


class PrefixHasher:
    """Token ids in, one name per full block out. Grows with the sequence; a prompt costs time by its length, once."""

    def __init__(self, key: bytes, block_size: int, token_ids: Sequence[int] = ()) -> None:
        self.hashes: list[bytes] = []
        self._block_size = block_size
        self._state = hashlib.blake2b(key=key, digest_size=HASH_BYTES)
        self.extend(token_ids)

    @classmethod
    def of_names(cls, names: Sequence[bytes]) -> "PrefixHasher":
        """Names that were computed elsewhere, for look-ups only."""
        made = cls(b"", 1)
        made.hashes = list(names)
        return made

    def fork(self) -> "PrefixHasher":
        """The same names, to be extended by itself."""
        twin = object.__new__(PrefixHasher)
        twin.hashes, twin._block_size, twin._state = self.hashes.copy(), self._block_size, self._state.copy()
        return twin

    def extend(self, token_ids: Sequence[int]) -> None:
        """Names the blocks that these tokens fill. They begin where the last named block ends; tokens of an unfilled block are not kept."""
        packed, size = array("I", token_ids).tobytes(), 4 * self._block_size
        state, append = self._state, self.hashes.append
        for start in range(0, len(packed) - size + 1, size):
            state.update(packed[start : start + size])
            append(state.copy().digest())
