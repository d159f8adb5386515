"""Exceptions that a person can act on: each message names the input, what was expected, what came, and what to do."""


class SeeSRError(Exception):
    """Base of everything this project raises on purpose; the command line prints its message as one line."""

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        # ComfyUI imports a plugin under the path of its folder and tells the module of an error's type to everybody.
        cls.__module__ = _MODULE


_MODULE = "seesr_core.errors"
SeeSRError.__module__ = _MODULE


class ImageError(SeeSRError):
    """A picture that cannot be read, processed or written."""


class WeightsError(SeeSRError):
    """A weights file of another model, of another size, truncated, unsafe or missing."""


class SettingsError(SeeSRError):
    """An option or a combination of options that cannot work."""


class DataError(SeeSRError):
    """Training or evaluation data that cannot be used."""


class ResourceError(SeeSRError):
    """Not enough memory or disk for the request."""


def about_file(error: OSError) -> str:
    """What is said of a file that the system refuses, for the last place that can say it."""
    return f"{error.filename}: {error.strerror}. Check the name and its permissions."
