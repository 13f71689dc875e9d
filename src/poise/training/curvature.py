"""How a loss is curved in the parameters of a module: products with its Hessian, and estimates of the diagonal.

    estimate = gauss_newton_bartlett(model, lambda: model(inputs), seed=step)
    opt.feed(hessian=estimate)

Every function gives tensors by parameter, for the parameters that require a gradient, zeros for those that the loss does not
reach. Gradients that stand in the parameters, buffers, and torch's random numbers are left as they were: with dropout, ask for
one seed twice and the same units are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle

from poise.linalg.lengths import wide
from poise.optim import Optimizer

ByParameter = dict[Tensor, Tensor]
Noise = Literal["normal", "rademacher"]
Likelihood = Literal["categorical", "normal"]


def hessian_vector_product(
    model: nn.Module, loss: Callable[[], Tensor], vectors: Mapping[Any, Tensor], *, seed: int = 0
) -> ByParameter:
    """`H v`, H the Hessian of `loss()`, by differentiating `<gradient, v>`: two backward passes, and no matrix.

    Args:
        loss: gives the loss of one batch, as a tensor of one number: `lambda: cross_entropy(model(x), y)`.
        vectors: v by parameter; where it has none, v is 0.
        seed: of what the forward pass draws.

    Raises:
        ValueError: a vector has another shape than its parameter, or no parameter of `model` requires a gradient.
    """
    params = _trained(model)
    with _unseen(model, params, seed):
        return _product(params, _gradients(_number(loss()), params, create_graph=True), _by(params, vectors))


def gauss_newton_product(
    model: nn.Module,
    outputs: Callable[[], Tensor],
    loss: Callable[[Tensor], Tensor],
    vectors: Mapping[Any, Tensor],
    *,
    seed: int = 0,
) -> ByParameter:
    """`G v` with the Gauss-Newton matrix `G = J^T (d^2 loss / d outputs^2) J`, J the Jacobian of the outputs.

    It is the Hessian without the curvature of the network itself, and positive semidefinite for every loss that is convex in
    the outputs. `J v` is had by differentiating `J^T w` with respect to w, so all that layers need is a second derivative.

    Args:
        outputs: gives the network's outputs on one batch: `lambda: model(x)`.
        loss: of outputs, as a tensor of one number: `lambda z: cross_entropy(z, y)`.
        vectors, seed: see `hessian_vector_product`.

    Source: "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent" (Schraudolph, 2002).
    """
    params = _trained(model)
    given = _by(params, vectors)
    with _unseen(model, params, seed):
        z = outputs()
        w = torch.zeros_like(z, requires_grad=True)
        back = torch.autograd.grad(z, params, w, create_graph=True, allow_unused=True, materialize_grads=True)
        (jv,) = torch.autograd.grad(_inner(back, given), w, retain_graph=True, allow_unused=True, materialize_grads=True)
        leaf = z.detach().requires_grad_()
        slope = _gradients(_number(loss(leaf)), [leaf], create_graph=True)
        (hjv,) = _product([leaf], slope, [jv]).values()
        found = torch.autograd.grad(z, params, hjv, allow_unused=True, materialize_grads=True)
    return dict(zip(params, found, strict=True))


def hutchinson(
    model: nn.Module, loss: Callable[[], Tensor], *, seed: int, samples: int = 1, noise: Noise = "normal"
) -> ByParameter:
    """An unbiased estimate of the diagonal of the Hessian of `loss()`: the mean of `u * (H u)` over random u.

    Entries may be negative, where the loss is concave or by chance. With "rademacher" noise an entry has variance
    `sum_{j != i} H_ij^2`, with "normal" noise `2 H_ii^2` more: of a diagonal Hessian random signs make no error at all.

    Args:
        loss: see `hessian_vector_product`. A part of the batch will do.
        seed: of u and of what the forward pass draws: another one in each step.
        samples: how many u, at two backward passes each after one forward pass.
        noise: "normal", the paper's, or "rademacher", random signs.

    Source: "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines" (Hutchinson, 1989); as
    Sophia-H takes it, "Sophia: A Scalable Stochastic Second-order Optimizer" (arXiv 2305.14342).
    """
    _check_samples(samples)
    if noise not in get_args(Noise):
        raise ValueError(f"noise={noise!r}: must be 'normal' or 'rademacher'")
    params = _trained(model)
    generator = torch.Generator().manual_seed(seed)
    found = [torch.zeros_like(p) for p in params]
    with _unseen(model, params, seed):
        slope = _gradients(_number(loss()), params, create_graph=True)
        for _ in range(samples):
            u = [_drawn(p, noise, generator) for p in params]
            for total, a, b in zip(found, u, _product(params, slope, u).values(), strict=True):
                total += a * b / samples
    return dict(zip(params, found, strict=True))


def gauss_newton_bartlett(
    model: nn.Module,
    outputs: Callable[[], Tensor],
    *,
    seed: int,
    samples: int = 1,
    likelihood: Likelihood = "categorical",
    max_norm: float | None = None,
    labels: Tensor | None = None,
) -> ByParameter:
    """An unbiased estimate of the diagonal of the Gauss-Newton matrix of the mean loss: `B g * g`, never negative.

    g is the gradient of the mean loss over B outputs, with labels drawn from what the network itself predicts there. By
    Bartlett's identities single gradients then have mean 0 and the loss's own curvature for covariance, so that B times the
    square of their mean estimates the diagonal. The labels of the data would give the empirical Fisher, which is no curvature.

    Args:
        outputs: gives logits (..., classes), `lambda: model(x)`, of which each row counts as one of B; with likelihood "normal"
            means (B, ...), of the loss `1/2 ||mean - y||^2`. Leave out what the loss leaves out: `lambda: model(x)[mask]`.
        seed: of the labels and of what the forward pass draws: another one in each step.
        samples: how many sets of labels, at one backward pass each after one forward pass.
        likelihood: "categorical", that of a cross entropy, or "normal", that of half a squared error.
        max_norm: scales g to at most this norm before it is squared, as the authors' script does (with 1.0); the estimate is
            then biased towards 0. None: unbiased.
        labels: these instead of drawn ones.

    Source: "Sophia: A Scalable Stochastic Second-order Optimizer" (arXiv 2305.14342).
    """
    _check_samples(samples)
    if likelihood not in get_args(Likelihood):
        raise ValueError(f"likelihood={likelihood!r}: must be 'categorical' or 'normal'")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm={max_norm}: must be positive, or None")
    params = _trained(model)
    generator = torch.Generator().manual_seed(seed)
    found = [torch.zeros_like(p) for p in params]
    with _unseen(model, params, seed):
        z = wide(outputs())
        z = z.reshape(-1, z.shape[-1]) if likelihood == "categorical" else z
        shape = z.shape[:1] if likelihood == "categorical" else z.shape
        for _ in range(samples):
            y = _labels(z.detach(), likelihood, generator) if labels is None else labels.reshape(shape)
            loss = cross_entropy(z, y) if likelihood == "categorical" else (z - y).square().sum() / (2 * len(z))
            g = _gradients(loss, params)
            scale = len(z) / samples
            if max_norm is not None:
                norm = torch.stack([torch.linalg.vector_norm(t) for t in g]).square().sum().sqrt()
                scale = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0).square()
            for total, t in zip(found, g, strict=True):
                total += scale * t.square()
    return dict(zip(params, found, strict=True))


def feed_hessian(opt: Optimizer, estimate: Callable[[int], Mapping[Any, Tensor]], every: int = 10) -> RemovableHandle:
    """Before steps `every + 1`, `2 every + 1`, ... of `opt`, feed it `estimate(steps taken)` of the diagonal Hessian.

        opt = Sophia(model, lr=1e-4)
        feed_hessian(opt, lambda step: gauss_newton_bartlett(model, lambda: model(inputs), seed=step), every=10)

    `inputs` is the batch at hand when the step is taken. Steps are the optimizer's own count, which is saved with it: a resumed
    run feeds in the same steps, with the same seeds.

    Args:
        opt: `Sophia`, or any rule that reads a `hessian`; inside of drivers, the innermost.
        every: at least 1.

    Returns:
        A handle; `handle.remove()` ends it.
    """
    if every < 1:
        raise ValueError(f"every={every}: must be at least 1")
    if not reads_hessian(opt):
        raise ValueError(f"opt={type(opt).__name__}: none of its rules reads a Hessian, as Sophia's does")

    def feed(*_: object) -> None:
        taken = max(group["clock"] for group in opt.param_groups)
        if taken and taken % every == 0:
            opt.feed(hessian=estimate(taken))

    return opt.register_step_pre_hook(feed)


def reads_hessian(opt: torch.optim.Optimizer) -> bool:
    """Whether `opt` may be fed a `hessian`, as `Sophia` may."""
    rules = opt._roster.rules.values() if isinstance(opt, Optimizer) else ()
    return any("hessian" in (*link.feeds, *link.may_feed) for rule in rules for link in rule)


# -- inside ---------------------------------------------------------------------------------------------------------------


def _trained(model: nn.Module) -> list[Tensor]:
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("model: none of its parameters requires a gradient")
    return params


@contextmanager
def _unseen(model: nn.Module, params: Sequence[Tensor], seed: int) -> Iterator[None]:
    """Within it gradients are on, attention has a second derivative, and what a forward pass leaves behind is undone."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    devices = sorted({str(p.device) for p in params if p.device.type not in ("cpu", "meta")})
    kind = devices[0].partition(":")[0] if devices else "cuda"
    # the fused kernels of scaled_dot_product_attention have no second derivative
    with torch.random.fork_rng(devices, device_type=kind), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _number(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"loss: must give a tensor of one number, got {loss if not isinstance(loss, Tensor) else loss.shape}")
    return loss.reshape(())


