"""What the scheduler knows of one model's TEs: a column a fact, a slot a TE. Pure.

Whoever follows the TEs (the job executor, the simulator) writes one number where one number changes; the policy reads whole
columns. Slots of TEs that are gone are used again, the lowest first, so that the columns stay short. Which TEs can take a task in
which way is kept as sets of slots, made anew only after one of them came, went, changed its role or began or ceased to take
tasks.
"""

from __future__ import annotations

import heapq
from ctypes import Array, Structure, byref, c_char, c_int64, c_void_p
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from engine.config import Role

ROLES: Final[tuple[Role, ...]] = ("colocated", "prefill", "decode", "semi")
COLOCATED, PREFILL, DECODE, SEMI = range(len(ROLES))

# Ways to run a task -> the TEs to choose from. "colocated": alone. "prefill", "decode": as that half of a pair. "semi": workers
# of semi pairs both of whose halves take tasks; their lenders decode. "prompt": those that can do a task alone that is no more
# than a prompt.
Way = Literal["colocated", "prefill", "decode", "semi", "prompt"]

ALONE, LOST = -1, -2  # in `lender`: its own KV pool; the TE that lends it one isn't there

Floats = NDArray[np.floating]
Slots = NDArray[np.intp]

# name -> what a free slot holds. All numbers are floats, so that no column is converted where two meet.
COLUMNS: Final[dict[str, tuple[type, float]]] = {
    "te": (np.int64, -1),  # its number; -1: nobody's slot
    "role": (np.int8, COLOCATED),  # index in ROLES
    "mixes": (np.float64, 1.0),  # 1: prompts are computed on the device that decodes; 0: elsewhere, by its role
    "lender": (np.int64, ALONE),  # slot of the TE in whose KV pool it computes (a worker of a semi pair), or ALONE or LOST
    "takes": (np.bool_, False),  # ready, not leaving, and not full
    "sequences": (np.float64, 0.0),  # given to it and not ended
    "queued_tokens": (np.float64, 0.0),  # prompt tokens given to it and not computed yet
    "running": (np.float64, 0.0),  # sequences that it decodes now
    "kv_used": (np.float64, 0.0),  # tokens of KV that live sequences hold
    "kv_total": (np.float64, np.inf),  # tokens of KV that its pool has; of a worker in another's pool inf
    "seats": (np.float64, np.inf),  # sequences that it runs at once
    "slow": (np.float64, 1.0),  # its steps take so many times what the costs say
    "last": (np.float64, 0.0),  # number of the newest task given to it: of equals the one that waited longest is taken
}
SETTABLE: Final = frozenset(COLUMNS) - {"te", "mixes", "lender"}
MAKES_SETS: Final = frozenset({"role", "takes"})
# Columns that the arithmetic of a decision (engine/native/outlook.c: View) reads, and those that are its room to work in.
READ: Final = ("lender", "mixes", "sequences", "queued_tokens", "kv_used", "kv_total", "seats", "slow", "last")
ROOM: Final = ("load", "compute", "cached", "values")


class Columns(Structure):
    """Where a view's columns are, for C."""

    _fields_ = (*((name, c_void_p) for name in (*READ, *ROOM, "slot_of")), ("numbers", c_int64), ("slots", c_int64))


Anything: type[Array[c_char]] = c_char * 0


def memory(array: Any) -> Any:
    """Where an array's numbers are, for C: to be passed while the array is there. They must lie side by side."""
    return byref(Anything.from_buffer(array))  # several times as quick as `array.ctypes`


