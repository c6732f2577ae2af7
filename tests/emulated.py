"""A GPU on a machine without one: tensors that say `cuda:0` or `mps:0`, computed on the CPU.

    with emulated("cuda"):
        RFMRegressor(device="cuda").fit(X, y)

It refuses what a GPU refuses: tensors with dimensions on two devices, `.numpy()` without `.cpu()`,
a generator of another device; and on "mps" double precision, and every operator for which torch's
own table (native_functions.yaml) names no kernel there. The device has random numbers of its own,
a driver that can be asked, shapes that change in place, storages whose addresses tell views apart,
and weights that can be saved. It says nothing about speed, memory, rounding, streams or kernels of
one's own, and torch.compile does not see it."""
import contextlib
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import agop_book.origins
import agop_book.tensors

GIB = 2**30
DOUBLE = (torch.float64, torch.complex128)
STATE = SimpleNamespace(kind="cuda", random=torch.Generator(), to_cpu=False,
                        own_generator=False)
with FakeTensorMode():
    torch.ones(1).to("cuda")    # from here on torch does without the driver


def there(device):
    "Whether a name, a number or a `torch.device` means the emulated one."
    return device is not None and torch.device(device).type == STATE.kind


class OnDevice(torch.Tensor):
    "A tensor that says it is on the device; `inner` holds its numbers on the CPU."

    @staticmethod
    def __new__(cls, inner):
        out = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device="cpu", requires_grad=False)
        out.inner = inner
        return out

    device = property(lambda self: torch.device(STATE.kind, 0))
    is_cuda = property(lambda self: STATE.kind == "cuda")
    is_mps = property(lambda self: STATE.kind == "mps")
    is_cpu = property(lambda self: False)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        take_over(self, value)

    def __repr__(self, **options):
        return f"OnDevice({self.inner!r})"

    def __format__(self, spec):
        return format(self.item(), spec) if self.dim() == 0 else super().__format__(spec)

    def __reduce_ex__(self, protocol):
        return restored, (self.inner, self.requires_grad, isinstance(self, torch.nn.Parameter))

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = restored(self.inner.clone(), self.requires_grad, parameter, True)
        return memo[id(self)]

    def get_device(self):
        return 0

    def cuda(self, *args, **options):
        return self

    def cpu(self, **options):
        return ToCPU.apply(self)

    def numpy(self, *, force=False):
        if force: return self.inner.numpy()
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use "
                        "Tensor.cpu() to copy the tensor to host memory first.")

    def __array__(self, *args, **options):
        return self.numpy()

    def tolist(self):
        return self.inner.tolist()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def data_ptr(self):
        return self.inner.data_ptr()

    def to(self, *args, **options):
        target, dtype = destination(args, options)
        copy = options.get("copy", False)
        out = self
        if copy or dtype not in (None, self.dtype):
            out = super().to(dtype=dtype or self.dtype, copy=copy)
        return out.cpu() if target is not None and torch.device(target).type == "cpu" else out

    def type(self, dtype=None, **options):
        if dtype is not None: return self.to(dtype)
        return super().type().replace("torch.", f"torch.{STATE.kind}.")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def destination(args, options):
    "The device and the dtype that the arguments of `Tensor.to` name; None where they name none."
    target, dtype = options.get("device"), options.get("dtype")
    for a in (*args, options.get("other")):
        if isinstance(a, torch.Tensor):
            target, dtype = a.device, a.dtype
        elif isinstance(a, (str, torch.device)):
            target = a
        elif isinstance(a, torch.dtype):
            dtype = a
    return target, dtype


def restored(inner, requires_grad, parameter, stay=False):
    "A tensor from a file or a copy; `torch.load(map_location='cpu')` leaves it on the CPU."
    t = inner if STATE.to_cpu and not stay else OnDevice(inner)
    if parameter: return torch.nn.Parameter(t, requires_grad)
    return t.requires_grad_(requires_grad)


def take_over(t, value):
    "Let a tensor on the device be what another one is: its numbers, its shape and its dtype."
    torch._C.TensorBase.data.__set__(t, value)
    t.inner = value.inner


