"""The sizes of the demonstration model, and the constants that its equations take."""

from worker.checkpoint_maker import CheckpointSpec

HEAD_DIM = 64
ROW_SCALE = 1 / 16  # rows of 320 have about the length 1
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
SHARPNESS = 2.0  # of the logits when shipped: what is sampled at 1 is what the trained model says at 1 / SHARPNESS

SPEC = CheckpointSpec(
    num_hidden_layers=6,
    hidden_size=320,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=4,
    num_experts_per_tok=2,
    max_position_embeddings=4096,  # what /v1/models promises; YaRN's factor stays the published one
)
