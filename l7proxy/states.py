"""The life of a request as a table: what may follow what. :mod:`l7proxy.stream` acts it out."""

from __future__ import annotations

import enum


class State(enum.IntEnum):
    NEW = 0
    WAITING = 1  #: for a connection, or for the time of the next attempt
    SENT = 2  #: the attempt has a connection; no response yet
    RESPONDING = 3
    TUNNEL = 4
    DONE = 5


class Event(enum.IntEnum):
    ATTEMPT = 0
    CONNECTED = 1
    HEAD = 2
    SWITCH = 3
    FINISH = 4


TABLE: dict[State, dict[Event, State]] = {
    State.NEW: {Event.ATTEMPT: State.WAITING, Event.FINISH: State.DONE},
    State.WAITING: {Event.ATTEMPT: State.WAITING, Event.CONNECTED: State.SENT, Event.FINISH: State.DONE},
    State.SENT: {
        Event.ATTEMPT: State.WAITING,
        Event.HEAD: State.RESPONDING,
        Event.SWITCH: State.TUNNEL,
        Event.FINISH: State.DONE,
    },
    State.RESPONDING: {Event.FINISH: State.DONE},
    State.TUNNEL: {Event.FINISH: State.DONE},
    State.DONE: {},
}
