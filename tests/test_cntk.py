"""The convolutional NTK against a slow version, autograd and reference numbers; bad input."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from agop_book import image_tiles, memory, relu_layers
from agop_book.cntk import CNTK, patch_agop
from agop_book.images import PreparedImages, window_sum

FIXTURE = Path(__file__).parents[2] / "shared/fixtures/cntk_fixture.npz"


@pytest.fixture(autouse=True)
def never_compile(monkeypatch):
    "Nothing here is large enough to wait for a compiler."
    monkeypatch.setattr(
        image_tiles, "compiled_layers", lambda: pytest.fail("a small call asked for the compiler")
    )


class Slow:
    "A kernel by explicit loops over pairs of positions; autograd goes through."

    def __init__(self, kernel, shape):
        self.kernel, (self.c, self.h, self.w) = kernel, shape
        reach = range(-(kernel.patch_size // 2), kernel.patch_size // 2 + 1)
        self.offsets = [(i, j) for i in reach for j in reach]
        everywhere = [(i, j) for i in range(self.h) for j in range(self.w)]
        self.grid = self.inner(everywhere)

    def seen_from(self, p):
        "The positions in the window around `p`; with circular padding they are wrapped around."
        found = [(p[0] + a, p[1] + b) for a, b in self.offsets]
        if self.kernel.padding == "circular":
            return [(i % self.h, j % self.w) for i, j in found]
        return found

    def inner(self, grid):
        "Where a window may lie."
        if self.kernel.padding != "valid":
            return grid
        return [p for p in grid if all(q in grid for q in self.seen_from(p))]

    def patches(self, t):
        nothing = torch.zeros(self.c, dtype=t.dtype)

        def pixel(i, j):
            return t[:, i, j] if 0 <= i < self.h and 0 <= j < self.w else nothing

        windows = [[pixel(*q) for q in self.seen_from(p)] for p in self.grid]
        return torch.stack([torch.stack(pixels, 1).flatten() for pixels in windows])

    def window_matrix(self, grid, inner, dtype):
        "1 at `(p, q, offset)` where position q of the grid is what the window around p sees there."
        K = torch.zeros(len(inner), len(grid), len(self.offsets), dtype=dtype)
        for n, p in enumerate(inner):
            for o, q in enumerate(self.seen_from(p)):
                if q in grid:
                    K[n, grid.index(q), o] = 1
        return K


def slow_cntk(x, z, kernel, M=None):
    "NNGP and NTK of two images."
    slow = Slow(kernel, x.shape)
    X, Z, c, grid = slow.patches(x), slow.patches(z), slow.c, slow.grid
    M = torch.eye(X.shape[1], dtype=x.dtype) if M is None else M
    M = torch.diag(M) if M.ndim == 1 else M
    S, A, B = X @ M @ Z.T / c, ((X @ M) * X).sum(1) / c, ((Z @ M) * Z).sum(1) / c
    T = S
    for layer in range(kernel.depth):
        if layer:
            inner = slow.inner(grid)
            K = slow.window_matrix(grid, inner, x.dtype)
            S, T = (torch.einsum("npo,pq,mqo->nm", K, t, K) for t in (S, T))
            A, B = (torch.einsum("npo,p->n", K, t) for t in (A, B))
            T, grid = T + S, inner
        sine = (A[:, None] * B - S * S).clamp(min=0).sqrt()
        k = 1 - torch.atan2(sine, S) / math.pi
        S, T = sine / math.pi + k * S, k * T
    if not kernel.pooling:
        S, T = S.diagonal(), T.diagonal()
    return S.mean(), (S + T).mean()


def slow_ntk(x, z, kernel, M=None):
    "The NTK of all pairs."
    rows = [[slow_cntk(a, b, kernel, M)[1] for b in z] for a in x]
    return torch.tensor(rows, dtype=torch.float64)


KERNELS = [
    CNTK(d, s, p, pool)
    for d, s in ((1, 1), (1, 3), (2, 3), (3, 3), (1, 5), (2, 1))
    for p in ("valid", "zero", "circular")
    for pool in (False, True)
]


def names(k):
    return f"{k.depth}-{k.patch_size}-{k.padding}" + "-pooled" * k.pooling


every_kernel = pytest.mark.parametrize("k", KERNELS, ids=names)


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def problem(k, n=2, m=2, c=2):
    g = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    need = 1 + k.depth * (k.patch_size - 1) if k.padding == "valid" else 4
    h, w, q = max(need, 4), max(need, 4) + 1, c * k.patch_size**2
    R = random(q, q)
    return random(n, c, h, w), random(m, c, h, w), R @ R.T / q, random(m, 3)


@every_kernel
def test_gram_and_gradient_equal_the_slow_version(k):
    x, z, M, coef = problem(k)
    exact = torch.tensor([[slow_cntk(a, b, k, M) for b in z] for a in x], dtype=torch.float64)
    assert relative(k(x, z, M), exact[..., 1]) < 1e-10
    assert relative(k.nngp(x, z, M), exact[..., 0]) < 1e-10
    image = x[0].clone().requires_grad_()
    f = sum(coef[i, 1] * slow_cntk(image, z[i], k, M)[1] for i in range(len(z)))
    # directions of 1 x 1 patches can agree up to rounding, where slopes are ill-conditioned
    assert relative(k.image_gradient(x, z, coef, M)[0, 1], torch.autograd.grad(f, image)[0]) < 1e-7


@every_kernel
def test_symmetric_gram_and_single_precision_also_on_the_diagonal(k):
    x, z, M, _ = problem(k, 5, 4)
    K = k(x, M=M)
    assert torch.equal(K, K.T) and relative(K, k(x, x.clone(), M)) < 1e-12
    for f in (k, k.nngp):
        assert float((f(x.float(), M=M.float()) / f(x, M=M) - 1).abs().max()) < 1e-5
        assert relative(f(x.float(), z.float(), M.float()).double(), f(x, z, M)) < 1e-5


@pytest.mark.parametrize("form", ["diagonal", "rank one", "single precision, rank one"])
def test_forms_of_the_metric(form):
    x, z, M, coef = problem(CNTK(2))
    v = M[:1]
    M = M.diagonal() if form == "diagonal" else v.T @ v
    given = M.float() if "single" in form else M
    exact = slow_ntk(x, z, CNTK(2), given.double())
    # the root of what rounding leaves of an eigenvalue 0, 1e-7, is 3e-4: so much leaks in
    assert relative(CNTK(2)(x, z, given), exact) < (1e-3 if "single" in form else 1e-6)
    assert torch.isfinite(CNTK(2).gradient(x, z, coef, given)).all()


def test_a_metric_is_as_exact_as_its_own_dtype():
    R = torch.randn(27, 3, generator=torch.Generator().manual_seed(0))
    M = R @ R.T  # rank 3: rounding leaves eigenvalues a little below 0
    M = M - 1e-7 * M.diagonal().max() * torch.eye(27)
    x = torch.rand(2, 3, 8, 8)
    assert torch.isfinite(CNTK()(x, M=M)).all()
    with pytest.raises(ValueError, match="M is not positive semi-definite"):
        CNTK()(x, M=M.double())


@pytest.mark.parametrize("noise", [0, 1e-6, 1e-5, 1e-4, 1e-3])
def test_single_precision_of_images_that_nearly_coincide(noise):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 12, 12, generator=g)
    z = x[:1] + noise * torch.randn(4, 3, 12, 12, generator=g)
    assert float((CNTK()(x, z) / CNTK()(x.double(), z.double()) - 1).abs().max()) < 1e-5


def close_pairs(dtype, metric):
    "Images, centers with one that nearly coincides with an image, coefficients, M."
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    x, z, coef, R = random(5, 2, 5, 5), random(4, 2, 5, 5), random(4, 2), random(18, 18)
    z[1] = x[1] + 1e-4 * random(2, 5, 5)
    return x, z, coef, R @ R.T / 18 if metric else None


each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
two_kernels = pytest.mark.parametrize(
    "kernel", [CNTK(2), CNTK(1, padding="zero", pooling=True)], ids=names
)


@each_dtype
@two_kernels
@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("scale", [1e2, 1e6, 1e12, 1e-12])
def test_a_pair_does_not_depend_on_the_other_images(kernel, metric, dtype, scale):
    x, z, coef, M = close_pairs(dtype, metric)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-11
    pairs = [[kernel(a[None], b[None], M)[0, 0] for b in z] for a in x]
    alone = torch.stack([torch.stack(row) for row in pairs])
    slopes = torch.cat([kernel.gradient(a[None], z, coef, M) for a in x])
    X, Z = x.clone(), z.clone()
    X[0] *= scale
    Z[0] *= scale
    assert float((kernel(X, Z, M)[1:, 1:] / alone[1:, 1:] - 1).abs().max()) < tolerance
    assert float((kernel(X, M=M)[1:, 1:] / kernel(x[1:], M=M) - 1).abs().max()) < tolerance
    g = kernel.gradient(X, z, coef, M)
    assert relative(g[1:], slopes[1:]) < 2e-6
    # slopes do not depend on the scale of x
    G = patch_agop(kernel, X, z, coef, M)
    assert relative(G, patch_agop(kernel, x, z, coef, M)) < 1e-5
    if dtype == torch.float64:
        assert relative(G, torch.einsum("ncpq,ncpr->qr", g, g) / 5) < 1e-5


def test_the_largest_images_that_single_precision_holds_are_right():
    x = torch.rand(2, 1, 8, 8)
    for scale in (1e-12, 1e14):
        assert torch.allclose(CNTK()(x * scale).double() / scale**2, CNTK()(x.double()), rtol=1e-5)


@pytest.mark.parametrize(
    "what,n,m,size", [("gram", 1, 1, 700), ("symmetric", 40, 40, 96), ("agop", 2, 2, 400)]
)
def test_the_plan_is_what_is_taken(what, n, m, size, planned_and_taken):
    x, z = torch.rand(n, 3, size, size), torch.rand(m, 3, size, size)
    calls = {
        "gram": lambda: CNTK()(x, z),
        "symmetric": lambda: CNTK()(x),
        "agop": lambda: patch_agop(CNTK(), x, z, torch.rand(m, 1)),
    }
    planned, taken = planned_and_taken(calls[what])
    assert taken > 5e7 and 0.9 * taken <= planned <= 1.35 * taken, (planned, taken)


def test_images_too_large_for_memory_are_refused_before_the_work(monkeypatch):
    x = torch.rand(1, 3, 1024, 1024)
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**27)
    monkeypatch.setattr(CNTK, "patches", lambda *args: pytest.fail("it began to work"))
    with pytest.raises(MemoryError, match="1 and 1 images of 1024 x 1024 pixels.*smaller images"):
        CNTK()(x)
    with pytest.raises(MemoryError, match="gradients of 1 outputs at 1 images of 1024 x 1024"):
        patch_agop(CNTK(), x, x, torch.ones(1, 1))
    with pytest.raises(MemoryError):
        CNTK(1, 2049, padding="zero")(x)


def test_many_tiles_give_what_one_tile_gives(monkeypatch):
    x, z = (torch.rand(n, 2, 9, 8, dtype=torch.float64) for n in (37, 23))
    K, L, g = CNTK(2)(x, z), CNTK(2)(x), CNTK(2).gradient(x, z, torch.ones(23))
    monkeypatch.setattr(image_tiles, "_TILE", {"cpu": (4, 1)})
    monkeypatch.setattr(image_tiles, "_PREPARED", 1)
    assert torch.allclose(CNTK(2)(x, z), K, rtol=1e-12)
    assert torch.allclose(CNTK(2)(x), L, rtol=1e-12)
    assert torch.allclose(CNTK(2).gradient(x, z, torch.ones(23)), g, atol=1e-12)


def test_equal_and_black_images():
    x = torch.rand(3, 2, 9, 9, dtype=torch.float64)
    x[1], x[2] = x[0], 0
    K, k = CNTK(3)(x, x.clone()), CNTK(3)
    a = k.box(k.box(k.patches(x).square().sum(-1) / 2))
    assert K[0, 1] == pytest.approx(4 * float(a.mean((0, 1))[0]), rel=1e-14)
    assert (K[2] == 0).all() and (K[:, 2] == 0).all()
    assert torch.isfinite(CNTK(3).gradient(x, x.clone(), torch.ones(3))).all()
    assert (CNTK(3)(torch.full((2, 1, 9, 9), 0.5)) > 0).all()


@pytest.mark.parametrize("patch_size", [1, 3])
@pytest.mark.parametrize("metric", [False, True])
def test_images_stay_as_they_are(patch_size, metric):
    x = torch.rand(4, 3, 8, 8)
    before = x.clone()
    CNTK(2, patch_size)(x, M=torch.eye(3 * patch_size**2) if metric else None)
    assert torch.equal(x, before)


def test_families_of_arrays():
    x = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), dtype=np.uint8)
    K = CNTK()(x)
    assert isinstance(K, np.ndarray) and K.dtype == np.float64
    assert isinstance(CNTK()(torch.from_numpy(x)), torch.Tensor)
    assert CNTK()(x.astype(np.float32)).dtype == np.float32
    np.testing.assert_allclose(CNTK()(x / 255), K / 255**2, rtol=1e-12)
    G = patch_agop(CNTK(), x / 255, x / 255, np.ones(3))
    assert isinstance(G, np.ndarray) and G.shape == (9, 9)


def test_patch_agop_is_the_mean_outer_product_of_the_gradients():
    x, z, M, coef = problem(CNTK(2), 11, 3)
    g = CNTK(2).gradient(x, z, coef, M)
    assert g.shape == (11, 3, 12, 18)
    G = patch_agop(CNTK(2), x, z, coef, M)
    assert relative(G, torch.einsum("ncpq,ncpr->qr", g, g) / 11) < 1e-12
    single = patch_agop(CNTK(2), x.float(), z.float(), coef.float(), M.float())
    assert relative(single.double(), G) < 1e-4


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11])
def test_window_sum(size):
    t = torch.rand(13, 12, 3, dtype=torch.float64)
    windows = t.unfold(0, size, 1).unfold(1, size, 1)
    assert torch.allclose(window_sum(t, size), windows.sum((-1, -2)))


def test_pooling_is_blind_to_circular_shifts():
    x, k = torch.rand(1, 2, 5, 6, dtype=torch.float64), CNTK(2, padding="circular", pooling=True)
    assert torch.allclose(k(x, x.roll((2, 1), (2, 3))), k(x, x.clone()), rtol=1e-12)


def channels_first(a):
    return np.ascontiguousarray(a.transpose(0, 3, 1, 2))


@pytest.mark.skipif(not FIXTURE.is_file(), reason="the stored reference numbers are not here")
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("metric", ["expanded", "expandedM"])
def test_reference_kernels(depth, metric):
    d = np.load(FIXTURE)
    x, z = (channels_first(d[f"X{i}_8x8x3"]) for i in (1, 2))
    M = d["M_8x8x3"] @ d["M_8x8x3"].T if metric == "expandedM" else None
    for name, f in (("ntk", CNTK(depth)), ("nngp", CNTK(depth).nngp)):
        error = np.abs(f(x, z, M) / d[f"{name}_{metric}_8x8x3_d{depth}"] - 1)
        # one image twice: the reference is off by rounding of its cosine, ours is exact
        assert error[0, 0] < 1e-8
        error[0, 0] = 0
        assert error.max() < 1e-10


@pytest.mark.skipif(not FIXTURE.is_file(), reason="the stored reference numbers are not here")
@pytest.mark.parametrize("name", ["d1", "d2", "d2M"])
def test_reference_patch_agop(name):
    d = np.load(FIXTURE)
    X, Xs, coef, G = (d[f"agop_{name}_{part}"] for part in ("X", "Xs", "alphas", "G"))
    M = d["agop_d2M_M"] @ d["agop_d2M_M"].T if name == "d2M" else None
    got = patch_agop(CNTK(int(name[1])), channels_first(Xs), channels_first(X), coef, M)
    assert np.abs(got - G).max() < 1e-10 * np.abs(G).max()


def images(n=2, channels=1, value=None):
    if value is None:
        return torch.rand(n, channels, 8, 8)
    return torch.full((n, channels, 8, 8), value)


def ones(*shape):
    return torch.ones(*shape)


BAD_KERNELS = [
    *[({"depth": v}, "depth must be an integer of at least 1 and below 2\\*\\*31, got")
      for v in (0, True, 2.0, 2**63)],
    *[({"patch_size": v}, "patch_size must be") for v in (-1, True, 2**63 + 1)],
    *[({"pooling": v}, "pooling must be True or False") for v in (1, "False", None)],
    ({"patch_size": 4}, "patch_size must be odd, got 4"),
    ({"padding": "same"}, "padding must be .* got 'same'"),
]  # fmt: skip


@pytest.mark.parametrize("parameters,message", BAD_KERNELS)
def test_bad_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        CNTK(**parameters)


deep = CNTK(40, padding="zero")
deepest = CNTK(2**31 - 1, padding="zero")
nearly_black = torch.cat([images(1), images(1, value=1e-25)])
too_large = "x reaches 1e.*overflows.*rescale it"

BAD_CALLS = [
    (lambda: CNTK()(images(value=1e20)), too_large),
    (lambda: CNTK()(images(value=1e17)), too_large),
    (lambda: CNTK()(np.full((2, 1, 8, 8), 1e160)), too_large),
    (lambda: CNTK()(images(), images(value=1e20)), "z reaches 1e"),
    (lambda: CNTK()(images(), M=torch.eye(9).double() * 1e36), "x reaches .*overflows"),
    (lambda: deep(images()), "depth=40 .*overflows torch.float32.*or pass it in float64"),
    (lambda: deepest(images().double()), "depth=2147483647 .*overflows"),
    (lambda: CNTK()(nearly_black), "x holds an image of at most 1e-25.*vanishes"),
    (lambda: CNTK()(torch.rand(2, 3, 6, 9)), "x holds images of 6 x 9 pixels.*at least 7 x 7"),
    (lambda: CNTK()(torch.rand(2, 64)), "x must have 4 axes"),
    (lambda: CNTK()(images(2, 3), images(2, 1)), "x holds images of .3, 8, 8. and z of .1, 8, 8."),
    (lambda: CNTK()(images(value=math.nan)), "x contains NaN"),
    (lambda: CNTK()(images(), M=torch.eye(8)), "M has shape .8, 8.; with 9"),
    (lambda: CNTK()(images(), M=-torch.eye(9)), "M is not positive semi-definite"),
    (lambda: CNTK().gradient(images(), images(3) * 1e10, 1e30 * ones(3, 1)), "gradients overflow"),
    (lambda: CNTK().gradient(images(), images(3), ones(2, 1)),
     "coef has shape .2, 1.; it must be .3, outputs."),
    (lambda: patch_agop(CNTK(), images(), images(3, value=1e20), ones(3)), "centers reaches 1e"),
    (lambda: patch_agop(CNTK(), images(), images(3), 1e30 * ones(3, 1)),
     "squares of the gradients overflow"),
    (lambda: patch_agop(CNTK(), images(), images(3, 2), ones(3, 1)), "centers of .2, 8, 8."),
]  # fmt: skip


@pytest.mark.parametrize("call,message", BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_more_pairs_than_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 100)
    x = torch.rand(6, 1, 8, 8)
    message = "6 and 6 images of 8 x 8 pixels, in 32-bit numbers, takes.*Pass float32 images"
    with pytest.raises(MemoryError, match=message):
        CNTK()(x)
    for call in (CNTK().gradient, CNTK().image_gradient, lambda *args: patch_agop(CNTK(), *args)):
        with pytest.raises(MemoryError, match="gradients of 2 outputs at 6 images of 8 x 8 pixels"):
            call(x, x, torch.rand(6, 2))


def test_only_large_calls_ask_for_the_compiler_and_without_one_stay_as_they_are(monkeypatch):
    x, asked = torch.rand(20, 1, 9, 9), []
    K = CNTK()(x)
    no_compiler = asked.append
    monkeypatch.setattr(image_tiles, "compiled_layers", functools.partial(no_compiler, 1))
    monkeypatch.setattr(image_tiles, "_COMPILE_FROM", 20 * 20 * 49 * 3 // 2 + 1)
    assert torch.equal(CNTK()(x), K) and not asked
    monkeypatch.setattr(image_tiles, "_COMPILE_FROM", 20 * 20 * 49 * 3 // 2 - 1)
    assert torch.equal(CNTK()(x), K) and asked
    asked.clear()
    CNTK()(x.double())
    assert not asked


def test_a_missing_compiler_is_no_error(monkeypatch):
    monkeypatch.undo()

    def broken(*args, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda f, **options: broken)
    relu_layers.compiled_layers.cache_clear()
    try:
        assert relu_layers.compiled_layers() is None
    finally:
        relu_layers.compiled_layers.cache_clear()


def test_the_compilers_version_of_a_layer_is_the_same_function():
    kernel, x = CNTK(3), torch.rand(6, 2, 11, 10)
    side = PreparedImages.of(kernel, x)
    layers = [functools.partial(layer, relu=relu_layers.fused_relu) for layer in relu_layers.PLAIN]
    plain, fused = kernel.forward(side[:3], side[3:]), kernel.forward(side[:3], side[3:], layers)
    for a, b in zip(plain, fused):
        assert torch.allclose(a, b, rtol=1e-5)


def smooth_images():
    g, rng = np.linspace(0, 1, 12), np.random.default_rng(0)
    waves = rng.uniform(0.5, 3, size=(10, 3))
    found = [np.outer(np.sin(g * a + b) + 1.5, np.cos(g * c) + 1.2) for a, b, c in waves]
    return np.stack(found)[:, None]


@pytest.mark.parametrize(
    "k", [CNTK(1, 3), CNTK(2, 3), CNTK(3, 3), CNTK(1, 3, pooling=True)], ids=names
)
def test_gradients_near_the_centers_are_exact_in_single_precision(k):
    base = smooth_images().astype(np.float32)
    x, coef = base * np.float32(1.01) + np.float32(0.01), np.random.default_rng(1).normal(size=10)
    G, double = k.image_gradient(x, base, coef), base.astype(np.float64)
    assert G.dtype == np.float32
    direction = np.random.default_rng(2).normal(size=x.shape)
    after, before = (k(x + step * direction, double) @ coef for step in (1e-6, -1e-6))
    slope, along = (after - before) / 2e-6, (G[:, 0] * direction).sum((1, 2, 3))
    np.testing.assert_allclose(along, slope, rtol=1e-4, atol=1e-5 * np.abs(slope).max())
    g, exact = k.gradient(x, base, coef), k.gradient(x.astype(np.float64), double, coef)
    assert g.dtype == np.float32
    np.testing.assert_allclose(g, exact, rtol=1e-4, atol=1e-6 * np.abs(g).max())


@pytest.mark.parametrize("integer", [np.int8, np.uint8, np.int64])
def test_numpy_integers_are_integers(integer):
    k = CNTK(integer(3), integer(13), padding="zero")
    x = np.random.default_rng(0).normal(size=(3, 1, 20, 20))
    assert k == CNTK(3, 13, padding="zero") and type(k.depth) is type(k.patch_size) is int
    np.testing.assert_array_equal(k(x), CNTK(3, 13, padding="zero")(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [-83, 83])
def test_patch_agop_of_very_small_and_large_coefficients(dtype, power):
    def random(*shape):
        g = torch.Generator().manual_seed(0)
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    x, z, coef = random(3, 2, 6, 6), random(4, 2, 6, 6) + 1, random(4, 2)
    wanted = patch_agop(CNTK(2), x.double(), z.double(), coef.double())
    scaled = patch_agop(CNTK(2), x.double(), z.double(), coef.double() * 2.0**power)
    np.testing.assert_allclose(scaled * 2.0 ** (-2 * power), wanted, rtol=1e-10)
    if dtype == torch.float64:
        return
    with pytest.raises(ValueError, match="squares of the gradients.*float32.*rescale coef"):
        patch_agop(CNTK(2), x, z, coef * 2.0**power)
    with pytest.warns(UserWarning, match="squares of the gradients vanish"):
        patch_agop(CNTK(2), x.double(), z.double(), coef.double() * 1e-200)


def test_patches_beyond_all_of_an_image_are_refused():
    with pytest.raises(ValueError, match="patch_size=1001 .*6 x 6.*patch_size <= 11"):
        CNTK(1, 1001, padding="zero", pooling=True)(np.ones((1, 1, 6, 6)))
