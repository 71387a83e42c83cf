"""Draws on a GPU: sequences and their parameters as tensors, for the kernels. Equal to the reference in `sampling.py`."""

import math
from collections.abc import Mapping
from collections.abc import Sequence as Ordered

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.host_copy import send
from worker.kernels.sampling_triton import SamplingInputs, draw_triton
from worker.sampling import NOT_NUMBERS, NOTHING_LEFT
from worker.sequences import SamplingParams, Sequence


def draw_on_gpu(logits: Tensor, sequences: Ordered[Sequence], masks: Mapping[int, NDArray[np.uint32]]) -> tuple[Tensor, Tensor]:
    """Token ids and faults, int64 [n]. Arguments as for `sampling.draw`; `sequences` is not empty."""
    inputs = gather_inputs(sequences, masks, logits.shape[1], logits.device)
    return draw_triton(logits, inputs, not_numbers=NOT_NUMBERS, nothing_left=NOTHING_LEFT)


def gather_inputs(
    sequences: Ordered[Sequence], masks: Mapping[int, NDArray[np.uint32]], vocab_size: int, device: torch.device
) -> SamplingInputs:
    """On the device, by copies that the host does not wait for. `masks` as in `draw`."""
    params = [sequence.sampling for sequence in sequences]
    penalised = [row for row, one in enumerate(params) if _penalties(one) != (1.0, 0.0, 0.0)]
    masked = sorted(masks)
    biases = [(row * vocab_size + token_id, bias) for row, one in enumerate(params) for token_id, bias in one.logit_bias]
    bans = [(row, row * vocab_size + token_id) for row, sequence in enumerate(sequences) for token_id in _banned(sequence)]
    seeds, positions, top_ks, penalty_rows, mask_rows, bias_places, ban_rows, ban_places, known_places, output_places = send(
        [
            torch.from_numpy(np.array([one.seed for one in params], dtype=np.uint64).view(np.int64)),
            _integers([len(sequence.token_ids) for sequence in sequences]),
            _integers([one.top_k for one in params]),
            _integers(_places(penalised, len(sequences))),
            _integers(_places(masked, len(sequences))),
            _integers([place for place, _ in biases]),
            _integers([row for row, _ in bans]),
            _integers([place for _, place in bans]),
            _flat_places([sequences[row].token_ids for row in penalised], vocab_size),
            _flat_places([_output(sequences[row]) for row in penalised], vocab_size),
        ],
        device,
    )
    temperatures, top_ps, largest_costs, bias_values, penalties = send(
        [
            torch.tensor([one.temperature for one in params]),
            torch.tensor([one.top_p for one in params]),
            torch.tensor([-math.log(one.min_p) if one.min_p > 0 else math.inf for one in params]),
            torch.tensor([bias for _, bias in biases]),
            torch.tensor([_penalties(params[row]) for row in penalised]).view(-1, 3),
        ],
        device,
    )
    words = np.stack([masks[row] for row in masked]).view(np.int32) if masked else np.zeros((0, 1), dtype=np.int32)
    counts = torch.zeros(len(penalised) * vocab_size, dtype=torch.int32, device=device)
    return SamplingInputs(
        temperatures=temperatures,
        top_ps=top_ps,
        largest_costs=largest_costs,
        top_ks=top_ks,
        seeds=seeds,
        positions=positions,
        penalty_rows=penalty_rows,
        penalties=penalties,
        known=torch.zeros_like(counts, dtype=torch.bool).index_fill_(0, known_places, True).view(-1, vocab_size),
        counts=counts.index_add_(0, output_places, torch.ones_like(output_places, dtype=torch.int32)).view(-1, vocab_size),
        mask_rows=mask_rows,
        masks=send([torch.from_numpy(words)], device)[0],
        bias_places=bias_places,
        biases=bias_values,
        ban_rows=ban_rows,
        ban_places=ban_places,
        has_floors=any(one.top_p < 1.0 or 0 < one.top_k < vocab_size for one in params),
    )


def _penalties(params: SamplingParams) -> tuple[float, float, float]:
    return params.repetition_penalty, params.presence_penalty, params.frequency_penalty


def _output(sequence: Sequence) -> list[int]:
    return sequence.token_ids[sequence.num_prompt_tokens :]


def _banned(sequence: Sequence) -> tuple[int, ...]:
    return sequence.sampling.banned_token_ids if len(_output(sequence)) < sequence.sampling.min_tokens else ()


def _places(rows: list[int], num_rows: int) -> list[int]:
    """For each row its place among `rows`, or -1."""
    place_of = {row: place for place, row in enumerate(rows)}
    return [place_of.get(row, -1) for row in range(num_rows)]


def _flat_places(token_ids: list[list[int]], vocab_size: int) -> Tensor:
    """row * vocab_size + token id, for all tokens of all rows."""
    places = [row * vocab_size + np.array(tokens, dtype=np.int64) for row, tokens in enumerate(token_ids)]
    return torch.from_numpy(np.concatenate(places)) if places else _integers([])


def _integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
