"""Reads plain data out of foreign pickles without ever importing or calling what they name.

GEO-Bench 1 stores labels as ``str(pickle.dumps(dict))`` in HDF5 attributes. Unpickling such a string with
``pickle.loads`` would run whatever its author wrote. Here every global resolves to an inert stub; only NumPy
arrays and scalars of numbers, and bytes, are rebuilt, by this module's own code.
"""

from __future__ import annotations

import ast
import io
import pickle
from typing import Any, Self

import numpy as np


class Stub:
    """Stands for an object of a class that was not imported: remembers its name, arguments and state, does nothing."""

    path = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        stub = object.__new__(cls)
        stub.args = args
        stub.state = None
        return stub

    def __init__(self, *args: Any, **kwargs: Any):
        """``__new__`` keeps the arguments."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """Pickles of list subclasses call this; the items are of no use here."""

    def extend(self, items: Any) -> None:
        """See ``append``."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Pickles of dict subclasses call this; the items are of no use here."""

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<stub {self.path}>"


class _Dtype(Stub):
    def numpy(self) -> np.dtype:
        name = self.args[0] if self.args else ""
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else "="
        found = np.dtype(name) if isinstance(name, str) and name.lstrip("<>=|")[:1] in "biufSU" and name else None
        if found is None or found.hasobject:
            raise pickle.UnpicklingError(f"array of {name!r}: only numbers and text are read")
        return found.newbyteorder(order) if order in "<>" else found


class _Array(Stub):
    value: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
            raise pickle.UnpicklingError("array whose content is not plain numbers")
        flat = np.frombuffer(bytes(data), dtype.numpy())
        self.value = flat.reshape(shape, order="F" if fortran else "C")


def _scalar(dtype: Any, data: Any = b"") -> Any:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("scalar whose content is not a plain number")
    return np.frombuffer(data, dtype.numpy())[0]


def _encode(text: Any, codec: str = "latin1") -> bytes:
    """What pickle protocols 0 to 2 write for bytes."""
    if not isinstance(text, str) or codec != "latin1":
        raise pickle.UnpicklingError(f"encoded bytes in {codec!r}")
    return text.encode("latin1")


def _buffer(data: Any, dtype: Any, shape: Any, order: str = "C") -> Any:
    """What pickle protocol 5 writes for arrays."""
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("array whose content is not plain numbers")
    return np.frombuffer(bytes(data), dtype.numpy()).reshape(shape, order=order)


class _Call:
    """A function of this module that a pickle may call but never alter (BUILD would set attributes of a function)."""

    __slots__ = ("_function",)

    def __init__(self, function: Any):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("pickle tries to alter a function")


_OWN = {
    ("multiarray", "_reconstruct"): _Array,
    ("multiarray", "scalar"): _Call(_scalar),
    ("numeric", "_frombuffer"): _Call(_buffer),
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Call(_encode),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        own = _OWN.get((module.rsplit(".", 1)[-1], name))
        if own is not None and module.split(".")[0] in ("numpy", "_codecs"):
            return own
        return type(name if name.isidentifier() else "Stub", (Stub,), {"path": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return Stub()


def _clean(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_clean(v) for v in value)
    return value


def loads(data: bytes) -> Any:
    """Plain data in a pickle. Raises ValueError for anything else, and for a pickle that needs more than plain data."""
    try:
        return _clean(_Unpickler(io.BytesIO(data)).load())
    except Exception as e:  # a foreign pickle may fail in any way, and every way means "not readable"
        raise ValueError(f"pickle holds no plain data ({type(e).__name__}: {e})") from e


def loads_attribute(text: Any) -> Any:
    """The same for the text ``str(pickle.dumps(...))`` of a GEO-Bench HDF5 attribute."""
    try:
        data = ast.literal_eval(text.decode() if isinstance(text, bytes) else str(text))
    except (ValueError, SyntaxError) as e:
        raise ValueError("attribute 'pickle' is not the text of a bytes literal") from e
    if not isinstance(data, bytes):
        raise ValueError(f"attribute 'pickle' holds {type(data).__name__}, expected bytes")
    return loads(data)
