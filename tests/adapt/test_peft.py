"""PEFT directories both ways: what is exported loads in peft, what peft wrote loads here, with the same outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt.cases import Conv1D, stirred
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from poise.adapt import DoRA, LoRA, adapters, attach, attached, detach, export, fold, load
from poise.checkpoint import CheckpointError

pytestmark = pytest.mark.hf
METHODS: dict[str, Any] = {
    "lora": LoRA(rank=4, alpha=6.0),
    "rslora": LoRA(rank=4, alpha=6.0, rank_stabilized=True),
    "dora": DoRA(rank=4, alpha=6.0, dropout=0.1),
    "dora and rslora": DoRA(rank=4, alpha=6.0, rank_stabilized=True),
}


def gpt2(**more: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2, bos_token_id=0, eos_token_id=0,
        **more,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def llama(**more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.2, bos_token_id=0, eos_token_id=0, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Pictures(nn.Module):
    """Words and convolutions in one, and a normalization with buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(64, 16, padding_idx=0)
        self.line = nn.Conv1d(16, 16, 3, stride=1, padding=1)
        self.square = nn.Conv2d(1, 6, (3, 2), stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.mix = Conv1D(5, 6)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.line(self.words(x).transpose(1, 2))
        h = self.norm(self.square(h.unsqueeze(1)))
        return self.head(torch.tanh(self.mix(h.mean((2, 3)))))


MODELS: dict[str, tuple[Any, Any, Any]] = {
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"], "*ln_f*"),
    "gpt2 words": (lambda: gpt2(tie_word_embeddings=False), ["wte", "c_attn"], "lm_head.weight"),
    "llama": (llama, None, ("*norm*", "lm_head.weight")),
    "pictures": (Pictures, ["words", "line", "square", "head"], ()),
}


def logits(model: Any) -> Tensor:
    x = torch.randint(0, 64, (3, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model.eval()(x)
    return found.logits if hasattr(found, "logits") else found


def of_peft(base: nn.Module, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_exported_loads_in_peft_with_the_same_logits(method: str, name: str, tmp_path: Path, recwarn: Any) -> None:
    make, targets, also = MODELS[name]
    model = make()
    before = logits(model)
    attach(model, METHODS[method], targets, also=also)
    stirred(model)
    wanted = logits(model)
    assert float((wanted - before).abs().max()) > 0.01
    export(model, tmp_path, "peft")
    other = of_peft(make(), tmp_path)
    close(logits(other), wanted)
    close(logits(other.merge_and_unload()), wanted)
    assert not [w for w in recwarn if "missing" in str(w.message)]
    again = make()
    load(again, tmp_path)
    assert torch.equal(logits(again), wanted)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_what_peft_wrote_loads_here_trains_on_folds_and_goes_back(method: str, name: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    make, targets, _ = MODELS[name]
    targets = targets or ["q_proj", "down_proj"]
    known = METHODS[method]
    config = LoraConfig(
        r=known.rank, lora_alpha=known.alpha, target_modules=targets, lora_dropout=known.dropout,
        use_dora=isinstance(known, DoRA), use_rslora=known.rank_stabilized,
        modules_to_save=None if name == "gpt2 words" else ["norm" if name != "gpt2" else "ln_f"],
        rank_pattern={targets[-1]: 3}, alpha_pattern={targets[-1]: 5},
    )  # fmt: skip
    theirs: Any = get_peft_model(make(), config)
    stirred(theirs)
    if name == "pictures":
        theirs.train()(torch.randint(0, 64, (8, 8)))  # running statistics of what is saved whole
    wanted = logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = make()
    kept = load(mine, tmp_path / "theirs")
    close(logits(mine), wanted)
    assert kept.trainable == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    export(mine, tmp_path / "mine", "peft")
    close(logits(of_peft(make(), tmp_path / "mine")), wanted)
    one, other = (load_file(tmp_path / whose / "adapter_model.safetensors") for whose in ("theirs", "mine"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key].float(), other[key].float()) for key in one)

    opt = torch.optim.AdamW([p for p in mine.parameters() if p.requires_grad], lr=0.01)
    found = mine.train()(torch.randint(0, 64, (3, 8)))
    (found.logits if hasattr(found, "logits") else found).square().mean().backward()
    opt.step()
    moved = logits(mine)
    assert not torch.allclose(moved, wanted, atol=1e-3)
    close(logits(fold(mine)), moved)
    plain = detach(mine)
    close(logits(plain), moved)
    fresh = make()
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(logits(fresh), logits(plain))


def test_ranks_that_differ_are_written_as_patterns(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], rank_pattern={"layers.1.self_attn.q_proj": 5, "v_proj": 1},
        alpha_pattern={"layers.0.self_attn.q_proj": 2.5},
    )  # fmt: skip
    theirs: Any = get_peft_model(llama(), config)
    stirred(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    mine = llama()
    load(mine, tmp_path / "theirs")
    ranks: dict[str, Any] = dict(adapters(mine))
    assert ranks["model.layers.1.self_attn.q_proj"].rank == 5
    assert ranks["model.layers.0.self_attn.v_proj"].rank == 1
    assert ranks["model.layers.0.self_attn.q_proj"].scale == 1.25
    export(mine, tmp_path / "mine")
    said = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert set(said["rank_pattern"].values()) | {said["r"]} == {1, 2, 5}
    close(logits(of_peft(llama(), tmp_path / "mine")), logits(theirs))


def test_tied_layers_go_to_peft_as_two_and_come_back_as_one(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(64, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        model[3].weight = model[1].weight
        return model

    model = tied()
    kept = attach(model, LoRA(rank=2), ["1", "3"])
    assert kept.layers == ("1",)
    stirred(model)
    wanted = logits(model)
    for form in ("peft", "poise"):
        export(model, tmp_path / form, form)
        again = tied()
        assert load(again, tmp_path / form).layers == ("1",)
        assert torch.equal(logits(again), wanted)
    close(logits(of_peft(tied(), tmp_path / "peft")), wanted)
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.3.lora_A.weight"] += 1
    save_file(tensors, file, {"format": "pt"})
    again = tied()
    with pytest.raises(CheckpointError, match=r"3\.lora_A\.weight.*differs from that of a layer with the same, tied weight"):
        load(again, tmp_path / "peft")
    assert attached(again) is None


def test_bfloat16_bases_have_adapters_in_float32_on_both_sides(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    attach(model, LoRA(rank=4))
    stirred(model)
    export(model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}
    other = of_peft(llama().to(torch.bfloat16), tmp_path)
    assert float((logits(other).float() - logits(model).float()).norm() / logits(model).float().norm()) < 0.02


def test_the_config_says_what_peft_asks_for(tmp_path: Path) -> None:
    model = gpt2()
    attach(model, METHODS["dora and rslora"], "c_attn", also="*ln_f*")
    export(model, tmp_path, base="some/base")
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = {
        "peft_type": "LORA", "task_type": None, "r": 4, "lora_alpha": 6, "use_dora": True, "use_rslora": True, "bias": "none",
        "fan_in_fan_out": True, "base_model_name_or_path": "some/base", "modules_to_save": ["transformer.ln_f"],
        "rank_pattern": {}, "alpha_pattern": {}, "inference_mode": True,
    }  # fmt: skip
    assert {key: said[key] for key in wanted} == wanted
    model = llama()
    attach(model, "lora")
    export(model, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_a_path_that_is_the_end_of_another_means_one_layer(tmp_path: Path) -> None:
    def nested() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.ModuleDict({"proj": nn.Linear(8, 8), "out": nn.Linear(8, 8)})
        model = nn.ModuleDict({"words": nn.Embedding(64, 8), "proj": nn.Linear(8, 8), "inner": inner})
        model.forward = lambda x: inner["out"](inner["proj"](model["proj"](model["words"](x))).tanh())
        return model

    model = nested()
    attach(model, LoRA(rank=2), lambda path, layer: path == "proj")
    stirred(model)
    export(model, tmp_path, "peft")
    other = of_peft(nested(), tmp_path)
    assert [n for n, _ in other.named_parameters() if "lora_A" in n] == ["base_model.model.proj.lora_A.default.weight"]


class Held(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.scale


@pytest.mark.parametrize(
    ("make", "targets", "also", "message"),
    [
        (lambda: nn.Linear(3, 3), "re:", (), "is the adapted layer itself"),
        (lambda: Held(nn.Linear(3, 3)), "layers.0", "scale", "'scale' trains too"),
        (lambda: Held(nn.Linear(3, 3)), "layers.0", "layers.0.bias", r"'layers\.0\.bias' trains too"),
        (lambda: Held(nn.Conv1d(3, 3, 3, dilation=2)), "layers.0", (), "padding_mode or dilation"),
        (lambda: Held(nn.Conv1d(3, 3, 3, padding_mode="reflect", padding=1)), "layers.0", (), "padding_mode or dilation"),
        (lambda: Held(*[nn.Linear(3, 3)] * 2), "layers.0", (), "stands at several places"),
    ],
)
def test_what_peft_would_do_otherwise_is_not_written_for_it(
    make: Any, targets: Any, also: Any, message: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make()
    attach(model, "lora", targets, also=also, rank=1)
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path, "peft")
    assert not list(tmp_path.iterdir())
    stirred(model)
    export(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter.safetensors", "poise_adapter.json"]
    torch.manual_seed(0)
    again = make()
    load(again, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
