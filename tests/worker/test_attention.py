"""Paged attention against the plain formula, one query at a time in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.worker.attention_scene import Scene
from worker.kernels.attention import PagedBatch, paged_attention, paged_attention_reference

Attend = Callable[[Scene, Tensor, PagedBatch], Tensor]
CHUNKS = [(40, 1), (0, 9), (300, 1), (13, 150), (5, 1), (511, 3)]


def _expected(queries: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, num_before: int, window: int) -> Tensor:
    """queries [m, 6, head_dim], keys and values [context, 2, head_dim]; head h reads key head h // 3."""
    out = torch.empty_like(queries)
    for row in range(len(queries)):
        position = num_before + row
        first = max(0, position - window + 1) if window else 0
        for head in range(6):
            seen = slice(first, position + 1)
            scores = keys[seen, head // 3].double() @ queries[row, head].double() * queries.shape[2] ** -0.5
            probabilities = torch.cat((scores, sinks[head : head + 1].double())).softmax(0)[:-1]
            out[row, head] = (probabilities @ values[seen, head // 3].double()).float()
    return out


def _attend(scene: Scene, queries: Tensor, batch: PagedBatch) -> Tensor:
    return paged_attention(queries, scene.keys, scene.values, scene.sinks, batch, scale=scene.scale, window=scene.window)


def _attend_by_reference(scene: Scene, queries: Tensor, batch: PagedBatch) -> Tensor:
    return paged_attention_reference(queries, scene.keys, scene.values, scene.sinks, batch, scene.scale, scene.window)


FORMS = pytest.mark.parametrize("attend", [_attend, _attend_by_reference])


@FORMS
@pytest.mark.parametrize("window", [0, 1, 5, 37, 128])
def test_each_row_attends_to_its_range_and_nothing_else_counts(window: int, attend: Attend) -> None:
    scene = Scene(CHUNKS, window)
    out = attend(scene, scene.queries, scene.batch.window)
    for row, place in scene.rows():
        before, now = CHUNKS[place]
        keys, values = scene.contexts[place]
        expected = _expected(scene.queries[row : row + now], keys, values, scene.sinks, before, window)
        torch.testing.assert_close(out[row : row + now], expected, rtol=0, atol=2e-6)


@FORMS
@pytest.mark.parametrize("window", [0, 37])
def test_a_decode_is_the_same_to_the_bit_alone_and_in_a_batch(window: int, attend: Attend) -> None:
    scene = Scene(CHUNKS, window)
    together = attend(scene, scene.queries, scene.batch.window)
    for row, place in scene.rows()[: scene.batch.window.num_decodes]:
        solo = attend(scene, scene.queries[row : row + 1], scene.build([place]).window)
        assert torch.equal(solo[0], together[row])
