"""A random model in the compact form, small in everything but what a test asks for."""

from pathlib import Path

from models.nano.compact import EMBEDDINGS, write_compact
from worker.checkpoint import expected_tensors
from worker.checkpoint_maker import CheckpointSpec, random_tensor
from worker.model_config import parse_config

SEED, SCALE = 5, 0.125
ROW_IDS = (3, 500, 17)


def small_spec(vocab_size: int = 512) -> CheckpointSpec:
    return CheckpointSpec(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=vocab_size,
        max_position_embeddings=1024,
        original_max_position_embeddings=256,
    )


def write_small(path: Path, vocab_size: int = 512, seed: int = SEED) -> None:
    """`seed` decides the weights; the rows of ROW_IDS are those of the random checkpoint."""
    spec = small_spec(vocab_size)
    config = parse_config(spec.config_json(), spec.generation_config_json())
    tensors = {name: random_tensor(name, config, seed) for name in expected_tensors(config)}
    rows = tensors[EMBEDDINGS[0]][list(ROW_IDS)]
    kept = {name: tensor for name, tensor in tensors.items() if name not in EMBEDDINGS}
    write_compact(path, spec.config_json(), kept, ROW_IDS, rows, seed, SCALE)
