"""The date that a conversation began, for as long as it goes on: a new date in the system message would void all of its cached prefix.

A conversation is known by how it begins. Where nothing was answered yet it begins today; later turns get the date of their beginning. Each
edge remembers its own, and a turn that comes to another one after midnight gets that day's date: right, and computed anew.
"""

import hashlib
from collections import OrderedDict

from protos.ossia.v1 import inference_pb2 as inference

MAX_CONVERSATIONS = 65_536  # some ten megabytes; those that were silent for longest go first
_ANSWERING = (inference.ROLE_ASSISTANT, inference.ROLE_TOOL)


class ConversationDates:
    def __init__(self) -> None:
        self._began: OrderedDict[bytes, str] = OrderedDict()  # by a digest of the beginning

    def __len__(self) -> int:
        return len(self._began)

    def find(self, request: inference.ChatRequest, today: str) -> str:
        """The date for this turn, YYYY-MM-DD."""
        beginning = hashlib.blake2b(f"{request.tenant}\0{request.cache_salt}\0{request.model}".encode(), digest_size=16)
        is_new = True
        for message in request.messages:
            if message.role in _ANSWERING:
                is_new = False
                break
            beginning.update(message.SerializeToString(deterministic=True))
        key = beginning.digest()
        date = today if is_new else self._began.pop(key, today)
        self._began[key] = date
        self._began.move_to_end(key)
        while len(self._began) > MAX_CONVERSATIONS:
            self._began.popitem(last=False)
        return date
