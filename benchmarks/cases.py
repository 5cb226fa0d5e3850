"""The benchmark cases: op, input shapes, implementations, and the bytes that every implementation must move."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

import peers
from measure import Unavailable
from peers import compiled
from shapes import MODELS
from udi_kernels import (
    GradientPlan,
    alignment_weights,
    certainty_fusion,
    club_mi,
    duc_loss,
    effective_dims,
    gramian,
    js_div,
    js_div_topk,
    linear_js_div,
    reference,
    skew_kl,
    weighted_sum,
)


@dataclass(frozen=True)
class Provider:
    """An implementation. Its fastest variant counts. A variant takes an input set and returns the timed call."""

    variants: dict[str, Callable]
    memory: float  # upper estimate of its extra memory, as a multiple of the inputs' size in float32
    beside: bool = False  # it computes something else, to compare the time with


@dataclass(frozen=True)
class Case:
    op: str
    shape: str
    dtype: torch.dtype
    mode: str
    rank: int  # 0: in the quick selection; higher ranks are less informative
    elements: int  # in an input set
    bytes: int  # that every implementation must read and write
    draw: Callable  # takes randn(*shape) and returns an input set
    providers: dict[str, Provider]

    @property
    def name(self):
        return " ".join(filter(None, (self.op, self.shape, str(self.dtype).removeprefix("torch."), self.mode)))


# --- losses -----------------------------------------------------------------------------------------------------

JS_DIV = [
    (64, 6), (64, 31), (64, 101), (1024, 1000), (8192, 4096), (4096, 32000), (2048, 131072), (1024, 262144),
]  # fmt: skip
LARGE = 4096, 32000
CLUB = [(64, 512), (512, 512), (4096, 512), (65536, 512), (8192, 4096)]
LINEAR = [(2048, 32000), (512, 128256), (512, 262144)]
DTYPES = (torch.float32, torch.bfloat16)


def loss_call(f, needs, *inputs):
    """The value, or the gradients of the inputs in `needs`."""
    value = f(*inputs)
    return torch.autograd.grad(value, [inputs[i] for i in needs]) if needs else value


def loss_providers(needs, table):
    """Providers from a table {provider: (memory, {variant: f})}."""
    return {
        name: Provider({variant: partial(partial, loss_call, f, needs) for variant, f in variants.items()}, memory)
        for name, (memory, variants) in table.items()
    }


def require(tensors, needs):
    return [t.requires_grad_(i in needs) for i, t in enumerate(tensors)]


def js_div_cases():
    table = {
        "udi_kernels": (1, {"": js_div}),
        "eager": (6, {"": peers.js_div_eager}),
        "torch.compile": (
            3,
            {
                "reference": compiled(reference.js_div),
                "probabilities": compiled(peers.js_div_probabilities),
            },
        ),
        "liger-kernel": (4, {"": peers.js_div_liger}),
    }
    least = loss_providers((0,), {"mse_loss": (1, {"": F.mse_loss})})["mse_loss"]  # what any small loss costs in torch
    quick = {(64, 6), (64, 101), (1024, 1000), LARGE}
    for mode, needs, passes in (("forward", (), 2), ("+ backward", (0,), 5), ("+ backward to both", (0, 1), 6)):
        for dtype in (*DTYPES, torch.float16):
            for rows, classes in JS_DIV if dtype in DTYPES else [LARGE]:
                narrow = dtype != torch.float32 and (rows, classes) != LARGE
                rank = narrow + (needs != (0,)) + ((rows, classes) not in quick)
                yield Case(
                    "js_div", f"{rows}x{classes}", dtype, mode, rank,
                    elements=2 * rows * classes,
                    bytes=passes * rows * classes * dtype.itemsize,
                    draw=lambda randn, s=(rows, classes), needs=needs: require([randn(*s), randn(*s)], needs),
                    providers=loss_providers(needs, table)
                    | ({"mse_loss": replace(least, beside=True)} if rows == 64 and needs == (0,) else {}),
                )  # fmt: skip


def js_div_inplace_cases():
    """The gradient in the memory of the logits, against one that is allocated."""
    rows, classes = LARGE

    def bind(x, y):
        """From its second call on, the logits are a gradient; that takes the same time."""
        x = x.detach().clone()

        def call():
            logits = peers.Layer.apply(x.new_zeros((), requires_grad=True), [x])
            return torch.autograd.grad(js_div(logits, y, inplace_backward=True), logits)

        return call

    peer = {
        "torch.compile": (
            3,
            {"reference": compiled(reference.js_div), "probabilities": compiled(peers.js_div_probabilities)},
        )
    }
    beside = loss_providers((0,), {"": (1, {"": js_div})})[""].variants
    for dtype in (*DTYPES, torch.float16):
        yield Case(
            "js_div(inplace_backward=)", f"{rows}x{classes}", dtype, "+ backward", rank=0,
            elements=2 * rows * classes,
            bytes=5 * rows * classes * dtype.itemsize,
            draw=lambda randn: require([randn(rows, classes), randn(rows, classes)], (0,)),
            providers={"udi_kernels": Provider({"": bind}, 1)}
            | loss_providers((0,), peer)
            | {"allocating": Provider(beside, 1, beside=True)},
        )  # fmt: skip


def linear_js_div_cases():
    """A head of 512 features, its teacher's of 1024; `linear_js_div.py` has memory and chunks."""
    table = {
        "udi_kernels": (1, {"": linear_js_div}),
        "logits": (4, {"js_div": peers.linear_js_div_logits}),
        "torch.compile": (6, {"reference": compiled(peers.linear_js_div_reference)}),
        "TRL": (14, {"whole": peers.linear_js_div_trl, "chunked": peers.linear_js_div_trl_chunked}),
        "liger-kernel": (
            14,
            {
                "chunked": peers.linear_js_div_liger,
                "compiled": partial(peers.linear_js_div_liger, compiled=True),
                "Triton": peers.linear_js_div_liger_triton,
            },
        ),
    }
    for dtype in DTYPES:
        for rows, classes in LINEAR:
            heads = classes * (512 + 1024)

            def draw(randn, n=rows, v=classes):
                return require([randn(n, 512), randn(v, 512) / 16, randn(n, 1024), randn(v, 1024) / 16], (0, 1))

            yield Case(
                "linear_js_div", f"{rows}x{classes}", dtype, "+ backward", 1 + (dtype == torch.bfloat16),
                elements=heads + rows * (512 + 1024),
                bytes=(heads + classes * 512) * dtype.itemsize,
                draw=draw,
                providers=loss_providers((0, 1), table),
            )  # fmt: skip


