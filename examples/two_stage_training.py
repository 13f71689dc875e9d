"""Two-stage training in small: rank-stabilized DoRA on answers that are often wrong, then GRPO on answers that are checked.

    python examples/two_stage_training.py --rounds 150

A language model has read lines such as `3,7=<5>`, of which three in ten have the larger digit in the brackets, which is right,
and the others any. In the first stage an adapter is shown lines of which a half are right. In the second it draws groups of
answers, and each is rewarded for being right and well formed, and pays for length and repetition. At the end it is folded.
"""

import argparse

import torch
import torch.nn.functional as F

from poise.adapt import fold
from poise.adapt.methods.gazal_r1 import Group, Reward, gazal_r1
from poise.models import GPT, GPTConfig
from poise.optim import AdamW

CONFIG = GPTConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=16,
)
PROMPT, ANSWER = 4, 5  # tokens of `3,7=`, and the most that an answer may have
REWARD = Reward(room=3)


def lines(count, right, generator):
    """Rows of `3,7=<7>.`, of which a share `right` has the larger digit in brackets, the others any."""
    a, b, other = torch.randint(10, (3, count), generator=generator)
    c = torch.where(torch.rand(count, generator=generator) < right, torch.maximum(a, b), other)
    return torch.tensor([list(f"{x},{y}=<{z}>.".encode()) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)])


def loss_of(model, rows):
    logits = model(rows[:, :-1])[:, PROMPT - 1 :]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, PROMPT:].flatten())


@torch.no_grad()
def drawn(model, prompts, generator):
    """The prompts, each with an answer of `ANSWER` tokens from the model."""
    rows = prompts
    for _ in range(ANSWER):
        chances = model(rows)[:, -1].softmax(-1)
        rows = torch.cat([rows, torch.multinomial(chances, 1, generator=generator)], 1)
    return rows


def judged(row):
    """The answer up to its full stop, and what it earns."""
    text = bytes(row.tolist()).decode("ascii")
    answer = text[PROMPT:].split(".")[0]
    wanted = f"<{max(text[0], text[2])}>"
    well_formed = len(answer) >= 3 and answer[0] == "<" and answer[-1] == ">" and "." in text
    return answer, REWARD(answer.encode(), answer == wanted, well_formed)


def group_of(model, answers, generator):
    """Answers to one prompt, rewarded."""
    prompt = lines(1, 1.0, generator)[:, :PROMPT]
    rows = drawn(model, prompt.expand(answers, -1), generator)
    found = [judged(row) for row in rows]
    ends = torch.tensor([len(answer) for answer, _ in found])

    def logp():
        logits = model(rows[:, :-1])[:, PROMPT - 1 :]
        return logits.log_softmax(-1).gather(2, rows[:, PROMPT:, None]).squeeze(2)

    mask = torch.arange(ANSWER) <= ends[:, None]  # the full stop is part of an answer
    return Group(torch.tensor([reward for _, reward in found]), logp, mask)


def accuracy(model, seed=123):
    """Share of answers that are right, of those the model draws."""
    generator = torch.Generator().manual_seed(seed)
    rows = lines(500, 1.0, generator)
    found = drawn(model, rows[:, :PROMPT], generator)
    return float((found[:, PROMPT : PROMPT + 4] == rows[:, PROMPT:]).all(1).float().mean())


def train(steps=200, rounds=150, answers=16, seed=0):
    """Accuracies of the base, after the first stage, and after both; the folded model."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = GPT(CONFIG)
    opt = AdamW(model, lr=3e-3)
    for _ in range(steps):
        opt.zero_grad()
        loss_of(model, lines(64, 0.3, generator)).backward()
        opt.step()
    found = [accuracy(model)]
    taught = (lambda: loss_of(model, lines(64, 0.5, generator)) for _ in range(steps))
    first = gazal_r1(model, taught, (), lambda model: AdamW(model, lr=3e-3), seed=seed)
    found.append(accuracy(model))
    groups = (lambda: group_of(model, answers, generator) for _ in range(rounds))
    second = gazal_r1(model, (), groups, lambda model: AdamW(model, lr=3e-4))
    found.append(accuracy(fold(model)))
    return found, first.losses, second.rewards


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=150)
    given = parser.parse_args()
    found, _, rewards = train(given.steps, given.rounds)
    for stage, share in zip(("base", "after answers", "after rewards"), found, strict=True):
        print(f"{stage:14}  right: {share:.1%}")
    tenth = max(1, len(rewards) // 10)
    print(f"mean reward, first and last tenth: {sum(rewards[:tenth]) / tenth:.3f}, {sum(rewards[-tenth:]) / tenth:.3f}")
