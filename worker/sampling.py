"""From logits to tokens. A row is a pure function of (logits, sampling parameters, known tokens), the same alone as in any batch.

In order: penalties, bias, the grammar's mask, bans, temperature, top-k, top-p, min-p, then the largest score plus Gumbel noise, a draw
from the softmax.
Noise is keyed by (seed, position, token id), so a sequence that is replayed or moved to another group continues with the same tokens.
Ties at the edge of top-k and top-p are kept, so that what is kept does not depend on the order of a sort.
"""

import math
from collections.abc import Mapping
from collections.abc import Sequence as Ordered

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.backend import DrawnToken, FailedSequence, TokenLogprobs
from worker.host_copy import HostCopy, send
from worker.philox import gumbel_noise
from worker.sequences import SamplingParams, Sequence

ROWS_AT_ONCE = 16  # bounds the noise's scratch memory: some 30 MB a row at 201088 tokens
NUCLEUS_GUESS = 1024  # likeliest tokens among which top-p is looked for before a whole row is sorted

NOT_NUMBERS, NOTHING_LEFT = 1, 2
FAULTS = {
    NOT_NUMBERS: "the model gave logits that are not numbers",
    NOTHING_LEFT: "no token may be drawn: the bans and biases of the sampling parameters leave none",
}


class Draws:
    """The tokens that one step drew, parallel to `sequences`: on the device at once, on the host when `take` has waited for them."""

    def __init__(self, sequences: Ordered[Sequence], token_ids: Tensor, faults: Tensor, logprobs: tuple[Tensor, ...]) -> None:
        self.token_ids = token_ids  # int64 [n], on the device; a failed sequence's is some token of the vocabulary
        self._sequences = sequences
        self._host = HostCopy(token_ids, faults, *logprobs)

    def is_done(self) -> bool:
        return self._host.is_done()

    def wait(self) -> None:
        self._host.wait()

    def take(self) -> tuple[list[DrawnToken], list[FailedSequence]]:
        """Waits for the device."""
        token_ids, faults, *logprobs = self._host.wait()
        by_row = _read_logprobs(_asked(self._sequences), *logprobs) if logprobs else {}
        drawn: list[DrawnToken] = []
        failed: list[FailedSequence] = []
        for row, (sequence, token_id, fault) in enumerate(zip(self._sequences, token_ids.tolist(), faults.tolist(), strict=True)):
            if fault:
                failed.append(FailedSequence(sequence.seq_id, FAULTS[fault]))
            else:
                drawn.append(DrawnToken(sequence.seq_id, token_id, by_row.get(row)))
        return drawn, failed


def sample(
    logits: Tensor, sequences: Ordered[Sequence], masks: Mapping[int, NDArray[np.uint32]] | None = None
) -> tuple[list[DrawnToken], list[FailedSequence]]:
    """`draw`, and what came of it."""
    return draw(logits, sequences, masks).take()


def draw(logits: Tensor, sequences: Ordered[Sequence], masks: Mapping[int, NDArray[np.uint32]] | None = None) -> Draws:
    """Draws the next token of every sequence from its row of `logits` [n, vocab], float32, which is left as it is.

    `masks` hold, by row, one bit a token id that may be drawn, the lowest first; a row without one may draw any.
    """
    assert logits.dtype == torch.float32
    assert logits.shape[0] == len(sequences)
    if logits.is_cuda:
        from worker.gpu_sampling import draw_on_gpu  # a worker without a GPU needs no Triton

        token_ids, faults = draw_on_gpu(logits, sequences, masks or {})
    else:
        token_ids, faults = _draw_reference(logits, sequences, masks or {})
    return Draws(sequences, token_ids, faults, _logprobs(logits, sequences, token_ids))


def _draw_reference(logits: Tensor, sequences: Ordered[Sequence], masks: Mapping[int, NDArray[np.uint32]]) -> tuple[Tensor, Tensor]:
    """Token ids and faults (0: none), int64 [n]."""
    token_ids, faults = [logits.new_empty(0, dtype=torch.int64)], [logits.new_empty(0, dtype=torch.int64)]
    for start in range(0, len(sequences), ROWS_AT_ONCE):
        rows, some = logits[start : start + ROWS_AT_ONCE], sequences[start : start + ROWS_AT_ONCE]
        scores = rows.clone()
        for index, sequence in enumerate(some):
            _adjust(scores[index], sequence, masks.get(start + index))
        # The largest of a row is finite only where no logit is NaN or infinite and one is left to draw.
        are_numbers, can_draw = torch.isfinite(rows.amax(-1)), torch.isfinite(scores.amax(-1))
        faults.append(torch.where(are_numbers, torch.where(can_draw, 0, NOTHING_LEFT), NOT_NUMBERS))
        token_ids.append(_draw(scores, some))
    return torch.cat(token_ids), torch.cat(faults)


def _adjust(row: Tensor, sequence: Sequence, mask: NDArray[np.uint32] | None) -> None:
    """Penalties, bias, mask and bans, in place on one row [vocab]. Where mask and bans leave nothing, the mask counts."""
    params = sequence.sampling
    if params.repetition_penalty != 1.0:
        penalised = torch.where(row > 0, row / params.repetition_penalty, row * params.repetition_penalty)
        row.copy_(torch.where(_count(sequence.token_ids, row) > 0, penalised, row))
    if params.presence_penalty or params.frequency_penalty:
        counts = _count(sequence.token_ids[sequence.num_prompt_tokens :], row)
        row -= params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
    if params.logit_bias:
        ids_and_biases = list(zip(*params.logit_bias, strict=True))
        row[torch.tensor(ids_and_biases[0], device=row.device)] += torch.tensor(ids_and_biases[1], dtype=row.dtype, device=row.device)
    if mask is not None:
        row.masked_fill_(_unpack(~mask, row), -torch.inf)
    if params.banned_token_ids and len(sequence.token_ids) - sequence.num_prompt_tokens < params.min_tokens:
        banned = list(params.banned_token_ids)
        kept = row[banned]
        row[banned] = -torch.inf
        if mask is not None and torch.isneginf(row.amax()):
            row[banned] = kept


