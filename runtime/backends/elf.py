"""How much code is in a shared object?"""

from __future__ import annotations

import struct

from runtime.backends.lowering import unknown


def text_section_bytes(shared: bytes) -> int | dict[str, str]:
    """Read the size of `.text` from a 64-bit little-endian ELF file: code without the weights beside it."""
    if shared[:6] != b"\x7fELF\x02\x01":
        return unknown("the shared object is not 64-bit little-endian ELF")
    (table,) = struct.unpack_from("<Q", shared, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", shared, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", shared, table + index * size) for index in range(count)]
    names_at = sections[names_index][4]
    for name, _, _, _, _, length in sections:
        if shared[names_at + name : names_at + name + 6] == b".text\x00":
            return int(length)
    return unknown("the shared object has no .text section")
