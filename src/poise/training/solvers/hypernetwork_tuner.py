"""Hyper-parameters by gradient descent, through a network that knows which weights are best for which of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from poise.catalog import Paper, choice, log_uniform, method

from .hypernetwork import Form, Generated, Hypernetwork

Version = Literal["local", "global"]
SIGMA = {"local": math.sqrt(1e-5), "global": 1.5}


@dataclass(frozen=True)
class Tuned:
    """What one step did."""

    train: float  # mean L_train over the drawn hyper-parameters, before the step
    valid: float  # L_valid, before lam moved
    lam: Tensor  # where it moved to


@method(
    "hypernetwork-tuning",
    family="training",
    kind="solver",
    paper=Paper("Stochastic Hyperparameter Optimization through Hypernetworks", arxiv="1802.09419", year=2018),
    tune={
        "lr": log_uniform(1e-5, 1e-1),
        "hyper_lr": log_uniform(1e-3, 1e-1),
        "sigma": log_uniform(1e-3, 1.0),
        "form": choice("linear", "factorized", "mlp"),
    },
    mutant=("self.train_loss(self.at(near), near, batch)", "self.train_loss(self.at(near), self.lam, batch)"),
)
class HypernetworkTuner:
    """Tunes hyper-parameters by the gradient of the validation loss, in one run and with no inner training loop.

        phi <- phi - lr grad_phi mean over lam' of L_train(w_phi(lam'), lam'),    lam' ~ N(lam, sigma^2)
        lam <- lam - hyper_lr grad_lam L_valid(w_phi(lam))

    w_phi, a `Hypernetwork`, learns the best response: which weights minimize the training loss at which hyper-parameters. Near
    its optimum the second line follows the derivative through that minimum, the implicit one, up to O(sigma^2).

        tuner = HypernetworkTuner(
            model,
            torch.zeros(()),
            train_loss=lambda net, lam, batch: loss(net, batch) + lam.exp() * sum(w.square().sum() for w in net.parameters()),
            valid_loss=loss,
        )
        for train_batch, valid_batch in zip(train, valid):
            tuner.step(train_batch, valid_batch)
        tuner.write()  # w_phi(lam) into the model

    Only what changes the minimum of the training loss can be tuned: penalties, weights of data or of augmentations; never a
    learning rate.

    Args:
        model: any module; its weights are where w_phi begins. They are not touched before `write`. Buffers stay its own.
        lam: where the hyper-parameters start, a tensor of any shape, in units in which steps of `hyper_lr` are sensible:
            logarithms of penalties.
        train_loss: `(net, lam, batch) -> number`, with lam in it. net is called as the model.
        valid_loss: `(net, batch) -> number`, without.
        version: "local" draws lam' around the lam of now; "global" around the first one, for `fit` alone first, then `tune`.
        form, width, scale: see `Hypernetwork`. "linear" (default) is meant for "local", "mlp" with its 50 units for "global",
            "factorized" for hundreds of hyper-parameters and more.
        sigma: 0.0032 for "local", 1.5 for "global". 0: no lam' is drawn, and the motion of lam is all that explores.
        samples: lam' a step, 10.
        lr: 1e-4, by plain SGD for "local" and by Adam for "global", as released. Small for most models.
        hyper_lr: 1e-2, by Adam.
        optimizer, hyper_optimizer: in their place, a function of a list of parameters that gives a `torch.optim.Optimizer`.
        seed: of all that is drawn.

    Raises:
        ValueError: settings out of range; a loss that is no single number, or a train_loss that does not depend on the weights.

    Kept: phi, lam, both optimizers and the generator, all in `state_dict`. phi of "linear" is h + 1 times the model.

    Source: "Stochastic Hyperparameter Optimization through Hypernetworks" (arXiv 1802.09419) and its code, of which two things
    are not taken over: its Adam of lam counts no steps, and its lam' are the same in every iteration.
    """

    def __init__(
        self,
        model: nn.Module,
        lam: Tensor,
        train_loss: Callable[[Any, Tensor, Any], Tensor],
        valid_loss: Callable[[Any, Any], Tensor],
        *,
        version: Version = "local",
        form: Form = "linear",
        sigma: float | None = None,
        samples: int = 10,
        lr: float = 1e-4,
        hyper_lr: float = 1e-2,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
        hyper_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
        width: int = 50,
        scale: float = 0.01,
        seed: int = 0,
    ) -> None:
        if version not in get_args(Version):
            raise ValueError(f"version={version!r}: must be one of {', '.join(get_args(Version))}")
        self.sigma = SIGMA[version] if sigma is None else sigma
        if not 0 <= self.sigma < math.inf or samples < 1:
            raise ValueError(f"sigma={sigma}, samples={samples}: sigma must be 0 or more and finite, samples at least 1")
        self.model, self.train_loss, self.valid_loss = model, train_loss, valid_loss
        self.version, self.samples = version, samples
        self.hypernetwork = Hypernetwork(model, lam.numel(), form, width, scale, seed)
        self.lam = lam.detach().to(self.hypernetwork.b).clone().requires_grad_()
        self.first = self.lam.detach().clone()
        self.generator = torch.Generator().manual_seed(seed + 1)
        fitting = torch.optim.SGD if version == "local" else torch.optim.Adam
        phi: list[Tensor] = list(self.hypernetwork.parameters())
        self.optimizer = fitting(phi, lr=lr) if optimizer is None else optimizer(phi)
        lams: list[Tensor] = [self.lam]
        self.hyper_optimizer = torch.optim.Adam(lams, lr=hyper_lr) if hyper_optimizer is None else hyper_optimizer(lams)

    def step(self, train_batch: Any, valid_batch: Any) -> Tuned:
        """One step of phi and one of lam."""
        train = self.fit(train_batch)
        return Tuned(train, self.tune(valid_batch), self.lam.detach().clone())

    def fit(self, batch: Any) -> float:
        """One step of phi; returns the mean training loss before it."""
        loss = self.objective(self.draw(), batch)
        phi = list(self.hypernetwork.parameters())
        if not loss.requires_grad:
            raise ValueError("train_loss: does not depend on the weights of net, so there is nothing to fit")
        for p, g in zip(phi, torch.autograd.grad(loss, phi, allow_unused=True), strict=True):
            p.grad = g
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def tune(self, batch: Any) -> float:
        """One step of lam; returns the validation loss before it."""
        loss, self.lam.grad = self._slope(batch)
        self.hyper_optimizer.step()
        self.hyper_optimizer.zero_grad()
        return float(loss)

    def hypergradient(self, batch: Any) -> Tensor:
        """`grad_lam L_valid(w_phi(lam))`, shaped as lam."""
        return self._slope(batch)[1]

    def at(self, lam: Tensor) -> Generated:
        """The model with the weights `w_phi(lam)`."""
        return Generated(self.model, self.hypernetwork(lam))

    def draw(self) -> list[Tensor]:
        """lam', as many as there are samples."""
        centre = self.lam.detach() if self.version == "local" else self.first
        noise = torch.randn((self.samples, *centre.shape), generator=self.generator, dtype=torch.float64)
        return [centre + self.sigma * z for z in noise.to(centre)]

    def objective(self, lams: list[Tensor], batch: Any) -> Tensor:
        """The mean of `L_train(w_phi(lam'), lam')`, what phi descends."""
        losses = [self.train_loss(self.at(near), near, batch) for near in lams]
        return torch.stack([_number("train_loss", loss) for loss in losses]).mean()

    @torch.no_grad()
    def write(self) -> None:
        """Write `w_phi(lam)` into the model."""
        weights = self.hypernetwork(self.lam)
        for name, p in self.model.named_parameters():
            p.copy_(weights[name])

    def state_dict(self) -> dict[str, Any]:
        return {
            "hypernetwork": self.hypernetwork.state_dict(),
            "lam": self.lam.detach().clone(),
            "first": self.first.clone(),
            "optimizer": self.optimizer.state_dict(),
            "hyper_optimizer": self.hyper_optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.hypernetwork.load_state_dict(state["hypernetwork"])
        self.lam.copy_(state["lam"])
        self.first.copy_(state["first"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.hyper_optimizer.load_state_dict(state["hyper_optimizer"])
        self.generator.set_state(state["generator"])

    def _slope(self, batch: Any) -> tuple[Tensor, Tensor]:
        loss = _number("valid_loss", self.valid_loss(self.at(self.lam), batch))
        (slope,) = torch.autograd.grad(loss, self.lam)
        return loss.detach(), slope


def _number(name: str, loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{name}: must give a tensor of one number, got {found}")
    return loss.reshape(())
