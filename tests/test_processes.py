"Several processes sum what each has seen, and fail together."

import torch

from agop_book.agop import agop
from test_agop import brute, mlp, normal


WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from test_agop import mlp, normal
from test_processes import settings_of_processes
from agop_book.agop import agop
dist.init_process_group("gloo")
share = normal(41, 6).split([13, 28])[dist.get_rank()]
found = [agop(mlp(), share, **kw) for kw in settings_of_processes()]
own = agop(mlp(), share, reduce=False)
lonely = [normal(41, 6)] if dist.get_rank() == 0 else []              # a process without samples
found += [agop(mlp(), iter(lonely), center=c, progress=False).double() for c in (False, True)]
found = [f.matrix if hasattr(f, "matrix") else f for f in found]
if dist.get_rank() == 1: torch.save([*found, own], sys.argv[1])
dist.destroy_process_group()
"""


def settings_of_processes():
    return [
        {},
        dict(center=True),
        dict(diag=True),
        dict(center=True, diag=True),
        dict(center=True, probes=3, random_state=0),
        dict(probes=40, random_state=0),
    ]


def test_two_processes_equal_one(two_processes):
    *found, empty, empty_centred, own = torch.load(two_processes(WORKER), weights_only=True)
    x = normal(41, 6)
    for kw, A in zip(settings_of_processes()[:-1], found):
        B = agop(mlp(), x, **kw)
        assert (A - getattr(B, "matrix", B)).abs().max() < 1e-11, kw
    exact = brute(mlp(), x)
    # fresh signs differ by process: equal in expectation
    assert (found[-1] - exact).norm() < 0.3 * exact.norm()
    assert torch.allclose(own, agop(mlp(), x[13:]))
    assert torch.allclose(empty, exact, rtol=1e-5)
    assert torch.allclose(empty_centred, brute(mlp(), x, True), rtol=1e-5)


FAILING_WORKER = """
import sys, time, datetime, torch, torch.distributed as dist
from torch import nn
sys.path.insert(0, sys.argv[2])
from test_agop import mlp, normal
from agop_book.accumulator import AGOP
from agop_book.agop import agop
from agop_book.processes import all_or_none
from agop_book.nfa import nfa
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=25))
rank, net = dist.get_rank(), nn.Sequential(nn.Linear(6, 3)).double()
def late(x):                                        # fails on process 1, at its second batch
    if rank == 1 and len(x) == 3: raise KeyError("out of luck")
    return mlp()(x)
def direct():
    J = torch.full((2, 3, 6), float("nan") if rank else 1.0)
    with all_or_none(): AGOP().update(J).all_reduce()
bad = torch.full((5, 6), float("nan")) if rank == 1 else normal(5, 6)
found = []
calls = (lambda: agop(late, normal(13, 6), batch_size=10),
         lambda: agop(mlp(), bad),
         lambda: agop(mlp(), normal(5, 6), probes=3 if rank == 0 else -1),
         lambda: agop(lambda a: mlp()(torch.as_tensor(a)).numpy(), bad.numpy()),
         direct,
         lambda: agop(mlp(c=3 - rank), normal(5, 6)),
         lambda: agop(mlp(d=6 + rank), normal(5, 6 + rank)),
         lambda: nfa(net, bad, progress=False))
for call in calls:
    start = time.perf_counter()
    try: call()
    except Exception as error:
        soon = time.perf_counter() - start < 20
        found.append(f"{soon} {type(error).__name__}: {error}")
    else: found.append("no error")
torch.save((found, agop(mlp(), normal(9, 6))), f"{sys.argv[1]}{rank}")
dist.destroy_process_group()
"""


REASONS = (
    "KeyError: 'out of luck'",
    "ValueError: x contains NaN",
    "ValueError: probes must",
    "ValueError: x contains NaN",
    "ValueError: jacobians are not finite",
    "ValueError: the Jacobians of this process have 2 outputs",
    "",
    "ValueError",
)


def test_a_process_that_fails_is_named_by_the_others_at_once(two_processes):
    path = two_processes(FAILING_WORKER, timeout=120)
    (first, A), (second, B) = (torch.load(f"{path}{rank}", weights_only=True) for rank in (0, 1))
    *at_first, by_sizes, by_nfa = first
    for text in (*at_first, by_nfa):
        assert text.startswith("True RuntimeError: process 1 of 2 failed"), first
    for text, reason in zip(second, REASONS):
        assert text.startswith(f"True {reason}"), second
    # the shared width is 7, the first has 6
    assert "process 0 of 2 failed" in second[6] and "jacobians have 7 features" in by_sizes
    # afterwards they still work together
    assert torch.equal(A, B) and torch.allclose(A, brute(mlp(), normal(9, 6)))