class ToCPU(torch.autograd.Function):
    "A copy on the CPU, whose gradient goes back to the device."
    @staticmethod
    def forward(ctx, x):
        return x.inner.clone()

    @staticmethod
    def backward(ctx, g):
        return g if isinstance(g, OnDevice) else OnDevice(g)


# --- one operator

MOVES = {"_to_copy", "to", "copy_", "index", "index_put", "index_put_", "_index_put_impl_"}


def is_on(t):
    return isinstance(t, OnDevice)


def is_gradient_of_index(name):
    "Whether torch pulls back x[i]: its zeros are where C++ believes x to be, on the CPU."
    return name == "index_put" and torch._C._current_graph_task_id() != -1


def check_places(name, args, tensors):
    "RuntimeError where tensors with dimensions are on two devices, and that is no move."
    on = [tuple(t.shape) for t in tensors if is_on(t)]
    off = [tuple(t.shape) for t in tensors if not is_on(t) and t.dim() > 0]
    if is_gradient_of_index(name): return
    if name.lstrip("_").startswith("index"):
        values = args[2:3] if "put" in name else ()
        here = is_on(args[0])
        off = [tuple(v.shape) for v in values if here and not is_on(v) and v.dim() > 0]
        on = on if off or not here else []
    elif name in MOVES:
        return
    if on and (off or name.lstrip("_").startswith("index")):
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two "
                           f"devices, {STATE.kind}:0 and cpu! ({name}: {on} and {off})")


def ends_up(name, args, asked, tensors):
    "Whether the result is on the device."
    if asked is not None and name != "copy_": return there(asked)
    if is_gradient_of_index(name): return any(map(is_on, tensors))
    if name == "copy_" or name.lstrip("_").startswith("index"): return is_on(args[0])
    return any(map(is_on, tensors))


def check_generator(generator, onto, name):
    "RuntimeError for a generator of the other device."
    if generator is None: return
    wanted, found = STATE.kind if onto else "cpu", STATE.kind if STATE.own_generator else "cpu"
    if wanted != found:
        raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}' "
                           f"({name})")


@contextlib.contextmanager
def own_random_numbers(func, kwargs, onto):
    "Inside, torch draws from the device's generator where the operator runs there."
    if not onto or torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator"):
        yield
        return
    outside = torch.default_generator.get_state()
    torch.default_generator.set_state(STATE.random.get_state())
    try:
        yield
    finally:
        STATE.random.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(outside)


def unwrapped(t):
    if is_on(t): return t.inner
    return torch.device("cpu") if isinstance(t, torch.device) and t.type == STATE.kind else t


def run(func, args, kwargs):
    "One operator of torch, on the CPU, with the complaints that the device would make."
    name = func.overloadpacket.__name__
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    check_places(name, args, tensors)
    onto = ends_up(name, args, kwargs.get("device"), tensors)
    check_generator(kwargs.get("generator"), onto, name)
    a, k = tree_map(unwrapped, args), tree_map(unwrapped, kwargs)
    k.pop("pin_memory", None)
    if onto and STATE.kind == "mps":
        check_mps(func, k)
    with own_random_numbers(func, kwargs, onto):
        out = func(*a, **k)
    back = {id(t.inner): t for t in tensors if is_on(t)}
    for t in back.values():
        follow(t)
    return tree_map(lambda t: result(t, back, onto), out)


def result(t, back, onto):
    "What comes out: a tensor that went in is the same one again."
    if not isinstance(t, torch.Tensor) or is_on(t): return t
    if id(t) in back: return back[id(t)]
    return OnDevice(refuse_double(t)) if onto else t


def follow(t):
    "After a change in place a tensor has the shape of its numbers: squeeze_, resize_, out=."
    seen = t.inner
    with torch._C._DisableTorchDispatch():
        same = t.shape == seen.shape and t.stride() == seen.stride()
    if not same:
        take_over(t, OnDevice(seen))


# --- Apple's device

def refuse_double(t):
    if STATE.kind == "mps" and t.dtype in DOUBLE:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't "
                        "support float64. Please use float32 instead.")
    return t