def js_div_topk_cases():
    """A teacher's top 16 against the student's logits."""
    k = 16

    def draw(randn, rows, classes):
        input, full = require([randn(rows, classes), randn(rows, classes)], (0,))
        logprobs, indices = full.log_softmax(-1).topk(k)
        return input, indices, logprobs

    gathered = peers.js_div_topk_gathered
    table = {
        "udi_kernels": (1, {"": js_div_topk}),
        "scatter + js_div": (3, {"": partial(peers.js_div_topk_scattered, js_div)}),
        "eager": (6, {"scatter": partial(peers.js_div_topk_scattered, peers.js_div_eager), "gather": gathered}),
        "torch.compile": (3, {"gather": compiled(gathered)}),
    }
    for dtype in DTYPES:
        for rows, classes in ((64, 101), (1024, 1000), (4096, 32000)):
            yield Case(
                "js_div_topk", f"{rows}x{classes} K={k}", dtype, "+ backward", rank=int(dtype == torch.bfloat16),
                elements=rows * (classes + k),
                bytes=3 * rows * classes * dtype.itemsize,
                draw=partial(draw, rows=rows, classes=classes),
                providers=loss_providers((0,), table),
            )  # fmt: skip


def skew_kl_cases():
    table = {
        "udi_kernels": (1, {"": skew_kl}),
        "eager": (6, {"": peers.skew_kl_eager}),
        "torch.compile": (
            3, {"eager": compiled(peers.skew_kl_eager), "reference": compiled(reference.skew_kl)}
        ),
    }  # fmt: skip
    for dtype in DTYPES:
        for rows, classes in ((64, 101), (1024, 1000), (4096, 32000)):
            yield Case(
                "skew_kl", f"{rows}x{classes}", dtype, "+ backward", rank=int(dtype == torch.bfloat16),
                elements=2 * rows * classes,
                bytes=5 * rows * classes * dtype.itemsize,
                draw=lambda randn, s=(rows, classes): require([randn(*s), randn(*s)], (0,)),
                providers=loss_providers((0,), table),
            )  # fmt: skip


