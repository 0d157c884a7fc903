"""Joining a Ray cluster that others have started: what keeps a driver out comes as one line."""

from __future__ import annotations

import logging
import socket

from arat_dist.errors import UserError

_CONNECT_S = 10.0
"""Longest wait for an answer of the address, in seconds."""

_WHERE = "in RAY_AUTH_TOKEN or in ~/.ray/auth_token"


def join(address: str) -> None:
    """Join a cluster.

    Args:
        address: HOST:PORT, or what else `ray.init` takes.

    Raises:
        UserError: nobody listens there, which is found out soon, or Ray says no.
    """
    import ray
    from ray.exceptions import AuthenticationError

    host, colon, port = address.rpartition(":")
    try:
        if colon and port.isdecimal() and "/" not in host:  # Ray would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
        ray.init(address, logging_level=logging.WARNING)
    except AuthenticationError:
        raise UserError(f"RAY_AUTH_TOKEN: missing: {address} wants its own token {_WHERE}") from None
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        first_line = (getattr(error, "strerror", None) or str(error)).strip().partition("\n")[0]
        raise UserError(
            f"cluster.address: {address}: {first_line}; HOST:6379 of a running Ray cluster, and its token {_WHERE}, "
            "would be right"
        ) from error
