"""From a checkpoint to a backend that is ready: checked, loaded, sized, warmed up, and held against what the model should compute."""

import hashlib
from functools import partial
from pathlib import Path

import torch

from worker import kernels, models, philox, sampling
from worker.backend import ModelFacts
from worker.checkpoint import Checkpoint, CheckpointError, count_parameters
from worker.cuda_graphs import CudaCapture, list_shapes
from worker.kernels import cpu
from worker.kv_cache import KVCache, KVCacheLayout, KVCacheTooSmall, blocks_per_window, size_kv_cache
from worker.load_progress import StartProgress
from worker.memory_profile import CudaMemory, DeviceMemory, largest_steps
from worker.model_config import ARCHITECTURE, ModelConfig
from worker.model_loader import load_model
from worker.models.gpt_oss import GptOss
from worker.runner import ModelBackend
from worker.self_check import Reference, check_logits, read_reference
from worker.tensor_parallel import TensorParallel, plan_shards

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model_backend(
    model_dir: Path,
    *,
    tensor_parallel: TensorParallel,
    device: str,
    dtype: str,
    block_size: int,
    num_full_blocks: int | None,
    num_window_blocks: int | None,
    kv_cache_bytes: int | None,
    max_model_len: int | None,
    max_batch_tokens: int,
    max_num_seqs: int,
    swap_space_bytes: int = 0,
    gpu_memory_utilization: float = 0.9,
    memory: DeviceMemory | None = None,
    use_graphs: bool = True,
    progress: StartProgress | None = None,
) -> ModelBackend:
    """Checks everything that can be checked, reads this rank's weights, and returns when steps can be computed.

    `kv_cache_bytes` are this rank's, for the pools whose number of blocks is None; `swap_space_bytes` of host memory stand behind them.
    None: what `gpu_memory_utilization` leaves by the profile of `memory`, on the rank that has least. `max_model_len` None: what the model
    was made for, or less where the cache holds less. Raises `CheckpointError`, `ShardPlanError`, `KVCacheTooSmall` or `SelfCheckFailed`.
    """
    progress = progress or StartProgress()
    torch_dtype, torch_device = DTYPES[dtype], torch.device(device)
    with Checkpoint(model_dir) as checkpoint:
        config = checkpoint.config
        plan = plan_shards(config, rank=tensor_parallel.rank, size=tensor_parallel.size)
        references = read_reference(model_dir, config.vocab_size)
        num_kv_heads = len(plan.kv_heads)
        size_pools = partial(
            size_kv_cache,
            config,
            block_size=block_size,
            num_kv_heads=num_kv_heads,
            dtype=torch_dtype,
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
            num_full_blocks=num_full_blocks,
            num_window_blocks=num_window_blocks,
            host_bytes=swap_space_bytes,
        )
        if kv_cache_bytes is not None:  # told before minutes are spent on loading
            _bound_length(config, size_pools(budget_bytes=kv_cache_bytes), max_model_len)
        progress.begin("loading")
        model = load_model(checkpoint, plan, tensor_parallel, dtype=torch_dtype, device=torch_device, progress=progress.note_bytes)
        gather_facts = partial(_gather_facts, checkpoint, model, tensor_parallel.size, device, dtype)
        make_cache = partial(KVCache, config, num_kv_heads=num_kv_heads, dtype=torch_dtype, device=torch_device)
        if kv_cache_bytes is None:
            progress.begin("measuring memory")
            longest = max_model_len or config.max_position_embeddings
            one_block = KVCacheLayout(block_size, 1, 1)
            probe = ModelBackend(model, make_cache(one_block), gather_facts(one_block, longest))
            profile = (memory or CudaMemory()).profile(partial(_compute_largest, probe, max_batch_tokens, max_num_seqs))
            budget = torch.tensor([profile.budget(gpu_memory_utilization)], device=torch_device)
            kv_cache_bytes = int(tensor_parallel.all_gather(budget).min())
        layout = size_pools(budget_bytes=kv_cache_bytes)
        facts = gather_facts(layout, _bound_length(config, layout, max_model_len))
    backend = ModelBackend(model, make_cache(layout), facts)
    progress.begin("warming up")
    backend.warm_up()
    if device == "cuda":
        compile_kernels(backend, max_batch_tokens)
    if use_graphs and device == "cuda":
        _capture_graphs(backend, config, max_num_seqs, progress)
    if references:
        progress.begin("checking itself")
        _check_itself(backend, [one for one in references if len(one.prompt) <= max_batch_tokens], is_judge=tensor_parallel.rank == 0)
    return backend


