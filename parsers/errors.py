"""What is wrong with bytes from the wire.

DissectError
├── PacketMalformed     a frame whose headers cannot be read, or whose lengths disagree
├── OutOfWindow         a segment far from where the stream stands
├── HeldFull            more bytes would have to wait than may
├── Overlap             bytes that differ from earlier ones at the same place
└── HttpError
    ├── NotHttp         no HTTP/1 request begins like this
    ├── HttpMalformed   against the grammar (RFC 9112)
    ├── HttpAmbiguous   two servers could read it differently
    └── HttpTooLong     beyond a bound
"""

from __future__ import annotations


class DissectError(Exception):
    """Any bytes end in events, need-more or this."""


class PacketMalformed(DissectError):  # noqa: N818 - these names say what the matter is
    pass


class OutOfWindow(DissectError):  # noqa: N818
    pass


class HeldFull(DissectError):  # noqa: N818
    pass


class Overlap(DissectError):  # noqa: N818
    pass


class HttpError(DissectError):
    pass


class NotHttp(HttpError):  # noqa: N818
    pass


class HttpMalformed(HttpError):  # noqa: N818
    pass


class HttpAmbiguous(HttpError):  # noqa: N818
    pass


class HttpTooLong(HttpError):  # noqa: N818
    pass
