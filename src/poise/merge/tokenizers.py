"""Tokenizers without their library: vocabularies out of `tokenizer.json`, the union of several, what is written for the result.

In a union the tokens of other models become added tokens of the base's tokenizer, as with mergekit: they are found in text
before its own pieces are. Numbers of the base's tokens stay; the others follow, in the order of the recipe's models.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poise.checkpoint import CheckpointError

from .recipe import Reference, Tokenizer

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
# Files that hold the tokens in older forms, and would contradict a tokenizer.json that was changed.
OLDER = (
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
FILES = (TOKENIZER, CONFIG, TEMPLATE, "special_tokens_map.json", "chat_template.json", "generation_config.json", *OLDER)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML}
NAMED = ("alpaca", "llama3", "mistral", "exaone")  # mergekit carries these too


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one model.

    Attributes:
        ids: text -> number, of those that the embedding has rows for.
        added: text -> entry of `added_tokens`.
        tree: the content of tokenizer.json.
        dropped: tokens that the embedding has no rows for.
    """

    folder: Path
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    tree: Mapping[str, Any]
    dropped: frozenset[str]


def load(folder: Path, size: int | None) -> Vocabulary | None:
    """The vocabulary of a model's folder, without what is beyond an embedding of `size` rows; None if it has no tokenizer."""
    file = folder / TOKENIZER
    if not file.is_file():
        older = [name for name in OLDER if (folder / name).is_file()]
        if not older:
            return None
        cure = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(...) of transformers writes {TOKENIZER}"
        raise CheckpointError(f"tokens are in {older[0]} only, which is not read", cure=cure, file=folder)
    tree = read(file)
    model = tree.get("model") or {}
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        ids = dict(vocab)
    elif isinstance(vocab, list):
        ids = {entry[0]: number for number, entry in enumerate(vocab)}
    else:
        raise CheckpointError("holds no vocabulary", cure="save the tokenizer again", file=file)
    added = {entry["content"]: entry for entry in tree.get("added_tokens") or []}
    config = folder / CONFIG
    decoder = read(config).get("added_tokens_decoder") or {} if config.is_file() else {}
    for number, entry in decoder.items():
        if entry["content"] not in ids:
            added.setdefault(entry["content"], {"id": int(number), **entry})
    ids |= {text: entry["id"] for text, entry in added.items()}
    dropped = frozenset() if size is None else frozenset(text for text, number in ids.items() if number >= size)
    kept = {text: number for text, number in ids.items() if text not in dropped}
    return Vocabulary(folder, kept, {text: entry for text, entry in added.items() if text not in dropped}, tree, dropped)


def read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", cure="copy it again from where it came", file=file) from None


@dataclass(frozen=True)
class Target:
    """The tokenizer of the result.

    Attributes:
        owner: number of the model whose files it is made from.
        ids: text -> number.
        rows: of its embedding.
        new: entries of `added_tokens` that the owner does not have.
    """

    owner: int
    vocabulary: Vocabulary
    ids: Mapping[str, int]
    rows: int
    new: tuple[Mapping[str, Any], ...]

    @property
    def changed(self) -> bool:
        return bool(self.new or self.vocabulary.dropped)


