"""The datapath's errors: one root, so that whoever drives it can catch all of them."""

from __future__ import annotations


class DatapathError(Exception):
    """Something the datapath needs from the kernel failed. The message says what, and what to do."""
