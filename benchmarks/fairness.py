"""One greedy tenant beside many modest ones, and twice the traffic that there is capacity for; simulated, with the production core.

Fairness: 150 tenants with prefixes of their own on 8 groups, 30 requests a second, as in benchmarks.placement. Then one more tenant sends
20 times as much as each of them, and in another run 150 requests a second, which is more than the groups can do. What counts is the others'
TTFT p99 against what it is without that tenant.

Overload: requests to two groups of gpt-oss-120b on one H200 each by the roofline, which must start within START_TIMEOUT_S, at half to twice
the capacity. Goodput is the answers' tokens a second of requests that started in time; capacity is what the groups finish when they always
have more to do.
"""

import statistics
from collections.abc import Iterator
from dataclasses import replace
from heapq import merge

from benchmarks.report import Report, finish, parser
from scheduler.sequence import GroupLimits
from scheduler.simulation.cluster import ClusterSpec, SimulatedCluster
from scheduler.simulation.outcome import Outcome
from scheduler.simulation.step_time import GPT_OSS_120B_H200, SerialPrefill
from scheduler.simulation.workload import Arrival
from scheduler.simulation.workloads import END_TOKEN_ID, Chats, SharedPrefixes
from services.errors import Overloaded
from services.prefix_hash import PrefixHasher, prefix_key

LIMITS = GroupLimits(16, 40_000, 6_000, 128, 131_072, 8192, max_num_seqs=64, eos_token_ids=frozenset({END_TOKEN_ID}))
TWO_GROUPS = ClusterSpec(2, LIMITS, GPT_OSS_120B_H200)
CHATS = Chats(
    rate_per_s=24.0,
    num_chats=360,
    num_tenants=20,
    system_tokens=1600,
    question_tokens=(300, 900),
    answer_tokens=(20, 180),
    num_turns=(1, 1),
)
GROUPS_WITH_PREFIXES = ClusterSpec(
    8, GroupLimits(16, 9632, 0, 0, 131_072, 8192, max_num_seqs=1, eos_token_ids=frozenset({END_TOKEN_ID})), SerialPrefill(20_000.0)
)
TENANTS = SharedPrefixes(30.0, num_tenants=150, num_requests=500)
GREEDY = "greedy"
GREEDY_RATES = {"none": 0.0, "20x": 20 * TENANTS.rate_per_s / TENANTS.num_tenants, "saturating": 150.0}
START_TIMEOUT_S = 2.0
OFFERED = (0.5, 0.8, 1.0, 1.5, 2.0)
OVERLOAD_S = 15.0


# ---- fairness ----


def with_greedy(rate_per_s: float, seed: int) -> Iterator[Arrival]:
    """The tenants, and one more at this rate for as long as they send."""
    others = list(TENANTS.arrivals(seed))
    if not rate_per_s:
        return iter(others)
    num_requests = round(rate_per_s * others[-1].at_s)
    alone = replace(TENANTS, rate_per_s=rate_per_s, num_tenants=1, num_requests=num_requests).arrivals(seed + 1000)
    return merge(others, map(belongs_to_greedy, alone), key=lambda one: one.at_s)


def belongs_to_greedy(arrival: Arrival) -> Arrival:
    request = arrival.request
    prefix = PrefixHasher(prefix_key(GREEDY, b""), 16, request.prompt_token_ids)
    return Arrival(arrival.at_s, replace(request, request_id=f"{GREEDY}-{request.request_id}", tenant=GREEDY, prefix=prefix))


def others_of(outcome: Outcome) -> Outcome:
    others = outcome.of(lambda one: one.request.tenant != GREEDY)
    assert all(one.is_answered for one in others.records), "one of the others was refused or cut short"
    return others


def measure_fairness(num_seeds: int) -> Report:
    report = Report(
        f"the others' TTFT p99 (medians of {num_seeds} seeds)", ("greedy tenant", "requests/s", "p99 s", "to without", "slowest s")
    )
    runs = {name: [others_of(run_fairness(rate, seed)) for seed in range(num_seeds)] for name, rate in GREEDY_RATES.items()}
    for name, rate in GREEDY_RATES.items():
        p99_s = statistics.median(one.ttft_s(0.99) for one in runs[name])
        ratio = statistics.median(one.ttft_s(0.99) / base.ttft_s(0.99) for one, base in zip(runs[name], runs["none"], strict=True))
        slowest_s = max(one.ttft_s(1.0) for one in runs[name])
        figures = {f"others_ttft_p99_s_{name}": p99_s, f"others_ttft_p99_ratio_{name}": ratio, f"others_ttft_max_s_{name}": slowest_s}
        report.add(name, f"{rate:g}", f"{p99_s:.3f}", f"{ratio:.2f}x", f"{slowest_s:.3f}", **figures)
    return report


