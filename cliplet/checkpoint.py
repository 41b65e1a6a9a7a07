"""Arrays and what is known about them on disk: one safetensors file and one JSON file, replaced as one.

    FOLDER/<stem>-<sha256, 12 digits>.safetensors    the arrays
    FOLDER/<stem>.json                               the details, and which file holds the arrays

The JSON file is replaced last and names the arrays by their hash, so a reader, or a kill at any moment, finds
the old pair or the new pair.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cliplet.errors import ArtifactError, explained_os_errors
from cliplet.labels import write_atomically

SCHEMA = 1


def save_arrays(
    folder: Path, stem: str, arrays: Mapping[str, np.ndarray], details: Mapping[str, Any]
) -> None:
    """Replace what `folder` holds under `stem`.

    Raises:
        EnvironmentError_: the folder cannot be written.
    """
    data = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    digest = hashlib.sha256(data).hexdigest()
    file = f"{stem}-{digest[:12]}.safetensors"
    with explained_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / file, data)
    described = {"schema": SCHEMA, "arrays": file, "sha256": digest, **details}
    write_atomically(folder / f"{stem}.json", json.dumps(described, indent=2).encode())
    # The second kind is what a kill in the middle of writing left.
    for other in folder.glob(f"{stem}-*.safetensors*"):
        if other.name != file:
            other.unlink()


def load_details(folder: Path, stem: str) -> dict[str, Any]:
    """What `save_arrays` was told about the arrays.

    Raises:
        ArtifactError: there is nothing under `stem`, or it was written with another layout.
    """
    file = folder / f"{stem}.json"
    try:
        details: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {file}: {error}", f"a folder with {file.name} in it") from error
    if details.get("schema") != SCHEMA:
        raise ArtifactError(f"{file} has schema {details.get('schema')}", f"schema {SCHEMA}", "write it anew")
    return details


def load_arrays(folder: Path, stem: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and details as they were saved.

    Raises:
        ArtifactError: a file is missing, or the arrays are not those that were saved.
    """
    details = load_details(folder, stem)
    file = folder / details["arrays"]
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"cannot read {file}: {error.strerror}", "the whole folder as it was written"
        ) from error
    if hashlib.sha256(data).hexdigest() != details["sha256"]:
        raise ArtifactError(f"{file} was changed after it was written", f"sha256 {details['sha256']}")
    try:
        return load(data), details
    except SafetensorError as error:
        raise ArtifactError(
            f"{file} is not a safetensors file: {error}", "arrays that cliplet wrote"
        ) from error