def js_div_view_cases():
    """Views, of which nothing should be kept for the backward pass."""
    rows, classes = 512, 32000
    views = {
        "logits[:, :-1]": ((4, rows // 4 + 1, classes), lambda z: z[:, :-1]),
        "(T, B, V) transposed": ((rows // 4, 4, classes), lambda z: z.transpose(0, 1)),
    }
    for name, (shape, view) in views.items():

        def viewed(f, view=view):
            return lambda x, y: f(view(x), view(y))

        table = {
            "udi_kernels": (1, {"": viewed(js_div)}),
            "eager": (6, {"": lambda x, y, view=view: peers.js_div_eager(*(view(z).flatten(0, 1) for z in (x, y)))}),
            "torch.compile": (3, {"probabilities": compiled(viewed(peers.js_div_probabilities))}),
        }
        yield Case(
            "js_div(views)", f"{rows}x{classes}, {name}", torch.float32, "+ backward", rank=0,
            elements=2 * math.prod(shape),
            bytes=5 * rows * classes * 4,
            draw=lambda randn, shape=shape: require([randn(*shape), randn(*shape)], (0,)),
            providers=loss_providers((0,), table),
        )  # fmt: skip


def js_div_mask_cases():
    """A tenth of the rows is kept; beside it all rows, and the zeros that the gradient has in the others."""
    rows, classes = 1024, 32000

    def draw(randn):
        mask = torch.arange(rows) % 10 == 3
        x, y = require([randn(rows, classes), randn(rows, classes)], (0,))
        return x, y, mask.to(x.device)

    table = {
        "udi_kernels": (1, {"": lambda x, y, mask: js_div(x, y, weight=mask)}),
        "indexed rows": (1, {"udi_kernels": lambda x, y, mask: js_div(x[mask], y[mask])}),
        "eager": (2, {"indexed rows": lambda x, y, mask: peers.js_div_eager(x[mask], y[mask])}),
    }
    beside = {
        "all rows": loss_providers((0,), {"": (1, {"": lambda x, y, mask: js_div(x, y)})})[""].variants,
        "torch.zeros": {"": lambda x, y, mask: lambda: torch.zeros(x.shape, device=x.device)},
    }
    yield Case(
        "js_div(weight=)", f"{rows}x{classes}, 10% kept", torch.float32, "+ backward", rank=0,
        elements=2 * rows * classes,
        bytes=(4 * rows // 10 + rows) * classes * 4,
        draw=draw,
        providers=loss_providers((0,), table) | {p: Provider(v, 1, beside=True) for p, v in beside.items()},
    )  # fmt: skip


def club_cases():
    def draw(randn, n, d, needs):
        mu = randn(n, d)
        return require([mu, randn(n, d).tanh(), mu + randn(n, d)], needs)

    quick = {(64, 512), (512, 512), (4096, 512)}
    for mode, needs, passes in (("+ backward to y", (2,), 7), ("+ backward to all", (0, 1, 2), 9)):
        for dtype in DTYPES:
            for n, d in CLUB:
                table = {
                    "udi_kernels": (1, {"": club_mi}),
                    "eager": (6, {"": peers.club_mi_closed_form}),
                    "torch.compile": (
                        3,
                        {"closed form": compiled(peers.club_mi_closed_form), "reference": compiled(reference.club_mi)},
                    ),
                    "NxNxD": (2 * n, {"": peers.club_mi_pairs}),
                }
                rank = (dtype == torch.bfloat16) + (needs != (2,)) + ((n, d) not in quick)
                yield Case(
                    "club_mi", f"{n}x{d}", dtype, mode, rank,
                    elements=3 * n * d,
                    bytes=passes * n * d * dtype.itemsize,
                    draw=partial(draw, n=n, d=d, needs=needs),
                    providers=loss_providers(needs, table),
                )  # fmt: skip


def club_given_cases():
    def draw(randn, n, d, classes):
        mu, given = randn(n, d), randn(n, classes).argmax(1)
        return *require([mu, randn(n, d).tanh(), mu + randn(n, d)], (2,)), given

    n, d = 4096, 512
    for classes in (10, 1000):
        one_hot = partial(peers.club_mi_one_hot, num_classes=classes)
        table = {
            "udi_kernels": (1, {"": lambda mu, logvar, y, given: club_mi(mu, logvar, y, given=given)}),
            "eager": (6 + classes / d, {"one-hot": one_hot}),
            "torch.compile": (
                3 + classes / d,
                {"one-hot": compiled(one_hot), "reference": compiled(reference.club_mi)},
            ),
        }
        yield Case(
            "club_mi(given=)", f"{n}x{d}, {classes} classes", torch.float32, "+ backward to y", rank=0,
            elements=3 * n * d,
            bytes=7 * n * d * 4,
            draw=partial(draw, n=n, d=d, classes=classes),
            providers=loss_providers((2,), table),
        )  # fmt: skip


# --- DI-MML's ops -------------------------------------------------------------------------------------------------

DUC = [(64, 512), (256, 512), (1024, 512), (8192, 512)]
MAX_LOOP = 1024  # samples; beyond, the loop takes minutes


def duc_cases():
    """A quarter of the dimensions, as if half of each modality's were effective; temperature 10."""

    def draw(randn, n, d):
        dims = torch.arange(d) % 4 == 1
        student, teacher = require([randn(n, d), randn(n, d)], (0,))
        return student, teacher, dims.to(student.device)

    def bind(f, gathered=False):
        def variant(student, teacher, dims):
            selected = dims.nonzero().flatten() if gathered else dims
            return partial(loss_call, lambda s, t: f(s, t, selected), (0,), student, teacher)

        return variant

    def at(f):  # temperature 10
        return lambda student, teacher, dims: f(student, teacher, dims, 10.0)

    for n, d in DUC:
        providers = {
            "udi_kernels": Provider({"": bind(lambda s, t, dims: duc_loss(s, t, dims, temperature=10.0))}, 2),
            "eager": Provider(
                {"indexed": bind(at(peers.duc_loss_indexed)), "masked": bind(at(peers.duc_loss_masked))}, 3 * n / d + 2
            ),
            "torch.compile": Provider(
                {
                    "gathered": bind(at(compiled(peers.duc_loss_gathered)), gathered=True),
                    "log-sum-exp": bind(at(compiled(peers.duc_loss_lse)), gathered=True),
                    "masked": bind(at(compiled(peers.duc_loss_masked))),
                },
                3 * n / d + 2,
            ),
        }
        if n <= MAX_LOOP:
            providers["sample by sample"] = Provider({"": bind(at(peers.duc_loss_loop))}, 3 * n / d + 2)
        yield Case(
            "duc_loss", f"{n}x{d}", torch.float32, "+ backward", rank=int(n not in (64, 256)),
            elements=2 * n * d,
            bytes=(2 * n * d // 4 + n * d) * 4,
            draw=partial(draw, n=n, d=d),
            providers=providers,
        )  # fmt: skip


def effective_dims_cases():
    def draw(randn, n, c, d):
        labels = randn(n, c).argmax(1)
        return randn(n, d) + randn(c, d)[labels], labels

    for n, c, d in ((1000, 10, 512), (10_000, 101, 512)):
        table = {
            "udi_kernels": (1, {"": effective_dims}),
            "NxCxD": (3 * c, {"": peers.effective_dims_pairs}),
            "eager": (3, {"class by class": peers.effective_dims_classes}),
        }
        yield Case(
            "effective_dims", f"{n}x{d}, {c} classes", torch.float32, "", rank=int(n > 1000),
            elements=n * d,
            bytes=n * d * 4,
            draw=partial(draw, n=n, c=c, d=d),
            providers={
                name: Provider({v: lambda x, y, f=f, c=c: partial(f, x, y, c) for v, f in variants.items()}, memory)
                for name, (memory, variants) in table.items()
            },
        )  # fmt: skip


def certainty_cases():
    for shape in ((3, 64, 6), (3, 1000, 101)):
        table = {
            "udi_kernels": (1, {"": certainty_fusion}),
            "eager": (4, {"heads": peers.certainty_fusion_heads, "stacked": peers.certainty_fusion_stacked}),
            "torch.compile": (2, {"stacked": compiled(peers.certainty_fusion_stacked)}),
        }
        yield Case(
            "certainty_fusion", "x".join(map(str, shape)), torch.float32, "", rank=0,
            elements=math.prod(shape),
            bytes=(shape[0] + 1) * shape[1] * shape[2] * 4,
            draw=lambda randn, shape=shape: (randn(*shape),),
            providers=loss_providers((), table),
        )  # fmt: skip


# --- gradients: an input set is (K lists, P stacked tensors that share their memory, weights) -------------------

MAX_DOTS, MAX_COMPILED_DOTS = 20_000, 1_000  # dot products; beyond, capture or compilation takes minutes


def draw_gradients(randn, k, shapes, weighted):
    stacked = [randn(k, *shape) for shape in shapes]
    lists = [[g[i] for g in stacked] for i in range(k)]
    return (lists, stacked, randn(k).float().abs()) if weighted else (lists, stacked)


def of_lists(f):
    return lambda lists, stacked, *weights: partial(f, lists, *weights)


def of_stacked(f):
    return lambda lists, stacked, *weights: partial(f, stacked, *weights)


def at_most(limit, products, bind):
    def refuse(*inputs):
        raise Unavailable(f"{products:,} dot products would take too long")

    return bind if products <= limit else refuse


def gramian_providers(k, params):
    products = params * k * (k + 1) // 2
    dots = at_most(MAX_DOTS, products, of_lists(peers.gramian_dots))
    mul_sum = at_most(MAX_DOTS, products, of_lists(peers.gramian_foreach_mul))
    compiled_dots = at_most(MAX_COMPILED_DOTS, products, of_lists(compiled(peers.gramian_dots)))
    matmuls = {"stacked": of_stacked(peers.gramian_matmuls), "lists": of_lists(peers.gramian_matmuls_of_lists)}
    return {
        "udi_kernels": Provider({"": of_lists(gramian)}, 0.1),
        "udi_kernels, stacked": Provider({"": of_stacked(partial(gramian, stacked=True))}, 0.1),
        "udi_kernels, plan": Provider({"": lambda lists, stacked: GradientPlan(lists).gramian}, 0.1),
        "cat + matmul": Provider({"": of_lists(peers.gramian_cat)}, 1.1),
        "dot products": Provider({"": dots}, 0.1),
        "foreach": Provider({"mul, sum": mul_sum, "add, norm": of_lists(peers.gramian_foreach_norm)}, 1.1 / k),
        "matmuls": Provider(matmuls, 0.5),
        "torch.compile": Provider({"dot products": compiled_dots}, 0.1),
    }


def weighted_sum_providers(k, params):
    def plan(lists, stacked, weights):
        return partial(GradientPlan(lists).weighted_sum, weights)

    foreach = {"mul, add_": peers.weighted_sum_foreach, "alpha": peers.weighted_sum_foreach_alpha}
    loop = at_most(MAX_COMPILED_DOTS, params * k, of_lists(compiled(peers.weighted_sum_loop)))
    return {
        "udi_kernels": Provider({"": of_lists(weighted_sum)}, 1 / k),
        "udi_kernels, stacked": Provider({"": of_stacked(partial(weighted_sum, stacked=True))}, 1 / k),
        "udi_kernels, plan": Provider({"": plan}, 1 / k),
        "eager": Provider({"": of_lists(peers.weighted_sum_loop)}, 1.5 / k),
        "foreach": Provider({name: of_lists(f) for name, f in foreach.items()}, 2 / k),
        "tensordot": Provider({"": of_stacked(peers.weighted_sum_tensordot)}, 1 / k),
        "torch.compile": Provider({"loop": loop}, 1 / k),
    }


def gradient_cases():
    for dtype, k, (model, shapes) in itertools.product(DTYPES, (3, 8, 32), MODELS.items()):
        numel = sum(map(math.prod, shapes))
        rank = (dtype == torch.bfloat16) + (k > 3) + (model != "ResNet-18")
        for op, providers, moved in (
            ("gramian", gramian_providers, k),
            ("weighted_sum", weighted_sum_providers, k + 1),
        ):
            yield Case(
                op, f"{model} K={k}", dtype, "", rank,
                elements=k * numel,
                bytes=moved * numel * dtype.itemsize,
                draw=partial(draw_gradients, k=k, shapes=shapes, weighted=op == "weighted_sum"),
                providers=providers(k, len(shapes)),
            )  # fmt: skip


# --- a follower's step: gradients of the three losses w.r.t. logits and features, and the controller on ResNet-18 ---

CLASSES, FEATURES = 101, 512


def step(js_div, club_mi, controller):
    """A variant of the whole step; controller(lists, stacked) returns the call that combines the gradients."""

    def bind(logits, anchor, labels, mu, logvar, y, lists, stacked):
        combine = controller(lists, stacked)

        def call():
            cls, con, com = F.cross_entropy(logits, labels), js_div(logits, anchor), club_mi(mu, logvar, y)
            outer = [torch.autograd.grad(loss, x)[0] for loss, x in ((cls, logits), (con, logits), (com, y))]
            return [*outer, *combine()]

        return call

    return bind


def combined(gramian, alignment_weights, weighted_sum, stacked=False):
    def controller(*grads):
        grads = grads[stacked]
        return lambda: weighted_sum(grads, alignment_weights(gramian(grads)))

    return controller


def planned(lists, stacked):
    plan = GradientPlan(lists)
    return lambda: plan.weighted_sum(alignment_weights(plan.gramian()))


def torchjd(**options):
    return lambda lists, stacked: peers.controller_torchjd(stacked, **options)


def step_cases():
    def draw(randn, batch):
        logits, anchor, labels = randn(batch, CLASSES), randn(batch, CLASSES), randn(batch, CLASSES).argmax(1)
        mu, logvar, noise = (randn(batch, FEATURES) for _ in range(3))
        grads = draw_gradients(randn, 3, MODELS["ResNet-18"], weighted=False)
        return logits.requires_grad_(), anchor, labels, mu, logvar.tanh(), (mu + noise).requires_grad_(), *grads

    fast_loops = {
        "dot products, foreach": combined(
            peers.gramian_dots, peers.alignment_weights, peers.weighted_sum_foreach_alpha
        ),
        "matmuls, tensordot": combined(
            peers.gramian_matmuls, peers.alignment_weights, peers.weighted_sum_tensordot, stacked=True
        ),
    }
    slow_loops = combined(peers.gramian_cat, peers.alignment_weights, peers.weighted_sum_loop)
    compiled_loops = combined(compiled(peers.gramian_dots), peers.alignment_weights, compiled(peers.weighted_sum_loop))
    eager = peers.js_div_eager, peers.club_mi_closed_form
    fused = compiled(peers.js_div_probabilities), compiled(peers.club_mi_closed_form)
    numel = sum(map(math.prod, MODELS["ResNet-18"]))
    for batch in (64, 1024):
        small = (8 * CLASSES + 7 * FEATURES) * batch  # cross-entropy reads twice and writes once
        pairs = 6 * batch**2 * FEATURES / (3 * numel)
        yield Case(
            "follower step", f"batch {batch}", torch.float32, "", rank=int(batch > 64),
            elements=3 * numel + (3 * CLASSES + 3 * FEATURES) * batch,
            bytes=4 * (7 * numel + small),
            draw=partial(draw, batch=batch),
            providers={
                "udi_kernels": Provider(
                    {"": step(js_div, club_mi, combined(gramian, alignment_weights, weighted_sum))}, 1
                ),
                "udi_kernels, plan": Provider({"": step(js_div, club_mi, planned)}, 1),
                "NxNxD, cat + matmul": Provider(
                    {"": step(peers.js_div_eager, peers.club_mi_pairs, slow_loops)}, 3 + pairs
                ),
                "eager": Provider({name: step(*eager, loops) for name, loops in fast_loops.items()}, 2),
                "torch.compile": Provider(
                    {"": step(*fused, compiled_loops)}
                    | {f"losses; {name}": step(*fused, loops) for name, loops in fast_loops.items()}, 2,
                ),
                "TorchJD": Provider(
                    {
                        "": step(*eager, torchjd()),
                        "by parameter": step(*eager, torchjd(optimize_gramian_computation=True)),
                    }, 3,
                ),
            },
        )  # fmt: skip


GROUPS = (
    js_div_cases,
    js_div_inplace_cases,
    linear_js_div_cases,
    js_div_topk_cases,
    skew_kl_cases,
    js_div_view_cases,
    js_div_mask_cases,
    club_cases,
    club_given_cases,
    duc_cases,
    effective_dims_cases,
    certainty_cases,
    gradient_cases,
    step_cases,
)
CASES = {c.name: c for c in sorted((c for group in GROUPS for c in group()), key=lambda c: c.rank)}
