"""The four types that are served, in the order in which they are pushed, and small helpers to build them."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from envoy.config.core.v3 import config_source_pb2
from google.protobuf import any_pb2, duration_pb2, struct_pb2
from google.protobuf.message import Message

_PREFIX = "type.googleapis.com/"


class Type(enum.Enum):
    """In the order make-before-break: what is referred to before what refers to it."""

    CLUSTER = _PREFIX + "envoy.config.cluster.v3.Cluster"
    ENDPOINTS = _PREFIX + "envoy.config.endpoint.v3.ClusterLoadAssignment"
    LISTENER = _PREFIX + "envoy.config.listener.v3.Listener"
    ROUTES = _PREFIX + "envoy.config.route.v3.RouteConfiguration"

    @property
    def short(self) -> str:
        """The usual abbreviation."""
        return {"CLUSTER": "CDS", "ENDPOINTS": "EDS", "LISTENER": "LDS", "ROUTES": "RDS"}[self.name]

    @property
    def whole(self) -> bool:
        """True if a response holds all resources of the type, so that one that is missing is removed."""
        return self in (Type.CLUSTER, Type.LISTENER)


def pack(message: Message) -> any_pb2.Any:
    """A message as Any, with the same bytes every time."""
    return any_pb2.Any(
        type_url=_PREFIX + message.DESCRIPTOR.full_name, value=message.SerializeToString(deterministic=True)
    )


def milliseconds(value: int) -> duration_pb2.Duration:
    result = duration_pb2.Duration()
    result.FromMilliseconds(value)
    return result


def struct(values: Mapping[str, Any]) -> struct_pb2.Struct:
    result = struct_pb2.Struct()
    result.update(values)
    return result


def over_ads() -> config_source_pb2.ConfigSource:
    """Further resources come over the same stream; waiting for them has no end (the last good state stays)."""
    return config_source_pb2.ConfigSource(
        ads=config_source_pb2.AggregatedConfigSource(),
        resource_api_version="V3",
        initial_fetch_timeout=duration_pb2.Duration(),
    )
