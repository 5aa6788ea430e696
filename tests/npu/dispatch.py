"""Runs the operators of the stub's devices: what CANN's kernels do on an Ascend NPU is done here by torch on the host.

A dispatch mode takes every call on an `npu` tensor. Memory, views and copies between host and device go on into the plugin
and the stub. Any other operator becomes a launch on the current stream of the stub: its outputs are allocated by the
plugin's allocator, in the shapes that the operator's meta kernel says, and later, when the stream comes to it, the operator
runs over the same memory: aten by torch's cpu kernels, `npu::*` by the references of engine/devices/npu_reference.py. So
order, capture, replay and waiting are the stub's, as they would be the device's. Every `npu::*` call is checked against the
plugin's own schema and meta kernel; what the device would not do (operands on two devices, 64-bit floats) is refused.

`install` is called in every process that imports torch_npu (site/sitecustomize.py).
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import itertools
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch_npu
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.npu import stub

# Done by the plugin itself: memory and what only describes it. Views are recognised by their schemas.
NATIVE = {
    "aten::empty",
    "aten::empty_strided",
    "aten::empty_like",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::resize_",
    "aten::set_",
    "aten::record_stream",
    "aten::is_pinned",
    "aten::_pin_memory",
    "aten::is_same_size",
    "aten::_local_scalar_dense",
    "npu::get_npu_format",
    "npu::empty_with_format",
}
# Without a meta kernel in the plugin: the reference on meta tensors says their shapes. Those that only size something are
# asked on the host while a step is prepared, and launch nothing.
SIZING = {
    "npu::_npu_fused_infer_attention_score_get_max_workspace",
    "npu::_npu_fused_infer_attention_score_infer_output",
    "npu::_npu_fused_infer_attention_score_v2_get_max_workspace",
    "npu::_npu_fused_infer_attention_score_v2_infer_output",
}
UNCHECKED = SIZING | {"npu::npu_format_cast"}
# Of which no vector unit of the device computes; what falls back to its scalar processor would be as good as a stop.
REFUSED = {torch.float64, torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128}
CODE = 507035  # an operator failed on the device


@dataclass(slots=True)
class Place:
    """Where a device tensor is, without holding on to it."""

    address: int
    nbytes: int
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]

    @staticmethod
    def of(x: Tensor) -> Place:
        storage = x.untyped_storage()
        return Place(storage.data_ptr(), storage.nbytes(), x.dtype, x.storage_offset(), x.size(), x.stride())

    def tensor(self) -> Tensor:
        """A cpu tensor over the same memory."""
        if self.nbytes == 0:
            return torch.empty(self.size, dtype=self.dtype)
        memory = (ctypes.c_uint8 * self.nbytes).from_address(self.address)
        base = torch.frombuffer(memory, dtype=torch.uint8)
        return torch.empty(0, dtype=self.dtype).set_(base.untyped_storage(), self.offset, self.size, self.stride)


@dataclass(slots=True)
class Scalar:
    """A cpu tensor without dimensions: a launch takes its value along."""

    value: Tensor


def mapped(x: Any, f: Callable[[Any], Any]) -> Any:
    """`x` with `f` of each of its leaves; operators take and give lists, no deeper structures."""
    if isinstance(x, (tuple, list)):
        return type(x)([mapped(y, f) for y in x])
    if isinstance(x, dict):
        return {name: mapped(y, f) for name, y in x.items()}
    return f(x)


def leaves(x: Any) -> list[Any]:
    if isinstance(x, (tuple, list)):
        return [leaf for y in x for leaf in leaves(y)]
    if isinstance(x, dict):
        return leaves(list(x.values()))
    return [x]


# ---- launches: numbers to the stub, work to us ------------------------------------------------------------------------

works: dict[int, Callable[[], None]] = {}
failures: dict[int, BaseException] = {}  # of launches that ran at once, for whom launched them
numbers = itertools.count(1)


def run_launch(run: int, keep: int, number: int) -> int:
    work = works[number] if run and keep else works.pop(number)
    if not run:
        return 0
    try:
        work()
    except BaseException as e:
        failures[number] = e
        text = "".join(traceback.format_exception_only(e)).strip()
        stub.library().aclstubSetMessage(text.encode())
        return CODE
    return 0


RUNNER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_uint64)(run_launch)


def launch(work: Callable[[], None], device: torch.device) -> None:
    """Put `work` on the current stream of `device`. What it raises comes out here if it runs at once, else where the stream
    is next waited for."""
    number = next(numbers)
    works[number] = work
    code = stub.library().aclstubLaunch(torch_npu._C._npu_getCurrentRawStream(device.index), number)
    if code:
        works.pop(number, None)
        message = stub.library().aclGetRecentErrMsg().decode()
        raise failures.pop(number, None) or RuntimeError(f"launch failed with {code}: {message}")


# ---- one call ---------------------------------------------------------------------------------------------------------


def name_of(func: torch._ops.OpOverload) -> str:
    return func._schema.name


@functools.cache
def is_view(func: torch._ops.OpOverload) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


@functools.cache
def is_made_of_others(func: torch._ops.OpOverload) -> bool:
    """Whether torch makes it of other operators and the plugin has no operator of its own for it. What may be a view or a
    copy (contiguous, reshape) always is: the plugin's kernels of those end in a copy, which must come back here."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(func.name(), "CompositeImplicitAutograd") and (is_view(func) or not has(func.name(), "PrivateUse1"))


