"""Where requests go, and what deciding it costs.

First the decision itself, on the clock: hashing the prompt's blocks, finding who holds them, scoring every group. Then the simulation of a
workload of tenants with long prefixes, under our placement and under other routers' policies, with one scheduler or router and with two:
8 groups, 6,000 shared and 1,200 own tokens a prompt, Poisson arrivals, blocks of 16, 9,632 blocks a group, serial prefill at 20,000
tokens/s, 1,500 requests. Each figure of the simulation is the median over seeds; the same seeds for every policy. --trace FILE replays
recorded traffic instead of the workload, on as many groups of that kind as --groups says.
"""

import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Report, finish, parser
from scheduler.batching import Batcher
from scheduler.placement import choose
from scheduler.prefix_cache import PrefixIndex
from scheduler.sequence import GroupLimits, StepResult
from scheduler.simulation import policies
from scheduler.simulation.cluster import ClusterSpec, SimulatedCluster
from scheduler.simulation.outcome import Outcome
from scheduler.simulation.step_time import SerialPrefill
from scheduler.simulation.trace import read_trace
from scheduler.simulation.workload import Arrival
from scheduler.simulation.workloads import END_TOKEN_ID, SharedPrefixes, Writer
from services.prefix_hash import PrefixHasher

BLOCKS_PER_GROUP = 9632
LIMITS = GroupLimits(16, BLOCKS_PER_GROUP, 0, 0, 131_072, 8192, max_num_seqs=1, eos_token_ids=frozenset({END_TOKEN_ID}))
PREFILL_TOKENS_PER_S = 20_000.0
NUM_RUNS = 5

WORKLOADS = {
    "30qps": SharedPrefixes(30.0, num_tenants=150),
    "60qps": SharedPrefixes(60.0, num_tenants=150),
    "24qps": SharedPrefixes(24.0, num_tenants=300),
}
# What an approximate cache-aware router is known to reach there: hit ratio, TTFT p99 in seconds.
KNOWN_ROUTER = {"30qps": (0.669, 1.01), "60qps": (0.693, 3.79), "24qps": (0.422, 3.59)}


def approximate_tree(group_ids: Sequence[str], draw: random.Random) -> policies.Policy:
    return policies.ApproximateTree(group_ids, draw, blocks_per_group=BLOCKS_PER_GROUP)


OURS = "ours"
POLICIES: Mapping[str, policies.MakePolicy | None] = {
    OURS: None,
    "approximate_tree": approximate_tree,
    "sticky": policies.StickyTenants,
    "least_loaded": policies.LeastLoaded,
    "power_of_two": policies.PowerOfTwo,
    "round_robin": policies.RoundRobin,
    "random": policies.Random,
}


# ---- the decision, on the clock ----


def held_groups(num_groups: int, num_prefixes: int) -> tuple[dict[str, Batcher], PrefixIndex, list[Sequence[int]]]:
    """Groups that have computed their share of prompts with different prefixes, and those prefixes."""
    index, writer = PrefixIndex(), Writer()
    groups = {f"g{number}": Batcher(LIMITS, max_queued_tokens=2**40, index=index, group_id=f"g{number}") for number in range(num_groups)}
    prefixes: list[Sequence[int]] = [writer.fresh(6000) for _ in range(num_prefixes)]
    for number, prefix in enumerate(prefixes):
        batcher = groups[f"g{number % num_groups}"]
        batcher.add(writer.request("t", [*prefix, *writer.fresh(1200)], writer.answer(1)), 0.0)
        while plan := batcher.plan(0.0):
            drawing = batcher.in_flight[-1].drawing
            batcher.apply(StepResult(plan.step, drawing, [END_TOKEN_ID] * len(drawing), device_time_s=0.36), 0.36)
    return groups, index, prefixes


