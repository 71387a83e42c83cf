"""Trains the demonstration model from nothing but this repository: the text is generated, the seed decides everything.

    python -m models.nano.train --folder build/nano

Two processes of one thread each share every step, so that a busy machine slows them little. Training stops early after `--minutes`, and
goes on from the last checkpoint in the folder when it is called again.
"""

import argparse
import json
import math
import multiprocessing
import sys
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from models.nano.alike_rows import add_other_spellings, other_spellings
from models.nano.batches import draw_batch, draw_examples
from models.nano.deepen import deepen
from models.nano.export import import_compact
from models.nano.loss import compute_loss, count_right
from models.nano.network import Network
from models.nano.optimizer import Muon
from models.nano.spec import SPEC

ROW_SAMPLE, ROW_MIN_COUNT = 10_000, 8  # an id gets a row of its own if it comes up in so many of so many conversations
WARMUP_STEPS, DECAY_SHARE = 40, 0.7
ROW_EPSILON = 1e-6  # most gradients of rows in the batch are above it, of others below 1e-7: with Adam's 1e-8 these would move too
COPYING_RATE, MATRIX_RATE, ROW_RATE, REST_RATE = 0.005, 0.010, 0.002, 0.001  # copying: attention of the first two layers
DRILLS_UNTIL, LEAST_DRILLS = 0.06, 0.15  # of all steps, and what is left of them later
SHORT_UNTIL, LEAST_SHORT = 0.28, 0.2
UNEVENNESS_WEIGHT = 0.01
CHECKPOINT_EVERY, EVALUATE_EVERY, LOG_EVERY = 100, 200, 10
END_TIMEOUT_S = 60


@dataclass(frozen=True)
class TrainConfig:
    steps: int
    minutes: float
    tokens: int  # of each rank in a step, at least
    held_out: int  # conversations to look at now and then
    seed: int
    folder: Path
    ranks: int
    initial: Path | None  # whose weights are the beginning: a checkpoint, or a compact model
    rate: float  # the highest, as a share of the full rates