def kernels_on_mps():
    "For each operator that torch declares with kernels: whether one of them serves mps."
    import torchgen
    table = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    found, delegates = {}, {}
    for entry in re.split(r"^- func: ", table.read_text(), flags=re.M)[1:]:
        name = entry.split("(", 1)[0]
        other = re.search(r"^  structured_delegate: (\S+)", entry, re.M)
        if other:
            delegates[name] = other[1]
        dispatch = re.search(r"^  dispatch:\n((?:    .*\n)+)", entry, re.M)
        if dispatch:
            keys = re.findall(r"^    ([^#:]*):", dispatch[1], re.M)
            found[name] = any(re.search(r"\bMPS\b|Composite", key) for key in keys)
    return {**found, **{name: found.get(other, True) for name, other in delegates.items()}}


def check_mps(func, kwargs):
    "What Apple's device refuses: double precision, and operators without a kernel there."
    if kwargs.get("dtype") in DOUBLE:
        refuse_double(torch.empty(0, dtype=kwargs["dtype"]))
    if not hasattr(STATE, "mps"):
        STATE.mps = kernels_on_mps()
    name = func.name().removeprefix("aten::")
    if not STATE.mps.get(name, True):
        raise NotImplementedError(f"The operator 'aten::{name}' is not currently implemented for "
                                  "the MPS device.")


# --- what stands around the operators

class Generator(torch.Generator):
    "A generator that says it is on the device."
    def __new__(cls, device="cpu"):
        if not there(device): return PLAIN_GENERATOR(device)
        made = PLAIN_GENERATOR.__new__(cls, "cpu")
        made.inner = PLAIN_GENERATOR("cpu")
        return made

    def __init__(self, device="cpu"):
        pass

    device = property(lambda self: torch.device(STATE.kind, 0))

    def manual_seed(self, seed):
        self.inner.manual_seed(seed)
        return self

    def initial_seed(self):
        return self.inner.initial_seed()

    def get_state(self):
        return self.inner.get_state()

    def set_state(self, state):
        self.inner.set_state(state)
        return self


PLAIN_GENERATOR = torch.Generator
LOAD = torch.load
TO = torch.Tensor.to


class Operators(TorchDispatchMode):
    "Every operator of torch passes through `run`."
    _mode_key = torch._C._TorchDispatchModeKey.FAKE     # torch then leaves the driver alone

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


MAKERS = (torch.tensor, torch.as_tensor, torch.asarray)


class Functions(TorchFunctionMode):
    "`x.to(other)` looks at the device that `other` names; numbers become tensors on the device."
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = kwargs.get("generator")
        STATE.own_generator = isinstance(given, Generator)
        if STATE.own_generator:
            kwargs["generator"] = given.inner
        return self.answer(func, args, kwargs)

    def answer(self, func, args, kwargs):
        first = args[0] if args else None
        if func is torch.Tensor.to and not is_on(first): return sent(first, args[1:], kwargs)
        if func is F.one_hot and is_on(first):     # which makes numbers where C++ says it is
            return OnDevice(func(first.inner, *args[1:], **kwargs))
        if func is F.scaled_dot_product_attention and is_on(first) and kwargs.get("is_causal"):
            shape = first.shape[-2], args[1].shape[-2] if len(args) > 1 else kwargs["key"].shape[-2]
            seen = torch.ones(shape, dtype=torch.bool, device=first.device).tril()
            kwargs |= {"is_causal": False, "attn_mask": seen}       # C++ makes it on the CPU
        if func is torch.Tensor.type_as and is_on(args[1]): return first.to(args[1])
        if func is torch.Tensor.cuda and not is_on(first): return sent(first, (STATE.kind,), {})
        if there(kwargs.get("device")):
            kwargs["device"] = torch.device(STATE.kind, 0)    # a number, or torch asks a driver
            if func in MAKERS:
                return sent(func(*args, **{**kwargs, "device": None}), (STATE.kind,), {})
        return func(*args, **kwargs)


