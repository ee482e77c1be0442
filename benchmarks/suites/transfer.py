"""One request with a large body, and one with a large answer."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.load import download, upload
from benchmarks.suites.base import ForAll, Mode, Point, Run

POSTS = 200
MB_S = 1_000  # or so: to say how long it takes


def up(run: Run) -> dict[str, float]:
    return {"upload": upload(run.place, run.route, run.mode.megabytes)}


def posts(run: Run) -> dict[str, float]:
    return {f"{POSTS} posts of 1 MiB": upload(run.place, run.route, 1, POSTS)}


def down(run: Run) -> dict[str, float]:
    return {"download": download(run.place, run.route, run.mode.megabytes)}


class Upload(ForAll):
    name = "upload"
    about = (
        "One POST with a body of declared length (1 GiB, quick: 256 MiB); full: also many on one connection."
    )

    def points(self, mode: Mode) -> Sequence[Point]:
        both = [
            Point({"upload": "MB/s"}, up, takes=mode.megabytes / MB_S),
            Point({f"{POSTS} posts of 1 MiB": "MB/s"}, posts, takes=POSTS / MB_S),
        ]
        return both if mode.full else both[:1]


class Download(ForAll):
    name = "download"
    about = "One GET with a large answer (1 GiB, quick: 256 MiB)."

    def points(self, mode: Mode) -> Sequence[Point]:
        return [Point({"download": "MB/s"}, down, takes=mode.megabytes / MB_S)]
