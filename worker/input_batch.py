"""A step's scheduled sequences as the model's input. Pure: reads the sequences, changes nothing.

Rows are ordered decodes first, then prefill chunks; `drawing_rows` leads back to the order in which the sequences were scheduled.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.host_copy import send
from worker.kernels.attention import PagedBatch
from worker.sequences import UNKNOWN_TOKEN, ScheduledSequence, Sequence

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class InputBatch:
    token_ids: Tensor  # int64 [rows]; ~r for the token that the step before this one drew in row r of its draws, until `know` fills it in
    positions: Tensor  # int64 [rows]
    full: PagedBatch
    window: PagedBatch  # without window layers the same as `full`
    drawing_rows: Tensor  # int64 [sequences that draw], in the order in which they were scheduled
    drawing: tuple[Sequence, ...]  # parallel to drawing_rows

    @property
    def has_unknown(self) -> bool:
        return bool((self.token_ids < 0).any())

    def know(self, drawn: Tensor) -> "InputBatch":
        """With the tokens that the step before drew, int64 [draws], on the batch's device."""
        return replace(self, token_ids=torch.where(self.token_ids < 0, drawn[(~self.token_ids).clamp(min=0)], self.token_ids))

    @property
    def tensors(self) -> list[Tensor]:
        """What the model reads."""
        pools = (self.full,) if self.window is self.full else (self.full, self.window)
        return [self.token_ids, self.positions, *(tensor for pool in pools for tensor in _tables(pool))]

    def to(self, device: torch.device) -> "InputBatch":
        """On the device, by one copy that the host does not wait for."""
        drawing_rows, token_ids, positions, *tables = send([self.drawing_rows, *self.tensors], device)
        full = _with_tables(self.full, *tables[:4])
        window = full if self.window is self.full else _with_tables(self.window, *tables[4:])
        return replace(self, token_ids=token_ids, positions=positions, drawing_rows=drawing_rows, full=full, window=window)


def _tables(pool: PagedBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return pool.context_lens, pool.table_starts, pool.block_tables, pool.slot_mapping


def _with_tables(pool: PagedBatch, context_lens: Tensor, table_starts: Tensor, block_tables: Tensor, slot_mapping: Tensor) -> PagedBatch:
    return PagedBatch(pool.num_decodes, pool.query_lens, context_lens, table_starts, block_tables, slot_mapping)


def build_batch(
    scheduled: Ordered[ScheduledSequence], *, block_size: int, sliding_window: int, drawn_rows: Mapping[int, int] | None = None
) -> InputBatch:
    """On the host. `scheduled` is not empty and each sequence has the blocks for its tokens. `sliding_window` 0: no window layers.

    `drawn_rows` gives the row of its draws in which the step before drew a sequence's unknown token, by seq_id.
    """
    order = sorted(range(len(scheduled)), key=lambda place: scheduled[place].num_tokens > 1)  # stable
    rows = [scheduled[place] for place in order]
    positions = [np.arange(row.sequence.num_computed_tokens, row.sequence.num_computed_tokens + row.num_tokens) for row in rows]
    token_ids = [_tokens(row, drawn_rows or {}) for row in rows]
    last_rows = np.cumsum([row.num_tokens for row in rows]) - 1
    last_row_of = {place: int(last) for place, last in zip(order, last_rows, strict=True)}
    drawing = [place for place, row in enumerate(scheduled) if row.draws_token]
    full = window = _page(positions, [row.sequence.full_block_ids for row in rows], block_size, 0)
    if sliding_window:
        window = _page(positions, [row.sequence.window_block_ids for row in rows], block_size, sliding_window)
    return InputBatch(
        token_ids=torch.from_numpy(np.concatenate(token_ids)),
        positions=torch.from_numpy(np.concatenate(positions)),
        full=full,
        window=window,
        drawing_rows=torch.tensor([last_row_of[place] for place in drawing], dtype=torch.int64),
        drawing=tuple(scheduled[place].sequence for place in drawing),
    )


def _tokens(row: ScheduledSequence, drawn_rows: Mapping[int, int]) -> NDArray[np.int64]:
    first = row.sequence.num_computed_tokens
    token_ids = np.array(row.sequence.token_ids[first : first + row.num_tokens], dtype=np.int64)
    if token_ids[-1] == UNKNOWN_TOKEN:
        token_ids[-1] = ~drawn_rows[row.sequence.seq_id]
    return token_ids


def _page(positions: list[Positions], block_ids: list[list[int]], block_size: int, window: int) -> PagedBatch:
    """Tables end with the newest token's block and, with a window, begin with the block of the first position that is still seen.

    What lies before is stale: those ids may name blocks that other sequences use by now.
    """
    first_blocks = [max(int(at[0]) - window + 1, 0) // block_size if window else 0 for at in positions]
    tables = [ids[first : int(at[-1]) // block_size + 1] for ids, first, at in zip(block_ids, first_blocks, positions, strict=True)]
    padded = np.zeros((len(tables), max(map(len, tables))), dtype=np.int64)
    slots = []
    for row, (table, first, at) in enumerate(zip(tables, first_blocks, positions, strict=True)):
        assert len(table) == at[-1] // block_size + 1 - first, "a scheduled sequence lacks blocks for its tokens"
        padded[row, : len(table)] = table
        slots.append(padded[row, at // block_size - first] * block_size + at % block_size)
    query_lens = tuple(len(at) for at in positions)
    return PagedBatch(
        num_decodes=query_lens.count(1),
        query_lens=query_lens,
        context_lens=torch.tensor([int(at[-1]) + 1 for at in positions], dtype=torch.int64),
        table_starts=torch.tensor(first_blocks, dtype=torch.int64) * block_size,
        block_tables=torch.from_numpy(padded),
        slot_mapping=torch.from_numpy(np.concatenate(slots)),
    )
