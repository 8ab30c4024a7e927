"""What tomograms are called: by their files' names, made distinct within the store by a digest.

In the store a tomogram is called NAME~DIGEST, by its file's name and the beginning of the file's digest, so that two
files of one name stay two tomograms. Other programs get NAME alone, where that leaves the names in a table distinct.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_ENDING = re.compile(
    r"(\.(mrc|map|rec|ccp4|st|ali|mrcs|em|hdf5?|h5|tiff?|ozx|zarr|ome|zip|gz|star|parquet|csv|json))+$", re.IGNORECASE
)
_UNSOUND = re.compile(r"[^A-Za-z0-9_.+=@-]+")
_LONGEST = 40
_DIGITS = 12
_UNIQUE = re.compile(rf"(.+)~[0-9a-f]{{{_DIGITS}}}")


def file_stem(path_or_uri: str) -> str:
    """A file's name without folders and ending, TS_01 of s3://b/TS_01.mrc.gz; characters that a STAR file or an MRC
    label can't hold become "_", and what is longer than 40 is cut."""
    name = path_or_uri.rstrip("/").rpartition("/")[2]
    return _UNSOUND.sub("_", _ENDING.sub("", name))[:_LONGEST] or "tomogram"


def unique_name(name: str, digest: str) -> str:
    """What the store calls the tomogram of a file with this name and content digest."""
    return f"{name}~{digest[:_DIGITS]}"


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """What other programs are told, by the store's names: without digests, unless two would then be the same."""
    distinct = list(dict.fromkeys(names))
    plain = [found[1] if (found := _UNIQUE.fullmatch(name)) else name for name in distinct]
    return {name: each if plain.count(each) == 1 else name for name, each in zip(distinct, plain, strict=True)}
