"""What fits where, from the published architecture: bytes of weights, room for keys and values, and what memory bandwidth allows at most.

Nothing is measured here. Weights count as the checkpoint stores them (MXFP4 experts, 4.25 bits a weight; the rest bfloat16), keys and
values as bfloat16. A step of one stream reads the attention weights, the chosen experts and the unembedding once: the ceiling is the data
sheet's bandwidth over those bytes.
"""

from dataclasses import dataclass

from benchmarks.report import Report, finish, parser

GIB = 1024**3
USABLE, WORKSPACE_BYTES = 0.95, 1.0 * GIB  # of a GPU's memory; activations and graphs
HIDDEN, VOCABULARY, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, CHOSEN_EXPERTS = 2880, 201_088, 64, 64, 8, 4
WINDOW, BLOCK = 128, 16
CONVERSATION_TOKENS = 8192
EXPERT_BYTES = 3 * HIDDEN * HIDDEN * 4.25 / 8


@dataclass(frozen=True)
class Model:
    name: str
    num_layers: int
    num_experts: int

    @property
    def attention_bytes(self) -> int:
        return self.num_layers * 2 * HIDDEN * (2 * NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM

    @property
    def weight_bytes(self) -> float:
        embeddings = 2 * 2 * VOCABULARY * HIDDEN
        return self.num_layers * self.num_experts * EXPERT_BYTES + self.attention_bytes + embeddings

    @property
    def step_bytes(self) -> float:
        """Read by a decode step of one sequence, keys and values aside."""
        return self.num_layers * CHOSEN_EXPERTS * EXPERT_BYTES + self.attention_bytes + 2 * VOCABULARY * HIDDEN

    @property
    def kv_token_bytes(self) -> int:
        """Of one token in one half of the layers: the full ones keep every token, the others only the window."""
        return self.num_layers // 2 * 2 * NUM_KV_HEADS * HEAD_DIM * 2

    def conversation_bytes(self, num_tokens: int) -> int:
        return self.kv_token_bytes * (num_tokens + WINDOW + BLOCK)


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_mib: float  # as the driver reports it
    bandwidth_gb_s: float  # of the data sheet


MODELS = (Model("gpt-oss-20b", 24, 32), Model("gpt-oss-120b", 36, 128))
GPUS = (
    Gpu("RTX 4080, 16 GB", 16_376, 717),
    Gpu("L4, 24 GB", 23_034, 300),
    Gpu("H100, 80 GB", 81_559, 3350),
    Gpu("H200, 141 GB", 143_771, 4800),
)
GROUPS = (1, 2, 4, 8)


def room_bytes(model: Model, gpu: Gpu, num_gpus: int) -> float:
    """For keys and values over the whole group; negative: it does not fit."""
    return num_gpus * (gpu.memory_mib * 2**20 * USABLE - WORKSPACE_BYTES) - model.weight_bytes


def rows() -> list[tuple[str, ...]]:
    """Per model and GPU, the smallest group that holds the model and one conversation of CONVERSATION_TOKENS, and a group of eight."""
    made = []
    for model in MODELS:
        for gpu in GPUS:
            fitting = [size for size in GROUPS if room_bytes(model, gpu, size) >= model.conversation_bytes(CONVERSATION_TOKENS)]
            made += [_row(model, gpu, size) for size in sorted({*fitting[:1], *fitting[-1:]})]
    return made


def _row(model: Model, gpu: Gpu, num_gpus: int) -> tuple[str, ...]:
    room = room_bytes(model, gpu, num_gpus)
    num_conversations = int(room // model.conversation_bytes(CONVERSATION_TOKENS))
    ceiling = num_gpus * gpu.bandwidth_gb_s * 1e9 / model.step_bytes
    weights = model.weight_bytes / num_gpus / GIB
    return (
        model.name,
        f"{num_gpus} x {gpu.name}",
        f"{weights:.1f}",
        f"{room / num_gpus / GIB:.1f}",
        f"{num_conversations:,}",
        f"{ceiling:,.0f}",
    )


def main() -> None:
    arguments = parser(__doc__).parse_args()
    columns = ("model", "GPUs", "weights GiB/GPU", "KV GiB/GPU", "8k conversations", "ceiling tok/s, 1 stream")
    report = Report("what fits where (computed, not measured)", columns)
    for row in rows():
        report.add(*row)
    for model in MODELS:
        key = model.name.replace("-", "_")
        report.figures[f"weights_gib_{key}"] = model.weight_bytes / GIB
        report.figures[f"step_gb_{key}"] = model.step_bytes / 1e9
    finish(report, arguments.json)


if __name__ == "__main__":
    main()
