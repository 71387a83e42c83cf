"""The routing kernels in Triton's interpreter: the reference's choice, and groups that hold every pair once."""

import pytest
import torch
from torch import Tensor

from worker.kernels.routing import route_reference
from worker.kernels.routing_triton import PAIRS_AT_ONCE, group_by_expert, route_triton

pytestmark = pytest.mark.usefixtures("interpreter")


def random_logits(num_rows: int, num_experts: int) -> Tensor:
    return torch.randn(num_rows, num_experts, generator=torch.Generator().manual_seed(num_rows)) * 3


@pytest.mark.parametrize(("num_rows", "num_experts", "num_chosen"), [(1, 1, 1), (3, 5, 2), (7, 32, 4), (9, 128, 4), (5, 6, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_experts_equal_the_reference(num_rows: int, num_experts: int, num_chosen: int, dtype: torch.dtype) -> None:
    logits = random_logits(num_rows, num_experts).to(dtype)
    ids, weights = route_triton(logits, num_chosen)
    expected_ids, expected_weights = route_reference(logits, num_chosen)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=2e-7)


def test_of_equal_logits_the_lower_ids_go_first() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 1.0], [0.0] * 5, [-torch.inf] * 5])
    for ids, _ in (route_triton(logits[:2], 3), route_reference(logits[:2], 3)):
        assert ids.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert route_triton(logits, 5)[0].tolist()[2] == [0, 1, 2, 3, 4]


def test_a_nan_reaches_its_own_rows_weights_alone() -> None:
    logits = random_logits(3, 6)
    logits[1, 4] = torch.nan
    ids, weights = route_triton(logits, 2)
    assert ids[1].tolist()[0] == 4 and 0 <= ids[1].tolist()[1] < 6
    assert weights[1].isnan().all() and not weights[[0, 2]].isnan().any()


@pytest.mark.parametrize("tile_size", [16, 64])
@pytest.mark.parametrize("num_rows", [1, 7, PAIRS_AT_ONCE // 3 + 5])
def test_groups_are_the_pairs_by_expert_and_tiles_cut_them(num_rows: int, tile_size: int) -> None:
    num_experts = 9
    ids = route_reference(random_logits(num_rows, num_experts - 2), 3)[0] + 1  # no row for the first and the last
    groups = group_by_expert(ids, num_experts, tile_size)
    assert groups.order.tolist() == ids.flatten().argsort(stable=True).tolist()
    tiles = groups.tiles[: int(groups.num_tiles)].tolist()
    assert int(groups.num_tiles) <= groups.max_tiles
    assert [tile for _, begin, end in tiles for tile in range(begin, end)] == list(range(ids.numel()))
    for expert, begin, end in tiles:
        assert 0 < end - begin <= tile_size
        assert set(ids.flatten()[groups.order[begin:end].long()].tolist()) == {expert}
    counts = ids.flatten().bincount(minlength=num_experts)
    assert len(tiles) == sum(-(-count // tile_size) for count in counts.tolist())


def test_all_rows_on_one_expert_fill_its_tiles() -> None:
    groups = group_by_expert(torch.full((40, 1), 2), 5, 16)
    assert groups.tiles[: int(groups.num_tiles)].tolist() == [[2, 0, 16], [2, 16, 32], [2, 32, 40]]
