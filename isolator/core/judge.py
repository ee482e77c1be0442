"""Bytes at a flow's boundary → how many of them may pass. Cuts them into pieces and asks policy about each head."""

from __future__ import annotations

from dataclasses import dataclass

from isolator.core.flow import Flow
from isolator.core.model import Decision, DropReason, Verdict
from parsers.errors import DissectError, HttpAmbiguous, HttpMalformed, HttpTooLong, NotHttp
from parsers.http1 import Mode, PieceKind, Request, RequestDissector

CACHE_MAX = 4096  # decided heads kept per profile; beyond that the profile's cache starts anew
PIECES_MAX = 4096  # read at a time, some milliseconds' work: tiny chunks must not hold up the others
HEAD_CACHED_MAX = 2048  # bytes; longer heads are rare and would fill memory

_MASK = 0xFFFFFFFF
_REASONS: tuple[tuple[type[DissectError], DropReason], ...] = (
    (NotHttp, DropReason.NOT_HTTP),
    (HttpTooLong, DropReason.HTTP_TOO_LONG),
    (HttpAmbiguous, DropReason.HTTP_AMBIGUOUS),
    (HttpMalformed, DropReason.HTTP_MALFORMED),
)

_GRANTED = (Mode.BODY, Mode.CHUNK_DATA)  # what was declared passes, before a byte of it is there

_Decided = tuple[Request, Decision, Mode, int]  # a head, its decision, and the dissector's state behind it


@dataclass(slots=True)
class Judged:
    """What became of the bytes at the boundary: [0, end) is allowed; `end` may lie beyond them."""

    end: int = 0
    recorded: int = 0  # [0, recorded) was looked at
    window: tuple[int, int] | None = None  # sequence numbers of the rest, which passes uninspected
    methods: tuple[str, ...] = ()
    decided: tuple[tuple[Decision, Request | None], ...] = ()
    denied: Decision | None = None
    more: bool = False  # it stopped for want of time
    request: Request | None = None  # the denied one


class Judge:
    """Decides bytes by their flow's profile."""

    def __init__(self) -> None:
        self._caches: dict[int, dict[bytes, _Decided]] = {}  # by id of the profile: its hash is deep

    def forget(self) -> None:
        """Decided heads are those of one policy generation."""
        self._caches.clear()

    def __call__(self, flow: Flow, data: bytes) -> Judged:
        """Moves the flow's dissector on, up to the first head that is denied or the first piece that is not whole."""
        judged, pieces = Judged(), 0
        dissector = flow.dissector
        try:
            while judged.end < len(data) or (judged.end == len(data) and dissector.mode in _GRANTED):
                if pieces == PIECES_MAX:
                    judged.more = judged.end < len(data)
                    break
                pieces += 1
                if dissector.mode == Mode.HEAD:
                    if not self._head(flow, data, judged):
                        break
                    continue
                piece = dissector.advance(data, judged.end)
                if piece is None:
                    break
                start, judged.end = judged.end, judged.end + piece.length
                judged.recorded = judged.end
                if piece.kind is PieceKind.OPAQUE and judged.end >= len(data):
                    self._open_window(flow, judged, start)
        except DissectError as error:
            self._misfit(flow, data, judged, error)
        return judged

    def _head(self, flow: Flow, data: bytes, judged: Judged) -> bool:
        """Decides the head at `judged.end`. One that was decided before, byte for byte, is not dissected again."""
        at, dissector = judged.end, flow.dissector
        length = data.find(b"\r\n\r\n", at) + 4 - at
        head = data[at : at + length]
        cache = self._caches.get(id(flow.profile))
        if cache is None:
            cache = self._caches[id(flow.profile)] = {}
        decided = cache.get(head) if length >= 4 else None
        if decided is None:
            piece = dissector.advance(data, at)
            if piece is None:
                return False
            assert isinstance(piece.message, Request)
            decision = flow.profile.decide(piece.message)
            decided = (piece.message, decision, dissector.mode, dissector.remaining)
            if piece.length == length <= HEAD_CACHED_MAX:
                if len(cache) >= CACHE_MAX:
                    cache.clear()
                cache[head] = decided
            length = piece.length
        request, decision, dissector.mode, dissector.remaining = decided
        if decision.verdict is not Verdict.ALLOW:
            judged.denied, judged.request = decision, request
            return False
        judged.end = judged.recorded = at + length
        judged.methods += (request.method,)
        judged.decided += ((decision, request),)
        return True

    def _open_window(self, flow: Flow, judged: Judged, start: int) -> None:
        judged.recorded = start
        judged.window = ((flow.next + start) & _MASK, (flow.next + judged.end) & _MASK)

    def _misfit(self, flow: Flow, data: bytes, judged: Judged, error: DissectError) -> None:
        """What cannot be read is denied; where nothing of it could be denied, the connection goes on unread."""
        reason = next((r for kind, r in _REASONS if isinstance(error, kind)), DropReason.HTTP_MALFORMED)
        decision = flow.profile.refuse(reason)
        if decision.verdict is not Verdict.ALLOW:
            judged.denied = decision
            return
        judged.decided += ((decision, None),)
        flow.dissector = RequestDissector(Mode.OPAQUE)
        piece = flow.dissector.advance(data, judged.end)
        assert piece is not None
        start, judged.end = judged.end, judged.end + piece.length
        self._open_window(flow, judged, start)
