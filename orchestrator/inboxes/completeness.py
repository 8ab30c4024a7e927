"""Whether a file that no longer changes is whole: what its first bytes say, against its size."""

from __future__ import annotations

import struct

from cryofleet.errors import InvalidArgument
from cryofleet.formats import mrc

HEAD_BYTES = mrc.HEADER_BYTES
_MRC_ENDINGS = (".mrc", ".mrcs", ".rec", ".map", ".st", ".ali")
_TIFF_DIRECTORY_AT = {b"II*\0": ("<I", 4), b"MM\0*": (">I", 4), b"II+\0": ("<Q", 8), b"MM\0+": (">Q", 8)}
"""By how a TIFF begins, where it says at which byte its directory is; a writer that is not done has put none there."""


class Incomplete(Exception):
    """More of the file may still come; the message says what is missing."""


def check_whole(head: bytes, size_bytes: int, name: str) -> None:
    """Compares a file's first HEAD_BYTES with its size; `name` is what errors call it.

    Of a gzipped file, and of a format that does not say its size, nothing can be said so cheaply: it passes, and the
    pipeline will read it.

    Raises:
        Incomplete: it is empty, or shorter than it says.
        InvalidArgument: it is named as an MRC file and is none, whatever is still to come.
    """
    if not size_bytes:
        raise Incomplete(f"{name}: an empty file")
    for magic, (layout, at) in _TIFF_DIRECTORY_AT.items():
        if head.startswith(magic):
            end = at + struct.calcsize(layout)
            directory = struct.unpack_from(layout, head, at)[0] if len(head) >= end else 0
            if not end <= directory < size_bytes:
                raise Incomplete(f"{name}: a TIFF file of {size_bytes} bytes, without its directory")
            return
    if not name.lower().endswith(_MRC_ENDINGS):
        return
    if mrc.is_gzip(head):
        return
    # Some programs write the header last, over zeros.
    if not any(head) or size_bytes < HEAD_BYTES:
        raise Incomplete(f"{name}: {mrc.describe(head)} of {size_bytes} bytes, without an MRC header")
    header = mrc.parse_header(head, name)
    try:
        mrc.check_size(header, size_bytes, name)
    except InvalidArgument as failure:
        # Longer than it says too: a header that counts the sections is put right last by some.
        raise Incomplete(failure.message) from None
