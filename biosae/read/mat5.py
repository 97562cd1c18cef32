"""Is a MATLAB 5 file whole? Its elements are walked before scipy reads them, whose reader can crash on damaged ones."""

from __future__ import annotations

import math
import os
import struct
import zlib

from biosae.data.items import ReadError
from biosae.read.edf_records import opened

# types of data elements -> bytes of one value
_SIZES = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 4, 9: 8, 12: 8, 13: 8, 16: 1, 17: 2, 18: 4}
_INT8, _INT32, _UINT32, _MATRIX, _COMPRESSED = 1, 5, 6, 14, 15
_CELL, _STRUCT, _OBJECT, _CHAR, _FUNCTION, _OPAQUE = 1, 2, 3, 4, 16, 17
_NUMERIC = range(6, 16)
_DEEPEST, _MOST_AXES = 40, 32
_DEFLATE = 1100  # a byte of zlib never holds more bytes than this


def check_mat5(path: str) -> None:
    """Walk all variables of a MATLAB 5 (to 7.2) file.

    Raises
    ------
    ReadError
        ``missing``, ``empty``, ``truncated``, ``unreadable``, or ``unsupported`` for MATLAB 7.3 and sparse arrays.
    """
    with opened(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        head = stream.read(128)
        if not head.strip(b"\0"):
            raise ReadError("empty", f"{size} bytes, all zero" if head else "0 bytes")
        if head.startswith((b"MATLAB 7.3", b"\x89HDF")):
            raise ReadError("unsupported", "a .set in MATLAB's format 7.3; save it with -v7 (EEGLAB: Memory options)")
        if not head.startswith(b"MATLAB 5.0") or head[124:128] not in (b"\0\1IM", b"\1\0MI"):
            raise ReadError("unreadable", f"not a MATLAB 5 file (begins with {head[:10]!r})")
        order = "<" if head[126:128] == b"IM" else ">"
        at = 128
        while at < size:
            tag = stream.read(8)
            if len(tag) < 8:
                raise ReadError("truncated", f"the file ends within a variable, at byte {size}")
            kind, length = struct.unpack(order + "II", tag)
            if kind not in (_MATRIX, _COMPRESSED):
                raise ReadError("unreadable", f"a variable of kind {kind} at byte {at}")
            if at + 8 + length > size:
                raise ReadError("truncated", f"{size} bytes, its last variable ends at byte {at + 8 + length}")
            data = tag + stream.read(length)
            try:
                _Walk(_inflated(data[8:], order) if kind == _COMPRESSED else data, order).matrix(0, 0)
            except (struct.error, zlib.error) as error:
                raise ReadError("unreadable", f"the variable at byte {at} is damaged ({error})") from None
            at += 8 + length


def _inflated(data: bytes, order: str) -> bytes:
    """Contents of a compressed variable, as long as they say and no longer."""
    inflater = zlib.decompressobj()
    tag = inflater.decompress(data, 8)
    length = struct.unpack(order + "II", tag)[1]
    if length > _DEFLATE * len(data):
        raise ReadError("unreadable", f"a variable of {length} bytes in {len(data)} compressed ones")
    rest = inflater.decompress(inflater.unconsumed_tail, length) if length else b""
    if len(rest) < length:
        raise ReadError("unreadable", f"a compressed variable ends after {len(rest)} of {length} bytes")
    inflater.decompress(inflater.unconsumed_tail, 1)  # lets zlib reach its checksum
    return tag + rest


class _Walk:
    """One variable; every method takes a position and gives that behind what it checked."""

    def __init__(self, data: bytes, order: str) -> None:
        self.data = data
        self.tag = struct.Struct(order + "II")
        self.one, self.int32 = struct.Struct(order + "I"), order + "i"

    def element(self, at: int, kinds: tuple[int, ...] | dict[int, int]) -> tuple[int, int, int, int]:
        """Type, position of the data, their bytes, and the position behind a data element."""
        first, length = self.tag.unpack_from(self.data, at)
        if first >> 16:  # type and length in four bytes, data in four
            kind, length, begin, end = first & 0xFFFF, first >> 16, at + 4, at + 8
        else:
            kind, begin, end = first, at + 8, at + 8 + length + -length % 8
        if kind not in kinds or (first >> 16 and length > 4):
            raise ReadError("unreadable", f"an element of kind {kind} with {length} bytes, where none belongs")
        if begin + length > len(self.data):
            raise ReadError("unreadable", f"an element of {length} bytes is longer than its variable")
        return kind, begin, length, end

    def numbers(self, at: int, least: int) -> int:
        """A data element of at least so many values."""
        kind, _, length, end = self.element(at, _SIZES)
        if length % _SIZES[kind] or length // _SIZES[kind] < least:
            raise ReadError("unreadable", f"{length} bytes for {least} values of {_SIZES[kind]} bytes")
        return end

    def matrices(self, at: int, n: int, depth: int) -> int:
        """So many arrays, one behind the other."""
        if n > (len(self.data) - at) // 8:
            raise ReadError("unreadable", f"{n} arrays in {len(self.data) - at} bytes")
        for _ in range(n):
            at = self.matrix(at, depth)
        return at

    def matrix(self, at: int, depth: int) -> int:
        """An array of any class."""
        kind, length = self.tag.unpack_from(self.data, at)
        if kind != _MATRIX or depth > _DEEPEST:
            raise ReadError("unreadable", f"kind {kind} in place of an array, {depth} deep")
        at += 8
        if not length:
            return at
        kind, begin, length, at = self.element(at, (_UINT32,))
        if length != 8:
            raise ReadError("unreadable", f"{length} bytes of array flags")
        flags = self.one.unpack_from(self.data, begin)[0]
        what = flags & 0xFF
        if what == _OPAQUE:
            for _ in range(3):
                at = self.element(at, (_INT8,))[3]
            return self.matrix(at, depth + 1)
        _, begin, length, at = self.element(at, (_INT32,))
        axes = [v for (v,) in struct.iter_unpack(self.int32, self.data[begin : begin + length - length % 4])]
        if length % 4 or not 2 <= len(axes) <= _MOST_AXES or min(axes) < 0:
            raise ReadError("unreadable", f"an array of shape {axes}")
        n = math.prod(axes)
        at = self.element(at, (_INT8,))[3]  # name
        if what in _NUMERIC:
            at = self.numbers(at, n)
            return self.numbers(at, n) if flags & 0x800 else at
        if what == _CHAR:
            return self.element(at, _SIZES)[3]  # UTF-8 may need more bytes than letters
        if what == _CELL:
            return self.matrices(at, n, depth + 1)
        if what in (_STRUCT, _OBJECT):
            return self.fields(at, n, what, depth)
        if what == _FUNCTION:
            return self.matrix(at, depth + 1)
        raise ReadError("unsupported" if what == 5 else "unreadable", f"an array of class {what}")

    def fields(self, at: int, n: int, what: int, depth: int) -> int:
        """Fields of ``n`` structures."""
        if what == _OBJECT:
            at = self.element(at, (_INT8,))[3]
        _, begin, length, at = self.element(at, (_INT32,))
        width = struct.unpack_from(self.int32, self.data, begin)[0] if length == 4 else 0
        _, _, length, at = self.element(at, (_INT8,))
        if width < 1 or length % width:
            raise ReadError("unreadable", f"{length} bytes of field names of {width}")
        return self.matrices(at, n * (length // width), depth + 1)
