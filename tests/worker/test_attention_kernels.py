"""The attention kernels in Triton's interpreter, against the reference and against themselves."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.worker.attention_scene import Chunks, Scene
from worker.input_batch import build_batch
from worker.kernels.attention import PagedBatch, paged_attention_reference
from worker.kernels.attention_triton import SPLIT, paged_attention_triton

pytestmark = pytest.mark.usefixtures("interpreter")

CHUNKS: Chunks = [(40, 1), (0, 9), (3 * SPLIT - 1, 1), (13, 70), (0, 1), (299, 3), (SPLIT, 1)]
SHAPES = {  # heads, key heads, head_dim, block_size
    "uneven": (6, 2, 10, 4),
    "wide blocks": (12, 4, 24, 32),
    "gpt-oss": (8, 1, 64, 16),  # one rank of eight
}


def make_scene(shape: str, window: int, dtype: torch.dtype = torch.float32, chunks: Chunks = CHUNKS) -> Scene:
    heads, kv_heads, head_dim, block_size = SHAPES[shape]
    return Scene(chunks, window, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, dtype=dtype)


def attend(scene: Scene, batch: PagedBatch, queries: Tensor) -> Tensor:
    return paged_attention_triton(queries, scene.keys, scene.values, scene.sinks, batch, scene.scale, scene.window)


@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ("uneven", 0),
        ("uneven", 1),
        ("uneven", 37),
        ("uneven", SPLIT + 44),
        ("wide blocks", 0),
        ("wide blocks", 128),
        ("gpt-oss", 0),
        ("gpt-oss", 128),
    ],
)
def test_kernels_equal_the_reference(shape: str, window: int) -> None:
    scene = make_scene(shape, window)
    batch = scene.batch.window
    expected = paged_attention_reference(scene.queries, scene.keys, scene.values, scene.sinks, batch, scene.scale, window)
    torch.testing.assert_close(attend(scene, batch, scene.queries), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", [0, 128])
def test_bfloat16_differs_by_its_rounding_alone(window: int) -> None:
    scene = make_scene("gpt-oss", window, torch.bfloat16)
    wide = [one.float() for one in (scene.queries, scene.keys, scene.values, scene.sinks)]
    expected = paged_attention_reference(*wide, scene.batch.window, scene.scale, window)
    torch.testing.assert_close(attend(scene, scene.batch.window, scene.queries).float(), expected, rtol=2**-8, atol=4e-3)


@pytest.mark.parametrize("window", [0, 128])
@pytest.mark.parametrize("size", [2, 7, 32])
def test_a_decode_is_the_same_to_the_bit_alone_and_in_a_batch(size: int, window: int) -> None:
    scene = make_scene("uneven", window, chunks=[(37 * place % 500, 1) for place in range(size)])
    together = attend(scene, scene.batch.window, scene.queries)
    for place in {1, size // 2, size - 1}:
        alone = attend(scene, scene.build([place]).window, scene.queries[place : place + 1])
        assert torch.equal(alone[0], together[place])


@pytest.mark.parametrize("window", [0, 37, 128])
def test_a_prefill_row_is_the_same_to_the_bit_in_any_chunk_and_company(window: int) -> None:
    """Chunks of one row are left out: they are decodes."""
    scene = make_scene("uneven", window, chunks=[(0, 145), (9, 33), (70, 1)])
    (prompt, _), other, decode = scene.scheduled
    begin = 1  # the decode's row
    whole = attend(scene, scene.batch.window, scene.queries)[begin : begin + 145]
    done = 0
    for now in (3, 64, 17, 2, 59):
        chunk = type(other)(replace(prompt, num_computed_tokens=done), now)
        batch = build_batch([other, chunk, decode], block_size=scene.block_size, sliding_window=window).window
        rows = scene.queries[begin + done : begin + done + now]
        out = attend(scene, batch, torch.cat((scene.queries[:1], scene.queries[-33:], rows)))
        assert torch.equal(out[-now:], whole[done : done + now])
        done += now
    assert done == 145


def test_a_padding_row_without_a_context_gives_zeros() -> None:
    for window in (0, 37):
        scene = make_scene("uneven", window, chunks=[(40, 1), (7, 1)])
        batch = replace(scene.batch.window, context_lens=scene.batch.window.context_lens * torch.tensor([1, 0]))
        out = attend(scene, batch, scene.queries)
        assert torch.equal(out[0], attend(scene, scene.batch.window, scene.queries)[0])
        assert not out[1].any()
