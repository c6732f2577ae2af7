"""The star on one class: where it is, and what is counted as lying on it."""

import numpy as np

from agop_book.book.planted import plant, star_mask, star_share


def test_a_star_is_symmetric_and_stands_upright():
    mask = star_mask(41)
    assert (mask == mask[:, ::-1]).all()
    widths = mask.sum(1)
    assert widths[:4].max() < widths[15] and mask[20, 20]  # one point on top, arms below
    assert 0.15 < mask.mean() < 0.5


def test_a_star_is_planted_where_it_is_asked_for():
    x = np.random.default_rng(0).random((5, 3, 32, 32)).astype("f4")
    before, where = x.copy(), np.array([True, False, True, False, False])
    planted = plant(x, where)
    assert (x == before).all() and (planted[~where] == x[~where]).all()
    changed = (planted[0] != x[0]).any(0)
    assert changed.sum() == star_mask(9).sum() and not changed[10:].any()
    assert (planted[0][:, changed] == np.array([[1], [1], [0]])).all()
    grey = plant(x[:, :1], where)
    assert (grey[0, 0][changed] == 1).all()


def test_a_share_is_a_part_of_the_whole():
    diagonal = np.arange(2 * 3 * 3.0).reshape(2, 3, 3)
    mask = np.eye(3, dtype=bool)
    assert star_share(diagonal, mask) == (0 + 4 + 8 + 9 + 13 + 17) / 153
