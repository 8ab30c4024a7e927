"""What requests of several services say in the same words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cryofleet.formats.tilt_series import read_tilt_series
from cryofleet.numerics import transfer
from cryofleet.server import Reader
from cryofleet.v1 import common_pb2

CONTRASTS: Mapping[int, str] = {common_pb2.CONTRAST_DARK: "dark", common_pb2.CONTRAST_LIGHT: "light"}

CTF_CORRECTIONS: Mapping[int, transfer.CtfCorrection] = {
    common_pb2.CTF_CORRECTION_NONE: "none",
    common_pb2.CTF_CORRECTION_PHASE_FLIP: "phase_flip",
    common_pb2.CTF_CORRECTION_WIENER: "wiener",
}


def tilt_series_transfer(request: Any, reader: Reader, box: int, voxel_size_angstrom: float) -> NDArray[np.float32]:
    """What the tilt series at the request's `tilts_uri` leaves of a box's components, on the half grid.

    Unless the request says whether the CTF counts, it does where the series says the defocus and the voltage.
    """
    series = read_tilt_series(reader.read_file(request.tilts_uri), request.tilts_uri)
    known = series.defocus_um is not None and series.voltage_kv is not None
    return transfer.tilt_series_transfer(
        series,
        box,
        voxel_size_angstrom,
        ctf_correction=CTF_CORRECTIONS[request.ctf_correction],
        use_ctf=request.weight_by_ctf if request.HasField("weight_by_ctf") else known,
        use_dose=request.weight_by_dose,
    )
