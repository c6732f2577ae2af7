"What a machine in few directions compares, and where its rows have their origin."

import numpy as np
import torch

from agop_book.directions import ProjectedMachine
from agop_book.iterative import Nystrom
from agop_book.kernels import Laplace
from agop_book.rfm import RFMRegressor


def test_rows_and_centers_have_one_origin():
    g = torch.Generator().manual_seed(0)
    centers, x = (5 + torch.rand(9, 3, generator=g, dtype=torch.float64) for _ in range(2))
    M = torch.diag(torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64))
    machine = ProjectedMachine(Laplace(1.0), centers, torch.ones(9, 1), M)
    found = torch.cdist(machine.compared(x), machine.compared_centers)
    assert torch.allclose(found**2, torch.cdist(x @ M.sqrt(), centers @ M.sqrt()) ** 2)


def test_a_fit_in_blocks_predicts_what_it_was_fitted_to():
    "Columns of rare categories are not symmetric around 0."
    rng = np.random.RandomState(0)
    codes = rng.choice([0, 1, 2, 7], p=[0.6, 0.3, 0.07, 0.03], size=(1500, 3)).astype(float)
    X = np.column_stack([codes, rng.randn(1500, 2)])
    y = 3.0 * (codes[:, 0] == 7) - (codes[:, 1] == 2) + np.sin(X[:, 3]) * (codes[:, 2] == 0)
    model = RFMRegressor(solver=Nystrom(centers=150), categorical_features=[0, 1, 2],
                         random_state=0).fit(X, y)
    told = model.history_["train_score"].iloc[-1]
    assert told > 0.8 and abs(model.score(X, y) - told) < 1e-3
