"""What checks shapes and dtypes of arrays in signatures, for jaxtyping's option of pytest; other types are mypy's."""

from collections.abc import Callable

from beartype import beartype


def checked(function: Callable) -> Callable:
    """Check calls of `function` against those of its annotations that jaxtyping wrote."""
    own = getattr(function, "__annotations__", {})
    function.__annotations__ = {name: hint for name, hint in own.items() if "jaxtyping" in repr(hint)}
    try:
        return beartype(function)
    finally:
        function.__annotations__ = own
