"""Classical features of small tiles, the yardstick for the difficulty of synthetic data.

Local statistics are taken per pixel and summarised by their median over the tile, so that they describe
the majority of a tile rather than the borders between its parts.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
from scipy.fft import fft2, ifft2, next_fast_len
from scipy.ndimage import gaussian_filter

SCALES = (0.0, 0.8, 1.4, 2.3, 3.7, 6.0)  # px: borders of the band passes
WAVELENGTHS = (4.0, 6.5, 10.0)  # px: of the oriented filters
ANGLES = 6


def _gabor(wavelength: float, angle: float) -> np.ndarray:
    """Complex zero-mean, unit-norm wavelet."""
    sigma = wavelength / 2
    reach = int(np.ceil(2.2 * sigma))
    rows, cols = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    envelope = np.exp(-(rows**2 + cols**2) / (2 * sigma**2))
    wave = envelope * np.exp(2j * np.pi * (cols * np.cos(angle) + rows * np.sin(angle)) / wavelength)
    wave -= envelope * wave.sum() / envelope.sum()
    return wave / np.linalg.norm(wave)


BANK = [[_gabor(w, np.pi * k / ANGLES) for k in range(ANGLES)] for w in WAVELENGTHS]


@lru_cache(maxsize=2)
def _spectra(n: int) -> np.ndarray:
    """Spectra [wavelengths, angles, n, n] of the oriented filters."""
    return np.stack([[fft2(wave, (n, n)) for wave in filters] for filters in BANK]).astype(np.complex64)


def _oriented(values: np.ndarray) -> np.ndarray:
    """Energy [wavelengths, angles, h, w] of the oriented filters."""
    n = next_fast_len(max(values.shape) + max(f.shape[0] for f in BANK[-1]))
    spectra = _spectra(n) * fft2(values, (n, n))
    energy = np.empty((len(BANK), ANGLES, *values.shape), np.float32)
    for i, filters in enumerate(BANK):
        for k, wave in enumerate(filters):
            r = wave.shape[0] // 2
            response = ifft2(spectra[i, k])[r : r + values.shape[0], r : r + values.shape[1]]
            energy[i, k] = np.abs(response) ** 2
    return energy


def texture(values: np.ndarray) -> np.ndarray:
    """Features of one band [h, w] with NaN where nothing was measured; independent of gain and offset.

    Relative energy and skewness of five band passes; energy, one- and two-fold orientation at three
    wavelengths.
    """
    valid = np.isfinite(values)
    if valid.mean() < 0.1:
        return np.zeros(2 * (len(SCALES) - 1) + 4 * len(WAVELENGTHS), np.float32)
    values = np.where(valid, values, np.median(values[valid])).astype(np.float32)
    values = (values - values.mean()) / (values.std() + 1e-6)
    blurred = [gaussian_filter(values, s) if s else values for s in SCALES]
    passes = [fine - coarse for fine, coarse in itertools.pairwise(blurred)]
    energy = [gaussian_filter(p * p, 5) + 1e-6 for p in passes]
    maps = [np.log(e / sum(energy)) for e in energy]
    maps += [gaussian_filter(p**3, 5) / e**1.5 for p, e in zip(passes, energy, strict=True)]
    oriented = gaussian_filter(_oriented(values - gaussian_filter(values, 8)), (0, 0, 4, 4)) + 1e-7
    strength = oriented.mean(1)
    harmonics = np.abs(np.fft.fft(oriented, axis=1))
    maps += [*np.log(strength / strength.sum(0))]
    maps += [harmonics[i, k] / harmonics[i, 0] for i in range(len(BANK)) for k in (1, 2, 3)]
    return np.median(np.stack(maps)[:, valid], axis=1)
