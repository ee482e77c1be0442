"""A small binding to libnftables (libnftables(3)): commands in, JSON out, each call one transaction."""

from __future__ import annotations

import ctypes
import json
from ctypes import c_char_p, c_int, c_uint, c_void_p
from functools import cache
from typing import Any

from isolator.datapath.errors import DatapathError

NFT_CTX_DEFAULT = 0
NFT_CTX_OUTPUT_JSON = 1 << 4


class NftablesError(DatapathError):
    """libnftables is not there, or the kernel refused commands; none of them was carried out."""


def run(commands: str) -> list[dict[str, Any]]:
    """Runs commands as `nft -f` would, in the calling thread's network namespace: all of them, or none.

    Returns what they list. Raises NftablesError.
    """
    nft = _library()
    context = nft.nft_ctx_new(NFT_CTX_DEFAULT)
    if not context:
        raise NftablesError("libnftables cannot be set up: is there memory, and are you root?")
    try:
        nft.nft_ctx_output_set_flags(context, NFT_CTX_OUTPUT_JSON)
        nft.nft_ctx_buffer_output(context)
        nft.nft_ctx_buffer_error(context)
        if nft.nft_run_cmd_from_buffer(context, commands.encode()):
            said = nft.nft_ctx_get_error_buffer(context).decode(errors="replace")
            raise NftablesError(said.strip().partition("\n")[0] or "nftables refused, and does not say why")
        listed = nft.nft_ctx_get_output_buffer(context)
        return list(json.loads(listed)["nftables"]) if listed else []
    finally:
        nft.nft_ctx_free(context)


@cache
def _library() -> ctypes.CDLL:
    try:
        nft = ctypes.CDLL("libnftables.so.1")
    except OSError as error:
        raise NftablesError("libnftables.so.1 is missing: install the package libnftables1") from error
    for name, result, *arguments in (
        ("nft_ctx_new", c_void_p, c_uint),
        ("nft_ctx_free", None, c_void_p),
        ("nft_ctx_output_set_flags", None, c_void_p, c_uint),
        ("nft_ctx_buffer_output", c_int, c_void_p),
        ("nft_ctx_buffer_error", c_int, c_void_p),
        ("nft_run_cmd_from_buffer", c_int, c_void_p, c_char_p),
        ("nft_ctx_get_output_buffer", c_char_p, c_void_p),
        ("nft_ctx_get_error_buffer", c_char_p, c_void_p),
    ):
        function = getattr(nft, name)
        function.restype, function.argtypes = result, arguments
    return nft
