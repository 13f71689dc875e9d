"""What the engine must get right where the CPU cannot show it: tensors that are not where the host is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from conformance.problems import draw, leaves, play
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.distributed.fake_pg import FakeStore

from poise.optim import AdamW, Param, clip
from poise.optim.engine import backends
from poise.optim.engine.links import bind
from poise.optim.engine.members import Member
from poise.optim.engine.program import reads_own


def test_what_a_link_reads_is_found_out_wherever_its_totals_are() -> None:
    """A trial of two elements on the CPU must not meet totals of a GPU; the device "meta" mixes with others as little."""
    bound, _ = bind((clip(1.0),), Param("p", torch.Size((4,)), torch.float32))
    totals = {"factor": torch.ones((), dtype=torch.float64, device="meta")}
    assert not reads_own(bound[0], ("squared",), (), {}, totals)


@pytest.fixture
def gpu_mesh() -> Iterator[DeviceMesh]:
    """Two ranks that a mesh of GPUs connects, as far as bookkeeping goes."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield DeviceMesh("cuda", [0, 1])
    dist.destroy_process_group()


def offloaded(local: Tensor, whole: tuple[int, ...], mesh: DeviceMesh) -> DTensor:
    """A shard as FSDP2 keeps it under CPUOffloadPolicy: on the CPU, whatever the mesh is of."""
    meta = TensorMeta(torch.Size(whole), torch.empty(whole, device="meta").stride(), local.dtype)
    return DTensor(local, DTensorSpec(mesh, (Shard(0),), tensor_meta=meta), requires_grad=False)


@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_the_state_of_weights_that_a_gpu_mesh_keeps_on_the_cpu_is_there_too(state: str, gpu_mesh: DeviceMesh) -> None:
    local = torch.zeros(32, 128)
    p = torch.nn.Parameter(offloaded(local, (64, 128), gpu_mesh))
    opt = AdamW([p], lr=0.1, state=state, backend="eager")
    p.grad = offloaded(torch.ones(32, 128), (64, 128), gpu_mesh)
    opt.step()
    for name, value in opt.state[p].items():
        if name != "step":
            assert isinstance(value, DTensor) and value.shape[0] == 64
            assert value.to_local().device.type == "cpu", name
    assert torch.allclose(local, torch.full_like(local, -0.1))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_noise_keeps_no_index_of_elements_that_follow_one_another(
    backend: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 bytes an element would be four times what 8-bit state saves."""
    made: list[Member] = []
    original = Member.__init__

    def noted(self: Member, *args: object) -> None:
        original(self, *args)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(Member, "__init__", noted)
    start, grads = draw([(64, 128)], 2, dtype=torch.bfloat16)
    params = leaves(start)
    play(AdamW(params, state=state, backend=backend), params, grads)  # pyright: ignore[reportArgumentType]
    assert made and all("index" not in member.__dict__ for member in made)


def test_without_triton_a_gpu_runs_eagerly_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(backends, "say_once", said.append)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends.mode_for(torch.device("cuda"), "auto") == "eager"
    assert "Triton" in said[0]


def test_without_a_c_compiler_a_gpu_runs_eagerly_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton builds its launcher with one, and would fail in the middle of the first step."""
    said: list[str] = []
    monkeypatch.setattr(backends, "say_once", said.append)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backends.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert backends.mode_for(torch.device("cuda"), "auto") == "eager"
    assert "compiler" in said[0]
