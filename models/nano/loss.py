"""How well the network says what it should: as a loss to train by, and as right answers to look at."""

import math
from collections import Counter

import torch
from torch import Tensor
from torch.nn import functional

from models.nano.batches import Batch, draw_examples, make_batch
from models.nano.network import Network

NUM_NEGATIVES = 1024  # generated rows that stand for all of them in the softmax of a step


def compute_loss(network: Network, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(mean cross entropy of the targets over the whole vocabulary, unevenness).

    Trained rows and the targets' own count as they are; a sample stands for all other generated rows, with its logits raised by the log of
    how many each one stands for.
    """
    rows = batch.before_targets
    said, unevenness = network.forward(batch, rows)
    targets = batch.token_ids[rows + 1]
    own = network.row_of[targets]
    copied: Tensor = torch.unique(targets[own < 0])
    sample = network.other_ids[torch.randint(len(network.other_ids), (NUM_NEGATIVES,), generator=generator)]
    raised = math.log((len(network.other_ids) - len(copied)) / NUM_NEGATIVES)
    of_sample = (said @ network.generated[sample].T).float() + raised
    logits = (said @ network.rows.T).float(), (said @ network.generated[copied].T).float()
    labels = torch.where(own >= 0, own, len(network.rows) + torch.searchsorted(copied, targets))
    unlike_targets = of_sample.masked_fill(torch.isin(sample, copied), -torch.inf)
    return functional.cross_entropy(torch.cat((*logits, unlike_targets), 1), labels), unevenness


@torch.no_grad()
def count_right(network: Network, seed: str, num_conversations: int) -> tuple[Counter[str], Counter[str]]:
    """(right, all) held-out conversations by skill: right where each target is the likeliest of the whole vocabulary."""
    right, total = Counter[str](), Counter[str]()
    table = network.table().T
    for number in range(num_conversations):
        for example in draw_examples(f"{seed}/{number}", 1, is_held_out=True):
            batch = make_batch([example])
            rows = batch.before_targets
            hidden, _ = network.forward(batch, rows)
            total[example.skill] += 1
            right[example.skill] += bool(torch.equal((hidden @ table).argmax(-1), batch.token_ids[rows + 1]))
    return right, total
