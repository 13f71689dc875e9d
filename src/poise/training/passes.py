"""Gradients taken more than once in a step: elsewhere, on the same batch, with the same noise, leaving no trace.

passes = Passes(opt, closure, model)
loss = passes.here()                             # the gradients at the weights are in .grad
passes.elsewhere(closure, moves, key=step)       # now those at the weights plus `moves`, and the weights are as they were
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from poise.memory import rounding

from . import weights


class Passes:
    """The passes of one step.

    All draw the same random numbers from torch's generators, so that dropout leaves out the same units: the loss whose gradient
    is taken twice is one function. Afterwards the generators, and the buffers of `model` (batch statistics, say), are where the
    pass at the weights themselves left them.
    """

    def __init__(self, opt: torch.optim.Optimizer, closure: Callable[[], Any], model: nn.Module | None = None) -> None:
        self.opt, self.closure = opt, closure
        self.params: list[Tensor] = [p for group in opt.param_groups for p in group["params"]]
        self.buffers = [] if model is None else list(model.buffers())
        self.devices = sorted({str(p.device) for p in self.params if p.device.type not in ("cpu", "meta")})
        self.begin = self._noise()

    def here(self) -> Any:
        """The closure at the weights as they are; returns the loss."""
        self._set_noise(self.begin)
        with torch.enable_grad():
            return self.closure()

    def elsewhere(
        self, closure: Callable[[], Any], moves: Iterable[Tensor | None] | None = None, *, key: int = 0, replay: bool = True
    ) -> Any:
        """`closure` at the weights plus `moves`, leaving its gradients; returns the loss.

        Args:
            moves: one for each parameter, in order, None for those that stay; by default all stay. Each is asked for before the
                gradient of its parameter is cleared, so that it may be computed from it without a second copy.
            key: a number of this step, of which the rounding of bfloat16 weights is a function.
            replay: with the random numbers of `here`.
        """
        kept, noise = [weights.local(p).clone() for p in self.params], self._noise()
        buffers = [b.clone() for b in self.buffers]
        try:
            given = iter(moves) if moves is not None else None
            for number, p in enumerate(self.params):
                move = next(given) if given is not None else None
                if move is not None:
                    weights.displace(self.opt, p, move, rounding.key_of(key, f"param_{number}"))
                p.grad = None
            if replay:
                self._set_noise(self.begin)
            with torch.enable_grad():
                return closure()
        finally:
            for p, value in zip(self.params, kept, strict=True):
                weights.local(p).copy_(value)
            for buffer, value in zip(self.buffers, buffers, strict=True):
                buffer.copy_(value)
            self._set_noise(noise)

    def _noise(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self.devices)]

    def _set_noise(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self.devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
