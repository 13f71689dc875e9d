"""A way to adapt a model, with its settings: what every method of this family is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .adapter import Adapter
from .targets import Place, Targets

Losses = Iterable[Callable[[], Tensor]]


@dataclass(frozen=True)
class Adaptation:
    """Settings of a method, and what it puts beside each layer.

    Subclasses are frozen dataclasses whose fields are the settings. `attach` calls, in this order, `default_targets`, `also`,
    `settle`, `choose`, `begin`, `adapter` for each place, and, once all adapters stand in the model, `finish`.

    Attributes:
        targets: the layers that are adapted where the user names none.
        reads_losses: whether losses of batches decide something at the start.
        needs_losses: whether `attach` must be given them.
        peft: whether what it puts beside a layer is a LoRA or DoRA that peft knows. "as LoRA": it does what a LoRA does and
            trains in another way, so that it is written as one only where that is asked for.
    """

    targets: ClassVar[Targets | None] = None
    reads_losses: ClassVar[bool] = False
    needs_losses: ClassVar[bool] = False
    peft: ClassVar[bool | Literal["as LoRA"]] = False

    def settle(self, model: nn.Module, places: Sequence[Place], seed: int, losses: Losses) -> Adaptation:
        """These settings with those filled in that the model and its losses decide: what is done, kept, and said in files.

        It leaves the model as it is.

        Args:
            places: what the targets mean.
            seed: of what is drawn.
            losses: of batches; empty for an adapter that is about to be read from a file.
        """
        return self

    def default_targets(self, model: nn.Module) -> Targets | None:
        """The layers that are adapted where the user names none, of a method that must look at the model: `targets`."""
        return self.targets

    def also(self, model: nn.Module) -> Sequence[str]:
        """Names of the model's own parameters that train too, besides those that the user names: none."""
        return ()

    def choose(self, model: nn.Module, places: Sequence[Place]) -> Sequence[Place]:
        """Those of the places that are adapted: all."""
        return places

    def begin(self, model: nn.Module, places: Sequence[Place], draw: Draw, losses: Losses) -> Any:
        """What is made once for all layers, and handed to each `adapter`: modules they share, statistics of the weights.

        Args:
            losses: of batches; empty for an adapter that is about to be read from a file.
        """
        return None

    def adapter(self, place: Place, draw: Draw, shared: Any) -> Adapter:
        """What stands beside this layer. Its tensors are on the layer's device."""
        raise NotImplementedError(f"{type(self).__name__}.adapter")

    def finish(self, model: nn.Module, adapters: dict[str, Adapter], losses: Losses) -> Iterable[RemovableHandle] | None:
        """Told when all adapters stand in the model, by path of their layers.

        Returns:
            Handles of hooks that it has put on the model, which `detach` removes; None: it has not.
        """

    def settings(self) -> dict[str, Any]:
        """What a file says of this adaptation."""
        return asdict(self)


class Draw:
    """Random numbers of one layer: of a seed and the layer's name, so that neither order nor other layers matter.

    Args:
        seed: of the whole adaptation.
        path: of the layer.
        like: tensors are made on its device, in float32, or float64 where it is float64.
    """

    def __init__(self, seed: int, path: str, like: Tensor) -> None:
        self.key = int.from_bytes(hashlib.sha256(f"{seed}\0{path}".encode()).digest()[:7], "big")
        self.generator = torch.Generator().manual_seed(self.key)
        self.device, self.dtype = like.device, torch.float64 if like.dtype == torch.float64 else torch.float32

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def uniform(self, *shape: int, bound: float) -> Tensor:
        """Uniform in (-bound, bound)."""
        drawn = torch.rand(shape, generator=self.generator, dtype=torch.float64) * 2 - 1
        return (drawn * bound).to(self.device, self.dtype)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (drawn * std).to(self.device, self.dtype)

    def noise(self, *shape: int) -> Tensor:
        """Normal, for what is drawn in every pass: on the device itself, so that other kinds of device draw other numbers."""
        generator = torch.Generator(self.device).manual_seed(self.key)
        return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