def references() -> dict[str, Callable[..., Any]]:
    from engine.devices.npu_reference import REFERENCES

    return REFERENCES


@dataclass(slots=True)
class Given:
    """An output that is one of the call's npu tensors."""

    index: int


@dataclass(slots=True)
class New:
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


known: dict[Any, Any] = {}  # shapes by `Call.key`


class Call:
    """One operator call with npu tensors or for an npu device."""

    def __init__(self, func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name = name_of(func)
        self.leaves = leaves((args, kwargs))
        self.tensors = [x for x in self.leaves if isinstance(x, Tensor)]
        self.npu = [x for x in self.tensors if x.device.type == "npu"]
        self.device = self.npu[0].device if self.npu else None
        for x in self.leaves:
            if self.device is None and isinstance(x, torch.device) and x.type == "npu":
                self.device = x if x.index is not None else torch.device("npu", torch.npu.current_device())

    def check(self) -> None:
        """Refuse what a device would not do."""
        for x in self.tensors:
            if x.device.type == "npu" and x.device != self.device:
                raise RuntimeError(f"{self.name}: operands on {self.device} and {x.device}")
            if x.device.type == "cpu" and x.dim():
                raise RuntimeError(f"{self.name}: an operand on {self.device} and one on the host, {tuple(x.shape)}")
            if x.dtype in REFUSED:
                raise RuntimeError(f"{self.name}: the device does not compute with {x.dtype}")

    def replaced(self, tensor: Callable[[Tensor], Any], device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with every npu tensor and every npu device replaced."""

        def one(x: Any) -> Any:
            if isinstance(x, Tensor):
                return tensor(x)
            if isinstance(x, torch.device) and x.type == "npu":
                return torch.device(device)
            if isinstance(x, torch.Generator) and x.device.type == "npu":
                return host_generator(x) if device == "cpu" else None
            return x

        return mapped(self.args, one), mapped(self.kwargs, one)

    # ---- shapes -------------------------------------------------------------------------------------------------------
    def outputs(self) -> Any:
        """What the operator returns: arguments where it returns those, else new tensors whose content is still to come.
        Raises what the operator's meta kernel raises."""
        key = self.key()
        shapes = known.get(key) if key is not None else None
        if shapes is None:
            shapes = self.shapes()
            if key is not None:
                if len(known) > 10000:  # attention's lengths are new at each step
                    known.clear()
                known[key] = shapes

        def real(x: Any) -> Any:
            if isinstance(x, Given):
                return self.npu[x.index]
            if isinstance(x, New) and self.name == "npu::npu_format_cast":
                # Of the plugin's own making, with the format and its memory; in which the values lie row-major all the same.
                return torch_npu.empty_with_format(x.size, dtype=x.dtype, device=self.device, acl_format=self.args[1])
            if isinstance(x, New):
                return torch.empty_strided(x.size, x.stride, dtype=x.dtype, device=self.device)
            return x

        return mapped(shapes, real)

    def key(self) -> Any:
        """Calls with the same key have outputs of the same shapes; None where that can't be told."""

        def one(x: Any) -> Any:
            if isinstance(x, Tensor):
                kind = x.device.type
                alike = next((i for i, y in enumerate(self.npu) if y is x), -1)  # an operand may be there twice
                return (kind, alike, x.size(), x.stride(), x.dtype)
            return (type(x), x)

        try:
            key = (self.func, tuple(map(one, self.leaves)), len(self.args), tuple(self.kwargs))
            hash(key)
        except TypeError:
            return None
        return key

    def shapes(self) -> Any:
        """The outputs as `Given` and `New`, by the operator's meta kernel."""
        metas: dict[int, Tensor] = {}

        def meta(x: Tensor) -> Tensor:
            if x.device.type != "npu":
                return x
            if id(x) not in metas:
                metas[id(x)] = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
            return metas[id(x)]

        func: Callable[..., Any] = self.func
        args, kwargs = self.replaced(meta, "meta")
        out = None
        if self.name.startswith("npu::") and self.func._overloadname == "out":  # the plugin has no meta kernels of these
            out, kwargs = kwargs.pop("out"), {k: v for k, v in kwargs.items() if k not in ("out", "workspace")}
            func = getattr(torch.ops.npu, self.name.split("::")[1]).default
        elif self.name in UNCHECKED:
            func = references()[self.name.split("::")[1]]
        shapes = func(*args, **kwargs)
        if out is not None:
            for have, want in zip(out, leaves(shapes), strict=True):
                if (have.shape, have.dtype) != (want.shape, want.dtype):
                    found, wanted = (f"{x.dtype} {tuple(x.shape)}" for x in (have, want))
                    raise RuntimeError(f"{self.name}: out is {found}, the operator gives {wanted}")
            shapes = out
        given = {id(metas[id(x)]): i for i, x in reversed(list(enumerate(self.npu)))}
        for x in self.npu:
            if metas[id(x)].shape != x.shape:
                raise RuntimeError(f"{self.name}: would resize an operand from {tuple(x.shape)} to {tuple(metas[id(x)].shape)}")

        def described(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if id(x) in given:
                return Given(given[id(x)])
            if x.dtype in REFUSED:
                raise RuntimeError(f"{self.name}: the device does not compute {x.dtype}")
            return New(x.size(), x.stride(), x.dtype)

        return mapped(shapes, described)

    # ---- computing ----------------------------------------------------------------------------------------------------
    def computation(self) -> Callable[[], Any]:
        """A function that runs the operator over the arguments' memory and gives what it returned, in cpu tensors."""
        args, kwargs = self.replaced(lambda x: Place.of(x) if x.device.type == "npu" else Scalar(x.clone()), "cpu")
        name = self.name.split("::")[1]
        func: Callable[..., Any] = self.func
        if self.name.startswith("npu::"):
            if name not in references():
                raise NotImplementedError(f"{self.name} has no reference in engine/devices/npu_reference.py")
            func = references()[name]
            if self.func._overloadname == "out":
                func = functools.partial(into, func)

        def host(x: Any) -> Any:
            return x.tensor() if isinstance(x, Place) else x.value if isinstance(x, Scalar) else x

        @torch.inference_mode()
        def compute() -> Any:
            return func(*mapped(args, host), **mapped(kwargs, host))

        return compute

    def launched(self) -> Any:
        """The outputs of the operator, whose computation is now on the stream."""
        self.check()
        try:
            outputs = self.outputs()
        except NotImplementedError:  # its outputs depend on the values: the device waits for them too
            if self.name.startswith("npu::"):
                raise
            return self.waited()
        if self.name in SIZING:
            return outputs
        compute = self.computation()
        places = [Place.of(x) if isinstance(x, Tensor) and x.device.type == "npu" else None for x in leaves(outputs)]

        @torch.inference_mode()
        def work() -> None:
            for place, found in zip(places, leaves(compute()), strict=True):
                if place is None or not isinstance(found, Tensor):
                    continue
                if (found.dtype, found.size()) != (place.dtype, place.size):
                    raise AssertionError(
                        f"{self.name}: the meta kernel says {place.dtype} {tuple(place.size)}, "
                        f"the computation gives {found.dtype} {tuple(found.size())}"
                    )
                if found.data_ptr() != place.tensor().data_ptr():
                    place.tensor().copy_(found)

        launch(work, self.device)
        return outputs

    def waited(self) -> Any:
        torch.npu.current_stream(self.device).synchronize()
        found = self.computation()()
        return mapped(found, lambda x: x.to(self.device) if isinstance(x, Tensor) else x)


def into(func: Callable[..., Any], *args: Any, out: Any, workspace: Any = None, **kwargs: Any) -> Any:
    """The variant with given outputs of an operator that returns new ones."""
    for to, found in zip(out, func(*args, **kwargs), strict=True):
        to.copy_(found)
    return out


@functools.cache
def host_generator(generator: torch.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(generator.initial_seed())


# ---- copies -----------------------------------------------------------------------------------------------------------


def copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`copy_` where one side or both are on a device: plain ones by the plugin, what must be converted by a launch before or
    after, on the device where it can be."""
    native = torch.ops.aten.copy_.default
    if to.device == source.device:
        Call(native, (to, source), {}).launched()
    elif to.dtype == source.dtype and to.shape == source.shape and to.is_contiguous() and source.is_contiguous():
        native(to, source, non_blocking)
    elif source.device.type == "cpu":
        plain = source.to(to.dtype).expand(to.shape).contiguous()
        if to.is_contiguous():
            native(to, plain, False)
        else:
            staged = torch.empty(to.shape, dtype=to.dtype, device=to.device)
            native(staged, plain, False)
            Call(native, (to, staged), {}).launched()
    else:
        staged = torch.empty(to.shape, dtype=to.dtype, device=source.device)
        Call(native, (staged, source), {}).launched()
        if to.is_contiguous():
            native(to, staged, non_blocking)
        else:
            host = torch.empty(to.shape, dtype=to.dtype)
            native(host, staged, False)
            to.copy_(host)
    return to


def to_copy(
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    like = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
    like = torch.empty_like(like, memory_format=memory_format or torch.preserve_format)
    out = torch.empty_strided(like.size(), like.stride(), dtype=dtype or x.dtype, device=device or x.device)
    if pin_memory or (non_blocking and out.device.type == "cpu"):
        out = out.pin_memory()  # as the plugin does for a copy that is not waited for
    return copy(out, x, non_blocking)


# ---- the mode ---------------------------------------------------------------------------------------------------------


class OnStub(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        call = Call(func, args, kwargs)
        if call.device is None or call.name in NATIVE:
            return func(*args, **kwargs)
        if call.name == "aten::copy_":
            return copy(*args, **kwargs)
        if call.name == "aten::_to_copy":
            return to_copy(*args, **kwargs)
        if is_made_of_others(func):
            with self:  # its parts come back here
                return func.decompose(*args, **kwargs)
        if is_view(func):
            return func(*args, **kwargs)
        return call.launched()


def ensure() -> None:
    """The mode is on in this thread."""
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    if not any(isinstance(m, OnStub) for m in modes):
        OnStub().__enter__()


def install() -> None:
    """From now on every thread of this process that uses an npu device has the mode. After torch_npu is imported."""
    stub.library().aclstubSetRunner(RUNNER)
    atexit.register(stub.library().aclstubQuiet)
    ensure()
    plain_run, plain_set_device = threading.Thread.run, torch.npu.set_device

    def run(self: threading.Thread) -> None:
        ensure()
        plain_run(self)

    def set_device(device: Any) -> None:  # a thread that was there before the import
        ensure()
        plain_set_device(device)

    plain_text = torch._tensor_str._str

    def text(x: Tensor, **more: Any) -> str:  # the plain one turns modes off
        if x.device.type == "npu":
            return f"{plain_text(x.cpu(), **more)} on {x.device}"
        return plain_text(x, **more)

    torch._tensor_str._str = text
    threading.Thread.run = run  # type: ignore[method-assign]
    torch.npu.set_device = set_device
