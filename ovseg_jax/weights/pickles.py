"""Pickles read as data: a stack machine that builds containers and never runs what it reads.

Python's own unpickler is an interpreter: a pickle names any function of any module and has it
called. Here the names go through a table that the caller gives, what stands in it are plain
constructors of ours, and every other instruction is refused. Nothing is imported, no attribute of
an existing object is ever set.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


class RefusedPickle(Exception):
    """The pickle asks for something that would run code, or that is not known to be data."""


class DamagedPickle(Exception):
    """The pickle is no sensible sequence of instructions."""


@dataclass(frozen=True)
class Constructor:
    """What a global name of a pickle stands for.

    Attributes:
      name: "module.name" as it stands in the pickle.
      make: makes the value from the arguments of the pickle.
    """

    name: str
    make: Callable[..., Any]


@runtime_checkable
class Readable(Protocol):
    """A binary file."""

    def read(self, count: int, /) -> bytes:
        """At most `count` bytes."""

    def readline(self) -> bytes:
        """The bytes up to the end of a line."""


@runtime_checkable
class Stateful(Protocol):
    """A value that is made empty and gets its content later."""

    def set_state(self, state: Any) -> None:
        """Takes the content."""


class Inert:
    """Stands for an object that is not needed, such as the settings of a training program."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


_MARK = Inert("mark")
_PLAIN = (str, int, float, complex, bytes, type(None), Inert, Constructor)
# Their argument is the value that they push.
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BYTEARRAY8".split()
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(
    file: Readable,
    find: Callable[[str, str], Any],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value of one pickle; `file` is left behind its last byte.

    Args:
      find: (module, name) to a `Constructor`, or to any other value that the name stands for.
        Raises RefusedPickle for a name that is not known.
      persistent: persistent id to value; without it such ids are refused.

    Raises:
      RefusedPickle: see the class. DamagedPickle: likewise.
    """
    machine = _Machine(find, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(file):
            machine.step(opcode.name, argument)
        return machine.pop()
    # What a nonsensical pickle can cause: wrong kinds, empty stacks, unknown memo entries.
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, AttributeError) as error:
        raise DamagedPickle(f"{type(error).__name__}: {error}") from None


def as_key(key: Any) -> Any:
    """The key itself, if it is a scalar or a tuple of scalars.

    Hashing runs through a key: a tuple of a tuple of ... would exhaust the C stack.

    Raises:
      TypeError: it is something else.
    """
    parts = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(part, _PLAIN) for part in parts):
        raise TypeError(f"a key of type {type(key).__name__}")
    return key


class _Machine:
    def __init__(
        self, find: Callable[[str, str], Any], persistent: Callable[[Any], Any] | None
    ) -> None:
        self._find, self._persistent = find, persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        return self._stack.pop()

    def _since_mark(self) -> list[Any]:
        stack = self._stack
        at = next(i for i in range(len(stack) - 1, -2, -1) if i < 0 or stack[i] is _MARK)
        if at < 0:
            raise ValueError("a mark is missing")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    def step(self, name: str, argument: Any) -> None:
        """Carries out one instruction."""
        push = self._stack.append
        if name in _LITERALS:
            push(argument)
        elif name in _CONSTANTS:
            push(_CONSTANTS[name]())
        elif name in _TUPLES:
            count = _TUPLES[name]
            push(tuple(self._take(count)))
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            push(self._memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = self._stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._stack[-1]
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            push(self._find(module, attribute))
        elif name == "STACK_GLOBAL":
            module, attribute = self._take(2)
            push(self._find(module, attribute))
        elif name in ("BINPERSID", "PERSID"):
            if self._persistent is None:
                raise RefusedPickle("it refers to objects outside of it")
            push(self._persistent(self.pop() if name == "BINPERSID" else argument))
        elif hasattr(self, f"_do_{name.lower()}"):
            getattr(self, f"_do_{name.lower()}")()
        else:
            raise RefusedPickle(f"it uses the instruction {name}, which no tensor file needs")

    def _take(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("the stack is empty")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    # ---- instructions without an argument

    def _do_proto(self) -> None:
        pass

    _do_frame = _do_stop = _do_proto

    def _do_mark(self) -> None:
        self._stack.append(_MARK)

    def _do_pop(self) -> None:
        self._stack.pop()

    def _do_pop_mark(self) -> None:
        self._since_mark()

    def _do_dup(self) -> None:
        self._stack.append(self._stack[-1])

    def _do_list(self) -> None:
        self._stack.append(self._since_mark())

    def _do_tuple(self) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _do_frozenset(self) -> None:
        self._stack.append(frozenset(as_key(item) for item in self._since_mark()))

    def _do_dict(self) -> None:
        items = self._since_mark()
        self._stack.append({})
        self._fill(items)

    def _do_setitem(self) -> None:
        self._fill(self._take(2))

    def _do_setitems(self) -> None:
        self._fill(self._since_mark())

    def _fill(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if len(items) % 2:
            raise ValueError("a key has no value")
        if isinstance(target, Inert):
            return
        if not isinstance(target, dict):
            raise TypeError("keys and values for what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[as_key(key)] = value

    def _do_append(self) -> None:
        self._extend(self._take(1))

    def _do_appends(self) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):
            raise TypeError("items for what is no list")

    def _do_additems(self) -> None:
        items = self._since_mark()
        self._stack[-1].update(as_key(item) for item in items)

    def _do_reduce(self) -> None:
        constructor, arguments = self._take(2)
        self._construct(constructor, tuple(arguments))

    _do_newobj = _do_reduce

    def _do_newobj_ex(self) -> None:
        constructor, arguments, named = self._take(3)
        self._construct(constructor, tuple(arguments))
        if named and not isinstance(self._stack[-1], Inert):
            raise RefusedPickle(f"it makes a {constructor.name} from named arguments")

    def _do_obj(self) -> None:
        constructor, *arguments = self._since_mark()
        self._construct(constructor, tuple(arguments))

    def _construct(self, constructor: Any, arguments: tuple[Any, ...]) -> None:
        if not isinstance(constructor, Constructor):
            name = constructor.name if isinstance(constructor, Inert) else type(constructor)
            raise RefusedPickle(f"it calls {name}, which is no function known to make data")
        self._stack.append(constructor.make(*arguments))

    def _do_build(self) -> None:
        state = self.pop()
        # The attributes of every other kind of object are of no interest: they are let go.
        if isinstance(self._stack[-1], Stateful):
            self._stack[-1].set_state(state)
