"""Two linear heads and the divergence of their softmaxes, without the logits of the whole batch."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import register_fake

from . import _distributed, reference
from ._distributed import Shard
from ._ops import (
    FLOATING,
    INTEGERS,
    LIBRARY,
    check_number,
    define,
    dtensors,
    launched_by_triton,
    native,
    not_a_tensor,
    ops,
)
from .reference import accumulation_dtype

NAME = "linear_js_div"
LOGIT_BYTES = {"cpu": 2**28, "cuda": 2**30}  # of both chunks of logits, unless these are shorter than LEAST_ROWS
LEAST_ROWS, MOST_ROWS = 128, 1024  # of a chunk; below, products are slow, and above, they get no faster
PARTIAL_BYTES = 2**24  # of a product that waits to be added to a float32 sum


def linear_js_div(
    input: Tensor,
    weight: Tensor,
    target: Tensor | tuple[Tensor, Tensor],
    target_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    target_bias: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    row_weight: Tensor | None = None,
    labels: Tensor | None = None,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    r"""Distillation of a linear head, ``js_div(linear(input, weight, bias), teacher's logits)``, in little memory.

    The logits exist a chunk of rows at a time. For each chunk, two products make the logits, one kernel computes the
    loss and replaces the student's logits by their gradient, and two products make of it the gradients of ``input`` and
    ``weight``. So the gradients are made in the forward pass, as far as they are required; the backward pass multiplies
    them by the incoming gradient. With ``labels``, cross-entropy is added in the same pass::

        loss = mean of JS over rows + hard_weight * mean of cross-entropy over rows with a label

    Memory beyond inputs and outputs is that of two chunks of logits. Products are torch's, in the dtype of the inputs,
    or in autocast's; gradients of ``weight`` and ``bias`` are summed over the chunks in float32.

    Args:
        input: the student's hidden states, shape (..., H), float16, bfloat16, float32 or float64, any strides.
        weight: the student's head, (V, H), of input's dtype unless under autocast. It may be tied to other layers.
        target: the teacher's hidden states, (..., G), or without ``target_weight`` its logits, (..., V). Neither it nor
            its head gets a gradient: detach them. Or a pair, the teacher's top K classes: ``(indices, logprobs)``, both
            (..., K), integers in [0, V) without repetition and their log-probabilities, already at the wanted
            temperature. These are renormalized to add up to 1, as by default in :func:`js_div_topk`; index -1 with
            log-probability -inf is padding. ``beta`` is then below 1.
        target_weight: the teacher's head, (V, G).
        bias, target_bias: of the heads, (V,).
        beta, temperature: as in :func:`js_div`; at its ends 0 and 1, ``beta`` gives KL(teacher || student) and
            KL(student || teacher).
        row_weight: factor of each row's divergence, shape (...), floating-point, integer or bool.
        labels: shape (...), integers in [0, V), or ``ignore_index`` for rows without one.
        hard_weight: factor of the cross-entropy with ``labels``, at temperature 1, whatever ``temperature`` is.
        ignore_index: the label of rows without one.
        reduction: ``"mean"`` or ``"sum"``. The mean of the divergence is the weighted mean with ``row_weight``; that of
            the cross-entropy is over the rows with a label.
        normalizer: what the two sums are divided by in place of the means' own denominators: a number, or a tensor with
            one element, such as the number of tokens of all processes and accumulated steps.
        chunk: rows of a chunk. By default about H/2, so that the chunks take as much memory as the gradient of
            ``weight``, between 128 and 1024, and so that the logits of two chunks take at most 256 MB on a CPU and 1 GB
            on a GPU. Smaller chunks take less memory and more time.

    Rows of weight 0 and without a label are gathered out before the products, whatever they hold, so that the cost is
    that of the others. To count these, a GPU is waited for; without ``row_weight`` and ``labels`` it is not.

    Returns:
        a scalar, float32 (float64 for float64 inputs). A mean over no counting rows is 0, over no rows at all NaN.

    Raises:
        TypeError: a tensor or a number is of another type, or the dtypes of a head and its inputs differ.
        ValueError: shapes or devices disagree, a number is out of range, or a tensor without a gradient requires one.
        RuntimeError: the second derivative, which does not exist, is asked for.

    DTensors on one mesh give a replicated DTensor. Heads, biases and the teacher's logits may be sharded over the
    classes: each process then makes the logits of its classes, and exchanges a few numbers a row twice a chunk. The
    gradient of ``input`` then comes back as ``Partial``. Rows are replicated first. A pair of a teacher's top K classes
    are DTensors too, which all processes have.

    Where no kernel serves (see :func:`build_info`), the logits are computed as a whole.
    """
    logprobs: Any = None
    if isinstance(target, tuple) and len(target) == 2:
        target, logprobs = target
    tensors: dict[str, Any] = {
        "input": input, "weight": weight, "bias": bias, "target": target, "logprobs": logprobs,
        "target_weight": target_weight, "target_bias": target_bias, "row_weight": row_weight, "labels": labels,
    }  # fmt: skip
    _check(tensors, beta, temperature, hard_weight, ignore_index, reduction, normalizer, chunk)
    options = beta, temperature, hard_weight, ignore_index, reduction, normalizer, chunk
    if module := dtensors(*tensors.values()):
        return module.linear_js_div(partial(_loss, options), tensors)
    return _loss(options, **tensors)


def _loss(
    options: tuple[Any, ...],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    logprobs: Tensor | None,
    target_weight: Tensor | None,
    target_bias: Tensor | None,
    row_weight: Tensor | None,
    labels: Tensor | None,
    shard: Shard | None = None,
) -> Tensor:
    beta, temperature, hard_weight, ignore_index, reduction, normalizer, chunk = options
    dtype = _autocast(input)
    soft, hard, scale = _factors(input, row_weight, labels, hard_weight, ignore_index, reduction, normalizer)
    labels = None if labels is None else labels.reshape(-1).long()
    if not _kernels_serve(input):
        if not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
            _check_labels(labels, hard, len(weight))
        if logprobs is not None:
            classes = len(weight)
            target = _dense(target.flatten(0, -2), logprobs.flatten(0, -2), classes, temperature, range(classes))
        heads: list[Any] = [input, weight, bias, target, target_weight, target_bias]
        products = 3 if target_weight is None else 6
        heads[:products] = [t if t is None or dtype is None else t.to(dtype) for t in heads[:products]]
        rows: dict[str, Any] = dict(soft=soft, hard=hard, labels=labels)
        return reference.linear_js_div(*heads, **rows, beta=beta, temperature=temperature) * scale
    if chunk is None:
        classes, features = weight.shape
        chunk = chunk_rows(classes, features, (dtype or input.dtype).itemsize, input.device.type)
    masked = row_weight is not None
    head = target, logprobs, target_weight, target_bias
    arguments = (*head, soft, hard, labels, scale, masked, float(beta), float(temperature), chunk, dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias)):
        return _LinearJSDiv.apply(input, weight, bias, shard, *arguments)
    fwd = ops.linear_js_div_fwd if shard is None else partial(_linear_js_div_fwd, shard=shard)
    return fwd(input, weight, bias, *arguments, False, False, False)[0]


def chunk_rows(classes: int, features: int, itemsize: int, device: str) -> int:
    """The default number of rows in a chunk."""
    fit = LOGIT_BYTES.get(device, 2**28) // (2 * max(1, classes) * itemsize)
    return max(LEAST_ROWS, min(MOST_ROWS, features // 2, fit))


class LinearJSDiv(nn.Module):
    """:func:`linear_js_div` as a module that holds its options."""

    __module__ = "udi_kernels"  # pickles name the public place

    def __init__(
        self,
        *,
        beta: float = 0.5,
        temperature: float = 1.0,
        hard_weight: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = dict(
            beta=beta,
            temperature=temperature,
            hard_weight=hard_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            chunk=chunk,
        )

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor | tuple[Tensor, Tensor],
        target_weight: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        target_bias: Tensor | None = None,
        row_weight: Tensor | None = None,
        labels: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar in nats."""
        return linear_js_div(
            input, weight, target, target_weight, bias=bias, target_bias=target_bias, row_weight=row_weight,
            labels=labels, normalizer=normalizer, **self.options,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


# --- arguments --------------------------------------------------------------------------------------------------


def _check(
    tensors: dict[str, Any], beta: Any, temperature: Any, hard_weight: Any, ignore_index: Any, reduction: Any,
    normalizer: Any, chunk: Any,
) -> None:  # fmt: skip
    input, weight, target, target_weight = (tensors[x] for x in ("input", "weight", "target", "target_weight"))
    for name, t in tensors.items():
        if t is None and name not in ("input", "weight", "target"):
            continue
        if not isinstance(t, Tensor):
            not_a_tensor(NAME, name, t)
        if t.layout != torch.strided or t.is_nested:
            raise ValueError(f"{NAME}: {name} must be dense, got {'a nested tensor' if t.is_nested else t.layout}")
        integers = name == "labels" or (name == "target" and tensors["logprobs"] is not None)
        allowed = INTEGERS if integers else (*FLOATING, *INTEGERS, torch.bool) if name == "row_weight" else FLOATING
        if t.dtype not in allowed:
            raise TypeError(f"{NAME}: {name} must not be of {t.dtype}")
        if t.device != input.device:
            raise ValueError(f"{NAME}: {name} must be on {input.device} as input is, got {t.device}")
        if name not in ("input", "weight", "bias") and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{NAME}: {name} gets no gradient; pass {name}.detach()")
    rows, classes = tuple(input.shape[:-1]), weight.shape[:1]
    if input.dim() < 2 or weight.dim() != 2 or weight.shape[1] != input.shape[-1] or weight.shape[0] == 0:
        got = f"{tuple(weight.shape)} and input {tuple(input.shape)}"
        raise ValueError(f"{NAME}: weight must be (V, H) with V > 0 for an input (..., H), got {got}")
    features = classes if target_weight is None else target_weight.shape[1:]
    if tensors["logprobs"] is not None:
        if target_weight is not None:
            raise ValueError(f"{NAME}: target_weight needs hidden states, got indices and log-probabilities")
        if beta == 1:
            raise ValueError(f"{NAME}: beta must be below 1 for a teacher's top K classes: KL(q || p) is infinite")
        features = target.shape[len(rows) :]
    shapes = {"target": (*rows, *features), "row_weight": rows, "labels": rows, "logprobs": (*rows, *features[:1])}
    shapes |= {"target_weight": (*classes, *features), "bias": classes, "target_bias": classes}
    for name, shape in shapes.items():
        t = tensors[name]
        if t is not None and tuple(t.shape) != tuple(shape):
            raise ValueError(f"{NAME}: {name} must have shape {tuple(shape)}, got {tuple(t.shape)}")
    if tensors["target_bias"] is not None and target_weight is None:
        raise ValueError(f"{NAME}: target_bias needs target_weight; logits have theirs")
    if not torch.is_autocast_enabled(input.device.type):
        for like, others in (("input", ("weight", "bias")), ("target", ("target_weight", "target_bias"))):
            for name in others:
                t = tensors[name]
                if t is not None and t.dtype != tensors[like].dtype:
                    raise TypeError(f"{NAME}: {name} must be {tensors[like].dtype} as {like} is, got {t.dtype}")
    for name, number in (("beta", beta), ("temperature", temperature), ("hard_weight", hard_weight)):
        check_number(NAME, name, number)
    if not 0 <= beta <= 1:
        raise ValueError(f"{NAME}: beta must lie in [0, 1], got {beta}")
    if not 1e-37 <= temperature <= 1e37:
        raise ValueError(f"{NAME}: temperature must lie in [1e-37, 1e37], got {temperature}")
    if not 0 <= hard_weight < math.inf:
        raise ValueError(f"{NAME}: hard_weight must be 0 or positive, got {hard_weight}")
    if hard_weight and tensors["labels"] is None:
        raise ValueError(f"{NAME}: hard_weight needs labels")
    if not isinstance(ignore_index, int):
        raise TypeError(f"{NAME}: ignore_index must be an integer, got {type(ignore_index).__name__}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{NAME}: reduction must be 'mean' or 'sum', got {reduction!r}")
    if normalizer is not None:
        if reduction == "sum":
            raise ValueError(f"{NAME}: a normalizer needs reduction 'mean', got 'sum'")
        if not isinstance(normalizer, Tensor):
            check_number(NAME, "normalizer", normalizer)
        elif normalizer.numel() != 1:
            raise ValueError(f"{NAME}: normalizer must have one element, got shape {tuple(normalizer.shape)}")
        elif normalizer.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{NAME}: normalizer gets no gradient; pass normalizer.detach()")
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool)):
        raise TypeError(f"{NAME}: chunk must be an integer, got {type(chunk).__name__}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"{NAME}: chunk must be positive, got {chunk}")


def _autocast(input: Tensor) -> torch.dtype | None:
    """The dtype of the products under autocast, which leaves float64 alone."""
    device = input.device.type
    if not torch.is_autocast_enabled(device) or input.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def _kernels_serve(input: Tensor) -> bool:
    """As `kernels_serve` in csrc/ops/checks.h."""
    if not native() or torch._C._are_functorch_transforms_active():
        return False
    return input.is_cpu or (input.is_cuda and input.dtype != torch.float64)


def _factors(
    input: Tensor, row_weight: Tensor | None, labels: Tensor | None, hard_weight: float, ignore_index: int,
    reduction: str, normalizer: float | Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Each row's factors of divergence and cross-entropy, (N,), over a power of 2, the scale, and this scale.

    So the largest of them is between 1 and 2, and gradients in float16 lose no digits to small factors.
    """
    rows, wide = input.shape[:-1].numel(), torch.float64 if input.device.type != "mps" else torch.float32
    one = torch.ones((), dtype=wide, device=input.device)
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.detach().reshape(()).to(one)
    whole = reduction == "mean" and normalizer is None

    def factors(weight: Tensor) -> Tensor:
        if whole:
            return reference.shares(weight, wide)
        return weight if normalizer is None else weight / normalizer

    soft = factors(one.expand(rows) if row_weight is None else row_weight.reshape(-1).to(wide))
    hard = None
    if labels is not None and hard_weight:
        hard = hard_weight * factors((labels.reshape(-1) != ignore_index).to(wide))
    largest = soft.abs() if hard is None else torch.maximum(soft.abs(), hard)
    exponent = torch.frexp(torch.cat((one.new_zeros(1), largest)).amax()).exponent
    dtype = accumulation_dtype(input.dtype)
    scale = torch.ldexp(one, exponent - 1)
    empty_mean = math.nan if whole and rows == 0 else 1.0
    return (soft / scale).to(dtype), None if hard is None else (hard / scale).to(dtype), (scale * empty_mean).to(dtype)


# --- autograd ---------------------------------------------------------------------------------------------------


class _LinearJSDiv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, shard: Shard | None, *arguments: Any
    ) -> Tensor:
        fwd = ops.linear_js_div_fwd if shard is None else partial(_linear_js_div_fwd, shard=shard)
        loss, *grads = fwd(input, weight, bias, *arguments, *ctx.needs_input_grad[:3])
        ctx.save_for_backward(input, weight, bias, arguments[7], *grads)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        *inputs, scale, grad_input, grad_weight, grad_bias = ctx.saved_tensors
        recorded = torch.is_grad_enabled()
        with torch.no_grad():
            grads = [
                _scaled(g, grad * scale, recorded) if need else None
                for g, need in zip((grad_input, grad_weight, grad_bias), ctx.needs_input_grad, strict=False)
            ]
        if recorded:
            grads = _NoSecondDerivative.apply(len(grads), *grads, *inputs)
        return (*grads, *[None] * 14)


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple:
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        raise RuntimeError(
            f"{NAME}: has no second derivative: its gradients are made in the forward pass; use js_div on logits"
        )


def _scaled(grad: Tensor, factor: Tensor, recorded: bool) -> Tensor:
    """The gradient times the factor: in its own memory if this pass frees the graph, so that none else reads it."""
    if torch.compiler.is_compiling():
        return (grad.to(factor.dtype) * factor).to(grad.dtype)
    kept = recorded or torch._C._autograd._get_current_graph_task_keep_graph()
    out = torch.empty_like(grad) if kept else grad
    if grad.dtype == factor.dtype:
        return torch.mul(grad, factor, out=out)
    for part, to in zip(grad.split(1024), out.split(1024), strict=True):  # the factor is not rounded to 16 bits
        to.copy_(part.to(factor.dtype) * factor)
    return out


# --- the loop over chunks ---------------------------------------------------------------------------------------


def _linear_js_div_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    logprobs: Tensor | None,
    target_weight: Tensor | None,
    target_bias: Tensor | None,
    soft: Tensor,
    hard: Tensor | None,
    labels: Tensor | None,
    scale: Tensor,
    masked: bool,
    beta: float,
    temperature: float,
    chunk: int,
    dtype: torch.dtype | None,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    shard: Shard | None = None,
) -> tuple[Tensor, ...]:
    classes, first = (shard.classes, shard.first) if shard else (len(weight), 0)
    _check_labels(labels, hard, classes)
    rows_loss: Callable = partial(_distributed.linear_js_div_rows, shard=shard) if shard else ops.linear_js_div_rows
    grads = _gradients(input, weight, bias, (need_input, need_weight, need_bias))
    grad_input, grad_weight, grad_bias = grads
    needed = need_input or need_weight or need_bias
    with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
        x, y, top = _matrix(input), _matrix(target), None if logprobs is None else _matrix(logprobs)
        kept = _kept_rows(soft, hard, masked, strided=any(t is not None and t.dim() > 2 for t in (x, y, top)))
        n = len(soft) if kept is None else len(kept)
        size = -(-n // max(1, -(-n // chunk)))  # chunks of one length
        student = _Head(weight, bias, dtype, size)
        teacher = None if target_weight is None else _Head(target_weight, target_bias, dtype, size)
        if need_input:
            grad_rows = grad_input.view(-1, input.shape[-1])
            if masked:
                grad_rows.zero_()
        products = _Sum(grad_weight, n <= size) if need_weight else None
        columns = torch.zeros_like(grad_bias, dtype=soft.dtype)
        losses = [soft.new_zeros(1)]
        for begin in range(0, n, size or 1):
            rows = slice(begin, min(begin + size, n)) if kept is None else kept[begin : begin + size]
            hidden = _take(x, rows).to(student.weight.dtype)
            z = student(hidden)
            p = _take(y, rows)
            if teacher is not None:
                p = teacher(p)
            elif top is not None:
                p = _dense(p, _take(top, rows), classes, temperature, range(first, first + len(weight)))
            wide = torch.promote_types(z.dtype, p.dtype)
            z, p = z.to(wide), p.to(wide)
            p = p if p.stride(1) == 1 else p.contiguous()
            picked = [None if t is None else t[rows] for t in (soft, hard, labels)]
            losses.append(rows_loss(z, p, *picked, beta, temperature, needed))
            z = z.to(hidden.dtype)  # now the gradient
            if need_input:
                grad_rows[rows] = (z @ student.weight).to(grad_rows.dtype)
            if products:
                products.add(z, hidden)
            del p
            if need_bias:
                columns += z.sum(0, dtype=columns.dtype)
        if products:
            products.finish()
        if need_bias:
            grad_bias.copy_(columns)
        loss = torch.cat(losses).sum(dtype=torch.float64) * scale
    return loss.to(scale.dtype), *grads


def _gradients(input: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]) -> list[Tensor]:
    """Memory for the gradients, empty where not needed. That of the weight has the weight's strides."""
    formats = torch.contiguous_format, torch.preserve_format, torch.contiguous_format
    return [
        torch.empty_like(t, memory_format=memory_format) if need and t is not None else input.new_empty(0)
        for t, need, memory_format in zip((input, weight, bias), needs, formats, strict=True)
    ]


def _check_labels(labels: Tensor | None, hard: Tensor | None, classes: int) -> None:
    """Raises ValueError on a CPU; on a GPU it would wait."""
    if labels is None or hard is None or not hard.is_cpu:
        return
    wrong = (hard != 0) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        raise ValueError(f"{NAME}: labels must lie in [0, {classes}) or be ignore_index, got {labels[wrong][0].item()}")


def _kept_rows(soft: Tensor, hard: Tensor | None, masked: bool, strided: bool) -> Tensor | None:
    """Indices of the rows that count; None if all do, unless tensors need indices."""
    if masked:
        return ((soft != 0) if hard is None else (soft != 0) | (hard != 0)).nonzero().flatten()
    return torch.arange(len(soft), device=soft.device) if strided else None


def _matrix(t: Tensor) -> Tensor:
    """The tensor as a matrix of rows if that is a view, else as it is."""
    outer = [(t.shape[d], t.stride(d)) for d in range(t.dim() - 1) if t.shape[d] != 1]
    joins = all(stride == size * inner for (_, stride), (size, inner) in zip(outer, outer[1:], strict=False))
    if t.numel() == 0:
        return t.reshape(t.shape[:-1].numel(), t.shape[-1])
    return t.view(-1, t.shape[-1]) if joins else t


def _take(t: Tensor, rows: slice | Tensor) -> Tensor:
    """Rows of (..., D) as a matrix: a view for a slice, a copy for indices."""
    if isinstance(rows, slice):
        return t[rows]
    return t.index_select(0, rows) if t.dim() == 2 else t[torch.unravel_index(rows, t.shape[:-1])]


def _dense(indices: Tensor, logprobs: Tensor, classes: int, temperature: float, part: range) -> Tensor:
    """Logits of part of the classes. The softmax of all has these probabilities, renormalized, and 0 elsewhere."""
    if indices.is_cpu and indices.numel() and not -1 <= indices.min() <= indices.max() < classes:
        got = f"{indices.min().item()} to {indices.max().item()}"
        raise ValueError(f"{NAME}: target's indices must lie in [0, {classes}), or be -1, got {got}")
    logits = logprobs.new_full((len(indices), len(part) + 1), -math.inf)
    inside = (indices >= part.start) & (indices < part.stop)
    column = torch.where(inside, indices.long() - part.start, len(part))  # others have a column of their own
    return logits.scatter_(1, column, logprobs * temperature)[:, :-1]


class _Head:
    """A linear layer whose results all lie in the same memory."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None, rows: int) -> None:
        self.weight = weight.to(dtype or weight.dtype)
        self.bias = None if bias is None else bias.to(self.weight.dtype)
        self.out = self.weight.new_empty(rows, len(weight))

    def __call__(self, x: Tensor) -> Tensor:
        x, out = x.to(self.weight.dtype), self.out[: len(x)]
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)


class _Sum:
    """The sum of z.T @ x over chunks, at least in float32 if there are several."""

    def __init__(self, out: Tensor, single: bool) -> None:
        wide = out.dtype if single else accumulation_dtype(out.dtype)
        self.out, self.sum, self.first = out, out if out.dtype == wide else torch.empty_like(out, dtype=wide), True

    def add(self, z: Tensor, x: Tensor) -> None:
        if z.dtype == self.sum.dtype and self.first:
            torch.mm(z.t(), x, out=self.sum)
        elif z.dtype == self.sum.dtype:
            self.sum.addmm_(z.t(), x)
        else:
            step = max(1, PARTIAL_BYTES // (x.shape[1] * x.element_size()))
            for total, part in zip(self.sum.split(step), z.split(step, 1), strict=True):
                total.copy_(part.t() @ x) if self.first else total.add_(part.t() @ x)
        self.first = False

    def finish(self) -> None:
        if self.first:
            self.out.zero_()
        elif self.sum is not self.out:
            self.out.copy_(self.sum)


define(
    "linear_js_div_fwd",
    [
        "Tensor input", "Tensor weight", "Tensor? bias", "Tensor target", "Tensor? logprobs", "Tensor? target_weight",
        "Tensor? target_bias", "Tensor soft", "Tensor? hard", "Tensor? labels", "Tensor scale", "bool masked",
        "float beta", "float temperature", "int chunk", "ScalarType? dtype",
        "bool need_input", "bool need_weight", "bool need_bias",
    ],
    4,
)  # fmt: skip
for _device in ("CPU", "CUDA"):
    LIBRARY.impl("linear_js_div_fwd", _linear_js_div_fwd, _device)


@register_fake("udi_kernels::linear_js_div_fwd", lib=LIBRARY)
def _(input, weight, bias, *arguments):
    return arguments[7].new_empty(()), *_gradients(input, weight, bias, arguments[-3:])


define(
    "linear_js_div_rows",  # the kernel: makes gradients of the input, and returns the rows' losses
    [
        "Tensor(a!) input", "Tensor target", "Tensor soft", "Tensor? hard", "Tensor? labels", "float beta",
        "float temperature", "bool need_grad",
    ],
)  # fmt: skip
launched_by_triton("linear_js_div", "linear_js_div_rows")
