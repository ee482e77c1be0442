"""bpf/isolator.h as the compiler sees it: numbers by name, sizes and offsets of structs."""

from __future__ import annotations

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

HEADER = Path(__file__).parent.parent / "bpf" / "isolator.h"


def names() -> list[str]:
    """Every enum member and every macro without arguments that has a value."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    enums = re.findall(r"\benum \w+ \{(.*?)\}", text, flags=re.S)
    members = [name for body in enums for name in re.findall(r"\b([A-Z]\w+)\b(?= *=| *,|\s*$)", body)]
    return members + re.findall(r"^#define ([A-Z]\w+)[ \t]+[0-9(]", text, flags=re.M)


@cache
def numbers() -> dict[str, int]:
    return evaluate({name: name for name in names()})


def evaluate(expressions: dict[str, str]) -> dict[str, int]:
    """What a C compiler makes of expressions that use the header."""
    lines = "\n".join(f'printf("%llu\\n", (unsigned long long)({text}));' for text in expressions.values())
    program = (
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/types.h>\n"
        f'#include "{HEADER}"\nint main(void) {{ {lines} return 0; }}\n'
    )
    with tempfile.TemporaryDirectory() as folder:
        binary = f"{folder}/numbers"
        subprocess.run(["clang", "-x", "c", "-", "-o", binary], input=program.encode(), check=True)
        answer = subprocess.run([binary], check=True, capture_output=True).stdout
    return dict(zip(expressions, map(int, answer.split()), strict=True))
