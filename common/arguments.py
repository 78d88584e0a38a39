"""Command-line arguments that several of our processes have."""

from __future__ import annotations

import argparse


def add_revoke_after(parser: argparse.ArgumentParser) -> None:
    """``--revoke-after SECONDS|never``: ``options.revoke_after`` in seconds, None for never."""
    parser.add_argument(
        "--revoke-after",
        type=_patience,
        default=0.0,
        metavar="SECONDS|never",
        help="that an open connection has once policy refuses it (default 0: it is ended at once)",
    )


def _patience(text: str) -> float | None:
    if text == "never":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of seconds nor never")
    return float(text)
