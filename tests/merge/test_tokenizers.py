"""Vocabularies: whose tokens the result has, and whose rows they get."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merge.folders import config, model, tensors, tokenizer, vocabulary
from poise.checkpoint import CheckpointError
from poise.merge import merge
from poise.merge.embeddings import mapped_rows
from poise.merge.merger import Merger
from poise.merge.merging import Merged, run
from poise.merge.recipe import Token, Tokenizer, parse

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = ["<unk>", "one", "two", "three"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """base: four words. chat: they and two tokens of a chat. other: they in another order, one of the two, one more."""
    for name, rows, words, added in (
        ("base", 4, WORDS, {}),
        ("chat", 6, WORDS, {"<start>": 4, "<end>": 5}),
        ("other", 8, ["<unk>", "three", "one", "two"], {"<start>": 4, "<more>": 5, "<unused>": 9}),
    ):
        model(tmp_path / name, rows, vocab_size=rows, num_hidden_layers=1)
        tokenizer(tmp_path / name, words, added)
    return tmp_path


def of(folder: Path, tensor: str = EMBEDDING) -> dict[str, Tensor]:
    """The row of every token of a folder."""
    rows = tensors(folder)[tensor]
    return {token: rows[number] for token, number in vocabulary(folder).items() if number < len(rows)}


def same(found: Tensor, *wanted: Tensor) -> bool:
    return torch.allclose(found, sum(wanted, torch.zeros(())) / len(wanted), atol=1e-6)


def test_a_union_has_every_token_with_rows_by_their_text(folder: Path, tmp_path: Path) -> None:
    models = [folder / name for name in ("base", "chat", "other")]
    found = merge(models, base=models[0], tokenizer="union", out=tmp_path / "out")
    assert isinstance(found, Merged) and found.broken == ()
    ids = vocabulary(tmp_path / "out")
    assert ids == {"<unk>": 0, "one": 1, "two": 2, "three": 3, "<start>": 4, "<end>": 5, "<more>": 6}
    for tensor in (EMBEDDING, HEAD):
        out, base, chat, other = (of(place, tensor) for place in (tmp_path / "out", *models))
        for word in WORDS:
            assert same(out[word], base[word], chat[word], other[word])
        # The base has none of these: its row is the only one there is, or the mean of those that there are.
        assert same(out["<end>"], chat["<end>"]) and same(out["<more>"], other["<more>"])
        assert same(out["<start>"], chat["<start>"], other["<start>"])
    assert tensors(tmp_path / "out")[EMBEDDING].shape == (7, 16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 7


def test_what_a_model_lacks_is_the_bases(folder: Path) -> None:
    text = f"""
