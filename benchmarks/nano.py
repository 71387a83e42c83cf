"""The demonstration model on this machine: seconds from start to ready, and tokens/s for one stream and for 32, beside transformers.

`ossia up` is started without a flag, as anybody does first: once on a machine that never served the model, which expands it, and once more.
Then both sides answer the same sums with the same number of tokens, from the same files on the same cores, in turns: Ossia as one cluster
over REST and SSE, its edge and scheduler on these cores too; transformers in process, as one batch, in float32, and in bfloat16 where the
processor multiplies it itself (elsewhere a round takes minutes). A rate is what was generated over all of the time from request to end,
prompts included. Medians of the rounds.
"""

import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path

import openai
import torch
from transformers import GptOssForCausalLM, Mxfp4Config
from transformers.utils import logging

from benchmarks.report import Report, finish, parser
from models.nano.cache import NANO_NAME, expanded_model
from tests.cluster.local_cluster import LocalCluster

NUM_TOKENS, NUM_STREAMS, NUM_ROUNDS = 128, 32, 3
DATE = "2026-01-01"
HAS_BFLOAT16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
DTYPES = {"float32": torch.float32} | ({"bfloat16": torch.bfloat16} if HAS_BFLOAT16 else {})


def questions(num_streams: int, round_: int) -> list[str]:
    """Of one length in tokens, each asked once."""
    return [f"What is {10 + num_streams + number} + {50 + round_}?" for number in range(num_streams)]


def start_s(home: Path) -> float:
    """From the command to READY."""
    begun = time.monotonic()
    with LocalCluster(home, tls=False):
        return time.monotonic() - begun


async def stream(client: openai.AsyncOpenAI, question: str) -> None:
    chunks = await client.chat.completions.create(
        model=NANO_NAME,
        messages=[{"role": "user", "content": question}],
        max_tokens=NUM_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "conversation_date": DATE},
    )
    usage = [chunk.usage async for chunk in chunks][-1]
    assert usage and usage.completion_tokens == NUM_TOKENS


def ossia_rate(url: str, asked: list[str]) -> float:
    """Tokens/s of all streams together."""

    async def run() -> float:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", timeout=600) as client:
            begun = time.perf_counter()
            await asyncio.gather(*(stream(client, question) for question in asked))
            return len(asked) * NUM_TOKENS / (time.perf_counter() - begun)

    return asyncio.run(run())


@torch.inference_mode()
def transformers_rate(model: GptOssForCausalLM, prompts: list[list[int]]) -> float:
    """Tokens/s of the batch."""
    ids = torch.tensor(prompts)
    begun = time.perf_counter()
    generated = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    rate = len(prompts) * NUM_TOKENS / (time.perf_counter() - begun)
    assert generated.shape == (len(prompts), ids.shape[1] + NUM_TOKENS)
    return rate


def load_reference(folder: Path, dtype: torch.dtype) -> GptOssForCausalLM:
    unpacked = Mxfp4Config(dequantize=True)  # as it does on a CPU
    return GptOssForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=unpacked).eval()


def measure_rates(cluster: LocalCluster, folder: Path) -> dict[tuple[str, int], float]:
    """Tokens/s by side and number of streams. What the first round says is not counted."""
    references = {f"transformers {name}": load_reference(folder, dtype) for name, dtype in DTYPES.items()}
    rates: dict[tuple[str, int], list[float]] = {}
    with openai.OpenAI(base_url=cluster.url, api_key="any") as client:
        for round_ in range(NUM_ROUNDS + 1):
            for num_streams in (1, NUM_STREAMS):
                asked = questions(num_streams, round_)
                prompts = [tokenize(client, question) for question in asked]
                rates.setdefault(("ossia", num_streams), []).append(ossia_rate(cluster.url, asked))
                for name, model in references.items():
                    rates.setdefault((name, num_streams), []).append(transformers_rate(model, prompts))
    return {key: statistics.median(found[1:]) for key, found in rates.items()}


def tokenize(client: openai.OpenAI, question: str) -> list[int]:
    """The prompt that the model reads."""
    body = {"model": NANO_NAME, "messages": [{"role": "user", "content": question}], "conversation_date": DATE}
    answer = client.post("/tokenize", body=body, cast_to=object)
    assert isinstance(answer, dict)
    return list(answer["tokens"])


def main() -> None:
    arguments = parser(__doc__).parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    report = Report(f"{NANO_NAME} on this machine", ("what", "ossia", *(f"transformers {name}" for name in DTYPES)))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OSSIA_CACHE_DIR"] = str(Path(folder) / "cache")
        home = Path(folder) / "home"
        home.mkdir()
        first_s, again_s = start_s(home), statistics.median(start_s(home) for _ in range(NUM_ROUNDS))
        report.add("first start to ready, s", f"{first_s:.1f}", nano_first_start_s=first_s)
        report.add("start to ready, s", f"{again_s:.1f}", nano_start_s=again_s)
        with LocalCluster(home, tls=False) as cluster:
            rates = measure_rates(cluster, expanded_model())
    for num_streams in (1, NUM_STREAMS):
        ours, *theirs = (rates[side, num_streams] for side in ("ossia", *(f"transformers {name}" for name in DTYPES)))
        report.add(
            f"tokens/s, {num_streams} stream{'s' * (num_streams > 1)}",
            *(f"{rate:.1f}" for rate in (ours, *theirs)),
            **{
                f"nano_{num_streams}_tokens_per_s": ours,
                **{f"nano_{num_streams}_transformers_{name}_tokens_per_s": rate for name, rate in zip(DTYPES, theirs, strict=True)},
                f"nano_{num_streams}_ratio": ours / max(theirs),
            },
        )
    finish(report, arguments.json)


if __name__ == "__main__":
    main()
