"""Another version's layout of the maps: the same programs, built from a header that lays structs out otherwise."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from isolator.datapath.bpf import TC_OBJECT, XDP_OBJECT, lay_out
from isolator.datapath.libbpf import Object
from isolator.datapath.pins import remove_folder

BPF = Path(__file__).parent.parent / "bpf"
BOUND = {"#define ADDRESSES_MAX 65536": "#define ADDRESSES_MAX 65537"}
"""Equal structs, another bound."""

_ENDPOINT = "\t__u32 endpoint;\n\t__u8 local[16];"
_KEY_END = "\t__u8 protocol;\n\t__u8 pad[3];\n};\n\n/* flows4"
STRUCTS = {
    "struct port {\n": "struct port {\n\t__u64 former;\n",
    _ENDPOINT: "\t__u8 local[16];",
    _KEY_END: _KEY_END.replace("};", "\t__u32 endpoint;\n};"),
    "struct flow4 {\n": "struct flow4 {\n\t__u64 former;\n",
    "\t__u8 verdict;\n\t__u8 flags;\n\t__u8 reason; /*": "\t__u8 flags;\n\t__u8 verdict;\n\t__u8 reason; /*",
    "struct half {\n\t__u64 word;\n": "struct half {\n\t__u64 former;\n\t__u64 word;\n",
    "\t__u32 mode;      /*": "\t__u16 mode;      /*",
    "struct flow7 {\n\t__u64 last_seen;\n": "struct flow7 {\n\t__u32 former;\n\t__u64 last_seen;\n",
    "\t__u32 flows7;\n\t__u32 flows7_max;": "\t__u32 flows7_max;\n\t__u64 flows7;",
    "struct control {\n": "struct control {\n\t__u64 former;\n",
}
"""Fields before, between, in another order, narrower and wider: keys, values, and structs inside them."""
PREFIXES = {"\t__u32 prefixlen; /* 32 + 0": "\t__u32 prefixlen;\n\t__u32 former; /* 32 + 0"}
"""Another prefix: its bits are counted over other fields."""


def build(folder: Path, changes: dict[str, str]) -> Path:
    """The objects, made from the header with these replacements."""
    source, objects = folder / "bpf", folder / "objects"
    shutil.copytree(BPF, source)
    objects.mkdir(parents=True)
    header = source / "isolator.h"
    text = header.read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    header.write_text(text)
    for name in (TC_OBJECT, XDP_OBJECT):
        flags = ["-O2", "-g", "-target", "bpf", "-mcpu=v3", f"-I/usr/include/{os.uname().machine}-linux-gnu"]
        parts = ["-c", source / name.replace(".o", ".c"), "-o", objects / name]
        subprocess.run(["clang", *flags, *parts], check=True)
    return objects


def put_in_force(pins: Path, objects: Path, tidy: bool = True) -> None:
    """As an agent of that version does when it starts, and then it is gone: the ports run its programs. `tidy`: it
    took other layouts away before."""
    with Object.open(objects / TC_OBJECT) as tc, Object.open(objects / XDP_OBJECT) as xdp:
        folder, _ = lay_out(tc, xdp, pins)
        for path in folder.others() if tidy else ():
            remove_folder(path)
