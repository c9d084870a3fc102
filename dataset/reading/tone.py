"""Convert HDR to SDR by published formulas: PQ and HLG codes to light, and light to SDR codes.

Highlights are rolled off by the EETF of ITU-R BT.2390 (section 5.4.1), from a display with a peak of 1000 cd/m2 to one
whose peak is the 203 cd/m2 of HDR reference white (BT.2408). Colours are converted from their primaries to BT.709, and
the light through the inverse of the BT.1886 EOTF.
"""

import functools

import numpy as np
from numpy.typing import NDArray

Light = NDArray[np.float32]

# Transfer characteristics of ITU-T H.273, table 3.
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
_PEAK, _WHITE = 1000.0, 203.0  # cd/m2
_GAMMA = 2.4  # BT.1886
# The constants of PQ (SMPTE ST 2084) and of HLG (BT.2100, table 5).
_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
_A, _B, _C = 0.17883277, 0.28466892, 0.55991073
_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)  # BT.2020
# To BT.709 from the primaries of H.273, table 2: BT.709 itself, BT.2020 (BT.2087, annex 2) and P3 with D65.
_TO_709 = {
    1: np.eye(3),
    9: np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]),
    12: np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]]),
}
_UNKNOWN = 9  # assumed for HDR without declared primaries


def to_sdr(codes: NDArray[np.uint16], transfer: int, primaries: int) -> NDArray[np.uint8]:
    """Return an image (H, W, 3) in 16-bit codes of an HDR transfer as 8-bit SDR; `transfer` and `primaries` are codes
    of H.273.

    Light above 1000 cd/m2 and colours outside BT.709 are clipped.
    """
    light = _light_table(transfer)[codes]
    if HDR_TRANSFERS[transfer] == "HLG":
        # The system gamma of a display of 1000 cd/m2 (BT.2100, table 5).
        light *= _PEAK * (light @ _LUMA)[..., None] ** np.float32(0.2)
    shown = np.maximum(light @ _TO_709.get(primaries, _TO_709[_UNKNOWN]).T.astype(np.float32), 0)
    brightest = np.maximum(shown.max(axis=2, keepdims=True), np.float32(1e-4))
    shown *= roll_off(brightest) / brightest / _WHITE
    return np.round(255 * shown.clip(0, 1) ** np.float32(1 / _GAMMA)).astype(np.uint8)


def roll_off(light: Light) -> Light:
    """Map light in cd/m2 on a 1000 cd/m2 display to a 203 cd/m2 one: unchanged up to about 90, compressed above."""
    peak, white = _encode_pq(np.array(_PEAK)), _encode_pq(np.array(_WHITE))
    top = white / peak
    knee = 1.5 * top - 0.5
    given = np.minimum(_encode_pq(light) / peak, 1)
    t = np.maximum(given - knee, 0) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * top
    rolled: Light = _decode_pq(np.where(given < knee, given, spline) * peak).astype(np.float32)
    return rolled


@functools.lru_cache(maxsize=2)
def _light_table(transfer: int) -> Light:
    """Return the light of each 16-bit code: in cd/m2 for PQ, scene light from 0 to 1 for HLG."""
    codes = np.arange(65536) / 65535
    if HDR_TRANSFERS[transfer] == "PQ":
        return _decode_pq(codes).astype(np.float32)
    return np.where(codes <= 0.5, codes**2 / 3, (np.exp((codes - _C) / _A) + _B) / 12).astype(np.float32)


def _decode_pq(codes: NDArray[np.floating]) -> NDArray[np.floating]:
    power = codes ** (1 / _M2)
    light: NDArray[np.floating] = 10000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)
    return light


def _encode_pq(light: NDArray[np.floating]) -> NDArray[np.floating]:
    power = (light / 10000) ** _M1
    codes: NDArray[np.floating] = ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2
    return codes
