"""Imported first by every model: puts the folders of $CLIPLET_TRITON_IMPORT in front of those that Python searches.

The embedded server runs models in an interpreter that sees no PYTHONPATH and no virtual environment, and that wants
another NumPy than the environment has. In a container the variable is unset, and its Python finds cliplet by itself.
"""

import os
import site
import sys

_before = set(sys.path)
_wanted = os.environ.get("CLIPLET_TRITON_IMPORT", "").split(os.pathsep)
for _folder in filter(None, _wanted):
    # Not only the folder: editable installs lie elsewhere, and .pth files in it say where.
    site.addsitedir(_folder)
sys.path[:] = [
    *(p for p in _wanted if p),
    *(p for p in sys.path if p not in _before and p not in _wanted),
    *(p for p in sys.path if p in _before and p not in _wanted),
]