merge_method: linear
base_model: {folder}/chat
models: [{{model: {folder}/chat}}, {{model: {folder}/other}}, {{model: {folder}/base}}]
tokenizer_source: union
"""
    work = Merger(parse(text))
    (line,) = [line for line in work.plan.lines if line.name == EMBEDDING]
    rows = [work.read(part, 0, 7) for part in line.parts]
    chat, other = of(folder / "chat"), of(folder / "other")
    assert torch.equal(rows[0][4], chat["<start>"]) and torch.equal(rows[1][4], other["<start>"])
    assert torch.equal(rows[2][4], chat["<start>"])  # and not the mean
    assert torch.equal(rows[0][6], other["<more>"]) and torch.equal(rows[1][1], other["one"])


def test_the_bases_vocabulary_keeps_its_rows(folder: Path, tmp_path: Path) -> None:
    models = [folder / "chat", folder / "other"]
    merge(models, "task_arithmetic", base=folder / "base", tokenizer="base", weight=0.5, out=tmp_path / "out")
    out, chat, other = of(tmp_path / "out"), of(folder / "chat"), of(folder / "other")
    assert list(out) == WORDS and all(same(out[word], chat[word], other[word]) for word in WORDS)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "base" / "tokenizer.json").read_bytes()


def test_a_models_vocabulary_comes_with_its_files_and_numbers(folder: Path, tmp_path: Path) -> None:
    config(folder / "base", eos_token_id=1)
    config(folder / "chat", eos_token_id=5)
    (folder / "chat" / "generation_config.json").write_text('{"eos_token_id": 5}')
    (folder / "base" / "generation_config.json").write_text('{"eos_token_id": 1}')
    merge([folder / "base", folder / "chat"], tokenizer=str(folder / "chat"), out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 5
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 5
    assert vocabulary(tmp_path / "out") == vocabulary(folder / "chat")


def test_tokens_beyond_the_embedding_are_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "other" / "vocab.txt").write_text("stale")
    merge([folder / "other"], tokenizer="base", out=tmp_path / "out")
    assert "<unused>" not in vocabulary(tmp_path / "out") and "<more>" in vocabulary(tmp_path / "out")
    assert tensors(tmp_path / "out")[EMBEDDING].shape[0] == 6  # and rows without tokens are too
    assert not (tmp_path / "out" / "vocab.txt").exists()


def test_pairs_of_tokens_that_are_left_out_are_too(folder: Path, tmp_path: Path) -> None:
    file = folder / "base" / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree["model"] = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3, "bc": 4}, "merges": [["a", "b"], "b c", "ab c"]}
    file.write_text(json.dumps(tree))
    merge([folder / "base"], tokenizer="base", out=tmp_path / "out")
    model = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]
    assert model["vocab"] == {"a": 0, "b": 1, "ab": 2, "c": 3} and model["merges"] == [["a", "b"], "ab c"]


def test_single_tokens_are_what_the_recipe_says(folder: Path, tmp_path: Path) -> None:
    text = f"""
merge_method: linear
models: [{{model: {folder}/base}}, {{model: {folder}/chat}}, {{model: {folder}/other}}]
tokenizer:
  source: union
  pad_to_multiple_of: 8
  tokens:
    <start>: {{source: {folder}/other}}
    three: {{source: {folder}/chat, force: true}}
    <new>: {{source: {{kind: model_token, model: {folder}/base, token: two}}}}
    <more>: {{source: {{kind: model_token, model: {folder}/chat, token_id: 5}}, force: true}}
    <none>: {{source: {{kind: zero}}}}