def target(wanted: Tokenizer, base: int, references: Sequence[Reference], known: Sequence[Vocabulary | None]) -> Target:
    """What a recipe asks for.

    Args:
        base: number of the model that "base" and "union" start from.
        known: the vocabulary of each of `references`.

    Raises:
        CheckpointError: if the one that is asked for has no tokenizer.
    """
    owner = references.index(wanted.source) if isinstance(wanted.source, Reference) else base
    found = known[owner]
    if found is None:
        cure = f"tokenizer.source needs a model with {TOKENIZER}"
        raise CheckpointError("has no tokenizer", cure=cure, file=str(references[owner]))
    new: dict[str, Mapping[str, Any]] = {}
    if wanted.source == "union":
        for other in known:
            for text in () if other is None else sorted(other.ids, key=other.ids.__getitem__):
                assert other is not None
                if text not in found.ids and text not in new:
                    new[text] = other.added.get(text, plain(text))
    for text in wanted.tokens:
        if text not in found.ids and text not in new:
            new[text] = plain(text)
    number = max(found.ids.values(), default=-1) + 1
    entries = tuple({**entry, "id": number + i} for i, entry in enumerate(new.values()))
    ids = {**found.ids, **{entry["content"]: entry["id"] for entry in entries}}
    rows = number + len(entries)
    multiple = wanted.pad_to_multiple_of or 1
    return Target(owner, found, ids, -(-rows // multiple) * multiple, entries)


def plain(text: str) -> dict[str, Any]:
    """A token as the tokenizers library adds it when it is told no more than its text."""
    return {"content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


def changed_tree(target: Target) -> dict[str, Any]:
    """The content of tokenizer.json, without the tokens that were dropped and with the new ones."""
    gone = target.vocabulary.dropped
    tree = json.loads(json.dumps(target.vocabulary.tree))
    model = tree["model"]
    if gone:
        if isinstance(model["vocab"], list):
            model["vocab"] = [entry for entry in model["vocab"] if entry[0] not in gone]
        else:
            model["vocab"] = {text: number for text, number in model["vocab"].items() if text not in gone}
        if model.get("merges"):
            pairs = [(pair, pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
            model["merges"] = [pair for pair, parts in pairs if not {*parts, "".join(parts)} & gone]
    kept = [entry for entry in tree.get("added_tokens") or [] if entry["content"] not in gone]
    known = {entry["content"] for entry in kept}
    of_config = [entry for text, entry in target.vocabulary.added.items() if text not in known]
    tree["added_tokens"] = [*kept, *({**plain(entry["content"]), **entry} for entry in (*of_config, *target.new))]
    return tree


def write(target: Target, folder: Path) -> dict[str, Path]:
    """The files of the result's tokenizer: name -> where it lies. What is changed is written into `folder`."""
    source = target.vocabulary.folder
    files = {name: source / name for name in FILES if (source / name).is_file()}
    if not target.changed:
        return files
    for name in OLDER:
        files.pop(name, None)
    files[TOKENIZER] = save(folder / TOKENIZER, changed_tree(target))
    if CONFIG in files:
        config = read(files[CONFIG])
        if isinstance(decoder := config.get("added_tokens_decoder"), dict):
            kept = {number: entry for number, entry in decoder.items() if entry["content"] not in target.vocabulary.dropped}
            new = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in target.new}
            config["added_tokens_decoder"] = kept | new
        files[CONFIG] = save(folder / CONFIG, config)
    return files


def save(file: Path, tree: Mapping[str, Any]) -> Path:
    file.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def template_of(folder: Path) -> str | None:
    """The chat template of a model's folder."""
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    found = read(folder / CONFIG).get("chat_template") if (folder / CONFIG).is_file() else None
    if isinstance(found, list):  # several by name
        found = next((entry.get("template") for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def chosen_template(wanted: str, folders: Sequence[Path]) -> str | None:
    """The chat template that a recipe asks for: "auto" is the one that most models have, the first of them where they tie.

    Raises:
        ValueError: for a name that is not known here, and for what is no template.
    """
    if wanted == "auto":
        found = Counter(text.strip() for folder in folders if (text := template_of(folder)))
        return found.most_common(1)[0][0] if found else None
    if wanted in TEMPLATES:
        return TEMPLATES[wanted]
    if wanted in NAMED:
        raise ValueError(f"chat_template: {wanted!r} is not carried by poise; give the template itself, or auto, or chatml")
    if "{" not in wanted:
        raise ValueError(f"chat_template: {wanted!r} must be auto, chatml, or a template in Jinja")
    return wanted


def write_template(template: str, files: dict[str, Path], folder: Path) -> None:
    """Put a chat template where both new and old readers look for it."""
    file = folder / TEMPLATE
    file.write_text(template, encoding="utf-8")
    config = read(files[CONFIG]) if CONFIG in files else {}
    files[CONFIG] = save(folder / CONFIG, {**config, "chat_template": template})
    files[TEMPLATE] = file
    files.pop("chat_template.json", None)


def digest(vocabularies: Sequence[Vocabulary | None]) -> str:
    """Of all that decides rows of embeddings."""
    seen = hashlib.sha256()
    for vocabulary in vocabularies:
        seen.update(json.dumps(None if vocabulary is None else dict(vocabulary.ids), sort_keys=True).encode())
    return seen.hexdigest()
