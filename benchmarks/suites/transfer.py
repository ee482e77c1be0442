"""One request with a large body, and one with a large answer."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.load import download, upload
from benchmarks.suites.base import ForAll, Mode, Point, Run


def up(run: Run) -> dict[str, float]:
    return {"upload": upload(run.place, run.route, run.mode.megabytes)}


def down(run: Run) -> dict[str, float]:
    return {"download": download(run.place, run.route, run.mode.megabytes)}


class Upload(ForAll):
    name = "upload"
    about = "One POST with a body of declared length (1 GiB, quick: 256 MiB)."

    def points(self, mode: Mode) -> Sequence[Point]:
        return [Point({"upload": "MB/s"}, up)]


class Download(ForAll):
    name = "download"
    about = "One GET with a large answer (1 GiB, quick: 256 MiB)."

    def points(self, mode: Mode) -> Sequence[Point]:
        return [Point({"download": "MB/s"}, down)]
