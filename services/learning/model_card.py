"""A model's card: what it is, what it was trained on, what it reached, and how it is used; in Markdown."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Protocol


class Described(Protocol):
    """A network's module. It may also have `USE` and `LIMITS`, sentences of its own for the card."""

    __doc__: str | None


_DATA = {
    "subtomograms": "Subtomograms",
    "training_subtomograms": "Subtomograms trained on",
    "validation_subtomograms": "Subtomograms held back for validation",
    "subtomogram_box_size": "Box side (voxels)",
    "subtomogram_voxel_size_angstrom": "Voxel size (Å)",
    "subtomogram_contrast": "Contrast of the subtomograms",
    "subtomogram_tilt_degrees": "Tilt range (degrees)",
    "tomogram_subvolumes": "Subvolumes of tomograms",
    "density_subvolumes": "Subvolumes of the second domain",
    "tomogram_contrast": "Contrast of the tomograms",
    "tomogram_tilt_degrees": "Tilt range of the tomograms (degrees)",
    "transposed_pair": "Trained on tomograms and the same on their side",
    "tomograms": "Tomograms",
    "training_patches": "Patches trained on",
    "validation_patches": "Patches held back for validation",
    "patch_size_voxels": "Patch side (voxels)",
    "feature": "Feature",
    "voxel_size_angstrom": "Voxel size of the tomogram (Å)",
    "tomogram_digest": "Digest of the tomogram",
    "tomogram_digests": "Digests of the tomograms",
    "density_digests": "Digests of the second domain",
    "binning": "Binned by",
    "pose_normalisation": "Poses normalised",
    "contrast": "Contrast as the network takes it",
    "intensity": "Intensities",
    "subtomograms_digest": "Digest of the subtomograms",
    "particles_digest": "Digest of the particles",
}
"""Entries of a config that say what the data was."""

_USE = (
    "Give it to the learning service as `model_uri`. Boxes are prepared as in training: how, `config.json` says, which "
    "must stay beside `model.safetensors`."
)
_LIMITS = (
    "It knows what it was trained on: subtomograms of the voxel size, box side and imaging conditions above. Figures "
    "are those of the validation part of the same data; other data may do worse."
)


def card(config: Mapping[str, Any], network: Described) -> str:
    """The card of a model by its config: architecture, data, "class_counts", "parameters" and "figures".

    It names no place where anything is stored, only digests.
    """
    about = inspect.cleandoc(network.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    figures = dict(config.get("figures", {}))
    data = {name: value for name, value in config.items() if name in _DATA}
    data |= {name: figures.pop(name) for name in list(figures) if name in _DATA}
    sections = [
        f"# {config['architecture']}, version {config['architecture_version']}",
        about,
        "## Data",
        _list({_DATA[name]: data[name] for name in _DATA if name in data}),
    ]
    counts = config.get("class_counts")
    if isinstance(counts, Mapping) and counts:
        dice = config.get("class_dice") or {}
        rows = [
            f"| {_cell(name)} | {_cell(count)} |" + (f" {_cell(dice.get(name, ''))} |" if dice else "")
            for name, count in counts.items()
        ]
        heading = (
            ["| Class | Boxes | Dice |", "| --- | ---: | ---: |"] if dice else ["| Class | Boxes |", "| --- | ---: |"]
        )
        sections += ["\n".join([*heading, *rows])]
    if config.get("parameters"):
        sections += ["## Parameters", _list(_words(config["parameters"]))]
    if figures:
        sections += ["## Figures", _list(_words(figures))]
    sections += [
        "## Use",
        " ".join([getattr(network, "USE", ""), _USE]).strip(),
        "## Limits",
        " ".join([getattr(network, "LIMITS", ""), _LIMITS]).strip(),
    ]
    return "\n\n".join(sections) + "\n"


def _list(entries: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {_cell(value)}" for name, value in entries.items())


def _words(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("_", " "): value for name, value in entries.items()}


def _cell(value: Any) -> str:
    """A value in a table or list of Markdown."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(each) for each in value)
    return str(value).replace("|", "\\|").replace("\n", " ")