class Trainer:
    """One rank's part of the training. All ranks hold equal weights after every step."""

    def __init__(self, config: TrainConfig, rank: int) -> None:
        self.config, self.rank = config, rank
        self.step = 0
        self.file = config.folder / f"state.{rank}.pt"
        begun = torch.load(self.file) if self.file.exists() else None
        initial = begun or (read_weights(config.initial) if config.initial else None)
        self.rows_seed = initial["seed"] if initial else config.seed  # other generated rows would have to be learned again
        self.network = Network(initial["row_ids"].tolist() if initial else choose_rows(config.seed), self.rows_seed)
        self.masters = self.network.masters()
        if initial:
            self.masters = {name: initial["masters"][name] for name in self.masters}  # in the order of the network's
        matrices = {name: master for name, master in self.masters.items() if is_matrix(name)}
        self.owners = {name: owner_of(name, config.ranks) for name in matrices}
        self.muon = Muon((name, matrix) for name, matrix in matrices.items() if self.owners[name] == rank)
        others = [master for name, master in self.masters.items() if name != "rows" and not is_matrix(name)]
        groups = [{"params": [self.masters["rows"]], "rate": ROW_RATE, "eps": ROW_EPSILON}, {"params": others, "rate": REST_RATE}]
        self.adam = torch.optim.Adam(groups, betas=(0.9, 0.95))
        if begun:
            self.step = begun["step"]
            self.adam.load_state_dict(begun["adam"])
            for name, momentum in begun["muon"].items():
                self.muon.state[name].copy_(momentum)
        self.network.ship(self.masters)

    def train(self) -> None:
        began, tokens = time.monotonic(), 0
        while self.step < self.config.steps and time.monotonic() - began < 60 * self.config.minutes:
            loss, num_tokens = self._step()
            tokens += num_tokens
            self.step += 1
            if self.step % LOG_EVERY == 0:
                elapsed_s = time.monotonic() - began
                self._tell(f"loss {loss:.4f} rate {self._rate():.3f} tokens/s {tokens / elapsed_s:.0f} minutes {elapsed_s / 60:.1f}")
            if self.step % EVALUATE_EVERY == 0:
                self._evaluate()
            if self.step % CHECKPOINT_EVERY == 0:
                self._save()
        self._evaluate()
        self._save()

    def _step(self) -> tuple[float, int]:
        """(this rank's loss, all ranks' tokens, about)"""
        seed = f"{self.config.seed}/train/{self.step}"
        batch = draw_batch(seed, self.config.tokens, self._drill_share(), self._short_share(), self.rank, self.config.ranks)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step * 64 + self.rank)
        self.network.zero_grad()
        loss, unevenness = compute_loss(self.network, batch, generator)
        torch.autograd.backward(loss + UNEVENNESS_WEIGHT * unevenness)
        self._average_gradients()
        rate = self._rate()
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * rate
        self.adam.step()
        self.muon.step({name: rate_of(name) * rate for name in self.muon.matrices})
        for name, owner in self.owners.items():
            dist.broadcast(self.masters[name], owner)
        self.network.ship(self.masters)
        return loss.item(), len(batch.token_ids) * self.config.ranks

    def _average_gradients(self) -> None:
        parameters = list(self.network.parameters())
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
        flat = torch.cat([gradient.flatten().float() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.config.ranks
        parts = torch.split(flat, [one.numel() for one in parameters])
        for master, part in zip(self.masters.values(), parts, strict=True):
            master.grad = part.view(master.shape)

    def _drill_share(self) -> float:
        """All at first, then less and less."""
        return max(LEAST_DRILLS, self._left_after(DRILLS_UNTIL))

    def _short_share(self) -> float:
        """All at first, where every token of a short conversation teaches more."""
        return max(LEAST_SHORT, self._left_after(SHORT_UNTIL))

    def _left_after(self, share: float) -> float:
        """1 in this share of all steps, and less in a line to nothing in as many again; nothing after another course."""
        return 0.0 if self.config.initial else min(1.0, 2 - self.step / (share * self.config.steps))

    def _rate(self) -> float:
        """Share of the full rates: up within the first steps, level, then down in a line to nothing."""
        left = (self.config.steps - self.step) / (DECAY_SHARE * self.config.steps)
        return self.config.rate * min(1.0, (self.step + 1) / WARMUP_STEPS, left)

    def _evaluate(self) -> None:
        counted = count_right(self.network, f"held-out/{self.rank}", self.config.held_out // self.config.ranks)
        gathered = [counted] * self.config.ranks
        dist.all_gather_object(gathered, counted)
        right, total = (sum((one[at] for one in gathered), Counter[str]()) for at in (0, 1))
        shares = {skill: f"{right[skill]}/{total[skill]}" for skill in sorted(total)}
        self._tell(f"held out {right.total() / total.total():.3f} {json.dumps(shares)}")

    def _tell(self, line: str) -> None:
        if self.rank == 0:
            print(f"step {self.step} {line}", flush=True)

    def _save(self) -> None:
        weights = {"masters": self.masters, "row_ids": self.network.row_ids, "seed": self.rows_seed}
        unfinished = self.file.with_suffix(".tmp")
        torch.save({**weights, "step": self.step, "adam": self.adam.state_dict(), "muon": self.muon.state}, unfinished)
        unfinished.replace(self.file)


def choose_rows(seed: int) -> list[int]:
    """The ids that come up often in the training text, and other spellings of their words."""
    counts = Counter[int]()
    for number in range(ROW_SAMPLE):
        for example in draw_examples(f"{seed}/rows/{number}", 1):
            counts.update({*example.prefix, *example.token_ids})
    frequent = sorted(token_id for token_id, count in counts.items() if count >= ROW_MIN_COUNT)
    return sorted({*frequent, *other_spellings(frequent)})


def read_weights(file: Path) -> dict[str, Any]:
    """Another course's end as this one's beginning: with as many layers as there are now, and rows for all spellings."""
    given = import_compact(file) if file.suffix == ".safetensors" else torch.load(file)
    masters = deepen(given["masters"], SPEC.num_hidden_layers)
    row_ids, masters["rows"] = add_other_spellings(given["row_ids"].tolist(), masters["rows"], given["seed"])
    return {"masters": masters, "row_ids": torch.tensor(row_ids), "seed": given["seed"]}


def is_matrix(name: str) -> bool:
    return name.endswith(("proj.weight", "_proj"))


def rate_of(name: str) -> float:
    """What can copy from the beginning changes slowly, lest it is lost before it is needed."""
    return COPYING_RATE if name.startswith(("layers.0.self_attn", "layers.1.self_attn")) else MATRIX_RATE


def owner_of(name: str, num_ranks: int) -> int:
    """The rank that moves this matrix; a layer has one owner."""
    return int(name.split(".")[1]) % num_ranks


def start_rank(rank: int, config: TrainConfig) -> None:
    """The whole life of a process: what it sets holds for all that runs there."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    run_rank(rank, config)


def run_rank(rank: int, config: TrainConfig) -> None:
    rendezvous = config.folder.absolute() / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=config.ranks)
    Trainer(config, rank).train()
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many, to go on another time")
    parser.add_argument("--tokens", type=int, default=3200, help="of each rank in a step, at least")
    parser.add_argument("--held-out", type=int, default=240, help="conversations to look at now and then")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("build/nano"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--initial", type=Path, help="an earlier course's checkpoint, or the model that was made of it")
    parser.add_argument("--rate", type=float, default=1.0, help="the highest, as a share of the full rates; less after another course")
    config = TrainConfig(**vars(parser.parse_args()))
    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / "rendezvous").unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=start_rank, args=(rank, config)) for rank in range(config.ranks)]
    for process in ranks:
        process.start()
    wait([process.sentinel for process in ranks])  # whether it is done or broken: the others end with it
    for process in ranks:
        process.join(END_TIMEOUT_S)
        process.terminate()
    return max(abs(process.exitcode or 0) for process in ranks)


if __name__ == "__main__":
    sys.exit(main())