def _unpack(mask: NDArray[np.uint32], row: Tensor) -> Tensor:
    """One bool a token id [vocab]."""
    bits = np.unpackbits(mask.view(np.uint8), count=len(row), bitorder="little")
    return torch.from_numpy(bits).view(torch.bool).to(row.device)


def _count(token_ids: list[int], row: Tensor) -> Tensor:
    """Occurrences of every token id [vocab]."""
    return torch.tensor(token_ids, dtype=torch.int64, device=row.device).bincount(minlength=len(row))


def _draw(scores: Tensor, sequences: Ordered[Sequence]) -> Tensor:
    """Token ids [n]: the likeliest for greedy rows, a draw for the others. Overwrites `scores` [n, vocab]."""
    if rows := [index for index, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]:
        chosen = [sequences[index] for index in rows]
        params = [sequence.sampling for sequence in chosen]
        temperatures, sampled = _column([one.temperature for one in params], scores), scores[rows]
        costs = (sampled.amax(-1, keepdim=True) - sampled) / temperatures  # at least 0, so that no temperature overflows
        largest_costs = _column([-math.log(one.min_p) if one.min_p > 0 else math.inf for one in params], scores)
        is_kept = (sampled >= _find_floors(sampled, costs, params)) & (costs <= largest_costs)
        noise = gumbel_noise([one.seed for one in params], [len(one.token_ids) for one in chosen], scores.shape[1], scores.device)
        scores[rows] = torch.where(is_kept, noise - costs, -torch.inf)
    return scores.argmax(-1)


def _find_floors(scores: Tensor, costs: Tensor, params: Ordered[SamplingParams]) -> Tensor:
    """The lowest score [n, 1] that both top-k and top-p keep. A token's probability goes as exp(-cost)."""
    vocab_size = scores.shape[1]
    floors = torch.full_like(scores[:, :1], -torch.inf)
    if rows := [index for index, one in enumerate(params) if 0 < one.top_k < vocab_size]:
        counts = torch.tensor([params[index].top_k for index in rows], device=scores.device)[:, None]
        likeliest = scores[rows].topk(int(counts.max()), dim=-1).values
        floors[rows] = likeliest.gather(1, counts - 1)
    if rows := [index for index, one in enumerate(params) if one.top_p < 1.0]:
        weights = torch.where(scores[rows] >= floors[rows], torch.exp(-costs[rows]), 0)
        top_ps = _column([params[index].top_p for index in rows], scores)
        floors[rows] = _nucleus_floors(scores[rows], weights, top_ps * weights.sum(-1, keepdim=True), min(NUCLEUS_GUESS, vocab_size))
    return floors


def _nucleus_floors(scores: Tensor, weights: Tensor, targets: Tensor, num_likeliest: int) -> Tensor:
    """The lowest score [n, 1] of the fewest likeliest tokens whose weights reach the targets: a token belongs when those before it do not.

    Looks among `num_likeliest` at first, and among all in those rows where they are not enough.
    """
    likeliest = scores.topk(num_likeliest, dim=-1)
    reached = weights.gather(1, likeliest.indices).cumsum(-1)
    floors = likeliest.values.gather(1, (reached[:, :-1] < targets).sum(-1, keepdim=True))
    is_beyond = reached[:, -1] < targets[:, 0]
    if num_likeliest < scores.shape[1] and is_beyond.any():
        floors[is_beyond] = _nucleus_floors(scores[is_beyond], weights[is_beyond], targets[is_beyond], scores.shape[1])
    return floors


def _asked(sequences: Ordered[Sequence]) -> dict[int, int]:
    """How many likeliest tokens each row asked for, by row."""
    return {row: count for row, one in enumerate(sequences) if (count := one.sampling.top_logprobs) is not None}


def _logprobs(logits: Tensor, sequences: Ordered[Sequence], token_ids: Tensor) -> tuple[Tensor, ...]:
    """From the untouched logits, for the rows that asked: of the drawn token [m], and ids and values of the likeliest [m, k]."""
    if not (asked := _asked(sequences)):
        return ()
    rows = send([torch.tensor(list(asked))], logits.device)[0]
    logprobs = logits[rows].log_softmax(-1)
    top = logprobs.topk(min(max(asked.values()), logits.shape[1]), dim=-1)
    return logprobs.gather(1, token_ids[rows][:, None])[:, 0], top.indices, top.values


def _read_logprobs(asked: Mapping[int, int], of_drawn: Tensor, top_ids: Tensor, top_values: Tensor) -> dict[int, TokenLogprobs]:
    """By row."""
    read = zip(asked.items(), of_drawn.tolist(), top_ids.tolist(), top_values.tolist(), strict=True)
    return {row: TokenLogprobs(logprob, tuple(zip(ids, values, strict=True))[:count]) for (row, count), logprob, ids, values in read}


def _column(values: Ordered[float], like: Tensor) -> Tensor:
    """[n, 1] of the dtype and device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
