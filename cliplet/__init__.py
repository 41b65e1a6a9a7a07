"""cliplet: class names and unlabelled images in, a multi-label tagger that runs anywhere out.

    import cliplet
    with cliplet.load("tiny", classes="cat, dog, person") as tagger:
        tagger.label(["photo.jpg"])[0].labels

Names are imported when they are first used, so that `import cliplet` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cliplet.errors import ClipletError as ClipletError
    from cliplet.labels import ErrorRecord as ErrorRecord
    from cliplet.labels import LabelRecord as LabelRecord
    from cliplet.labels import read_errors as read_errors
    from cliplet.labels import read_labels as read_labels
    from cliplet.tagger import Tagger as Tagger
    from cliplet.tagger import load as load

__version__ = "0.1.0"

_HOMES = {
    "ClipletError": "cliplet.errors",
    "ErrorRecord": "cliplet.labels",
    "LabelRecord": "cliplet.labels",
    "Tagger": "cliplet.tagger",
    "load": "cliplet.tagger",
    "read_errors": "cliplet.labels",
    "read_labels": "cliplet.labels",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cliplet' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
