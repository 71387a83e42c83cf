"""What a group's step results teach about its speed. Pure: fed with measured device times, asked by placement."""

from dataclasses import dataclass, field

HALF_LIFE_STEPS = 64.0
DECAY = 0.5 ** (1.0 / HALF_LIFE_STEPS)


@dataclass
class LineFit:
    """A least-squares line through (x, y) pairs whose weight halves every HALF_LIFE_STEPS pairs."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    intercept: float = 0.0
    slope: float = 0.0

    def add(self, x: float, y: float) -> None:
        self.weight = self.weight * DECAY + 1.0
        self.x = self.x * DECAY + x
        self.y = self.y * DECAY + y
        self.xx = self.xx * DECAY + x * x
        self.xy = self.xy * DECAY + x * y

        self._fit()

    def _fit(self) -> None:
        """In proportion to x where no more is known than one x, or where the line would not rise or would begin under zero."""
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        spread = self.xx / self.weight - mean_x * mean_x
        slope = (self.xy / self.weight - mean_x * mean_y) / spread if spread > 1e-6 * mean_x * mean_x else 0.0
        if slope > 0.0 and mean_y > slope * mean_x:
            self.intercept, self.slope = mean_y - slope * mean_x, slope
        else:
            self.intercept, self.slope = 0.0, mean_y / mean_x if mean_x else 0.0

    @property
    def mean(self) -> float:
        return self.y / self.weight if self.weight else 0.0

    def at(self, x: float) -> float:
        """The line's value for an x over 0; 0 while nothing was seen."""
        return self.intercept + self.slope * x


class DecodeCurve:
    """How a decode step's time grows with its batch. Concave: one more sequence costs less the more there are.

    Means are kept for each octave of batch sizes, so that a group that stays at one size forgets nothing of the others.
    """

    def __init__(self) -> None:
        self._octaves: dict[int, LineFit] = {}
        self._knots: list[tuple[float, float]] = []  # mean size and mean time of each octave, ascending in both

    def add(self, num_sequences: int, seconds: float) -> None:
        self._octaves.setdefault(num_sequences.bit_length(), LineFit()).add(num_sequences, seconds)
        self._knots = []

    def at(self, num_sequences: float) -> float:
        """Seconds of a step; 0 while nothing was measured."""
        knots = self._knots or self._join()
        if len(knots) < 2:
            return knots[0][1] if knots else 0.0
        place = 1
        while place < len(knots) - 1 and knots[place][0] < num_sequences:
            place += 1
        (x0, y0), (x1, y1) = knots[place - 1], knots[place]
        return max(0.0, y0 + (y1 - y0) * (num_sequences - x0) / (x1 - x0))

    def _join(self) -> list[tuple[float, float]]:
        slowest = 0.0
        for _, fit in sorted(self._octaves.items()):
            slowest = max(slowest, fit.mean)
            self._knots.append((fit.x / fit.weight, slowest))
        return self._knots


@dataclass
class GroupRates:
    """Learned per group: what prefill costs, how a decode step's time grows with its batch, and how long answers are."""

    decode: DecodeCurve = field(default_factory=DecodeCurve)
    last_decode_step_s: float = 0.0
    completion_tokens: LineFit = field(default_factory=LineFit)  # y: tokens of a finished sequence
    _fetch: LineFit = field(default_factory=LineFit)  # x: blocks from host memory in a step, y: the seconds that it took longer
    prefill: LineFit = field(default_factory=LineFit)  # x: prompt tokens of a step, y: its seconds, decodes that ride along included

    def learn_step(self, num_prefill_tokens: int, num_decodes: int, device_time_s: float) -> None:
        """One step's result."""
        if num_prefill_tokens:
            self.prefill.add(num_prefill_tokens, device_time_s)
        elif num_decodes:
            self.decode.add(num_decodes, device_time_s)
            self.last_decode_step_s = device_time_s

    def learn_fetch(self, num_blocks: int, seconds: float) -> None:
        """One step that fetched blocks took so much longer than its tokens explain."""
        self._fetch.add(num_blocks, max(0.0, seconds))

    def fetch_s(self, num_blocks: int) -> float:
        """Seconds to bring so many blocks back from host memory; 0 until the first fetch, so that it is tried."""
        return self._fetch.at(num_blocks)

    def learn_completion(self, num_tokens: int) -> None:
        self.completion_tokens.add(0.0, num_tokens)

    def prefill_s(self, num_tokens: int, max_batch_tokens: int) -> float:
        """Seconds of the steps that so many prompt tokens take, at most `max_batch_tokens` a step; 0 until the first prefill."""
        num_full_steps, rest = divmod(num_tokens, max_batch_tokens)
        return (num_full_steps * self.prefill.at(max_batch_tokens) if num_full_steps else 0.0) + (self.prefill.at(rest) if rest else 0.0)

    @property
    def prefill_tokens_per_s(self) -> float:
        """As measured over all prefill steps; 0 until the first."""
        return self.prefill.x / self.prefill.y if self.prefill.y > 0.0 else 0.0

    def step_s(self, num_prefill_tokens: int, num_decodes: int) -> float:
        """Seconds of one step."""
        return self.prefill.at(num_prefill_tokens) if num_prefill_tokens else self.decode.at(num_decodes)
