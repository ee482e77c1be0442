"""What Python does to an inspected flow: one syscall program, run with a command as its context.

The state word of a half changes by compare-and-swap only (R0), and a map update is none. So Python's changes
go through the program isolator_flow7, which finds the flow, checks what Python believes of it and swaps. A
command costs about two microseconds: context and options stand ready, a call fills in what differs.
"""

from __future__ import annotations

import ctypes
import struct
from enum import IntEnum
from typing import NamedTuple

from isolator.core.model import Direction, Owner
from isolator.datapath.abi import (
    COMMIT_FIN,
    COMMIT_GATE,
    COMMIT_LEND,
    COMMIT_MARK,
    COMMIT_RECORD,
    COMMIT_WINDOW,
    FLOW7_COMMAND,
    FLOW7_COMMIT,
    FLOW7_DELETE,
    FLOW7_OPEN,
    FLOW7_OWN,
    FLOW7_TAKE,
    RECORD_MAX,
    WINDOW_BYTES_MAX,
)
from isolator.datapath.libbpf import TestRunOptions, check, library

_AT = FLOW7_COMMAND.offsets
_HEAD = struct.Struct("=44sBBBBIIIIQIIIH2xI")  # key … record_len, and the result as it is before the run
_RESULT = struct.Struct("=IIIIII")  # result, acked, other_next, other_record_len, half_next, half_owner
assert _HEAD.size == _AT["result"] + 4


class Outcome(IntEnum):
    """enum flow7_result."""

    OK = 0
    GONE = 1
    STALE = 2  # the incarnation, the owner or `next` is not what the command expects


_OUTCOMES = tuple(Outcome)


class Answer(NamedTuple):
    """What a command came to, and where the flow stands: `acked`, `next` and `owner` of the half, the rest of the
    other."""

    outcome: Outcome
    acked: int
    other_next: int
    other_record_len: int
    next: int = 0
    owner: int = Owner.PYTHON

    def __bool__(self) -> bool:
        return self.outcome is Outcome.OK


class FlowCommands:
    """Runs isolator_flow7. For one thread."""

    def __init__(self, program_fd: int) -> None:
        self._fd = ctypes.c_int(program_fd)
        self._context = bytearray(FLOW7_COMMAND.size)
        anchor = (ctypes.c_char * len(self._context)).from_buffer(self._context)
        self._options = TestRunOptions(
            sz=ctypes.sizeof(TestRunOptions), ctx_in=ctypes.addressof(anchor), ctx_size_in=len(self._context)
        )
        self._anchor = anchor  # keeps the bytearray where it is
        self._pointer = ctypes.c_void_p(ctypes.addressof(self._options))
        self._call = library()["bpf_prog_test_run_opts"]  # untyped: the arguments stand ready

    def commit(
        self,
        key: bytes,
        direction: Direction,
        incarnation: int,
        expect_next: int,
        following: int,
        *,
        mode: int = 0,
        remaining: int = 0,
        lend: bool = False,
        window: tuple[int, int] | None = None,
        record: tuple[int, bytes] | None = None,
        mark: bool = False,
        fin: bool = False,
        gate: bool = True,
    ) -> Answer:
        """Move a half's `next` from `expect_next` to `following`, all of it or nothing.

        `record`: (sequence number, bytes ≤ RECORD_MAX) of the message's head, `window`: [from, to) that the
        kernel may pass, `gate`: only once `open_gate` was called, `mark`: the answer begins where the other half
        stands now, `fin`: the half ends at `following`, `lend`: the kernel may decide what comes next (R7). With
        both numbers equal it only tells whether the flow is still the one that is meant.
        """
        flags, at, length = 0, 0, 0
        if record is not None:
            at, head = record
            length = len(head)
            if length > RECORD_MAX:
                raise ValueError(f"a record of {length} bytes, {RECORD_MAX} at most")
            self._context[_AT["record"] : _AT["record"] + length] = head
            flags = COMMIT_RECORD
        if window is None:
            window = (0, 0)
        else:
            if (window[1] - window[0]) & 0xFFFFFFFF > WINDOW_BYTES_MAX:
                raise ValueError(f"a window of more than {WINDOW_BYTES_MAX} bytes")
            flags |= COMMIT_WINDOW | (COMMIT_GATE if gate else 0)
        if mark:
            flags |= COMMIT_MARK
        if fin:
            flags |= COMMIT_FIN
        if lend:
            flags |= COMMIT_LEND
        _HEAD.pack_into(
            self._context, 0,
            key, FLOW7_COMMIT, direction, flags, 0, incarnation, expect_next, following, mode, remaining,
            *window, at, length, Outcome.STALE,
        )  # fmt: skip
        return self._run()

    def own(self, key: bytes, direction: Direction, incarnation: int, owner: Owner) -> Answer:
        """Set a half's owner."""
        self._plain(key, FLOW7_OWN, direction, owner, incarnation)
        return self._run()

    def take(self, key: bytes, direction: Direction, incarnation: int) -> Answer:
        """A half that was lent to the kernel is Python's again. STALE: the kernel does not let go of it."""
        self._plain(key, FLOW7_TAKE, direction, Owner.PYTHON, incarnation)
        return self._run()

    def open_gate(self, key: bytes, direction: Direction, incarnation: int) -> Answer:
        """What is in the half's windows passes in the kernel: nothing of the flow is under way here any more."""
        self._plain(key, FLOW7_OPEN, direction, Owner.KERNEL, incarnation)
        return self._run()

    def delete(self, key: bytes, incarnation: int) -> Answer:
        """Forget the flow and give its place in the endpoint's quota back."""
        self._plain(key, FLOW7_DELETE, Direction.INGRESS, Owner.KERNEL, incarnation)
        return self._run()

    def _plain(self, key: bytes, op: int, direction: int, owner: int, incarnation: int) -> None:
        _HEAD.pack_into(
            self._context, 0, key, op, direction, 0, owner, incarnation, 0, 0, 0, 0, 0, 0, 0, 0, Outcome.STALE
        )  # fmt: skip

    def _run(self) -> Answer:
        result = self._call(self._fd, self._pointer)
        if result:
            check(result, "isolator_flow7 failed")
        outcome, *rest = _RESULT.unpack_from(self._context, _AT["result"])
        return Answer(_OUTCOMES[outcome], *rest)