def _compute_largest(probe: ModelBackend, max_batch_tokens: int, max_num_seqs: int) -> None:
    facts = probe.facts
    for step in largest_steps(
        max_batch_tokens=max_batch_tokens, max_num_seqs=max_num_seqs, max_model_len=facts.max_model_len, block_size=facts.block_size
    ):
        probe.step(step, ())


def _check_itself(backend: ModelBackend, references: list[Reference], *, is_judge: bool) -> None:
    """Every rank computes, one judges. What the cache does not hold is passed over."""
    for reference in references:
        if backend.holds(len(reference.prompt)):
            logits = backend.prompt_logits(reference.prompt)
            if is_judge:
                check_logits(reference, logits, backend.facts.dtype)


def compile_kernels(backend: ModelBackend, max_batch_tokens: int) -> None:
    """Prompts of every length at which a kernel may take another form: it is compiled when it is first used."""
    for length in (2**power for power in range(max_batch_tokens.bit_length())):
        if backend.holds(length):
            backend.prompt_logits([0] * length)


def _capture_graphs(backend: ModelBackend, config: ModelConfig, max_num_seqs: int, progress: StartProgress) -> None:
    facts = backend.facts
    shapes = list_shapes(
        max_num_seqs=max_num_seqs,
        max_model_len=facts.max_model_len,
        block_size=facts.block_size,
        num_window_blocks=blocks_per_window(config, facts.block_size),
    )
    progress.begin("capturing graphs")
    backend.graphs.capture(shapes, CudaCapture(), lambda num_done: progress.note_count(num_done, len(shapes)))


def _bound_length(config: ModelConfig, layout: KVCacheLayout, max_model_len: int | None) -> int:
    held = layout.num_full_blocks * layout.block_size
    if max_model_len is None:
        return min(config.max_position_embeddings, held)
    if max_model_len > config.max_position_embeddings:
        raise CheckpointError(
            f"max_model_len is {max_model_len}, over the config's max_position_embeddings of {config.max_position_embeddings}: lower it."
        )
    if max_model_len > held:
        raise KVCacheTooSmall(f"max_model_len is {max_model_len}, the KV cache holds {held} tokens: lower it or raise kv_cache_bytes.")
    return max_model_len


def _gather_facts(
    checkpoint: Checkpoint,
    model: GptOss,
    tensor_parallel_size: int,
    device: str,
    dtype: str,
    layout: KVCacheLayout,
    max_model_len: int,
) -> ModelFacts:
    config = checkpoint.config
    total, active = count_parameters(config)
    output_factors = f"{config}|{checkpoint.digest()}|{digest_kernels(model)}|{tensor_parallel_size}|{dtype}|{device}"
    return ModelFacts(
        architecture=ARCHITECTURE,
        fingerprint=hashlib.sha256(output_factors.encode()).hexdigest()[:16],
        total_parameters=total,
        active_parameters=active,
        max_model_len=max_model_len,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        block_size=layout.block_size,
        num_full_blocks=layout.num_full_blocks,
        num_window_blocks=layout.num_window_blocks,
        num_host_blocks=layout.num_host_blocks,
        sliding_window=config.sliding_window,
        device=device,
        dtype=dtype,
    )


def digest_kernels(model: GptOss) -> str:
    """SHA-256 in hex over what computes beside the weights: this tree's kernels and model, the form of the experts, and torch."""
    compute = model.layers[0].mlp.experts.compute
    vectors = compute.vectors if isinstance(compute, cpu.Experts) else ""
    digest = hashlib.sha256(f"{torch.__version__}|{type(compute).__name__}|{vectors}".encode())
    folders = [Path(folder) for package in (kernels, models) for folder in package.__path__]
    sources = sorted(file for folder in folders for file in folder.iterdir() if file.suffix in (".py", ".c"))
    for file in (*sources, *(Path(module.__file__ or "") for module in (sampling, philox))):
        digest.update(file.read_bytes())
    return digest.hexdigest()
