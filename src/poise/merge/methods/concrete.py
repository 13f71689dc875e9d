"""Concrete subspace learning: one mask for all task vectors, learned from unlabelled data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from poise.catalog import Paper, log_uniform, method

Form = Literal["task_arithmetic", "adamerging"]
Per = Literal["task", "tensor"]
Predict = Callable[[Any, int, Any], Tensor]


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the predicted distributions."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


class ConcreteMask(nn.Module):
    """A number in (0, 1) for each entry, near 0 or 1 the colder, and differentiable: the relaxed Bernoulli distribution.

        m = sigmoid((x + log u - log(1 - u)) / T),   u uniform in (0, 1)

    Args:
        like: tensors whose names and shapes the mask has.
        initial: x at first, 0: m is 1/2 in the mean.
        temperature: T, 0.5.
        seed: of what is drawn.
    """

    def __init__(self, like: Mapping[str, Tensor], initial: float = 0.0, temperature: float = 0.5, seed: int = 0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be above 0")
        self.names, self.temperature = tuple(like), temperature
        self.logits = nn.ParameterList([nn.Parameter(torch.full(t.shape, float(initial))) for t in like.values()])
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> dict[str, Tensor]:
        """Uniform numbers for one mask."""
        return {n: torch.rand(x.shape, generator=self.generator) for n, x in zip(self.names, self.logits, strict=True)}

    def forward(self, uniform: Mapping[str, Tensor] | None = None, temperature: float | None = None) -> dict[str, Tensor]:
        """The mask that belongs to these uniform numbers, differentiable in x; without them sigmoid(x)."""
        if uniform is None:
            return {name: torch.sigmoid(x) for name, x in zip(self.names, self.logits, strict=True)}
        t = self.temperature if temperature is None else temperature
        tiny = torch.finfo(torch.float32).eps
        return {
            name: torch.sigmoid((x + torch.logit(uniform[name].clamp(tiny, 1 - tiny))) / t)
            for name, x in zip(self.names, self.logits, strict=True)
        }


@method(
    "concrete",
    family="merge",
    kind="solver",
    paper=Paper(
        "Concrete Subspace Learning based Interference Elimination for Multi-task Model Fusion", arxiv="2312.06173", year=2023
    ),
    tune={"lr": log_uniform(1e-4, 1e-1)},
    mutant=("mask[name] / mask[name].mean()", "mask[name]"),
)
class ConcreteMerging:
    """Learns which entries of the task vectors to merge, so that the merged model is sure of itself on every task.

        tau'_t = m tau_t / mean(m), the mean over a tensor;   theta = theta_0 + sum_t lambda_t tau'_t
        minimize over x:  sum_t mean entropy of softmax f_theta(batch of task t)

        merging = ConcreteMerging(model, base, models, predict)
        merging.fit(batches, steps=2000)
        weights = merging.result()

    Args:
        model: the network, called with the merged weights. Its own are not touched, and need not be any of these.
        base: theta_0, a state dict.
        models: the fine-tuned ones, each of a task.
        predict: `(net, task, batch) -> logits`; default `net(batch)`. Heads of tasks belong here.
        form: "task_arithmetic": lambda is fixed. "adamerging": in every step lambda, back at its first value, makes one step of
            its own, and x is then moved for where that leads, with no gradient through it; `freeze` ends with one drawn mask
            and lambda trained.
        per: lambda for each "task" (default), or for each task and "tensor". In "adamerging" it is kept in [0, 1].
        coefficient: lambda at first, 0.3.
        lr: of Adam for x, 1e-3 as for vision models; 1e-4 for LoRA on text.
        inner_lr: of Adam for lambda, 1. Its moments outlive lambda's return to the start, as in the authors' code; with a rate
            of 1 the first step takes lambda to 0 or 1.
        temperature: of the mask, 0.5.
        initial: x at first, 0.
        seed: of the masks.

    Raises:
        ValueError: settings out of range, or models whose tensors are not the base's.

    Kept: x, its two moments, and the task vectors. Integer tensors are the base's. Source: "Concrete Subspace Learning based
    Interference Elimination for Multi-task Model Fusion" (arXiv 2312.06173). Its code adds the task vectors to the base in
    place where both are on one device, and takes the inner gradient at the lambda of before the return; neither is done here.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Mapping[str, Tensor],
        models: Sequence[Mapping[str, Tensor]],
        predict: Predict = lambda net, task, batch: net(batch),
        *,
        form: Form = "task_arithmetic",
        per: Per = "task",
        coefficient: float = 0.3,
        lr: float = 1e-3,
        inner_lr: float = 1.0,
        temperature: float = 0.5,
        initial: float = 0.0,
        seed: int = 0,
    ) -> None:
        if form not in get_args(Form) or per not in get_args(Per):
            raise ValueError(f"form={form!r}, per={per!r}: must be one of {get_args(Form)}, and of {get_args(Per)}")
        if not models:
            raise ValueError("models: at least one is needed")
        for number, one in enumerate(models):
            if wrong := [name for name, t in base.items() if name not in one or one[name].shape != t.shape]:
                raise ValueError(f"model {number}: tensor {wrong[0]!r} is missing or of another shape than the base's")
        self.model, self.predict, self.form = model, predict, form
        self.base = {name: t.detach() for name, t in base.items()}
        self.floating = [name for name, t in base.items() if t.is_floating_point()]
        self.taus = [{name: (one[name] - base[name]).detach() for name in self.floating} for one in models]
        self.mask = ConcreteMask({name: base[name] for name in self.floating}, initial, temperature, seed)
        shape = (len(models),) if per == "task" else (len(models), len(self.floating))
        self.coefficient = coefficient
        self.lambdas = torch.full(shape, coefficient, requires_grad=form == "adamerging")
        self.upper = torch.optim.Adam(self.mask.parameters(), lr=lr)
        self.inner = torch.optim.Adam([self.lambdas], lr=inner_lr) if form == "adamerging" else None

    def merged(self, mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """theta for a mask, differentiable in it and in lambda. New tensors, of the base's dtypes."""
        found = dict(self.base)
        for column, name in enumerate(self.floating):
            scaled = mask[name] / mask[name].mean()
            moved = self.base[name].float()
            for task, tau in enumerate(self.taus):
                moved = moved + self._lambda(task, column) * (tau[name].float() * scaled)
            found[name] = moved.to(self.base[name].dtype)
        return found

    def loss(self, weights: Mapping[str, Tensor], batches: Sequence[Any]) -> Tensor:
        """The sum over tasks of the mean entropy, a batch of each."""
        if len(batches) != len(self.taus):
            raise ValueError(f"batches: {len(batches)} for {len(self.taus)} tasks; there must be one for each")

        def net(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.model, dict(weights), args, kwargs)

        return torch.stack([entropy(self.predict(net, task, batch)) for task, batch in enumerate(batches)]).sum()

    def step(self, batches: Sequence[Any], more: Sequence[Any] | None = None) -> float:
        """One step of the mask, for "adamerging" after one of lambda on `batches`; the mask's on `more`, or the same."""
        if self.inner is not None:
            with torch.no_grad():
                self.lambdas.fill_(self.coefficient)
            self._train_lambda(self.inner, self.mask(self.mask.draw()), batches)
            batches = batches if more is None else more
        loss = self.loss(self.merged(self.mask(self.mask.draw())), batches)
        self.upper.zero_grad()
        loss.backward(inputs=list(self.mask.parameters()))
        self.upper.step()
        return float(loss.detach())

    def fit(self, batches: Iterable[Sequence[Any]], steps: int = 2000) -> list[float]:
        """So many steps, each on the next of `batches`, a batch of every task; the losses."""
        stream = iter(batches)
        return [self.step(next(stream), next(stream) if self.inner is not None else None) for _ in range(steps)]

    def freeze(self, batches: Iterable[Sequence[Any]], steps: int = 1000, lr: float = 1e-3) -> dict[str, Tensor]:
        """Draw the mask that stays, train lambda under it with Adam, and return that mask."""
        if self.inner is None:
            raise ValueError("freeze: lambda is trained in form='adamerging' alone")
        mask, stream = self.final_mask(), iter(batches)
        with torch.no_grad():
            self.lambdas.fill_(self.coefficient)
        opt = torch.optim.Adam([self.lambdas], lr=lr)
        for _ in range(steps):
            self._train_lambda(opt, mask, next(stream))
        return mask

    @torch.no_grad()
    def final_mask(self, kind: Literal["soft", "hard", "mean"] = "soft") -> dict[str, Tensor]:
        """A drawn mask, as the authors evaluate ("soft"); zeros and ones, drawn at T = 0.001 ("hard"); sigmoid(x) ("mean")."""
        if kind == "mean":
            return self.mask()
        if kind == "soft":
            return self.mask(self.mask.draw())
        drawn = {name: (m > 0.5).float() for name, m in self.mask(self.mask.draw(), 1e-3).items()}
        return {name: m if bool(m.any()) else torch.ones_like(m) for name, m in drawn.items()}  # of nothing there is no mean

    @torch.no_grad()
    def result(self, mask: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The merged weights, under the mask given or a soft one."""
        return {name: t.clone() for name, t in self.merged(self.final_mask() if mask is None else mask).items()}

    def _lambda(self, task: int, column: int) -> Tensor:
        value = self.lambdas[task] if self.lambdas.ndim == 1 else self.lambdas[task, column]
        return value if self.inner is None else value.clamp(0, 1)

    def _train_lambda(self, opt: torch.optim.Optimizer, mask: Mapping[str, Tensor], batches: Sequence[Any]) -> None:
        fixed = {name: m.detach() for name, m in mask.items()}
        opt.zero_grad()
        self.loss(self.merged(fixed), batches).backward(inputs=[self.lambdas])
        opt.step()
        with torch.no_grad():
            self.lambdas.clamp_(0, 1)
