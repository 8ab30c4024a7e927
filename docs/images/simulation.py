"""Makes docs/images/simulation.png: python docs/images/simulation.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from services.simulation import density, detector, imaging, scene, signal_to_noise
from services.simulation.phantoms import phantom
from services.simulation.projection import project
from services.simulation.tilt_scheme import tilt_scheme
from services.simulation.weighted_back_projection import weighted_back_projection

SHAPE, VOXEL = (100, 320, 320), 8.0
KINDS = ("double-ring", "barrel-with-lids", "two-subunit-globule", "hexameric-ring", "icosahedral-shell")


def specimen() -> scene.Specimen:
    built = [density.build(name, None, "", VOXEL, 2 * VOXEL, 2) for name in KINDS]
    helix = phantom("helical-filament").helix
    assert helix is not None
    strand = density.build_subunit("helical-filament", None, "", VOXEL, 2 * VOXEL, 2)
    return scene.Specimen(
        SHAPE,
        VOXEL,
        2 * VOXEL,
        placements=[
            *(scene.Placement(made, 22) for made in built),
            scene.Placement(density.build("single-ring", None, "", VOXEL, 2 * VOXEL), 12, where="membrane"),
        ],
        vesicles=[scene.Vesicles(2, 250, 330)],
        filaments=[scene.Filaments(strand, 4, helix.rise_angstrom, helix.twist_degrees)],
        gold_beads=[scene.GoldBeads(4, 80)],
        carbon=scene.Carbon(260, 200, 4000),
        allow_partial=True,
    )


def grey(image: NDArray[np.floating], low: float, high: float) -> Image.Image:
    bottom, top = np.percentile(image, [low, high])
    return Image.fromarray((np.clip((image - bottom) / (top - bottom), 0, 1) * 255).astype(np.uint8))


def spectrum(volume: NDArray[np.floating], side: int) -> Image.Image:
    """Logarithm of the power in the x-z plane, kx to the right, kz upwards."""
    rows = volume[:, ::8].transpose(1, 0, 2)
    window = np.hanning(rows.shape[1])[:, None] * np.hanning(rows.shape[2])
    power = (np.abs(np.fft.fft2(rows * window, (side, side))) ** 2).mean(axis=0)
    return grey(np.fft.fftshift(np.log(power + 1e-12))[::-1], 2, 99.9)


def main() -> None:
    rng = np.random.default_rng(7)
    made = scene.build_scene(specimen(), rng)
    parameters = imaging.ImagingParameters(pixel_size_angstrom=VOXEL, defocus_um=5.0)
    series = imaging.draw_tilt_series(tilt_scheme(-60, 60, 2), parameters, rng)
    contrast = imaging.noise_free_series(project(made.density, series.angles_degrees, workers=2), series, parameters)
    clean = detector.apply_mtf(contrast, detector.sinc_mtf)
    angles = series.angles_degrees
    gold = np.isin(made.labels, made.labels_of("gold"))
    level = signal_to_noise.noise_sigma_for_snr(
        clean, angles, SHAPE[0], 0.3, rng, mtf=detector.sinc_mtf, left_out=gold, workers=2
    )
    noisy = detector.gaussian_series(contrast, np.full(len(angles), level.sigma), rng).images
    noisy -= noisy.mean(axis=(1, 2), keepdims=True)
    tomogram = weighted_back_projection(noisy, angles, SHAPE[0], SHAPE[2], workers=2)

    middle = SHAPE[0] // 2
    zero = int(np.argmin(np.abs(angles)))
    colours = np.random.default_rng(3).integers(60, 255, (len(made.label_names), 3))
    colours[0] = 20
    side = SHAPE[1]
    power = np.abs(np.fft.fft2(clean[zero] * np.hanning(side)[:, None] * np.hanning(side))) ** 2
    frequency = np.fft.fftshift(np.log(power + 1e-9))
    panels = [
        ("grand model, one plane", grey(np.minimum(made.density[middle], 6), 1, 99.8)),
        ("labels of that plane", Image.fromarray(colours[made.labels[middle]].astype(np.uint8))),
        ("untilted image, SNR 0.3", grey(noisy[zero], 1, 99)),
        ("tomogram, same plane", grey(tomogram[middle], 1, 99)),
        ("spectrum of an image without noise", grey(frequency, 5, 99.9)),
        ("spectrum of the tomogram, x-z", spectrum(tomogram, side)),
    ]
    gap, title = 8, 22
    sheet = Image.new("RGB", (3 * side + 4 * gap, 2 * (side + title) + 3 * gap), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    for number, (name, panel) in enumerate(panels):
        x = gap + number % 3 * (side + gap)
        y = gap + number // 3 * (side + title + gap)
        draw.text((x, y), name, fill="black", font=font)
        sheet.paste(panel.convert("RGB"), (x, y + title))
    sheet.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
