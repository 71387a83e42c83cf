"""What the edge and the scheduler cost, and what they add, beside litellm's proxy: the same client, the same words, the same machine.

    cpu_us_per_token         CPU of edge + scheduler for one streamed token, 64 streams at once
    cpu_ratio_litellm        litellm's CPU for the same, over ours
    rps_ratio_litellm        our requests per second over litellm's, streams of one token, 64 connections
    added_ttft_ms_p50_64     time to first token through edge and scheduler less that of the worker alone, while 64 streams run
    p99_gap_over_pacing_1000 the 99th percentile of the time between two tokens over the worker's step, 1,000 streams at 10 tokens/s,
                             while all of them run; with_arrivals: from the first request on, as the thousand open at one moment

The workers are fakes that take a given time for a token and no thought: ours speaks the worker protocol, litellm's OpenAI's. litellm is
installed on first use into an environment of its own.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence

import uvloop

from benchmarks.edge_load.client import Connection, StreamTimes, build_request
from benchmarks.edge_load.processes import Target, litellm, ossia
from benchmarks.edge_load.worker_alone import first_token_times_s
from benchmarks.report import Report, finish, parser

MODEL = "scripted"
NUM_STREAMS, STREAM_TOKENS, STEP_MS = 64, 256, 20.0
NUM_CONNECTIONS, NUM_PROBES = 64, 60
NUM_MANY, MANY_STEP_MS, MANY_TOKENS = 1000, 100.0, 80


async def stream_all(target: Target, num_streams: int, num_tokens: int, is_raw: bool = False) -> list[StreamTimes]:
    """So many streams at once, each on its own connection, to the end."""
    request = build_request(target.address, MODEL, num_tokens, is_raw)
    connections = [await Connection.open(target.address) for _ in range(num_streams)]
    try:
        return await asyncio.gather(*(connection.stream(request) for connection in connections))
    finally:
        for connection in connections:
            connection.close()


async def cpu_us_per_token(target: Target) -> float:
    await stream_all(target, 8, 8)
    before = target.cpu_s()
    times = await stream_all(target, NUM_STREAMS, STREAM_TOKENS)
    used_s = target.cpu_s() - before
    assert all(one.is_whole for one in times)
    return used_s / (NUM_STREAMS * STREAM_TOKENS) * 1e6


async def requests_per_s(target: Target, seconds: float) -> float:
    """Streams of one token, one after the other on every connection."""
    request = build_request(target.address, MODEL, 1)
    connections = [await Connection.open(target.address) for _ in range(NUM_CONNECTIONS)]
    num_done = 0
    end = time.perf_counter() + seconds

    async def keep_asking(connection: Connection) -> None:
        nonlocal num_done
        while time.perf_counter() < end:
            assert (await connection.stream(request)).is_whole
            num_done += 1

    begin = time.perf_counter()
    await asyncio.gather(*map(keep_asking, connections))
    for connection in connections:
        connection.close()
    return num_done / (time.perf_counter() - begin)


async def probe_first_tokens_s(target: Target) -> list[float]:
    """Time to first token of one request after another, while the other streams run."""
    running = asyncio.create_task(stream_all(target, NUM_STREAMS - 1, 1000, is_raw=True))
    await asyncio.sleep(1.0)
    connection, request = await Connection.open(target.address), build_request(target.address, MODEL, 4, is_raw=True)
    times = []
    for number in range(NUM_PROBES):
        await asyncio.sleep(STEP_MS / 1000 * (1 + number / NUM_PROBES))  # so that arrivals lie evenly over a step
        got = await connection.stream(request)
        times.append(got.events[0] - got.sent)
    connection.close()
    running.cancel()
    await asyncio.wait((running,))
    return times


async def gaps_over_pacing(target: Target) -> tuple[float, float]:
    """While all streams run, and from the first on."""
    times = await stream_all(target, NUM_MANY, MANY_TOKENS)
    assert all(one.is_whole for one in times)
    all_run, one_ended = max(one.events[0] for one in times), min(one.events[-1] for one in times)
    gaps = [(later, later - earlier) for one in times for earlier, later in zip(one.events[2:-2], one.events[3:-1], strict=True)]
    together = [gap for at, gap in gaps if all_run < at < one_ended]
    assert len(together) > len(gaps) / 2
    pacing_s = MANY_STEP_MS / 1000
    return percentile(together, 99) / pacing_s, percentile([gap for _, gap in gaps], 99) / pacing_s


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


async def measure(arguments: argparse.Namespace) -> Report:
    report = Report("edge and scheduler beside litellm", ("what", "ossia", "litellm"))
    with ossia(STEP_MS, STREAM_TOKENS) as target:
        ours_us = await cpu_us_per_token(target)
    with ossia(0.0, 1) as target:
        await requests_per_s(target, 2)
        ours_rps = await requests_per_s(target, arguments.seconds)
    with ossia(STEP_MS, 1000, header="") as target:
        through = statistics.median(await probe_first_tokens_s(target)) * 1e3
    alone = statistics.median(await first_token_times_s(STEP_MS, NUM_STREAMS, NUM_PROBES)) * 1e3
    with ossia(MANY_STEP_MS, MANY_TOKENS, max_num_seqs=NUM_MANY) as target:
        gap, arriving = await gaps_over_pacing(target)
    report.add("first token ms, p50, 64 streams", f"{through:.2f} ({alone:.2f} alone)", "", added_ttft_ms_p50_64=through - alone)
    figures = {"p99_gap_over_pacing_1000": gap, "p99_gap_over_pacing_1000_with_arrivals": arriving}
    report.add("p99 gap over pacing, 1000 streams", f"{gap:.2f} ({arriving:.2f} while they open)", "", **figures)
    if arguments.no_litellm:
        report.add("CPU us per token", f"{ours_us:.1f}", "", cpu_us_per_token=ours_us)
        report.add("requests/s of one token", f"{ours_rps:.0f}", "", requests_per_s=ours_rps)
        return report
    with litellm(STEP_MS) as target:
        theirs_us = await cpu_us_per_token(target)
    with litellm(0.0) as target:
        await requests_per_s(target, 2)
        theirs_rps = await requests_per_s(target, arguments.seconds)
    figures = {"cpu_us_per_token": ours_us, "cpu_us_per_token_litellm": theirs_us, "cpu_ratio_litellm": theirs_us / ours_us}
    report.add("CPU us per token", f"{ours_us:.1f}", f"{theirs_us:.1f}", **figures)
    figures = {"requests_per_s": ours_rps, "requests_per_s_litellm": theirs_rps, "rps_ratio_litellm": ours_rps / theirs_rps}
    report.add("requests/s of one token", f"{ours_rps:.0f}", f"{theirs_rps:.0f}", **figures)
    return report


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--seconds", type=float, default=8.0, help="how long requests per second are counted")
    flags.add_argument("--no-litellm", action="store_true", help="measure ours alone")
    arguments = flags.parse_args()
    finish(uvloop.run(measure(arguments)), arguments.json)


if __name__ == "__main__":
    main()
