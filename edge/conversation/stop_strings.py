"""Stop strings in visible text: held back while they may begin, cut where they do."""

from collections.abc import Sequence


class StopStrings:
    """The matcher of one message. What `feed` and `flush` return, joined, is the text up to the first stop string.

    The match that begins first wins, and of those the shortest, which is complete first. `matched` names it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(filter(None, stops), key=len)
        self._held = ""  # the longest end of the text that may begin a stop string
        self.matched = ""

    def feed(self, text: str) -> str:
        """The text that is safe to deliver. After a match: nothing."""
        if self.matched:
            return ""
        text = self._held + text
        safe = self._find_unfinished(text)
        begin, stop = self._find_match(text)
        if begin <= safe and stop:  # else a stop string that began earlier may still complete
            return self._cut(text, begin, stop)
        self._held = text[safe:]
        return text[:safe]

    def flush(self) -> str:
        """What was held back, at the end of the message."""
        begin, stop = self._find_match(self._held)
        return self._cut(self._held, begin, stop)

    def _cut(self, text: str, begin: int, stop: str) -> str:
        self.matched, self._held = self.matched or stop, ""
        return text[:begin]

    def _find_match(self, text: str) -> tuple[int, str]:
        """Where the first stop string begins, and which; the text's length and "" if there is none."""
        hits = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        return min(hits, key=lambda hit: hit[0], default=(len(text), ""))

    def _find_unfinished(self, text: str) -> int:
        """Where the earliest stop string begins that the text ends within; the text's length if none does."""
        longest = len(self._stops[-1]) if self._stops else 0
        for at in range(max(0, len(text) - longest + 1), len(text)):
            end = text[at:]
            if any(len(end) < len(stop) and stop.startswith(end) for stop in self._stops):
                return at
        return len(text)
