"""What stands beside a layer, and the layer that asks it: `Adapter` and `Adapted`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn

from .layout import Layout

Base = Callable[[Tensor], Tensor]


class Adapter(nn.Module):
    """What an adapted layer computes in place of its own forward pass. Its parameters are what trains.

    Subclasses give `forward`, and `folded` if the adapter is a change of the weight alone. They stand in the layer as the
    submodule `adapter`; the layer's own weight stays where it is, under its own name, and is never written.

    Args:
        layout: of the layer.
    """

    foldable = True  # whether there is a weight with which the plain layer does the same

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.active = True

    def forward(self, x: Tensor, layer: Any, base: Base) -> Tensor:
        """The output of the adapted layer.

        Args:
            x: its input.
            layer: itself.
            base: its own forward pass.
        """
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def parts(self) -> dict[str, LowRank]:
        """By name, the LoRAs that it is made of and that may act alone; of most there are none."""
        return {}

    def folded(self, matrix: Tensor) -> Tensor:
        """The weight that does what the adapted layer does in eval mode, from the layer's: (outputs, inputs), in float32."""
        raise NotImplementedError(f"{type(self).__name__}.folded")


class Adapted:
    """Stands before a layer's own class, as the class that `adapt` gives it: calls go through the adapter."""

    adapter: Adapter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own: Any = super()
        if not self.adapter.active:
            return own.forward(x, *args, **kwargs)
        return self.adapter(x, self, lambda x: own.forward(x, *args, **kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _empty, (type(self).__mro__[2],), self.__dict__  # the class is made, and found by no name


@cache
def adapted(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of adapted layers of `kind`; they are layers of `kind` still."""
    return type(f"Adapted{kind.__name__}", (Adapted, kind), {"__module__": kind.__module__})


def _empty(kind: type[nn.Module]) -> nn.Module:
    made = adapted(kind)
    return made.__new__(made)


class LowRank(Adapter):
    """A product of two small matrices beside a weight.

        y = W x + s B A x

    Args:
        layout: of the layer.
        down, up: A (rank, inputs) and B (outputs, rank), which become parameters.
        scale: s.
        dropout: share of the inputs of A that is set to zero in training, the others divided by what is left.
    """

    def __init__(self, layout: Layout, down: Tensor, up: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__(layout)
        self.lora_A, self.lora_B = nn.Parameter(down), nn.Parameter(up)
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    @property
    def rank(self) -> int:
        return len(self.lora_A)

    @property
    def core(self) -> nn.Parameter | None:
        """What trains between A and B, if anything does."""
        return None

    def forward(self, x: Tensor, layer: Any, base: Base) -> Tensor:
        return added(base(x), self.beside(x, layer))

    def beside(self, x: Tensor, layer: Any) -> Tensor:
        """s B A x, in the adapter's own dtype."""
        if x.is_floating_point():  # words of an embedding are not
            x = self.dropout(x).to(self.lora_A.dtype)
        h = self.layout.down(layer, x, self.lora_A)
        return self.layout.up(self.between(h), self.lora_B) * self.scale

    def between(self, h: Tensor) -> Tensor:
        """What happens to A x before B."""
        return h

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A, B and s, whose product is what the weight is changed by."""
        return self.lora_A, self.lora_B, self.scale

    def change(self) -> Tensor:
        """s B A, (outputs, inputs), differentiable."""
        down, up, scale = self.factors()
        return scale * (up @ down)

    def folded(self, matrix: Tensor) -> Tensor:
        down, up, scale = self.factors()
        return matrix + scale * (up.to(matrix.dtype) @ down.to(matrix.dtype))

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:.4g}"


def added(y: Tensor, beside: Tensor) -> Tensor:
    """Their sum in the wider of the two dtypes, rounded once to that of `y`."""
    return (y + beside).to(y.dtype)
