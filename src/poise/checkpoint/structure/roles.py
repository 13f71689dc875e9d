"""What a tensor is by its name and shape, with what stands beside it."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch

from .words import ATTENTION, EMBEDDING, EXPERT, HEAD, is_bias

ROLES = (
    "embedding",
    "head",
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.qkv",
    "attention.kv",
    "attention.o",
    "mlp.gate",
    "mlp.up",
    "mlp.gate_up",
    "mlp.down",
    "router",
    "expert.gate",
    "expert.up",
    "expert.gate_up",
    "expert.down",
    "expert",  # of an expert, which of its matrices is not known
    "conv",
    "matrix",  # two dimensions in no known part
    "norm",  # gain and shift
    "bias",
    "vector",  # one dimension, or one that is more than 1 wide
    "buffer",  # not trained: running means, masks, counters
)

_NORM = re.compile(r"norm|layrnorm|normalization|(^|_)(ln|bn|gn)(_|\d|$)", re.IGNORECASE)
_BUFFER = re.compile(r"running_(mean|var)|num_batches_tracked|masked_bias|inv_freq|position_ids|.*_ids", re.IGNORECASE)
_PROJECTION = re.compile(r"mapping|proj", re.IGNORECASE)
_MORE_EMBEDDINGS = re.compile(r"embd|shared|relative_attention_bias", re.IGNORECASE)
_MORE_HEADS = re.compile(r"output|score|qa_outputs", re.IGNORECASE)
_LOGARITHM = re.compile(r"(^|_)log(_|$)", re.IGNORECASE)

# What a layer of attention is called, most of them wherever it stands, the short names only inside a module called attention.
_ENDS = r"(_?(proj|lin|linear|[ab]_proj|a_proj_with_mqa))?"
_ANYWHERE = {
    "attention.qkv": re.compile(r"w?qkv(_?proj|_?lin)?|query_key_value|c_attn", re.IGNORECASE),
    "attention.q": re.compile(r"q_([ab]_)?proj|to_q|wq|query_proj|q_attn", re.IGNORECASE),
    "attention.k": re.compile(r"k_proj|to_k|wk|key_proj", re.IGNORECASE),
    "attention.v": re.compile(r"v_proj|to_v|wv|value_proj", re.IGNORECASE),
    "attention.kv": re.compile(r"kv(_[ab])?_proj(_with_mqa)?|key_value|to_kv", re.IGNORECASE),
    "attention.o": re.compile(r"o_proj", re.IGNORECASE),
}
_IN_ATTENTION = {
    "attention.qkv": re.compile(r"in_proj", re.IGNORECASE),
    "attention.q": re.compile(rf"(q|query){_ENDS}", re.IGNORECASE),
    "attention.k": re.compile(rf"(k|key){_ENDS}", re.IGNORECASE),
    "attention.v": re.compile(rf"(v|value){_ENDS}", re.IGNORECASE),
    "attention.o": re.compile(r"o|wo|out|output|dense|proj|c_proj|(out|o)_?(proj|lin)|to_out", re.IGNORECASE),
}
_MLP = {
    "gate_up": re.compile(r"gate_up(_proj)?|gate_and_up(_proj)?|w13", re.IGNORECASE),
    "gate": re.compile(r"gate(_proj)?|wi_0|linear_gate", re.IGNORECASE),
    "up": re.compile(r"up(_proj)?|wi(_1)?|w3|fc_?1|c_fc|dense_h_to_4h|lin(ear)?_?1|ffn|fc_in|intermediate", re.IGNORECASE),
    "down": re.compile(r"down(_proj)?|wo|w2|fc_?2|c_proj|dense_4h_to_h|lin(ear)?_?2|ffn_output|fc_out|output", re.IGNORECASE),
}


@dataclass(frozen=True)
class Named:
    """A name in its pieces.

    Attributes:
        owner: path of the module that the tensor belongs to; of `experts.down_proj_bias`, that of `experts.down_proj`.
        label: the last part of it that is no number.
        context: its parts before that, numbers left out.
        own: `weight`, `bias`, or the tensor's name where it has neither.
    """

    owner: str
    label: str
    context: tuple[str, ...]
    own: str


def named(name: str) -> Named:
    *path, own = name.split(".")
    if own in ("weight", "bias") and path:
        owner = path
    else:
        owner = [*path, re.sub(r"_(weight|bias)$", "", own)]
    words = [part for part in owner if not part.isdigit()] or owner
    label, context = words[-1], words[:-1]
    # GGUF and some others put the part before the name of the layer: attn_q, ffn_gate.
    if (found := re.fullmatch(r"(attn|ffn)_(?!norm)(\w+)", label, re.IGNORECASE)) and found[2] != "output":
        label, context = found[2], [*context, found[1]]
    elif label == "attn_output":
        label, context = "output", [*context, "attn"]
    return Named(".".join(owner), label, tuple(context), own)


def role_of(
    name: str, shape: torch.Size, floating: bool, *, owners: Collection[str], layered: bool, vocabulary: int | None
) -> str:
    """One of `ROLES`.

    Args:
        owners: paths of all modules of the model, to see who stands beside whom.
        layered: whether the tensor lies in a layer that the model repeats.
        vocabulary: number of tokens, None where it is not known.
    """
    it = named(name)
    wide = sum(size > 1 for size in shape)
    if _BUFFER.fullmatch(it.own) or not floating or (it.own == "bias" and len(shape) > 2):
        return "buffer"  # GPT-2 once kept its causal mask as `attn.bias`
    if wide < 2 and (_NORM.search(it.label) or f"{it.owner}.running_mean" in owners):
        return "norm"
    if is_bias(it.own):
        return "bias"
    if len(shape) < 2 or (wide < 2 and len(shape) > 2) or _LOGARITHM.search(it.own):
        return "vector"
    table = EMBEDDING.search(it.label) or _MORE_EMBEDDINGS.search(it.label)
    if len(shape) == 2 and not layered and HEAD.fullmatch(it.label):
        return "head"
    if table and not _PROJECTION.search(it.label) and (len(shape) == 2 or shape[0] == 1):
        return "embedding"
    if len(shape) == 2 and not layered and (_MORE_HEADS.fullmatch(it.label) or shape[0] == vocabulary):
        return "head"
    if router(it, owners):
        return "router"
    part = attention_part(it) or mlp_part(it, owners)
    expert = any(EXPERT.search(word) and not word.lower().startswith("shared") for word in (*it.context, it.label))
    if expert or re.search(r"_exps$", it.label):
        return f"expert.{part.partition('.')[2]}" if part is not None and part.startswith("mlp.") else "expert"
    if len(shape) > 2:
        return "conv"
    return part or "matrix"


def router(it: Named, owners: Collection[str]) -> bool:
    """What shares out tokens among experts: it says so, or is a gate beside experts."""
    if re.search(r"router|shared_expert_gate|gate_inp", it.owner, re.IGNORECASE):
        return True
    beside = it.owner.rpartition(".")[0]
    return it.label.lower() in ("gate", "wg") and f"{beside}.experts" in owners


def attention_part(it: Named) -> str | None:
    for role, words in _ANYWHERE.items():
        if words.fullmatch(it.label):
            return role
    # Inside a part that is called attention, up to the module around it: `attention.output.dense`, `attention.self.query`.
    if any(ATTENTION.search(word) for word in it.context[-3:]):
        for role, words in _IN_ATTENTION.items():
            if words.fullmatch(it.label):
                return role
    return None


def mlp_part(it: Named, owners: Collection[str]) -> str | None:
    label = re.sub(r"_exps$", "", it.label)
    if label == "dense" and it.context:
        label = it.context[-1]  # BERT: intermediate.dense, output.dense
    if label.lower() in ("w1", "v1"):
        # Llama's and Mixtral's own names: w1 is the gate where there is a w3 beside it.
        return "mlp.gate" if re.sub(r"w1$", "w3", it.owner) in owners and label.lower() == "w1" else "mlp.up"
    return next((f"mlp.{part}" for part, words in _MLP.items() if words.fullmatch(label)), None)
