"""The page of weighed adapters: it is what its JSON files say, and no adapter is missing. What MiniLM is trained on."""

from __future__ import annotations

from types import SimpleNamespace

import adapters
import glosses
import pytest
import torch
from adapting.claims import CLAIMS, claims, forgets_less
from adapting.forgetting import BASE, forgotten, read
from adapting.page import page
from adapting.studies import STUDIES, weighed
from torch import nn

from poise import catalog
from poise.compare import Results
from poise.compare.entries import parse

NOUNS = """\
  1 This line is of the licence, not of a word.
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived or known or inferred to have its own existence
00002684 03 n 02 object 0 physical_object 0 0 | a tangible and visible entity; an entity that can cast a shadow; "it was full \
of rackets, balls and other objects"
00005787 03 n 01 benthos 0 0 | organisms; "there were many of them there"
00006484 03 n 01 cell 2 0 | the basic structural unit of all organisms; "a cell"; "they may exist as independent units of life"
"""


def test_the_page_is_what_the_results_say() -> None:
    found = {name: Results.read(adapters.file(adapters.DOCS, name)) for name in STUDIES}
    assert (adapters.DOCS / "adapters.md").read_text(encoding="utf-8") == page(
        found, read(adapters.DOCS / "adapters-forgetting.json")
    )
    for name, results in found.items():
        study = STUDIES[name]
        assert [one.name for one in results.methods] == list(parse(",".join(study.methods)))
        assert results.settings.trials == study.trials and results.settings.seeds == study.seeds
        assert results.settings.steps == study.steps and results.settings.tune_steps == study.tune_steps


def test_every_adapter_is_weighed_or_it_is_said_why_not() -> None:
    known = {method.name for method in catalog.methods("adapt")}
    apart = {claim.method for claim in CLAIMS if claim.judge is None and claim.why}
    for study in STUDIES.values():
        assert weighed(study) <= known and known - weighed(study) <= apart


def test_pairs_are_a_long_sentence_and_the_meaning_of_the_noun_in_it() -> None:
    assert glosses.pairs_of(NOUNS) == [
        (
            "it was full of rackets, balls and other objects",
            "a tangible and visible entity; an entity that can cast a shadow",
        ),
        ("they may exist as independent units of life", "the basic structural unit of all organisms"),
    ]


def test_what_is_said_of_padding_does_not_count() -> None:
    class Says(nn.Module):
        """Of token t the vector (t, 1), and of what is padding a large one."""

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
            said = torch.stack([input_ids.float(), torch.ones_like(input_ids, dtype=torch.float32)], dim=-1)
            return SimpleNamespace(last_hidden_state=torch.where(attention_mask[..., None] == 1, said, 1e6))

    batch = glosses.padded([([1, 2], [6]), ([4], [3, 3, 3])])
    assert batch["input_ids"].tolist() == [[1, 2, 0], [4, 0, 0], [6, 0, 0], [3, 3, 3]]
    means = torch.tensor([[1.5, 1.0], [4.0, 1.0], [6.0, 1.0], [3.0, 1.0]])
    assert torch.allclose(glosses.embedded(Says(), batch), means / means.norm(dim=-1, keepdim=True))


def test_the_loss_is_that_of_choosing_ones_own_meaning() -> None:
    angles = torch.tensor([0.0, 1.0, 0.1, 1.3])

    class Embeds(nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
            angle = angles[input_ids]
            return SimpleNamespace(last_hidden_state=torch.stack([angle.cos(), angle.sin()], dim=-1))

    batch = glosses.padded([([0], [2]), ([1], [3])])
    likely = (20 * (angles[:2, None] - angles[None, 2:]).cos()).log_softmax(-1)
    task = object.__new__(glosses.Glosses)  # without the files that its texts come from
    assert torch.allclose(task.loss(Embeds(), batch), -likely.diagonal().mean())


def test_a_meaning_is_in_one_split() -> None:
    parts = [glosses.part(f"meaning {i}") for i in range(1000)]
    assert parts == [glosses.part(f"meaning {i}") for i in range(1000)]
    assert 750 < parts.count("train") < 850 and min(parts.count("tune"), parts.count("report")) > 70


def test_less_is_forgotten_where_the_loss_of_before_rises_less_on_every_seed() -> None:
    losses = {BASE: [1.2], "a": [1.5, 1.6, 1.4], "b": [1.3, 1.4, 1.2], "c": [1.5, 1.5, 1.5]}
    assert forgotten(losses, "b") == pytest.approx([0.1, 0.2, 0.0])
    results = Results.read(adapters.file(adapters.DOCS, "python_to_prose"))
    outcomes = {pair: forgets_less(*pair, losses)(results).outcome for pair in (("b", "a"), ("a", "b"), ("a", "c"))}
    assert outcomes == {("b", "a"): "held", ("a", "b"): "contradicted", ("a", "c"): "not seen"}
    diverged = forgets_less("a", "b", {**losses, "a": [1.5, None, 1.4]})(results)
    assert diverged.outcome == "not judged"
    known = {claim.method: claim for claim in claims({})}
    assert known["kappatune"].judge is None and known["kappatune"].why