def sent(t, args, options):
    "`t.to(...)` of a tensor on the CPU."
    target, dtype = destination(args, options)
    copy = options.get("copy", False)
    if target is None: return TO(t, dtype, copy=copy)
    target = torch.device(STATE.kind, 0) if there(target) else target
    return TO(t, target, dtype or t.dtype, copy=copy)


class Event:
    "An event of a stream on which everything has happened already."
    def __init__(self, **options):
        self.recorded = False

    def record(self, stream=None):
        self.recorded = True

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 1.0


def load(*args, map_location=None, **options):
    "`torch.load` that knows tensors of the device."
    STATE.to_cpu = map_location is not None and torch.device(map_location).type == "cpu"
    try:
        with torch.serialization.safe_globals([restored]):
            return LOAD(*args, map_location="cpu", **options)
    finally:
        STATE.to_cpu = False


def nothing(*args, **options):
    "What a driver answers to an order."


def constant(value):
    return lambda *args, **options: value


QUIET = ("synchronize", "empty_cache", "_lazy_init", "init", "set_device", "ipc_collect",
         "reset_peak_memory_stats", "reset_accumulated_memory_stats", "seed_all")
ANSWERS = {
    "device_count": 1, "current_device": 0, "is_initialized": True, "is_available": True,
    "memory_allocated": 0, "memory_reserved": 0, "max_memory_allocated": 0,
    "max_memory_reserved": 0, "mem_get_info": (8 * GIB, 16 * GIB), "get_device_name": "emulated",
    "get_device_capability": (8, 0), "is_bf16_supported": True,
    "get_device_properties": SimpleNamespace(
        name="emulated", major=8, minor=0, multi_processor_count=108, total_memory=16 * GIB,
        L2_cache_size=2**22),
}
MPS_ANSWERS = {"device_count": 1, "current_allocated_memory": 0, "driver_allocated_memory": 0,
               "recommended_max_memory": 8 * GIB}


def own_generator():
    "The functions of `torch.cuda` or `torch.mps` about the device's own random numbers."
    def set_rng_state(state, *device):
        STATE.random.set_state(state)

    def get_rng_state(*device):
        return STATE.random.get_state()

    seeded = STATE.random.manual_seed
    return {"manual_seed": seeded, "manual_seed_all": seeded, "get_rng_state": get_rng_state,
            "set_rng_state": set_rng_state, "initial_seed": STATE.random.initial_seed,
            "seed": STATE.random.seed}


def driver():
    "What can be asked of a driver: pairs of a module of torch, and its answers by name."
    random = own_generator()
    if STATE.kind == "cuda":
        constants = {name: constant(value) for name, value in ANSWERS.items()}
        return [(torch.cuda, {**random, **dict.fromkeys(QUIET, nothing), **constants,
                              "Event": Event})]
    mps = {name: random[name] for name in ("manual_seed", "get_rng_state", "set_rng_state", "seed")}
    mps |= {name: constant(value) for name, value in MPS_ANSWERS.items()}
    mps |= {"synchronize": nothing, "empty_cache": nothing}
    there = dict.fromkeys(("is_available", "is_built"), constant(True))
    return [(torch.mps, mps), (torch.backends.mps, there)]


def has_memory(t):
    "`is_plain` of the library, for which a tensor on the device is like any other."
    if not is_on(t): return IS_PLAIN(t)
    return t.layout == torch.strided and t.numel() > 0


IS_PLAIN = agop_book.tensors.is_plain


@contextlib.contextmanager
def emulated(kind="cuda"):
    "Inside, torch has one device of a kind, 'cuda' or 'mps'."
    STATE.kind = kind
    STATE.random.manual_seed(0)
    conversion = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for module, answers in driver():
            for name, value in answers.items():
                stack.enter_context(mock.patch.object(module, name, value))
        for module in (agop_book.tensors, agop_book.origins):
            stack.enter_context(mock.patch.object(module, "is_plain", has_memory))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(torch, "load", load))
        stack.enter_context(mock.patch.object(torch.backends.cudnn, "is_acceptable",
                                              lambda *args: False))
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, conversion)
        stack.enter_context(Functions())
        stack.enter_context(Operators())
        yield torch.device(kind, 0)
