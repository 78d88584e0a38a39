"""The one error of the facade, and how the errors of what lies below become it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bpf.links import LinkError
from bpf.maps import MapError, MapFullError


class KernelError(OSError):
    """The kernel refused something; the message names the object and the reason."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Errors within are about ``what``."""
    try:
        yield
    except KernelError:
        raise
    except MapFullError as error:
        raise MapFullError(error.errno, f"{what}: {error.strerror}") from error
    except (MapError, LinkError) as error:
        raise KernelError(f"{what}: {error.strerror or error}") from error
    except OSError as error:
        raise KernelError(f"{what}: {error}") from error
