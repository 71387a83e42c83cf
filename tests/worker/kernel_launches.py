"""What the ops launch for gpt-oss's shapes, to be compiled without a GPU."""

from dataclasses import replace

import torch

from tests.worker.attention_scene import Scene
from worker.gpu_sampling import draw_on_gpu
from worker.kernels.attention_triton import paged_attention_triton
from worker.kernels.kv_store_triton import rotate_and_store_triton
from worker.kernels.linear_triton import linear_triton
from worker.kernels.rms_norm_triton import add_rms_norm_triton
from worker.sequences import SamplingParams, Sequence

HIDDEN, HEAD_DIM, BLOCK_SIZE, VOCAB_SIZE = 2880, 64, 16, 201088


def launch_kernels() -> None:
    for kv_heads, window in ((8, 0), (8, 128), (1, 0)):  # on one GPU, and on one of eight
        chunks = [(400, 1), (3, 1), (0, 40)]
        scene = Scene(chunks, window, heads=8 * kv_heads, kv_heads=kv_heads, head_dim=HEAD_DIM, block_size=BLOCK_SIZE, dtype=torch.bfloat16)
        paged_attention_triton(scene.queries, scene.keys, scene.values, scene.sinks, scene.batch.window, scene.scale, window)
        rows = len(scene.queries)
        kv, (cos, sin) = scene.queries[:, :kv_heads], torch.empty(2, rows, HEAD_DIM // 2, dtype=torch.bfloat16)
        rotate_and_store_triton(scene.queries, kv, kv, cos, sin, scene.keys, scene.values, scene.batch.window.slot_mapping)
    x = torch.empty(3, HIDDEN, dtype=torch.bfloat16)
    add_rms_norm_triton(x, x, x[0], 1e-5)
    add_rms_norm_triton(x, None, x[0], 1e-5)
    for num_rows, num_outputs in ((1, 5120), (1, 128), (2048, 5120), (2048, 128)):
        rows, weight = torch.empty(num_rows, HIDDEN, dtype=torch.bfloat16), torch.empty(num_outputs, HIDDEN, dtype=torch.bfloat16)
        linear_triton(rows, weight, torch.empty(num_outputs, dtype=torch.bfloat16))
    logits = torch.empty(2, VOCAB_SIZE)
    params = SamplingParams(top_k=5, presence_penalty=1.0)
    sequences = [Sequence(row, "", [1, 2], 1, params) for row in range(2)]
    draw_on_gpu(logits, sequences, {})
    draw_on_gpu(logits, [replace(one, sampling=SamplingParams()) for one in sequences], {})
