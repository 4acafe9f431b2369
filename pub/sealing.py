"""Keeps secrets out of errors: one that leaves tokencore has its message and traceback, but no local variables.

Error trackers send the local variables of every frame in a traceback. Inside tokencore, requests and urllib3 these
include the key, the secret and the token, so the public classes and functions strip them from every error. What has
to be named after a secret, such as a key's files, is named by its `digest`.
"""

from __future__ import annotations

import hashlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    _Function = TypeVar("_Function", bound="Callable[..., Any]")
    _Class = TypeVar("_Class", bound=type)


class Sensitive:
    """Base of objects that know a secret: they cannot be pickled or copied, so none is sent to another process."""

    __slots__ = ()

    def __reduce__(self) -> str:
        raise TypeError(f"{type(self).__name__} holds secrets and cannot be copied or pickled: create it where needed")


def digest(*parts: str, length: int) -> str:
    """Return `length` hex digits that depend on all of the parts and reveal none of them."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:length]


def sealed_class(*, but: tuple[str, ...] = ()) -> Callable[[_Class], _Class]:
    """Seal the class's own public members, `__init__` and `__call__`, except those in `but`, sealed further inside."""

    def seal(cls: _Class) -> _Class:
        for name, member in list(vars(cls).items()):
            if name not in but and (name in ("__init__", "__call__") or not name.startswith("_")):
                setattr(cls, name, _sealed(member))
        return cls

    return seal


def _sealed(member: Any) -> Any:  # noqa: ANN401 - any member of a class
    if isinstance(member, property):
        return property(sealed(member.fget), doc=member.__doc__) if member.fget else member
    if isinstance(member, (classmethod, staticmethod)):
        return type(member)(sealed(member.__func__))
    return sealed(member) if isinstance(member, type(sealed)) else member


def sealed(work: _Function) -> _Function:
    """Wrap `work` so that no error leaves it with its arguments or any other local variable of a frame.

    Chained errors are dropped too, since those of requests hold the request; the context that the caller sees is the
    error that it was handling itself.
    """

    def edge(*given: Any, **named: Any) -> Any:  # noqa: ANN401 - as `work` takes them
        try:
            return work(*given, **named)
        except BaseException as error:  # noqa: BLE001 - an interrupt during a request as well
            met = error
        del given, named
        try:
            raise _emptied(met)
        finally:
            del met

    edge.__wrapped__ = work  # type: ignore[attr-defined] # functools would cost a cached `get` a tenth of its time
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(edge, name, getattr(work, name))
    return edge  # type: ignore[return-value] # it has the signature of `work`


def _emptied(error: BaseException) -> BaseException:
    from traceback import clear_frames  # not on the path of a cached token

    clear_frames(error.__traceback__)
    error.__cause__ = error.__context__ = None
    error.__suppress_context__ = False  # setting the cause has changed it
    return error