def _gradients(loss: Tensor, params: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    if not loss.requires_grad:
        raise ValueError("loss: does not hang on the parameters of the model")
    return torch.autograd.grad(
        loss, params, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def _product(params: Sequence[Tensor], slope: Sequence[Tensor], vectors: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """The derivative of `<slope, vectors>`."""
    along = _inner(slope, vectors)
    if not along.requires_grad:  # the loss is linear
        return {p: torch.zeros_like(p) for p in params}
    found = torch.autograd.grad(along, params, retain_graph=True, allow_unused=True, materialize_grads=True)
    return dict(zip(params, found, strict=True))


def _inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum().to(a[0].device) for x, y in zip(a, b, strict=True)]).sum()


def _by(params: Sequence[Tensor], vectors: Mapping[Any, Tensor]) -> list[Tensor]:
    """The vectors in the order of the parameters."""
    for p, v in vectors.items():
        if p.shape != v.shape:
            raise ValueError(f"vectors: one has shape {tuple(v.shape)}, its parameter {tuple(p.shape)}")
    return [vectors.get(p, torch.zeros_like(p)).to(p) for p in params]


def _drawn(p: Tensor, noise: Noise, generator: torch.Generator) -> Tensor:
    """Drawn on the CPU, so that one seed means the same everywhere."""
    if noise == "normal":
        return torch.randn(p.shape, generator=generator).to(p)
    return (2.0 * torch.randint(2, p.shape, generator=generator) - 1.0).to(p)


def _labels(z: Tensor, likelihood: Likelihood, generator: torch.Generator) -> Tensor:
    """Labels from the distribution that the outputs stand for."""
    if likelihood == "normal":
        return z + torch.randn(z.shape, generator=generator).to(z)
    drawn = torch.rand(len(z), 1, generator=generator, dtype=torch.float64).to(z.device, torch.float64)
    below = z.double().softmax(-1).cumsum(-1)
    return (below[:, :-1] < drawn).sum(-1)


def _check_samples(samples: int) -> None:
    if samples < 1:
        raise ValueError(f"samples={samples}: must be at least 1")