"""
    run(Merger(parse(text)), tmp_path / "out")
    out, base, chat, other = (of(place) for place in (tmp_path / "out", *(folder / n for n in ("base", "chat", "other"))))
    assert same(out["<start>"], other["<start>"], chat["<start>"], other["<start>"])
    assert same(out["three"], chat["three"]) and same(out["<new>"], base["two"]) and same(out["<more>"], chat["<end>"])
    assert not out["<none>"].any()
    rows = tensors(tmp_path / "out")[EMBEDDING]
    assert len(rows) == 16 and len(out) == 9
    torch.testing.assert_close(rows[9:], rows[:9].mean(0).expand(7, -1))


def test_rows_do_not_hang_on_where_they_are_cut(folder: Path) -> None:
    wanted = Tokenizer("union", {"<none>": Token()}, 8)
    for name in ("base", "chat"):
        text = f"merge_method: linear\nmodels: [{{model: {folder}/{name}}}, {{model: {folder}/other}}]\n"
        text += "tokenizer: {source: union, pad_to_multiple_of: 8, tokens: {<none>: {source: {kind: zero}}}}\n"
        merger = Merger(parse(text))
        assert merger.recipe.tokenizer == wanted
        maps = merger.planner.maps
        assert maps is not None
        for i, rows in enumerate(maps):
            whole = mapped_rows(merger.parents, i, EMBEDDING, rows, 0, 8)
            for step in (1, 3):
                cut = [mapped_rows(merger.parents, i, EMBEDDING, rows, s, min(s + step, 8)) for s in range(0, 8, step)]
                assert torch.equal(torch.cat(cut), whole)


@pytest.mark.hf
def test_transformers_reads_a_union_as_it_was_meant(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merge([folder / name for name in ("base", "chat", "other")], tokenizer="union", out=tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found("one <start> two<more><end> three")["input_ids"] == [1, 4, 2, 6, 5, 3]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_input_embeddings().weight.shape == (7, 16)


def test_a_tied_embedding_is_put_in_order_once(tmp_path: Path) -> None:
    for seed, words in enumerate((WORDS, ["<unk>", "three", "one", "two"])):
        model(tmp_path / str(seed), seed, vocab_size=4, num_hidden_layers=1, tie_word_embeddings=True)
        tokenizer(tmp_path / str(seed), words, {})
    merge([tmp_path / "0", tmp_path / "1"], tokenizer="base", out=tmp_path / "out")
    out, one, two = (of(tmp_path / name) for name in ("out", "0", "1"))
    assert all(same(out[word], one[word], two[word]) for word in WORDS) and HEAD not in tensors(tmp_path / "out")


def test_a_model_without_tokenizer_is_taken_to_have_the_bases_if_it_is_as_large(folder: Path, tmp_path: Path) -> None:
    model(tmp_path / "bare", 9, vocab_size=4, num_hidden_layers=1)
    (tmp_path / "bare" / "tokenizer.json").unlink(missing_ok=True)
    found = merge([folder / "base", tmp_path / "bare"], tokenizer="base", out=tmp_path / "out")
    assert isinstance(found, Merged) and any("has none, and is taken to have the base's" in note for note in found.notes)
    with pytest.raises(CheckpointError, match=r"bare: has no tokenizer, and 4 rows where the base has 6 tokens"):
        merge([folder / "chat", tmp_path / "bare"], tokenizer="base")
    with pytest.raises(CheckpointError, match=r"bare: has no tokenizer; tokenizer.source needs a model with tokenizer.json"):
        merge([tmp_path / "bare", folder / "chat"], tokenizer="base")
    (tmp_path / "bare" / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"tokens are in tokenizer.model only, which is not read; AutoTokenizer"):
        merge([folder / "base", tmp_path / "bare"], tokenizer="base")


def test_tokens_that_a_model_does_not_have_are_named(folder: Path) -> None:
    for asked, message in (("token: <what>", "has no token '<what>'"), ("token_id: 6", "has rows 0 to 5, not 6")):
        recipe = parse(f"""
merge_method: linear
models: [{{model: {folder}/base}}, {{model: {folder}/chat}}]
tokenizer: {{tokens: {{<new>: {{source: {{kind: model_token, model: {folder}/chat, {asked}}}}}}}}}
""")
        with pytest.raises(ValueError, match=rf"tokenizer.tokens.<new>: .*{re.escape(message)}"):
            Merger(recipe)


def test_the_chat_template_is_most_models_or_a_name_or_its_text(folder: Path, tmp_path: Path) -> None:
    for name, text in (("base", "{{ 1 }}"), ("chat", "{{ 2 }}"), ("other", "{{ 2 }}")):
        tokenizer(folder / name, WORDS, {}, chat_template=text)
    (folder / "other" / "chat_template.jinja").write_text("{{ 2 }}\n")  # where newer transformers keep it

    def written(template: str | None) -> tuple[str, str | None]:
        models = [folder / name for name in ("base", "chat", "other")]
        merge(models, chat_template=template, common_rows=True, out=tmp_path / "out", fresh=True)
        file = tmp_path / "out" / "chat_template.jinja"
        known = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"]
        return known, file.read_text() if file.exists() else None

    assert written(None) == ("{{ 1 }}", None)
    assert written("auto") == ("{{ 2 }}", "{{ 2 }}")
    assert written("{{ x }}") == ("{{ x }}", "{{ x }}")
    assert "<|im_start|>" in written("chatml")[0]
    with pytest.raises(ValueError, match="chat_template: 'nothing' must be auto, chatml, or a template"):
        written("nothing")
