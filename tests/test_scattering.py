import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

pytest.importorskip("kymatio", reason="the wavelets come from kymatio")
from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D

from safetensors.numpy import save_file

from agop_book import memory
from agop_book.book.load import load
from agop_book.files import load_arrays, save_arrays
from agop_book.kernels import KERNELS, Laplace
from agop_book.metrics import apply_metric
from agop_book.rfm import RFMRegressor
from agop_book.maprfm import MapRFMClassifier, MapRFMRegressor
from agop_book.maps import MapScaler, RowSpan, wavelet_disk
from agop_book.scattering import Scattering
from agop_book.solvers import CholeskySolver, rounds
from agop_book.structures import STRUCTURES
from agop_book.wavelets import scatter, scattering_paths

DIGITS = load("digits", n=160, random_state=0)
IMAGES = DIGITS.x.repeat(2, axis=2).repeat(2, axis=3)  # (160, 1, 16, 16)


@pytest.mark.parametrize(
    "J, L, shape, order",
    [
        (1, 8, (2, 2), 2),
        (1, 4, (8, 8), 2),
        (2, 8, (13, 9), 2),
        (2, 6, (4, 5), 1),
        (3, 8, (8, 8), 2),
        (2, 8, (28, 28), 2),
        (3, 4, (32, 20), 2),
    ],
)
def test_equals_kymatio(J, L, shape, order):
    x = torch.randn(3, *shape)
    theirs = ScatteringTorch2D(J, shape, L=L, max_order=order)(x)
    ours = scatter(x, J, L, order)
    assert ours.shape == theirs.shape == (3, len(scattering_paths(J, L, order)), *theirs.shape[-2:])
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(
        scatter(x.double(), J, L, order).float(), theirs, atol=2e-6, rtol=1e-4
    )


def test_paths_are_kymatios():
    listed = ScatteringTorch2D(3, (16, 16), L=4, out_type="list")(torch.randn(1, 16, 16))
    table = scattering_paths(3, 4)
    angle = {k: ((1 - k) * 45 - 90) % 180 for k in range(4)}
    for theirs, ours in zip(listed, table.itertuples(), strict=True):
        assert ours.order == len(theirs["j"])
        assert [v for v in (ours.scale1, ours.scale2) if not np.isnan(v)] == list(theirs["j"])
        assert [v for v in (ours.angle1, ours.angle2) if not np.isnan(v)] == [
            angle[k] for k in theirs["theta"]
        ]