class View:
    """The columns are attributes: arrays as long as the highest slot in use. Read them; write by `add`, `update`, `remove`.
    `columns` is where they are."""

    te: NDArray[np.int64]
    role: NDArray[np.int8]
    mixes: Floats
    lender: NDArray[np.int64]
    takes: NDArray[np.bool_]
    sequences: Floats
    queued_tokens: Floats
    running: Floats
    kv_used: Floats
    kv_total: Floats
    seats: Floats
    slow: Floats
    last: Floats

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}  # TE -> slot
        self._free: list[int] = []  # a heap
        self._lender_of: dict[int, int] = {}  # worker of a semi pair -> the TE that lends to it; that one may be gone
        self._sets: dict[Way, Slots] = {}
        self._buffers: dict[str, NDArray[Any]] = {
            name: np.full(8, empty, dtype=dtype) for name, (dtype, empty) in COLUMNS.items()
        }
        self._room = np.empty((len(ROOM), 8))
        self._where = np.full(8, -1, dtype=np.intp)  # TE -> slot; one place more than the highest number needs
        self.columns = Columns()
        self._cut(0)

    def __len__(self) -> int:
        return len(self.slots)

    def add(self, te: int, role: Role = "colocated", lender: int = -1, **fields: float) -> int:
        """A TE is there; its slot. `lender`: the number of the TE in whose KV pool it computes. It takes tasks unless told
        otherwise."""
        assert te not in self.slots, f"TE {te} is there already"
        slot = heapq.heappop(self._free) if self._free else len(self.te)
        if slot == len(self.te):
            self._cut(slot + 1)
        if te + 1 >= len(self._where):
            self._where = np.concatenate((self._where, np.full(te + 1, -1, dtype=np.intp)))
            self._point()
        self.slots[te] = slot
        self._where[te] = slot
        self.te[slot] = te
        if lender >= 0:
            self._lender_of[te] = lender
            self.lender[slot] = self.slots.get(lender, LOST)
        for worker, its in self._lender_of.items():
            if its == te and worker in self.slots:
                self.lender[self.slots[worker]] = slot
        self.update(te, **{"role": role, "takes": True, **fields})
        return slot

    def update(self, te: int, **fields: Any) -> None:
        """Facts of a TE have changed. Values by the names of `COLUMNS`; `role` by its name."""
        slot = self.slots[te]
        assert SETTABLE.issuperset(fields), f"no such columns: {sorted(fields.keys() - SETTABLE)}"
        if "role" in fields:
            fields["role"] = ROLES.index(fields["role"])
            self.mixes[slot] = fields["role"] in (COLOCATED, SEMI)
        for name, value in fields.items():
            column = self._buffers[name]
            if name in MAKES_SETS and column[slot] != value:
                self._sets.clear()
            column[slot] = value

    def remove(self, te: int) -> None:
        """A TE is gone. Workers that computed in its pool are left without their other half."""
        slot = self.slots.pop(te)
        self._where[te] = -1
        self._lender_of.pop(te, None)
        self.lender[self.lender == slot] = LOST
        for name, (_, empty) in COLUMNS.items():
            self._buffers[name][slot] = empty
        heapq.heappush(self._free, slot)
        self._sets.clear()

    @property
    def crowd(self) -> float:
        """Sequences a TE, in the mean."""
        return float(self.sequences.sum()) / max(len(self.slots), 1)

    def slots_of(self, tes: NDArray[np.integer]) -> Slots:
        """The slots of TEs by number, none negative; -1 for one that isn't there."""
        if len(tes) and tes.max() >= len(self._where):
            tes = np.where(tes < len(self._where), tes, -1)  # the last place is nobody's
        return self._where[tes]

    def candidates(self, way: Way) -> Slots:
        """Slots of the TEs that can take a task in this way, ascending. Don't write into it."""
        found = self._sets.get(way)
        if found is None:
            found = self._sets[way] = self._scan(way)
        return found

    def _scan(self, way: Way) -> Slots:
        alone = self.takes & (self.lender == ALONE)
        if way == "semi":
            workers = np.flatnonzero(self.takes & (self.role == SEMI) & (self.lender >= 0))
            return workers[self.takes[self.lender[workers]]]
        if way == "prompt":
            return np.flatnonzero(alone & (self.role != DECODE))
        return np.flatnonzero(alone & (self.role == ROLES.index(way)))

    def _cut(self, length: int) -> None:
        """Columns of this length."""
        for name, (dtype, empty) in COLUMNS.items():
            buffer = self._buffers[name]
            if length > len(buffer):
                buffer = self._buffers[name] = np.concatenate((buffer, np.full(len(buffer), empty, dtype=dtype)))
            setattr(self, name, buffer[:length])
        if length > self._room.shape[1]:
            self._room = np.empty((len(ROOM), len(self._buffers["te"])))
        self._point()

    def _point(self) -> None:
        """Tell C where the columns are now."""
        for name in READ:
            setattr(self.columns, name, self._buffers[name].ctypes.data)
        for name, row in zip(ROOM, self._room, strict=True):
            setattr(self.columns, name, row.ctypes.data)
        self.columns.slot_of = self._where.ctypes.data
        self.columns.numbers, self.columns.slots = len(self._where), len(self.te)
