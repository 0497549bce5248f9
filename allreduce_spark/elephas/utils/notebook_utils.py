"""Whether this is a notebook."""

from __future__ import annotations

import sys

__all__ = ["is_running_in_notebook"]


def is_running_in_notebook() -> bool:
    """Whether this process is the kernel of a Jupyter notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config
