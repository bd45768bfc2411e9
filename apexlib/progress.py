"""Progress bars where somebody watches."""

import os
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], description: str, **options: Any) -> Iterable[T]:
    """Iterate over `items` under a progress bar, with `options` of tqdm, unless `hide_progress()`."""
    return tqdm(items, desc=description, disable=hide_progress(), leave=False, **options)


def hide_progress() -> bool:
    """Whether a progress bar would only flood a log: neither a terminal nor JupyterLab, or TQDM_DISABLE is set."""
    return bool(os.environ.get("TQDM_DISABLE")) or not ("ipykernel" in sys.modules or sys.stderr.isatty())
