"""`ossia checkpoint`: checkpoints in the published format: random ones for tests and benchmarks, and the demonstration model."""

from pathlib import Path
from typing import Annotated

import typer

from models.nano.cache import NANO_FILE, describe
from services.process import StartError

app = typer.Typer(no_args_is_help=True, help="Checkpoints in the published format.")


@app.command()
def make(
    directory: Annotated[Path, typer.Argument(help="folder to make; it must not exist")],
    layers: Annotated[int, typer.Option(min=1, max=256, help="layers; even ones have a sliding window")] = 4,
    experts: Annotated[int, typer.Option(min=1, max=1024, help="experts of a layer")] = 8,
    experts_per_token: Annotated[int, typer.Option(min=1, max=64, help="experts that a token uses")] = 4,
    hidden: Annotated[int, typer.Option(min=32, max=65536, help="hidden size, a multiple of 32")] = 64,
    intermediate: Annotated[int, typer.Option(min=32, max=65536, help="intermediate size of an expert, a multiple of 32")] = 64,
    heads: Annotated[int, typer.Option(min=1, max=1024, help="query heads")] = 4,
    kv_heads: Annotated[int, typer.Option(min=1, max=1024, help="key and value heads, a divisor of the query heads")] = 2,
    head_dim: Annotated[int, typer.Option(min=2, max=1024, help="size of a head, even")] = 64,
    sliding_window: Annotated[int, typer.Option(min=1, max=1_000_000, help="tokens that a window layer sees")] = 128,
    vocab: Annotated[int, typer.Option(min=8, max=1_000_000, help="size of the vocabulary")] = 201_088,
    context: Annotated[int, typer.Option(min=1, max=10_000_000, help="longest sequence, in tokens")] = 131_072,
    shard_mib: Annotated[int, typer.Option(min=1, max=100_000, help="largest file of weights, MiB")] = 4_768,
    seed: Annotated[int, typer.Option(min=0, help="decides every byte")] = 0,
) -> None:
    """Writes a random gpt-oss checkpoint in the published format: config, index, MXFP4 experts, shards."""
    write(
        directory,
        seed,
        num_hidden_layers=layers,
        num_local_experts=experts,
        num_experts_per_tok=experts_per_token,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        sliding_window=sliding_window,
        vocab_size=vocab,
        max_position_embeddings=context,
        max_shard_bytes=shard_mib * 2**20,
    )
    _report_size(directory)


def _report_size(directory: Path) -> None:
    print(f"{directory}: {sum(file.stat().st_size for file in directory.iterdir()) / 2**20:.1f} MiB")


def write(directory: Path, seed: int, **sizes: int) -> None:
    """Writes the checkpoint. Raises StartError. The maker needs torch, which the rest of the command does without."""
    from worker.checkpoint import CheckpointError
    from worker.checkpoint_maker import CheckpointSpec, make_checkpoint

    try:
        make_checkpoint(directory, CheckpointSpec(**sizes), seed)  # type: ignore[arg-type]  # the one field that is no int is not given
    except (CheckpointError, OSError) as error:
        raise StartError(str(error)) from None


@app.command()
def reference(
    directory: Annotated[Path, typer.Argument(help="folder of a checkpoint", exists=True, file_okay=False)],
    device: Annotated[str, typer.Option(help="cpu or cuda: where this model is known to compute right")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
) -> None:
    """Writes DIRECTORY/reference.json: what a few prompts lead to. Workers hold themselves against it before they serve."""
    from worker.config import WorkerConfig
    from worker.load_progress import StartProgress
    from worker.rank import load_rank
    from worker.self_check import REFERENCE, write_reference

    (directory / REFERENCE).unlink(missing_ok=True)  # or it would be held against the one before
    config = WorkerConfig(model_dir=directory, device=device, dtype=dtype, kv_cache_gib=0.25, max_num_seqs=1, cuda_graphs=False)
    backend = load_rank(config, 0, None, StartProgress()).backend
    write_reference(directory, backend.prompt_logits, backend.facts.vocab_size)
    print(f"{directory / REFERENCE}: written")


@app.command()
def expand(directory: Annotated[Path, typer.Argument(help="folder to make; it must not exist")]) -> None:
    """Writes ossia-nano, the demonstration model that comes with Ossia, in the published format."""
    from models.nano.compact import expand_compact
    from worker.checkpoint import CheckpointError

    try:
        expand_compact(NANO_FILE, directory)
    except CheckpointError as error:
        raise StartError(str(error)) from None
    except OSError as error:
        raise StartError(f"cannot expand {NANO_FILE.stem} into {directory}: {describe(error, 'another folder')}") from None
    _report_size(directory)
