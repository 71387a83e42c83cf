"""A backend whose draws come to the host late, as a GPU's do: only when the next step has been started."""

from collections.abc import Sequence as Ordered

from worker.backend import Backend, BlockCopy, ModelFacts, StepOutput, StepUnderWay
from worker.sequences import UNKNOWN_TOKEN, ScheduledSequence


class LateStep:
    """A step that is not done until somebody waits for it."""

    def __init__(self, step: StepUnderWay) -> None:
        self._step = step
        self._is_done = False

    def draw(self) -> None:
        self._step.draw()

    def is_done(self) -> bool:
        return self._is_done

    def wait(self) -> None:
        self._step.wait()
        self._is_done = True

    def take(self) -> StepOutput:
        self.wait()
        return self._step.take()


class LateBackend:
    """`num_unknown` counts the tokens that steps were started with before the host knew them."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.num_unknown = 0

    @property
    def facts(self) -> ModelFacts:
        return self._backend.facts

    def start(self, scheduled: Ordered[ScheduledSequence], copies: Ordered[BlockCopy]) -> StepUnderWay:
        self.num_unknown += sum(one.sequence.token_ids[-1] == UNKNOWN_TOKEN for one in scheduled)
        return LateStep(self._backend.start(scheduled, copies))
