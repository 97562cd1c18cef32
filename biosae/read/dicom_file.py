"""One DICOM file: its header, and the bytes of each frame. Nothing that the file states is allocated unchecked."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from biosae.data.items import ReadError
from biosae.errors import require
from biosae.read import dicom_codecs as codecs
from biosae.read.dicom_tags import Header

MAX_VALUES = 2**27  # samples in one frame
MAX_INFLATED = 2**29  # bytes of a deflated data set
MAX_FRAGMENTS = 2**21
PHOTOMETRIC = (
    "MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"
)  # fmt: skip
WHOLE_SLIDE, DIRECTORY = "1.2.840.10008.5.1.4.1.1.77.1.6", "1.2.840.10008.1.3.10"
_PIXELS = {0x7FE00010: "PixelData", 0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData"}
_DOCUMENTS = (
    (".1.104.", "an encapsulated document (PDF, STL, CDA ...)"), (".1.88.", "a structured report"),
    (".1.9.", "a waveform; export it to EDF or WFDB and use bs.read.edf or bs.read.wfdb"),
    (".1.481.", "a radiotherapy object"), (".1.11.", "a presentation state"), (".1.66", "raw data or a registration"),
)  # fmt: skip
_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"


@contextmanager
def read_errors(path: str | os.PathLike) -> Iterator[None]:
    """Everything that goes wrong with a file becomes one :class:`ReadError` that names it, and quotes nothing of it."""
    name = Path(path).name
    try:
        yield
    except ReadError as error:
        raise ReadError(error.reason, f"{name}: {error.detail}") from None
    except FileNotFoundError:
        raise ReadError("missing", f"no file {path}") from None
    except OSError as error:
        raise ReadError("unreadable", f"{name}: {error.strerror or 'the header is damaged'}") from None
    except MemoryError:
        raise
    except Exception as error:  # pydicom and the decoders raise many types; their messages may quote the header
        raise ReadError("unreadable", f"{name}: the file is damaged ({type(error).__name__})") from None


class DicomFile:
    """Header of a DICOM file and access to its frames, as stored.

    Parameters
    ----------
    path
        The file.
    force
        Accept files without the preamble and its mark ``DICM``. A transfer syntax must be stated all the same.

    Raises
    ------
    ReadError
        ``no_image``, ``truncated``, ``unreadable``, ``unsupported``, ``empty`` or ``missing``.
    """

    def __init__(self, path: str | os.PathLike, *, force: bool = True) -> None:
        require("pydicom", extra="dicom")
        self.path = os.fspath(path)
        self._stream: Any = None
        with read_errors(path):
            self._stream = Bounded(open(self.path, "rb"))  # noqa: SIM115 -- closed by close()
            try:
                self._open(force)
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()

    def _open(self, force: bool) -> None:
        from pydicom.filereader import read_dataset
        from pydicom.uid import UID

        if self._stream.size == 0:
            raise ReadError("empty", "0 bytes")
        if self._stream.read(132)[128:] != b"DICM":
            if not force:
                raise ReadError("unreadable", "no DICOM mark at byte 128; force=True reads files without it")
            self._stream.seek(0)
        meta = read_dataset(self._stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
        self.syntax = str(Header(meta).text("TransferSyntaxUID"))
        if self.syntax == "nan":
            raise ReadError(
                "unreadable",
                "no transfer syntax is stated (or this is no DICOM file), so that its bytes have no sure meaning; "
                "convert it with a tool that knows the writer (dcmconv), which adds the file meta information",
            )
        if self.syntax == codecs.DEFLATED:
            self._stream = _inflated(self._stream)
        uid = UID(self.syntax)
        implicit, little = self.syntax == "1.2.840.10008.1.2", self.syntax != "1.2.840.10008.1.2.2"
        dataset = read_dataset(self._stream, implicit, little, stop_when=lambda tag, vr, length: tag in _PIXELS)
        self.header = Header(dataset)
        self._locate(little)
        self.syntax_name = uid.name if uid.is_transfer_syntax else self.syntax
        self._describe()
        self._decoder, self._plugin = codecs.decoder(self.syntax)
        self._frames = self._native() if self.syntax in codecs.NATIVE else self._encapsulated()

    def _locate(self, little: bool) -> None:
        """Find the element of the pixels, behind the header."""
        sop_class = self.header.text("SOPClassUID")
        if sop_class == WHOLE_SLIDE:
            raise ReadError("unsupported", "a whole-slide image; read it with bs.read.wsi")
        head = self._stream.read(8)
        order = "little" if little else "big"
        tag = int.from_bytes(head[:2], order) << 16 | int.from_bytes(head[2:4], order)
        if len(head) < 8 or tag not in _PIXELS:
            self._refuse(str(sop_class))
        self.keyword = _PIXELS[tag]
        self._vr = head[4:6].decode("latin-1")
        if self._vr in ("OB", "OW", "OF", "OD", "UN"):
            self._length = int.from_bytes(self._stream.read(4), order)
        else:
            self._vr, self._length = "OW", int.from_bytes(head[4:], order)
        self._start = self._stream.tell()

    def _refuse(self, sop_class: str) -> None:
        """Say why a file has no pixels."""
        elements = list(self.header.dataset.values())
        value, length = (elements[-1].value, getattr(elements[-1], "length", 0)) if elements else (None, 0)
        if isinstance(value, bytes) and len(value) < length < 0xFFFFFFFF:
            raise ReadError("truncated", "the file ends within its header")
        kinds = ((DIRECTORY, "a directory of files (DICOMDIR)"), *_DOCUMENTS)
        what = next((f"it is {what}" for part, what in kinds if part in f"{sop_class}."), "it has no pixel data")
        raise ReadError("no_image", f"no image in this file: {what}")

    def _describe(self) -> None:
        """What the header says of the pixels."""
        header = self.header
        self.rows, self.columns = header.whole("Rows"), header.whole("Columns")
        self.samples = header.whole("SamplesPerPixel", 1)
        self.photometric = str(header.text("PhotometricInterpretation"))
        self.n_frames = header.whole("NumberOfFrames", 1) or 1
        self.planar = header.whole("PlanarConfiguration", 0)
        self.bits = header.whole("BitsAllocated")
        self.is_float = self.keyword != "PixelData"
        self.bits_stored = self.bits if self.is_float else header.whole("BitsStored")
        self.signed = not self.is_float and header.whole("PixelRepresentation") == 1
        high = header.whole("HighBit", self.bits_stored - 1) if self.bits_stored else 0
        self._shift = 0 if self.is_float or self.syntax not in codecs.NATIVE else high + 1 - self.bits_stored
        if not self.rows or not self.columns:
            raise ReadError("unreadable", f"{self.rows} x {self.columns} pixels")
        if self.photometric not in PHOTOMETRIC:
            raise ReadError("unsupported", "a photometric interpretation other than " + ", ".join(PHOTOMETRIC))
        monochrome = self.photometric.startswith(("MONO", "PALETTE"))
        if self.samples != (1 if monochrome else 3) or self.planar > 1:
            raise ReadError("unreadable", f"{self.samples} samples a pixel do not fit {self.photometric}")
        if self.bits not in ((32, 64) if self.is_float else (1, 8, 16, 32, 64)):
            raise ReadError("unsupported", f"{self.bits} bits allocated to a value; 1, 8, 16, 32 or 64 can be read")
        if not 1 <= self.bits_stored + self._shift <= self.bits or self._shift < 0 or (self.bits == 1 and self.signed):
            raise ReadError("unreadable", f"{self.bits_stored} bits stored of {self.bits} allocated, highest {high}")
        swapped = self.syntax == "1.2.840.10008.1.2.2" and self._vr == "OW" and self.bits == 8
        if swapped and self.n_frames > 1 and self.rows * self.columns * self.samples % 2:
            raise ReadError("unsupported", "big-endian words that hold several 8-bit frames of odd length")
        if self.bits == 1 and self.syntax not in codecs.NATIVE:
            raise ReadError("unsupported", "compressed one-bit pixels; store them uncompressed")
        if self.rows * self.columns * self.samples > MAX_VALUES:
            raise ReadError("unsupported", f"{self.rows} x {self.columns} pixels are more than {MAX_VALUES} values")

    # -- where the frames lie ------------------------------------------------------------------------------------

    @property
    def frame_bits(self) -> int:
        """Bits of one uncompressed frame."""
        values = self.rows * self.columns * self.samples
        if self.photometric == "YBR_FULL_422" and self.syntax in codecs.NATIVE:
            values = values // 3 * 2
        return values * self.bits

    def _native(self) -> list[list[tuple[int, int]]]:
        there = min(self._length, self._stream.size - self._start)
        if there * 8 < self.frame_bits * self.n_frames:
            needed = -(-self.frame_bits * self.n_frames // 8)
            raise ReadError("truncated", f"{there} bytes of pixels; {self.n_frames} frames need {needed}")
        return []

    def _encapsulated(self) -> list[list[tuple[int, int]]]:
        """``(offset, length)`` of the pieces of each frame."""
        if self._length != 0xFFFFFFFF:
            raise ReadError("unreadable", "compressed pixels without the fragments that hold such data")
        pieces = list(self._fragments())
        if not pieces:
            raise ReadError("truncated", "no pixels")
        table, pieces = pieces[0], pieces[1:]
        if self.n_frames == 1 and pieces:
            return [pieces]
        if len(pieces) < self.n_frames:
            raise ReadError("truncated", f"{len(pieces)} fragments for {self.n_frames} frames")
        if len(pieces) == self.n_frames:
            return [[piece] for piece in pieces]
        starts = self._offsets(table)
        if len(starts) == self.n_frames:
            wanted = {pieces[0][0] - 8 + s for s in starts}
            first = [i for i, (offset, _) in enumerate(pieces) if offset - 8 in wanted]
        else:  # no table: a frame begins with its codec's magic
            magic = b"\xff\xd8" if self.syntax in codecs.JPEG else b"\xff\x4f\xff\x51"
            first = [i for i, (offset, _) in enumerate(pieces) if self._bytes(offset, len(magic)) == magic]
        if len(first) != self.n_frames or first[0] != 0:
            raise ReadError("unreadable", f"{len(pieces)} fragments that cannot be told apart into frames")
        return [pieces[a:b] for a, b in zip(first, [*first[1:], len(pieces)])]

    def _fragments(self) -> Iterator[tuple[int, int]]:
        at = self._start
        for _ in range(MAX_FRAGMENTS):
            head = self._bytes(at, 8)
            if head[:4] == _END or not head:
                return
            length = int.from_bytes(head[4:], "little")
            if len(head) < 8 or at + 8 + length > self._stream.size:
                raise ReadError("truncated", "the file ends within its pixels")
            if head[:4] != _ITEM:
                raise ReadError("unreadable", "the compressed pixels' fragments are damaged")
            yield at + 8, length
            at += 8 + length
        raise ReadError("unsupported", f"more than {MAX_FRAGMENTS} fragments")

    def _offsets(self, table: tuple[int, int]) -> list[int]:
        long = self.header.raw("ExtendedOffsetTable")[0]
        if isinstance(long, bytes) and len(long) == 8 * self.n_frames:
            return np.frombuffer(long, "<u8").tolist()
        return np.frombuffer(self._bytes(table[0], table[1] // 4 * 4), "<u4").tolist()

    def _bytes(self, offset: int, length: int) -> bytes:
        self._stream.seek(offset)
        return self._stream.read(length)

    # -- frames --------------------------------------------------------------------------------------------------

    def stored(self, frame: int) -> tuple[np.ndarray, bool]:
        """Values of one frame, as stored: ``(H, W)`` or ``(H, W, 3)``, and whether three samples are already RGB.

        Call it within :func:`read_errors`.

        Raises
        ------
        ReadError
            ``missing`` for a frame that is not there; ``truncated``, ``unreadable``, ``unsupported``.
        """
        if not 0 <= frame < self.n_frames:
            raise ReadError("missing", f"no frame {frame}; the file has {self.n_frames}, counted from 0")
        options = {
            "rows": self.rows, "columns": self.columns, "samples_per_pixel": self.samples,
            "photometric_interpretation": self.photometric, "number_of_frames": 1, "pixel_keyword": self.keyword,
            "bits_allocated": self.bits, "pixel_vr": self._vr,
        }  # fmt: skip
        if not self.is_float:
            options |= {"bits_stored": self.bits_stored + self._shift, "pixel_representation": int(self.signed)}
        if self.samples > 1:
            options["planar_configuration"] = self.planar
        if self.syntax in codecs.NATIVE:
            data, colour = self._native_frame(frame), ""
        else:
            data, colour = self._compressed_frame(frame)
        try:
            with codecs.quiet():
                out = self._decoder.as_array(data, index=0, raw=True, decoding_plugin=self._plugin, **options)[0]
        except RuntimeError:
            raise ReadError(
                "unreadable", f"{self._plugin} cannot decode frame {frame}; its stream is damaged"
            ) from None
        if out.shape[:2] != (self.rows, self.columns):
            raise ReadError("unreadable", "the decoder gave a picture of another size")
        if self._shift:
            out = out >> self._shift
        rgb = colour == "RGB" or (not colour and not self.photometric.startswith("YBR_FULL"))
        return out.astype(out.dtype.newbyteorder("="), copy=False), rgb

    def _native_frame(self, frame: int) -> bytes:
        first, last = frame * self.frame_bits, (frame + 1) * self.frame_bits
        length = -(-last // 8) - first // 8
        data = self._bytes(self._start + first // 8, length + length % 2)
        if first % 8:  # one-bit frames follow each other without a gap
            bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[first % 8 :]
            data = np.packbits(bits[: self.frame_bits], bitorder="little").tobytes()
        return data + b"\0" * (len(data) % 2)

    def _compressed_frame(self, frame: int) -> tuple[bytes, str]:
        from pydicom.encaps import encapsulate

        src = b"".join(self._bytes(*piece) for piece in self._frames[frame])
        found = codecs.check_stream(
            src, self.syntax, rows=self.rows, columns=self.columns, samples=self.samples, bits=self.bits
        )
        return encapsulate([src]), found["colour"]


class Bounded:
    """A file that is never asked for more bytes than it has: Python sets aside what a read names."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.size = stream.seek(0, io.SEEK_END)
        self.seek, self.tell, self.close = stream.seek, stream.tell, stream.close
        stream.seek(0)

    def read(self, n: int | None = -1) -> bytes:
        """Up to ``n`` bytes; all that are left without ``n``."""
        left = max(0, self.size - self._stream.tell())
        return self._stream.read(left if n is None or n < 0 else min(n, left))


def _inflated(stream: Bounded) -> Bounded:
    """The data set of a deflated file, in memory."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    data = inflater.decompress(stream.read(), MAX_INFLATED)
    stream.close()
    if inflater.unconsumed_tail:
        raise ReadError("unsupported", f"inflates to more than {MAX_INFLATED >> 20} MiB; store it undeflated")
    if not inflater.eof:
        raise ReadError("truncated", "the deflated data set has no end")
    return Bounded(io.BytesIO(data))


def looks_like_dicom(path: str | os.PathLike) -> bool:
    """Whether a file's first bytes are those of a DICOM file, with or without the preamble."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(132)
    except OSError:
        return False
    return head[128:] == b"DICM" or (
        head[:2] in (b"\x02\0", b"\x08\0", b"\0\x08") and head[3:4] in (b"\0", b"\1", b"\5")
    )
