"""The one error of the facade, and how the errors of what lies below become it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from bpf.links import LinkError
from bpf.maps import MapError, MapFullError


class KernelError(OSError):
    """The kernel refused something; the message names the object and the reason."""


class NoVethError(KernelError):
    """A pod has no veth to its node, so that nobody could judge what it sends: it cannot be in the mesh as it is."""

    def __init__(self, addresses: Iterable[str]) -> None:
        super().__init__(
            f"no veth of the node has {' or '.join(sorted(addresses))} at its other end, and what passes interfaces of"
            " other kinds (macvlan, ipvlan, host-device, tap) cannot be judged: give the pod a veth, or keep it out of the"
            " mesh with its label istio.io/dataplane-mode=none"
        )


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
