"""The kernels of cpu.c, for each kind of processor, against torch and against themselves.

Largest differences allowed, float32: products 4e-5 of values around 30, experts 2e-6 of values around 1, attention 4e-6, norm 2e-6.
Torch draws inputs and sums references with last bits that depend on the processor, so each is twice what was found on several.
MXFP4, a row alone or among others, and a prompt in one chunk or in many: none.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.worker.attention_scene import Scene
from tests.worker.cpu_variants import VARIANTS, compiled
from tests.worker.paged_run import PagedRun
from worker.kernels import cpu
from worker.kernels.attention import PagedBatch, paged_attention, paged_attention_reference
from worker.kernels.experts import DenseExperts, ExpertsWeights, add_down_bias, add_down_bias_reference, prepare_experts
from worker.kernels.kv_store import rotate_and_store
from worker.kernels.linear import linear
from worker.kernels.mxfp4 import decode_mxfp4
from worker.kernels.rms_norm import add_rms_norm, rms_norm_reference
from worker.kernels.rope import rotate
from worker.kernels.routing import route, route_reference
from worker.model_config import ModelConfig
from worker.models.gpt_oss import GptOss

CROWDS = (1, 2, 7, 32)
CHUNKS = [(40, 1), (0, 9), (300, 1), (13, 70), (0, 1), (511, 3)]  # tokens before, tokens now


@pytest.fixture(autouse=True, params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu, "library", lambda: compiled(request.param))
    return str(request.param)


def randoms(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def crowds_of(num_rows: int) -> Iterator[slice]:
    """Every row alone, and among others at the front, in the middle and at the end."""
    for size in CROWDS:
        for begin in range(0, num_rows - size + 1, max(1, size // 2)):
            yield slice(begin, begin + size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "width", "num_outs"), [(1, 1000, 37), (49, 33, 5), (100, 96, 66), (7, 1, 3), (3, 64, 0)])
def test_a_product_is_its_formula_in_rows_that_are_no_multiple_of_anything(
    dtype: torch.dtype, num_rows: int, width: int, num_outs: int
) -> None:
    x, weight, bias = randoms(num_rows, width), randoms(num_outs, width).to(dtype), randoms(num_outs)
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(linear(x, weight).double(), expected, rtol=0, atol=4e-5)
    torch.testing.assert_close(linear(x, weight, bias).double(), expected + bias.double(), rtol=0, atol=4e-5)


def test_bfloat16_rows_are_widened_and_the_sum_is_rounded_once() -> None:
    x, weight, bias = (one.bfloat16() for one in (randoms(5, 96), randoms(11, 96), randoms(11)))
    assert torch.equal(linear(x, weight, bias), linear(x.float(), weight.float(), bias.float()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_products_row_is_the_same_to_the_bit_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    x, weight, bias = randoms(100, 1000), randoms(70, 1000).to(dtype), randoms(70)
    together = linear(x, weight, bias)
    assert torch.equal(together, linear(x, weight.float(), bias))
    assert all(torch.equal(linear(x[crowd], weight, bias), together[crowd]) for crowd in crowds_of(len(x)))


@pytest.mark.parametrize("scale", [0, 1, 2, 120, 126, 127, 128, 250, 252])
def test_every_byte_of_mxfp4_decodes_exactly(scale: int) -> None:
    """Expert e gives 1 to column e and 0 to the others, so that a row shows one column of `down` as it is."""
    blocks = torch.arange(256, dtype=torch.uint8).repeat(2).view(1, 32, 1, 16).expand(32, -1, -1, -1)
    scales = torch.full((32, 32, 1), scale, dtype=torch.uint8)
    gate_up = torch.zeros(32, 64, 1, 16, dtype=torch.uint8), torch.zeros(32, 64, 1, dtype=torch.uint8)
    bias = torch.stack((torch.eye(32), torch.zeros(32, 32)), dim=-1).flatten(1)  # gates and ups take turns
    experts = prepare_experts(ExpertsWeights(*gate_up, bias, blocks, scales, alpha=100.0, limit=7.0))
    out = experts(torch.zeros(32, 32), torch.arange(32).unsqueeze(1), torch.ones(32, 1))
    assert torch.equal(out.T, decode_mxfp4(blocks[0], scales[0], torch.float32))


def test_the_reserved_scale_is_no_number() -> None:
    weights = make_experts(1, 32, 32)
    weights.down_scales.fill_(255)
    assert prepare_experts(weights)(torch.ones(1, 32), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)).isnan().all()


def make_experts(num_experts: int, hidden: int, inner: int) -> ExpertsWeights:
    generator = torch.Generator().manual_seed(hidden + inner)

    def draw(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=generator).byte()

    return ExpertsWeights(
        gate_up_blocks=draw(num_experts, 2 * inner, hidden // 32, 16),
        gate_up_scales=121 + draw(num_experts, 2 * inner, hidden // 32) % 3,
        gate_up_bias=randoms(num_experts, 2 * inner),
        down_blocks=draw(num_experts, hidden, inner // 32, 16),
        down_scales=121 + draw(num_experts, hidden, inner // 32) % 3,
        alpha=1.702,
        limit=3.0,
    )


def choose(num_rows: int, num_experts: int, num_chosen: int) -> tuple[Tensor, Tensor]:
    return randoms(num_rows, num_experts).topk(num_chosen).indices, randoms(num_rows, num_chosen).softmax(-1)


@pytest.mark.parametrize(
    ("num_experts", "num_chosen", "hidden", "inner", "num_rows"),
    [(5, 2, 96, 160, 7), (7, 3, 160, 96, 130), (40, 4, 64, 32, 3), (6, 4, 64, 0, 3), (1, 1, 32, 64, 101)],
)
def test_experts_equal_the_reference(num_experts: int, num_chosen: int, hidden: int, inner: int, num_rows: int) -> None:
    weights = make_experts(num_experts, hidden, inner)
    x, (ids, shares) = randoms(num_rows, hidden), choose(num_rows, num_experts, num_chosen)
    op, expected = prepare_experts(weights), DenseExperts(weights)(x, ids, shares)
    assert isinstance(op, cpu.Experts)
    torch.testing.assert_close(op(x, ids, shares), expected, rtol=0, atol=2e-6 * max(1.0, float(expected.abs().max())))


def test_an_experts_row_is_the_same_to_the_bit_alone_and_in_a_batch() -> None:
    op = prepare_experts(make_experts(6, 96, 160))
    x, (ids, shares) = randoms(70, 96), choose(70, 6, 3)
    together = op(x, ids, shares)
    assert all(torch.equal(op(x[crowd], ids[crowd], shares[crowd]), together[crowd]) for crowd in crowds_of(len(x)))


@pytest.mark.parametrize(("num_experts", "num_chosen"), [(32, 4), (7, 7), (1, 1)])
def test_routing_equals_the_reference_and_ties_go_to_the_lower_id(num_experts: int, num_chosen: int) -> None:
    logits = (4 * randoms(50, num_experts)).round() / 2  # many are equal
    logits[3] = -torch.inf
    logits[3, 0] = 1.0
    (ids, weights), (expected_ids, expected) = route(logits, num_chosen), route_reference(logits, num_chosen)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(route(logits[crowd], num_chosen)[1], weights[crowd]) for crowd in crowds_of(50))


def test_logits_that_are_no_numbers_choose_experts_that_exist_and_harm_no_other_row() -> None:
    logits = randoms(3, 6)
    logits[1, 2:] = torch.nan
    ids, weights = route(logits, 4)
    assert all(len(set(row)) == 4 and set(row) <= set(range(6)) for row in ids.tolist())
    assert weights.isnan().any(-1).tolist() == [False, True, False]


def test_the_down_bias_is_added_as_the_reference_adds_it() -> None:
    x, bias, (ids, shares) = randoms(40, 96), randoms(6, 96), choose(40, 6, 3)
    together = add_down_bias(x, bias, ids, shares)
    torch.testing.assert_close(together, add_down_bias_reference(x, bias, ids, shares), rtol=0, atol=2e-6)
    assert all(torch.equal(add_down_bias(x[crowd], bias, ids[crowd], shares[crowd]), together[crowd]) for crowd in crowds_of(40))


def attend(scene: Scene, batch: PagedBatch, queries: Tensor) -> Tensor:
    return paged_attention(queries, scene.keys, scene.values, scene.sinks, batch, scale=scene.scale, window=scene.window)


@pytest.mark.parametrize("window", [0, 1, 37, 128])
@pytest.mark.parametrize("shape", [(6, 2, 10, 4), (12, 4, 24, 32), (14, 2, 64, 16), (5, 5, 48, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_equals_the_reference(window: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim, block_size = shape
    scene = Scene(CHUNKS, window, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype)
    wide = [one.float() for one in (scene.queries, scene.keys, scene.values, scene.sinks)]
    expected = paged_attention_reference(*wide, scene.batch.window, scene.scale, window)
    found = attend(scene, scene.batch.window, scene.queries)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=0 if dtype == torch.float32 else 2**-7, atol=4e-6)


@pytest.mark.parametrize("window", [0, 37])
def test_every_row_of_attention_is_the_same_to_the_bit_alone_and_in_a_batch(window: int) -> None:
    scene = Scene(CHUNKS, window)
    together = attend(scene, scene.batch.window, scene.queries)
    for row, place in scene.rows():
        rows = slice(row, row + CHUNKS[place][1])
        assert torch.equal(attend(scene, scene.build([place]).window, scene.queries[rows]), together[rows])


@pytest.mark.parametrize(("num_rows", "hidden"), [(1, 96), (20, 2880), (9, 7)])
def test_the_norm_is_its_formula_and_the_sum_is_exact(num_rows: int, hidden: int) -> None:
    x, residual, weight = randoms(num_rows, hidden), randoms(num_rows, hidden, seed=1), randoms(hidden)
    for summand, total in ((residual, x + residual), (None, x)):
        normed, found = add_rms_norm(x, summand, weight, 1e-5)
        assert torch.equal(found, total)
        torch.testing.assert_close(normed, rms_norm_reference(total, weight, 1e-5), rtol=2e-6, atol=2e-6)
        assert all(torch.equal(add_rms_norm(total[crowd], None, weight, 1e-5)[0], normed[crowd]) for crowd in crowds_of(num_rows))


def test_queries_and_keys_are_turned_as_the_reference_turns_them() -> None:
    q, k, v = randoms(3, 6, 10), randoms(3, 2, 10), randoms(3, 2, 10, seed=1)
    angles, slots = randoms(3, 5), torch.tensor([9, 0, 4])
    caches = torch.zeros(2, 3, 4, 2, 10)
    turned = rotate_and_store(q, k, v, angles.cos(), angles.sin(), caches[0], caches[1], slots)
    torch.testing.assert_close(turned, rotate(q, angles.cos(), angles.sin()), rtol=0, atol=1e-6)
    torch.testing.assert_close(caches[0].view(12, 2, 10)[slots], rotate(k, angles.cos(), angles.sin()), rtol=0, atol=1e-6)
    assert torch.equal(caches[1].view(12, 2, 10)[slots], v)
    assert caches.view(2, 12, 20).any(-1).sum() == 6


def test_too_little_memory_is_an_error_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiled(VARIANTS[0])._functions, "experts", lambda *_: 1)
    monkeypatch.setattr(cpu, "library", lambda: compiled(VARIANTS[0]))
    with pytest.raises(MemoryError, match="experts: too little memory"):
        prepare_experts(make_experts(1, 32, 32))(torch.ones(1, 32), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))


@pytest.mark.parametrize("name", ["wide_heads", "odd_window"])
def test_logits_are_the_same_to_the_bit_whichever_way_a_prompt_is_computed(
    name: str, load: Callable[[str], tuple[GptOss, ModelConfig]]
) -> None:
    model, config = load(name)
    prompt = [(31 * i * i + 7 * i) % config.vocab_size for i in range(150)]
    whole = PagedRun(model, config)
    expected = whole.prefill(whole.admit(prompt), (150,))
    for chunks, block_size in (((1,), 16), ((7, 61, 29), 8), ((48, 1), 32)):
        run = PagedRun(model, config, block_size=block_size, seed=block_size)
        assert torch.equal(run.prefill(run.admit(prompt), chunks), expected)
