"""HDR becomes SDR by the published curves."""

import numpy as np
import pytest

from dataset.reading.tone import roll_off, to_sdr

PQ, HLG, BT709, BT2020 = 16, 18, 1, 9


def grey(code: float) -> np.ndarray:
    return np.full((1, 1, 3), round(code * 65535), np.uint16)


# Points of PQ: the code of 10, 100, 203 and 1000 cd/m2 (BT.2408, table 1, and SMPTE ST 2084).
@pytest.mark.parametrize(("code", "light"), [(0.3018, 10), (0.5081, 100), (0.5807, 203), (0.7518, 1000), (1.0, 10000)])
def test_pq_is_light_rolled_off_at_the_gamma_of_a_screen(code, light):
    shown = roll_off(np.array([min(light, 1000)], np.float32))[0]
    expected = 255 * min(shown / 203, 1) ** (1 / 2.4)
    assert to_sdr(grey(code), PQ, BT2020)[0, 0].tolist() == pytest.approx([expected] * 3, abs=1.5)


def test_hlg_shows_its_white_as_pq_does():
    # 75% of HLG is 203 cd/m2 on a screen of 1000 (BT.2408, table 1), and its top is 1000.
    assert np.abs(to_sdr(grey(0.75), HLG, BT2020).astype(int) - to_sdr(grey(0.5807), PQ, BT2020)).max() <= 2
    assert to_sdr(grey(1.0), HLG, BT2020).min() >= 254
    assert to_sdr(grey(0.0), HLG, BT2020).max() == 0


def test_the_roll_off_keeps_shadows_and_ends_at_white():
    light = np.linspace(0.01, 1000, 2000, dtype=np.float32)
    rolled = roll_off(light)
    assert np.all(np.diff(rolled) >= 0) and rolled[-1] == pytest.approx(203, rel=1e-3)
    assert rolled[light < 80] == pytest.approx(light[light < 80], rel=1e-3)
    assert np.all(rolled <= light * 1.001)


def test_grey_stays_grey_and_colours_become_those_of_bt709():
    for primaries in (BT709, BT2020, 12, 2):
        assert np.ptp(to_sdr(grey(0.45), PQ, primaries)) <= 1
    # BT.709's red at 50 cd/m2, in the colours of BT.2020 (BT.2087).
    light = 50 * np.array([0.6274, 0.0691, 0.0164])
    power = (light / 10000) ** (2610 / 16384)
    codes = ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    found = to_sdr(np.round(codes * 65535).astype(np.uint16)[None, None], PQ, BT2020)[0, 0]
    assert found.tolist() == pytest.approx([255 * (50 / 203) ** (1 / 2.4), 0, 0], abs=4)
