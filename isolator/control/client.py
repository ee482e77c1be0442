"""The control API's client: standard library alone, so that a command line starts fast.

As a program it is the image's health check: `python -m isolator.control.client` ends with 0 if the agent answers,
whatever state its endpoints are in, else with 1 and one line. It costs a tenth of what `isolator status` costs.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Generator, Iterator, Sequence
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

DEFAULT_SOCKET = Path("/run/isolator/isolator.sock")

TIMEOUT_SECONDS = 30.0
"""How long an answer may take; a restore of many endpoints is the slowest. A followed stream has no bound."""


class ClientError(Exception):
    """What a command prints when it can't go on. `details`: further lines."""

    def __init__(self, error: str, details: Sequence[str] = ()) -> None:
        super().__init__(error)
        self.error = error
        self.details = list(details)


class AgentUnreachableError(ClientError):
    """Nobody answers on the socket."""


class RefusedError(ClientError):
    """The agent answered with an error; `status` is its HTTP status."""

    def __init__(self, status: int, error: str, details: Sequence[str] = ()) -> None:
        super().__init__(error, details)
        self.status = status


class UnixConnection(HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("isolator", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Client:
    """One connection a call: a call never depends on what became of an earlier one."""

    def __init__(self, path: Path = DEFAULT_SOCKET, timeout: float = TIMEOUT_SECONDS) -> None:
        self._path = path
        self._timeout = timeout

    def status(self) -> dict[str, Any]:
        return self._call("GET", "/v1/status")

    def endpoints(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._call("GET", "/v1/endpoints")["endpoints"]
        return found

    def policies(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._call("GET", "/v1/policies")["policies"]
        return found

    def offload(self) -> dict[str, Any]:
        return self._call("GET", "/v1/offload")

    def reload(self) -> dict[str, Any]:
        return self._call("POST", "/v1/reload")  # without a body: the answer may come before it was sent

    def restore(self, names: Sequence[str] | None) -> list[dict[str, Any]]:
        """None: all."""
        body: dict[str, Any] = {"all": True} if names is None else {"names": list(names)}
        results: list[dict[str, Any]] = self._call("POST", "/v1/restore", body)["results"]
        return results

    def explain(self, question: dict[str, Any]) -> dict[str, Any]:
        return self._call("POST", "/v1/explain", question)

    def flows(
        self, last: int | None = None, verdict: str | None = None, follow: bool = False
    ) -> Generator[dict[str, Any], None, None]:
        """Records, oldest first; `follow` goes on until the agent ends. `{"lost": n}` stands for a gap."""
        asked = {"last": last, "verdict": verdict, "follow": 1 if follow else None}
        query = urlencode({key: value for key, value in asked.items() if value is not None})
        with Exchange(self._path, None if follow else self._timeout) as exchange:
            for line in exchange.send("GET", f"/v1/flows?{query}"):
                yield json.loads(line)

    def _call(self, method: str, target: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with Exchange(self._path, self._timeout) as exchange:
            answer: dict[str, Any] = json.loads(b"".join(exchange.send(method, target, body)))
            return answer


class Exchange:
    """One request and its answer; whatever goes wrong is said as a ClientError."""

    def __init__(self, path: Path, timeout: float | None) -> None:
        self._path = path
        self._connection = UnixConnection(path, timeout)

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def send(self, method: str, target: str, body: dict[str, Any] | None = None) -> Iterator[bytes]:
        """The answer's lines. Raises AgentUnreachableError, RefusedError, ClientError."""
        content = None if body is None else json.dumps(body)
        headers = {"connection": "close", "content-type": "application/json"}
        try:
            self._connection.request(method, target, content, headers)
            with self._connection.getresponse() as response:
                yield from self._lines(response)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
            raise AgentUnreachableError(
                f"no agent answers on {self._path}: start one with `isolator run -c isolator.yaml`, "
                "or name its socket with --socket"
            ) from error
        except PermissionError as error:
            raise ClientError(f"{self._path} may be opened by root only: run this as root") from error
        except TimeoutError as error:
            raise ClientError(f"the agent on {self._path} gave no answer in time") from error
        except (OSError, HTTPException) as error:
            raise ClientError(f"the agent on {self._path} broke off ({type(error).__name__})") from error

    def _lines(self, response: HTTPResponse) -> Iterator[bytes]:
        if response.status >= 400:
            raise refusal(response.status, response.read())
        yield from response


def refusal(status: int, content: bytes) -> RefusedError:
    """The error that an answer's body tells."""
    try:
        answer = json.loads(content)
        return RefusedError(status, str(answer["error"]), [str(line) for line in answer.get("details", [])])
    except (ValueError, KeyError, TypeError):
        return RefusedError(status, f"the agent answered with status {status}")


def main() -> int:
    try:
        seen = Client(Path(os.environ.get("ISOLATOR_SOCKET", DEFAULT_SOCKET))).status()
    except ClientError as error:
        print(f"isolator: {error}", file=sys.stderr)
        return 1
    print(f"alive, pid {seen['pid']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
