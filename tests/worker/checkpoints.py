"""Three random checkpoints whose sizes all differ, so that a swapped axis or a wrong divisor cannot hide."""

from worker.checkpoint_maker import CheckpointSpec

SPECS = {
    # head_dim as published; experts, heads, groups and widths all different
    "wide_heads": CheckpointSpec(
        num_hidden_layers=3,
        hidden_size=96,
        intermediate_size=160,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=5,
        num_experts_per_tok=2,
        vocab_size=701,
        max_position_embeddings=4096,
        original_max_position_embeddings=128,
    ),
    # a window that is no multiple of the block size, YaRN's ramp within few positions
    "odd_window": CheckpointSpec(
        num_hidden_layers=4,
        hidden_size=128,
        intermediate_size=64,
        num_attention_heads=10,
        num_key_value_heads=5,
        head_dim=24,
        num_local_experts=7,
        num_experts_per_tok=3,
        sliding_window=37,
        vocab_size=512,
        max_position_embeddings=1024,
        original_max_position_embeddings=64,
        rope_factor=16.0,
        rope_theta=10000.0,
    ),
    # divides between 4 ranks; the 3 MXFP4 blocks of an expert do not, so that one rank holds no part of the experts
    "four_ranks": CheckpointSpec(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=32,
        num_local_experts=6,
        num_experts_per_tok=4,
        vocab_size=1024,
        max_position_embeddings=2048,
        original_max_position_embeddings=64,
    ),
}
SEEDS = {name: seed for seed, name in enumerate(SPECS, start=11)}
