"""Runs steps on one rank: copies blocks, builds the batch, computes logits, draws tokens. Speaks no protocol and decides nothing."""

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from functools import partial

import torch
from torch import Tensor

from services.vocabulary import VOCAB_SIZE
from worker.backend import BlockCopy, FailedSequence, FinishedStep, ModelFacts, StepOutput, StepUnderWay
from worker.cuda_graphs import DecodeGraphs
from worker.grammar import GrammarMasks, StepMasks
from worker.input_batch import InputBatch, build_batch
from worker.kv_cache import KVCache
from worker.models.gpt_oss import GptOss
from worker.sampling import Draws, draw
from worker.sequences import SamplingParams, ScheduledSequence, Sequence


class ModelStep:
    """One step on the device. `draws` are there from `draw` on, in rows by seq_id."""

    def __init__(
        self, drawing: Ordered[Sequence], logits: Tensor | None, masks: StepMasks | None, start_masks: Callable[[], StepMasks]
    ) -> None:
        self.rows = {sequence.seq_id: row for row, sequence in enumerate(drawing)}
        self.draws: Draws | None = None
        self._drawing = drawing
        self._logits = logits  # [sequences that draw, vocabulary], float32; None: none does
        self._masks, self._start_masks = masks, start_masks
        self._broken: list[FailedSequence] = []  # whose constraint cannot be followed

    @torch.inference_mode()
    def draw(self) -> None:
        if self._logits is not None:
            allowed, self._broken = (self._masks or self._start_masks()).take()
            self.draws = draw(self._logits, self._drawing, allowed)
            self._logits = None

    def is_done(self) -> bool:
        return self.draws is None or self.draws.is_done()

    def wait(self) -> None:
        if self.draws:
            self.draws.wait()

    def take(self) -> StepOutput:
        drawn, failed = self.draws.take() if self.draws else ([], [])
        rest = StepOutput(tuple(drawn), tuple(failed)).without({one.seq_id for one in self._broken})
        return StepOutput(rest.drawn, (*self._broken, *rest.failed))


class ModelBackend:
    """A `Backend` that computes with the model. Holds the weights and the KV cache; only its steps write the cache."""

    def __init__(self, model: GptOss, kv_cache: KVCache, facts: ModelFacts) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._facts = facts
        self._device = torch.device(facts.device)
        forward = partial(model.forward, kv_cache=kv_cache)
        self.graphs = DecodeGraphs(forward, block_size=facts.block_size, null_blocks=kv_cache.null_blocks, device=self._device)
        self._grammars = GrammarMasks(facts.eos_token_ids)
        self._last: ModelStep | None = None  # the step started last: the next one may need what it draws

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    @torch.inference_mode()
    def start(self, scheduled: Ordered[ScheduledSequence], copies: Ordered[BlockCopy]) -> StepUnderWay:
        self._kv_cache.copy_blocks(copies)
        if not scheduled:
            return FinishedStep(StepOutput(()))
        batch = build_batch(
            scheduled,
            block_size=self._facts.block_size,
            sliding_window=self._facts.sliding_window,
            drawn_rows=self._last.rows if self._last else {},
        )
        start_masks = partial(self._grammars.start, scheduled, batch.drawing)
        masks = None if batch.has_unknown else start_masks()  # worked out while the model computes, where every token is known by now
        self._last = ModelStep(batch.drawing, self._compute_logits(batch), masks, start_masks)
        return self._last

    def step(self, scheduled: Ordered[ScheduledSequence], copies: Ordered[BlockCopy]) -> StepOutput:
        """A whole step: returns when it is done."""
        step = self.start(scheduled, copies)
        step.draw()
        return step.take()

    def _compute_logits(self, batch: InputBatch) -> Tensor | None:
        """Of the rows that draw. `batch` is on the host."""
        shape = self.graphs.find(batch)
        on_device = (self.graphs.pad(batch, shape) if shape else batch).to(self._device)
        if batch.has_unknown:
            assert self._last and self._last.draws, "an unknown token was drawn by the step before"
            on_device = on_device.know(self._last.draws.token_ids)
        hidden = self.graphs.run(on_device, shape) if shape else self._model.forward(on_device, self._kv_cache)
        return self._model.compute_logits(hidden[on_device.drawing_rows]) if batch.drawing else None

    def prompt_logits(self, token_ids: list[int]) -> Tensor:
        """Of the token after a prompt that `holds` allows, float32 [vocabulary]. Overwrites the first blocks of the cache."""
        table = list(range(-(-len(token_ids) // self._facts.block_size)))
        sequence = Sequence(0, "", token_ids, len(token_ids), SamplingParams(), 0, table, table)
        batch = build_batch(
            [ScheduledSequence(sequence, len(token_ids))], block_size=self._facts.block_size, sliding_window=self._facts.sliding_window
        )
        with torch.inference_mode():
            logits = self._compute_logits(batch)
        assert logits is not None
        return logits[0]

    def holds(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens has room in both pools."""
        num_blocks = min(self._facts.num_full_blocks, self._facts.num_window_blocks or self._facts.num_full_blocks)
        return num_tokens <= min(self._facts.max_model_len, num_blocks * self._facts.block_size)

    def warm_up(self) -> None:
        """A prefill and a decode, with all ways to draw: what is allocated or compiled at first use is so by then."""
        num_tokens = self._facts.block_size
        params = SamplingParams(top_k=2, top_p=0.5, presence_penalty=1.0)
        sequence = Sequence(0, "warm-up", [0] * num_tokens, num_tokens, params)
        sequence.full_block_ids, sequence.window_block_ids = [0], [0]
        self.step([ScheduledSequence(sequence, num_tokens)], ())
        sequence.num_computed_tokens, sequence.sampling = num_tokens - 1, SamplingParams()
        self.step([ScheduledSequence(sequence, 1)], ())
        if self._facts.vocab_size == VOCAB_SIZE:
            self._grammars.warm_up()