@pytest.mark.parametrize("shift", [1, 2])
def test_properties(shift):
    x = torch.nn.functional.pad(torch.from_numpy(IMAGES[:10, 0]).double(), [12] * 4)
    S, moved = scatter(x), scatter(x.roll((shift, shift), (1, 2)))
    pixels = (x - x.roll((shift, shift), (1, 2))).norm() / x.norm()
    assert (S - moved).norm() / S.norm() < (0.5, 0.7)[shift - 1] * pixels
    ratio = (
        torch.cdist(S.flatten(1), S.flatten(1))
        * 4
        / torch.cdist(x.flatten(1), x.flatten(1)).clamp(min=1e-9)
    )
    assert 0.2 < ratio.max() <= 1
    turned = scatter(
        x.transpose(1, 2)
    )  # swapping rows and columns swaps the angles: 0 with 90, 22.5 with 112.5 + ...
    t = scattering_paths(2, 8)
    swap = [
        t[(t.order == 1) & (t.scale1 == r.scale1) & (t.angle1 == (-r.angle1 - 90) % 180)].index[0]
        for r in t[t.order == 1].itertuples()
    ]
    torch.testing.assert_close(turned[:, swap], S[:, 1:17].transpose(2, 3), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(scatter(3 * x), 3 * S)


def test_a_folder_keeps_results(tmp_path):
    s = Scattering(cache=tmp_path)
    S = s.fit_transform(IMAGES[:20])
    assert S.shape == (20, 81 * 16) == (20, np.prod(s.maps_shape_)) and S.dtype == np.float32
    files = list(tmp_path.iterdir())
    assert len(files) == 1 and files[0].suffix == ".safetensors"
    written = files[0].stat().st_mtime_ns
    assert (s.transform(IMAGES[:20]) == S).all()
    assert files[0].stat().st_mtime_ns == written  # read back
    files[0].write_bytes(files[0].read_bytes()[:200])
    with pytest.warns(UserWarning, match="computing its coefficients again"):
        assert (s.transform(IMAGES[:20]) == S).all()
    assert (s.transform(IMAGES[:20]) == S).all()
    other = s.transform(IMAGES[20:40])
    assert len(list(tmp_path.iterdir())) == 2 and not np.allclose(other, S)
    Scattering(order=1, cache=tmp_path).fit_transform(IMAGES[:20])
    assert len(list(tmp_path.iterdir())) == 3  # another transform, another file


def test_families_and_dtypes():
    S = Scattering().fit_transform(IMAGES[:20])
    plain = Scattering(batch_size=7).fit(IMAGES[:20])
    assert np.allclose(plain.transform(IMAGES[:20]), S, atol=1e-6)
    for dtype in (np.uint8, np.int64, bool):
        assert plain.transform((4 * IMAGES[:20]).astype(dtype)).dtype == np.float32
    assert plain.transform(IMAGES[:20].astype(np.float64)).dtype == np.float64
    tensor = plain.transform(torch.from_numpy(IMAGES[:20]))
    assert isinstance(tensor, torch.Tensor) and np.allclose(tensor, S, atol=1e-6)
    assert np.allclose(plain.transform(np.asfortranarray(IMAGES[:20])), S, atol=1e-6)
    rows = Scattering(image_shape=(1, 16, 16)).fit_transform(
        pd.DataFrame(IMAGES[:20].reshape(20, -1)).rename(columns=str)
    )
    assert np.allclose(rows, S, atol=1e-6)
    assert np.isfinite(plain.fit_transform(0 * IMAGES[:2])).all()
    frame = (
        Scattering(image_shape=(1, 16, 16))
        .set_output(transform="pandas")
        .fit_transform(IMAGES[:20].reshape(20, -1))
    )
    assert list(frame.columns[:2]) == ["c0 S0 y0 x0", "c0 S0 y0 x1"]
    assert np.allclose(frame, S, atol=1e-6)


def wrong_files(file, S, folder):
    "Contents that a cache file must not have, by what is wrong with them."
    good = file.read_bytes()
    _, about = load_arrays(file)
    flipped = bytearray(good)
    flipped[-5] ^= 4  # one bit of one coefficient
    plain = folder / "plain"
    save_file({"coefficients": S + 1}, plain)  # the right shape, without a checksum
    yield from {"flipped": flipped, "plain": plain.read_bytes(), "cut": good[:100]}.items()
    yield "empty", b""
    for name, arrays, what in (
        ("rows", {"coefficients": S[:3]}, about),
        ("dtype", {"coefficients": S.astype(np.float64)}, about),
        ("not finite", {"coefficients": S * np.nan}, about),
        ("another key", {"coefficients": S + 1}, {**about, "key": "0"}),
        ("another name", {"c": S}, about),
        ("more", {"coefficients": S, "c": S}, about),
    ):
        save_arrays(plain, arrays, what)
        yield name, plain.read_bytes()


def test_a_cache_file_is_believed_only_if_it_is_this_result(tmp_path):
    cache, (x, other) = tmp_path / "cache", (IMAGES[:6], IMAGES[6:12])
    s = Scattering(cache=cache).fit(x)
    S = s.transform(x)
    file = next(cache.iterdir())
    s.transform(other)
    foreign = next(f for f in cache.iterdir() if f != file).read_bytes()
    for name, content in [("foreign", foreign), *wrong_files(file, S, tmp_path)]:
        file.write_bytes(content)
        with pytest.warns(UserWarning, match="computing its coefficients again"):
            assert np.array_equal(s.transform(x), S), name
        assert np.array_equal(load_arrays(file)[0]["coefficients"], S), name  # and is repaired
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(s.transform(x), S)


def test_memory_is_planned(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device="cpu": 2**26)
    for options, x in (
        ({"L": 2000}, IMAGES),
        ({"batch_size": 2**31 - 1}, IMAGES.repeat(50, 0)),
        ({"J": 3}, np.zeros((1, 1, 1024, 1024), np.float32)),
    ):
        with pytest.raises(
            MemoryError, match="the scattering of .* images of .* fewer or smaller images"
        ):
            Scattering(**options).fit(x)


def test_colours_and_names():
    x = np.random.default_rng(0).random((4, 3, 12, 8), dtype=np.float32)
    s = Scattering(J=2, L=4).fit(x)
    names, maps = s.get_feature_names_out(), s.transform(x).reshape(4, *s.maps_shape_)
    assert s.maps_shape_ == (3, 25, 3, 2) and len(set(names)) == len(names) == 3 * 25 * 6
    assert names[-1] == "c2 S2 j0,1 t0,0 y2 x1"
    assert np.allclose(maps[:, 1], scatter(torch.from_numpy(x[:, 1]), 2, 4), atol=1e-6)


BAD = [
    ({"J": 0}, IMAGES, "J must be an integer of at least 1"),
    ({"J": 2.0}, IMAGES, "J must be"),
    ({"L": -1}, IMAGES, "L must be"),
    ({"order": 0}, IMAGES, "order must be 1 or 2"),
    ({"order": True}, IMAGES, "order must be"),
    *[
        ({name: value}, IMAGES, f"{name} must be")
        for name in ("J", "L", "batch_size")
        for value in (2**63, True, -1, 1.0, "2")
    ],
    ({"J": 2**31 - 1}, IMAGES, r"J=2147483647 needs images of at least 2\^2147483647"),
    ({"batch_size": 0}, IMAGES, "batch_size"),
    ({"cache": 3}, IMAGES, "cache must be None or a folder"),
    ({"device": "tpu"}, IMAGES, "device='tpu'"),
    ({"image_shape": (16, 16)}, IMAGES, "image_shape must be"),
    ({"image_shape": (3, 16, 16)}, IMAGES, "image_shape is"),
    (
        {"J": 5},
        IMAGES,
        r"J=5 needs images of at least 32 x 32 pixels, X holds 16 x 16; take J <= 4",
    ),
    ({"J": 1}, IMAGES[:, :, :1], "enlarge"),
    ({}, IMAGES.reshape(160, -1), "rows need image_shape"),
    ({}, IMAGES[:, 0], r"pass X\[:, None\]"),
    ({}, np.full_like(IMAGES, np.nan), "NaN"),
    ({}, IMAGES * 1j, "Complex"),
    ({}, IMAGES[:0], "minimum of 1"),
]


@pytest.mark.parametrize("options, x, message", BAD)
def test_bad_input(options, x, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Scattering(**options).fit(x)


def test_bad_transform():
    s = Scattering().fit(IMAGES)
    for x, message in (
        (IMAGES.repeat(3, axis=1), r"\(3, 16, 16\), but the model was fitted to \(1, 16, 16\)"),
        (IMAGES[:, :, :8], "fitted to"),
        (np.where(IMAGES > 0, np.inf, 0), "infinity"),
        (IMAGES.reshape(160, -1)[:, :9], "expecting 256 features"),
    ):
        with pytest.raises(ValueError, match=message):
            s.transform(x)


def laplace_machine(machine, x):
    "The machine, written out; away from a coincident point, whose slope is taken as 0."
    gap = x[None] - machine.centers
    r = (gap * apply_metric(gap, machine.M)).sum(1)
    near = r < 1e-18
    return torch.where(near, 0, torch.exp(-torch.where(near, 1.0, r).sqrt() / 3)) @ machine.coef


@pytest.mark.parametrize("metric", ["diag", "shared", "separable"])
def test_rounds_by_autograd(metric):
    C, P = 3, 4
    rng = torch.Generator().manual_seed(1)
    X, Y = (
        torch.randn(25, C * P, generator=rng).double(),
        torch.randn(25, 2, generator=rng).double(),
    )
    steps = list(rounds(CholeskySolver(Laplace(3.0), X, Y, [1e-3], STRUCTURES[metric](C, P)), 2))
    for now, after in zip(steps, steps[1:]):
        f = partial(laplace_machine, now.machine)
        J = torch.stack([torch.autograd.functional.jacobian(f, x) for x in X]).reshape(-1, C, P)
        D, blocks = J.square().sum(0) / 25, torch.einsum("icp,ikp->ck", J, J) / 25 / P
        want = {
            "diag": D.flatten(),
            "shared": blocks,
            "separable": (D.sum(1)[:, None] * D.sum(0) / D.sum()).flatten(),
        }[metric]
        torch.testing.assert_close(after.M, want)
        torch.testing.assert_close(now.fitted, now.machine(X))


@pytest.mark.parametrize(
    "kernel", [k for k in sorted(KERNELS) if k != "ntk" and "shared" in KERNELS[k].metrics]
)
def test_equals_rfm(kernel):
    X, y = DIGITS.flat[:80].astype(np.float64), DIGITS.y[:80]
    for ours, theirs in (
        ({"metric": "diag"}, {"diag": True}),
        ({"metric": "shared", "channels": 64}, {"diag": False}),
    ):
        a = MapRFMRegressor(
            **ours,
            kernel=kernel if kernel != "generalized_exponential" else KERNELS[kernel](4.0, 1.2),
            bandwidth=0.5,
            n_iter=2,
            center=True,
        ).fit(X, y)
        b = RFMRegressor(
            **theirs,
            kernel=kernel if kernel != "generalized_exponential" else KERNELS[kernel](4.0, 1.2),
            bandwidth=4.0,
            n_iter=2,
            center=True,
        ).fit(X, y)
        assert np.allclose(a.M_, b.M_, rtol=1e-5, atol=1e-8 * b.M_.max()) and np.allclose(
            a.predict(X), b.predict(X), atol=1e-5
        )


@pytest.mark.parametrize("metric, channels", [("diag", None), ("shared", 81), ("separable", 81)])
def test_classifier(tmp_path, metric, channels):
    chosen = dict(reg=[1e-4, 1e-2], validation_fraction=0.25, random_state=0)
    model = MapRFMClassifier(metric, channels=channels, n_iter=2, bandwidth=3.0, **chosen)
    pipe = make_pipeline(Scattering(), MapScaler(81), model)
    pipe.fit(IMAGES[:120], DIGITS.y[:120])
    assert pipe.score(IMAGES[120:], DIGITS.y[120:]) > 0.8
    assert len(model.history_) == 3 and set(model.history_["reg"]) <= {1e-4, 1e-2}
    assert model.history_["val_score"].idxmax() == model.best_round_
    features = pipe[:-1].transform(IMAGES[120:])
    model.save(tmp_path / "m")
    again = MapRFMClassifier.load(tmp_path / "m")
    want = model.decision_function(features)
    assert np.allclose(again.decision_function(features), want, atol=1e-5)
    assert again.get_params()["metric"] == metric
    Z = model.transform(features)
    outputs = (
        Laplace(3.0 * features.shape[1] ** 0.5)(Z, model.transform(model.machine_.centers.numpy()))
        @ model.dual_coef_
    )
    assert np.allclose(outputs, want, atol=1e-4)


def test_search_and_clone():
    pipe = make_pipeline(Scattering(), StandardScaler(), MapRFMClassifier(n_iter=1))
    search = GridSearchCV(
        pipe,
        {"scattering__J": [1, 2], "maprfmclassifier__bandwidth": [1.0, 3.0]},
        cv=2,
        error_score="raise",
    ).fit(IMAGES[:60], DIGITS.y[:60])
    assert search.best_score_ > 0.6 and clone(search.best_estimator_).get_params() is not None


def test_row_span_is_exact():
    rng = np.random.default_rng(0)
    X, X_test, y = (
        rng.standard_normal((30, 200)),
        rng.standard_normal((20, 200)),
        rng.standard_normal(30),
    )
    span = RowSpan().fit(X)
    Z, Z_test = span.transform(X), span.transform(X_test)
    assert Z.shape == (30, 30) and np.allclose(Z[:, -1], 0) and (Z_test[:, -1] > 0).all()
    for n_iter in (0, 1, 2):
        a, b = (
            RFMRegressor(bandwidth=10.0, n_iter=n_iter).fit(X, y),
            RFMRegressor(bandwidth=10.0, n_iter=n_iter).fit(Z, y),
        )
        assert np.allclose(a.predict(X_test), b.predict(Z_test), atol=1e-8)


MAP_BAD = [
    ({"metric": "block"}, "metric must be one of"),
    ({"metric": "shared"}, "needs channels"),
    ({"metric": "separable", "channels": 7}, "not channels=7 maps"),
    ({"kernel": "cauchy"}, "kernel must be a Kernel or one of"),
    ({"reg": []}, "reg must be"),
    ({"bandwidth": 0}, "bandwidth must be"),
    ({"n_iter": -1}, "n_iter must be"),
    ({"channels": 0}, "channels must be"),
]


@pytest.mark.parametrize("options, message", MAP_BAD)
def test_bad_parameters(options, message):
    with pytest.raises(ValueError, match=message):
        MapRFMClassifier(**options).fit(DIGITS.flat[:20], DIGITS.y[:20])


def test_memory_and_scaler_errors():
    with pytest.raises(MemoryError, match="memory_limit"):
        MapRFMClassifier(memory_limit=2**20).fit(DIGITS.flat[:20], DIGITS.y[:20])
    with pytest.raises(ValueError, match="channels=5 must be a positive integer that divides"):
        MapScaler(5).fit(DIGITS.flat)
    constant = MapScaler(64).fit_transform(np.ones((5, 64)))
    assert (constant == 0).all()


def test_constant_target():
    with pytest.warns(UserWarning, match="M_ is zero"):
        model = MapRFMRegressor(n_iter=1).fit(DIGITS.flat[:20], np.zeros(20))
    assert (model.predict(DIGITS.flat[:5]) == 0).all()


@pytest.mark.parametrize(
    "estimator",
    [MapRFMRegressor(), MapRFMClassifier(n_iter=1), MapScaler(), RowSpan()],
    ids=lambda e: type(e).__name__,
)
def test_check_estimator(estimator):
    check_estimator(estimator, on_skip=None)


def test_check_estimator_of_the_transformer():
    "The checks feed tables of any width; those that fail say that a row is not an image."
    results = check_estimator(Scattering(J=1, image_shape=(1, 2, 2)), on_fail=None, on_skip=None)
    failed = [r for r in results if r["status"] == "failed"]
    assert sum(r["status"] == "passed" for r in results) >= 18
    for r in failed:
        chain = f"{r['exception']} {r['exception'].__cause__} {r['exception'].__context__}"
        assert "image_shape is (1, 2, 2)" in chain, (r["check_name"], chain)


def test_disk():
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(subplot_kw={"projection": "polar"})
    table = scattering_paths(3, 4)
    for order, bars in ((1, 2 * 12), (2, 2 * 3 * 16)):
        ax.clear()
        wavelet_disk(ax, np.arange(len(table)), table, order)
        assert len(ax.patches) == bars and all(
            p.get_y() + p.get_height() <= 3.3 + 1e-9 for p in ax.patches
        )
    with pytest.raises(ValueError, match="order=2"):
        wavelet_disk(ax, np.ones(9), scattering_paths(1, 8), 2)
    plt.close(fig)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda():
    on_cpu, on_gpu = (
        Scattering(device="cpu").fit_transform(IMAGES),
        Scattering(device="cuda").fit_transform(IMAGES),
    )
    assert np.allclose(on_cpu, on_gpu, atol=1e-5)
    a, b = (
        MapRFMClassifier("shared", channels=81, device=d, n_iter=1, bandwidth=3.0).fit(
            on_cpu, DIGITS.y
        )
        for d in ("cpu", "cuda")
    )
    assert (a.predict(on_cpu) == b.predict(on_cpu)).mean() > 0.98


def test_svhn_crops():
    try:
        data = load("svhn_crops", split="all")
    except FileNotFoundError:
        pytest.skip("no SVHN crops on this machine (AGOP_BOOK_DATA)")
    s = Scattering()
    rows = s.fit_transform(data.x[:400])
    pipe = make_pipeline(
        MapScaler(243),
        MapRFMClassifier(n_iter=1, bandwidth=3.0, validation_fraction=0.3, random_state=0),
    )
    pipe.fit(rows[:300], data.y[:300])
    assert s.maps_shape_ == (3, 81, 8, 8) and pipe.score(rows[300:], data.y[300:]) > 0.45


@pytest.mark.parametrize("integer", [np.int8, np.uint8, np.int64])
def test_numpy_integers_are_integers(integer):
    X = IMAGES[:3].repeat(9, axis=2).repeat(9, axis=3)  # 144 pixels: more than int8 holds
    wanted = Scattering(2, 4, batch_size=2).fit_transform(X)
    np.testing.assert_array_equal(
        Scattering(integer(2), integer(4), integer(2), batch_size=integer(2)).fit_transform(X),
        wanted,
    )


@pytest.mark.parametrize("inside", [False, True])
def test_a_cache_that_cannot_be_written_is_found_before_the_work(inside, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("mine")
    model = Scattering(2, 4, cache=file / "folder" if inside else file).fit(IMAGES[:3])
    monkeypatch.setattr(Scattering, "_compute", lambda *args: pytest.fail("it began to work"))
    with pytest.raises(OSError, match="cache: .*file.*choose another"):
        model.transform(IMAGES[:3])
    assert file.read_text() == "mine"


@pytest.mark.parametrize("dtype, peak", [(np.float32, 1e38), (np.float64, 1e307)])
def test_images_whose_sums_overflow_are_refused(dtype, peak):
    X = IMAGES[:3].astype(dtype)
    X /= np.abs(X).max()
    model = Scattering(2, 4).fit(X)
    with pytest.raises(ValueError, match="X reaches 1e.*overflow float"):
        model.transform(X * dtype(peak))
    with pytest.raises(ValueError, match="X reaches 1e.*overflow float"):
        Scattering(2, 4).fit(X * dtype(peak))
    large = dtype(peak / 1e6)
    np.testing.assert_allclose(
        model.transform(X * large) / large, model.transform(X), rtol=1e-3, atol=1e-5
    )


def test_a_refused_fit_leaves_the_model_as_it_was():
    small = IMAGES[:3, :, :4, :4]
    model = Scattering(1, 2).fit(IMAGES[:3])
    wanted = model.transform(IMAGES[:2])
    with pytest.raises(ValueError, match="J=3 needs"):
        model.set_params(J=3).fit(small)
    np.testing.assert_array_equal(model.transform(IMAGES[:2]), wanted)
    assert model.J == 3 and model.image_shape_ == (1, 16, 16) and model.n_features_in_ == 256
    fresh = Scattering(3, 2)
    with pytest.raises(ValueError):
        fresh.fit(small)
    with pytest.raises(ValueError, match="not fitted"):
        fresh.transform(small)
