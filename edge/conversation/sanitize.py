"""Cleaning of what was sent, for operators who ask for it. It changes the user's text, so it is off unless asked for.

It is no safety measure: text can never become a control token here, whatever it says.
"""

import re
import unicodedata

from protos.ossia.v1 import inference_pb2 as inference
from services.vocabulary import CONTROL_NAMES

_CONTROL_NAMES = re.compile("|".join(map(re.escape, CONTROL_NAMES.values())))
_KEPT = frozenset("\n\t")
_INVISIBLE = frozenset(("Cc", "Cf", "Co", "Cs"))  # controls, format and direction marks, private use, lone surrogates
_JOINERS = frozenset("\u200c\u200d")  # they shape words and emoji


def sanitize(text: str) -> str:
    """NFC, one kind of line end, no invisible characters, no control token written out."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    visible = (sign for sign in text if sign in _KEPT or sign in _JOINERS or unicodedata.category(sign) not in _INVISIBLE)
    return _CONTROL_NAMES.sub("", "".join(visible))


def sanitize_request(request: inference.ChatRequest) -> None:
    """In place, what users and tools said; instructions and what the model said before stay as they are."""
    for message in request.messages:
        if message.role in (inference.ROLE_USER, inference.ROLE_TOOL):
            for part in message.content:
                part.text = sanitize(part.text)
    if request.prompt.text:
        request.prompt.text = sanitize(request.prompt.text)
