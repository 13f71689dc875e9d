"""What goes with weights from one model directory to the next: tokenizer, chat template, code, licence. Byte for byte."""

from __future__ import annotations

import filecmp
import json
import re
from pathlib import Path

from .atomic import replacing
from .errors import CheckpointError
from .output import inside

# The files that libraries look for by name. Whatever else lies there (logs, other formats of the weights, pictures) stays.
TRAVELS = re.compile(
    r".*\.(json|jinja|model|py|spm|tiktoken)|(vocab|merges|added_tokens|spiece|bpe|sentencepiece)[^/]*"
    r"|(licen[cs]e|notice|use_policy)[^/]*|additional_chat_templates/.*",
    re.IGNORECASE,
)
# What is made anew, and what tells of training or of weights that are not these.
STAYS = re.compile(
    r"(adapter_)?config\.json|.*\.index\.json|(trainer_state|(all|train|eval|test|predict)_results)\.json", re.IGNORECASE
)
README = re.compile(r"readme[^/]*", re.IGNORECASE)
MODULES = "modules.json"
CHUNK = 2**20


def side_files(folder: Path, *, readme: bool = False) -> dict[str, Path]:
    """Names relative to a model directory, and the files themselves, of what must go with its weights.

    Tokenizer, chat template, generation and processor settings, the model's own code, licence; of sentence-transformers
    `modules.json` and the folders it names, with the weights that they may hold. Not the weights, their index, `config.json`,
    hidden files, and, unless `readme`, the README, which speaks of the other model.

    Raises:
        CheckpointError: a `modules.json` that cannot be read, or that names folders elsewhere.
    """
    travelling = [path for path in folder.iterdir() if path.is_file()]
    extra = folder / "additional_chat_templates"
    travelling += extra.rglob("*") if extra.is_dir() else []
    names = {path.relative_to(folder).as_posix(): path for path in travelling if path.is_file()}
    kept = {name: path for name, path in names.items() if TRAVELS.fullmatch(name) and not STAYS.fullmatch(name)}
    if readme:
        kept |= {name: path for name, path in names.items() if README.fullmatch(name)}
    for module in _module_folders(folder):
        kept |= {path.relative_to(folder).as_posix(): path for path in (folder / module).rglob("*") if path.is_file()}
    return {name: path for name, path in sorted(kept.items()) if not any(part.startswith(".") for part in Path(name).parts)}


def copy(source: Path, path: Path) -> None:
    """Byte for byte, whole or not at all; a file that is already there is left alone."""
    if path.is_file() and filecmp.cmp(source, path, shallow=False):
        return
    with source.open("rb") as file, replacing(path) as write:
        while chunk := file.read(CHUNK):
            write(chunk)


def _module_folders(folder: Path) -> list[str]:
    """Of sentence-transformers: "1_Pooling" and its like. The transformer's own is this folder, or holds the weights."""
    path = folder / MODULES
    if not path.is_file():
        return []
    try:
        modules = [(module["path"], module["type"]) for module in json.loads(path.read_text(encoding="utf-8"))]
        named = [str(place) for place, kind in modules if place and not kind.endswith(".Transformer")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = "is not the list of modules that sentence-transformers writes"
        raise CheckpointError(what, cure="restore it", file=path) from error
    for place in named:
        if not inside(place):
            raise CheckpointError(f"names {place!r}, outside of its folder", cure="correct the path", file=path)
    return named