def run_fairness(greedy_rate_per_s: float, seed: int) -> Outcome:
    return SimulatedCluster(GROUPS_WITH_PREFIXES, seed).run(with_greedy(greedy_rate_per_s, seed))


# ---- overload ----


def capacity_per_s() -> float:
    """Requests a second that the groups finish while they always have more to do; the first and last seconds are left out."""
    outcome = SimulatedCluster(TWO_GROUPS, 1).run(replace(CHATS, rate_per_s=400.0, num_chats=1600).arrivals(1))
    ends = sorted(one.ended_s for one in outcome.records if one.ended_s is not None)
    middle = ends[len(ends) // 4 : 3 * len(ends) // 4]
    return (len(middle) - 1) / (middle[-1] - middle[0])


def with_deadline(arrival: Arrival) -> Arrival:
    return Arrival(arrival.at_s, replace(arrival.request, start_deadline_s=arrival.at_s + START_TIMEOUT_S))


def run_overload(rate_per_s: float, seed: int) -> Outcome:
    workload = replace(CHATS, rate_per_s=rate_per_s, num_chats=round(rate_per_s * OVERLOAD_S))
    return SimulatedCluster(TWO_GROUPS, seed).run(map(with_deadline, workload.arrivals(seed)))


def started_share(outcome: Outcome) -> float:
    """Of the accepted, those whose first token came in time. Whatever was not accepted was told when to come again."""
    refused = [one for one in outcome.records if isinstance(one.error, Overloaded) and not one.group_ids]
    assert all(one.error and one.error.retry_after_s and one.ended_s == one.at_s + TWO_GROUPS.hop_s for one in refused), "not at once"
    return sum(one.first_token_s is not None and one.ttft_s <= START_TIMEOUT_S for one in outcome.records) / (
        len(outcome.records) - len(refused)
    )


def goodput(outcome: Outcome) -> float:
    """Tokens a second, over the time in which requests came and the answers to the last of them."""
    in_time = [one for one in outcome.records if one.is_answered and one.ttft_s <= START_TIMEOUT_S]
    return sum(len(one.token_ids) for one in in_time) / outcome.ended_s


def measure_overload(num_seeds: int) -> Report:
    capacity = capacity_per_s()
    columns = ("offered", "requests/s", "accepted", "started in time", "goodput tokens/s", "of peak")
    report = Report(f"offered load over capacity, {capacity:.1f} requests/s (medians of {num_seeds} seeds)", columns)
    runs = {offered: [run_overload(offered * capacity, seed) for seed in range(num_seeds)] for offered in OFFERED}
    goodputs = {offered: statistics.median(map(goodput, outcomes)) for offered, outcomes in runs.items()}
    for offered, outcomes in runs.items():
        accepted = statistics.median(sum(bool(one.group_ids) for one in run.records) / len(run.records) for run in outcomes)
        started, of_peak = statistics.median(map(started_share, outcomes)), goodputs[offered] / max(goodputs.values())
        name = f"{offered:g}x"
        figures = {
            f"accepted_ratio_{name}": accepted,
            f"started_in_time_ratio_{name}": started,
            f"goodput_tokens_per_s_{name}": goodputs[offered],
            f"goodput_of_peak_ratio_{name}": of_peak,
        }
        row = (f"{offered * capacity:.1f}", f"{accepted:.3f}", f"{started:.3f}", f"{goodputs[offered]:.0f}", f"{of_peak:.3f}")
        report.add(name, *row, **figures)
    return report


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--seeds", type=int, default=5)
    arguments = flags.parse_args()
    fairness, report = measure_fairness(arguments.seeds), measure_overload(arguments.seeds)
    fairness.show()
    report.figures = {**fairness.figures, **report.figures}
    finish(report, arguments.json)


if __name__ == "__main__":
    main()
