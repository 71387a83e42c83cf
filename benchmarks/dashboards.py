"""Draws the docs' dashboards from a cluster on this machine: two scripted groups under a load that rises and falls, scraped by a real
Prometheus.
"""

import argparse
import os
import random
import tempfile
import time
from pathlib import Path

from benchmarks.streams import streaming_in_thread
from deploy.grafana.plot import plot
from tests.cluster.local_cluster import LocalCluster
from tests.fakes.prometheus_server import prometheus_server

DRAWN = ("overview", "kv", "latency", "cost")
WAVES = (4, 24, 48, 8)  # clients at once, one after the other
MODELS = "models:\n  scripted:\n    price: {input: 0.15, cached_input: 0.05, output: 0.60}\n"
SCRIPT = 'default: "<|channel|>analysis<|message|>Let me think.<|end|><|start|>assistant<|channel|>final<|message|>{words}"\n'


def bodies() -> list[dict[str, object]]:
    """Ten conversations that begin alike, and answers of many lengths."""
    draw = random.Random(1)
    shared = "You answer questions about the sea. " * 40
    return [
        {
            "model": "scripted",
            "messages": [
                {"role": "system", "content": shared * draw.randint(1, 6)},
                {"role": "user", "content": f"Question {number % 10}"},
            ],
            "max_tokens": draw.choice([20, 100, 300]),
        }
        for number in range(200)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--wave-s", type=float, default=15.0, help="seconds of each wave")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        (home / "models.yaml").write_text(MODELS)
        (home / "script.yaml").write_text(SCRIPT.format(words=" ".join(map(str, range(300)))))
        os.environ["OSSIA_EDGE_MODELS_FILE"] = str(home / "models.yaml")
        flags = ("--groups", "2", "--backend", "scripted", "--script", str(home / "script.yaml"), "--step-ms", "5")
        timing = ("--prefill-token-ms", "0.02", "--sequence-ms", "0.1", "--num-full-blocks", "1200", "--num-window-blocks", "800")
        with LocalCluster(home, *flags, *timing, tls=True) as cluster:
            jobs: dict[str, list[str]] = {}
            for process, facts in cluster.state.items():
                jobs.setdefault(f"ossia-{process.partition('-')[0]}", []).append(facts["metrics"])
            with prometheus_server(home, jobs) as prometheus:
                for num_clients in WAVES:
                    with streaming_in_thread(lambda: cluster.url, bodies(), num_clients) as tally:
                        time.sleep(arguments.wave_s)
                    print(f"{num_clients} clients: {tally.num_finished} streams finished, {len(tally.broken)} broken")
                for path in plot(prometheus.url, arguments.out, len(WAVES) * arguments.wave_s + 5, "5s", DRAWN):
                    print(path)


if __name__ == "__main__":
    main()