def decision_s(num_groups: int) -> float:
    """Seconds to hash a prompt of 7,200 tokens, match it and score every group. Its prefix is held by one of them, the rest is new."""
    groups, index, prefixes = held_groups(num_groups, num_prefixes=max(16, num_groups))
    writer = Writer()
    writer.fresh(10_000_000)

    def decide(prompt: Sequence[int]) -> None:
        request = writer.request("t", prompt, answer)
        best = choose(request, groups, index, 1.0)
        assert best and best.num_cached_tokens == 6000

    answer = writer.answer(1)
    prompts = [[*prefixes[number % 16], *writer.fresh(1200)] for number in range(20)]
    return median_s(lambda: [decide(prompt) for prompt in prompts]) / len(prompts)


def hash_s(num_tokens: int) -> float:
    """Seconds per token to name the blocks of one prompt."""
    prompt, repeats = random.Random(1).choices(range(200_000), k=num_tokens), max(1, 200_000 // num_tokens)
    return median_s(lambda: [PrefixHasher(b"key", 16, prompt) for _ in range(repeats)]) / (num_tokens * repeats)


def median_s(work: Callable[[], object]) -> float:
    times = []
    for _ in range(NUM_RUNS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def time_decisions() -> Report:
    report = Report("one placement decision (median of 5)", ("what", "cost"))
    for num_groups in (1, 64, 256):
        cost_ms = decision_s(num_groups) * 1e3
        report.add(
            f"7,200 tokens, {num_groups} groups",
            f"{cost_ms:.3f} ms",
            **{f"placement_ms_{num_groups}_group{'s' * (num_groups > 1)}": cost_ms},
        )
    for name, num_tokens in (("1k", 1024), ("128k", 131_072)):
        cost_ns = hash_s(num_tokens) * 1e9
        report.add(f"names of a prompt of {name} tokens", f"{cost_ns:.1f} ns/token", **{f"hash_ns_per_token_{name}": cost_ns})
    return report


# ---- the workloads, simulated ----


@dataclass(frozen=True)
class Run:
    """One policy on one workload, with one seed."""

    policy: str
    num_schedulers: int
    hit_ratio: float
    mean_ttft_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    num_mispredicted: int


def simulate(policy: str, num_schedulers: int, arrivals: Iterable[Arrival], seed: int, num_groups: int = 8) -> Run:
    spec = ClusterSpec(num_groups, LIMITS, SerialPrefill(PREFILL_TOKENS_PER_S), num_schedulers, POLICIES[policy])
    outcome: Outcome = SimulatedCluster(spec, seed).run(arrivals)
    assert all(one.is_answered for one in outcome.records), "a simulated answer is not whole"
    ttfts_s = outcome.ttft_s(0.9), outcome.ttft_s(0.99)
    return Run(policy, num_schedulers, outcome.hit_ratio, outcome.mean_ttft_s, *ttfts_s, outcome.num_mispredicted)


def simulate_all(name: str, seed: int, wanted: Sequence[str]) -> list[Run]:
    """Every policy on the same arrivals."""
    arrivals = list(WORKLOADS[name].arrivals(seed))
    return [simulate(policy, num_schedulers, arrivals, seed) for policy in wanted for num_schedulers in (1, 2)]


def compare(report: Report, name: str, runs: Sequence[Run]) -> None:
    """One row for each policy and number of schedulers: medians over the seeds."""
    for policy, num_schedulers in dict.fromkeys((one.policy, one.num_schedulers) for one in runs):
        own = [one for one in runs if (one.policy, one.num_schedulers) == (policy, num_schedulers)]
        hit, mean, p90, p99 = (
            statistics.median(getattr(one, field) for one in own) for field in ("hit_ratio", "mean_ttft_s", "ttft_p90_s", "ttft_p99_s")
        )
        prefix = "" if policy == OURS else f"{policy}_"
        suffix = f"_{name}" + ("_2schedulers" if num_schedulers == 2 else "")
        figures = {f"{prefix}hit{suffix}": hit, f"{prefix}ttft_mean_s{suffix}": mean, f"{prefix}ttft_p90_s{suffix}": p90}
        figures[f"{prefix}ttft_p99_s{suffix}"] = p99
        if policy == OURS and name in KNOWN_ROUTER:
            figures[f"ttft_p99_ratio_to_known_router{suffix}"] = p99 / KNOWN_ROUTER[name][1]
            figures[f"num_mispredicted_hits{suffix}"] = sum(one.num_mispredicted for one in own)
        report.add(name, policy, num_schedulers, f"{hit:.3f}", f"{mean:.3f}", f"{p90:.3f}", f"{p99:.3f}", **figures)


def compare_workloads(wanted: Sequence[str], num_seeds: int) -> Report:
    columns = ("workload", "policy", "schedulers", "hit ratio", "TTFT mean s", "p90 s", "p99 s")
    report = Report(f"tenants with a shared prefix (medians of {num_seeds} seeds)", columns)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        tasks = {name: [pool.submit(simulate_all, name, seed, wanted) for seed in range(1, num_seeds + 1)] for name in WORKLOADS}
        for name, seeds in tasks.items():
            compare(report, name, [one for task in seeds for one in task.result()])
            if name in KNOWN_ROUTER:
                hit, p99 = KNOWN_ROUTER[name]
                report.add(name, "(a router in the field, as published)", 1, f"{hit:.3f}", "", "", f"{p99:.3f}")
    return report


def replay(path: Path, wanted: Sequence[str], num_groups: int) -> Report:
    report = Report(f"replay of {path}", ("trace", "policy", "schedulers", "hit ratio", "TTFT mean s", "p90 s", "p99 s"))
    runs = [simulate(policy, num, read_trace(path), 1, num_groups) for policy in wanted for num in (1, 2)]
    compare(report, "trace", runs)
    return report


def plot(report: Report, folder: Path) -> None:
    """Hit ratio and TTFT p99 of every policy, one picture each."""
    from matplotlib.figure import Figure

    for key, label in (("hit", "hit ratio"), ("ttft_p99_s", "TTFT p99, s")):
        figure = Figure(figsize=(11, 4), layout="constrained")
        for place, (suffix, title) in enumerate((("", "one scheduler"), ("_2schedulers", "two schedulers")), 1):
            axes = figure.add_subplot(1, 2, place, title=title, ylabel=label)
            drawn = [one for one in POLICIES if one == OURS or f"{one}_hit_30qps" in report.figures]
            for number, policy in enumerate(drawn):
                prefix = "" if policy == OURS else f"{policy}_"
                heights = [report.figures[f"{prefix}{key}_{name}{suffix}"] for name in WORKLOADS]
                axes.bar(
                    [at + 0.12 * (number - len(drawn) // 2) for at in range(len(heights))],
                    heights,
                    width=0.11,
                    label=policy.replace("_", " "),
                )
            axes.set_xticks(range(len(WORKLOADS)), [f"{name}, {one.num_tenants} tenants" for name, one in WORKLOADS.items()])
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(POLICIES))
        figure.savefig(folder / f"placement_{key}.png", dpi=110)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--seeds", type=int, default=NUM_RUNS, help="runs of each workload and policy")
    flags.add_argument("--policies", default=",".join(POLICIES), help="which to compare, comma separated")
    flags.add_argument("--plot", type=Path, metavar="FOLDER", help="also draw placement_hit.png and placement_ttft_p99_s.png there")
    flags.add_argument("--trace", type=Path, metavar="FILE", help="replay recorded traffic instead")
    flags.add_argument("--groups", type=int, default=8, help="groups for --trace")
    arguments = flags.parse_args()
    wanted = [name for name in arguments.policies.split(",") if name in POLICIES]
    if arguments.trace:
        finish(replay(arguments.trace, wanted, arguments.groups), arguments.json)
        return
    decisions, report = time_decisions(), compare_workloads(wanted, arguments.seeds)
    decisions.show()
    report.figures = {**decisions.figures, **report.figures}
    finish(report, arguments.json)
    if arguments.plot:
        plot(report, arguments.plot)


if __name__ == "__main__":
    main()
