"""Clients of the parameter server."""

from __future__ import annotations

from typing import NoReturn

from allreduce_spark.elephas.gone import PartOfServer
from allreduce_spark.errors import ConfigError

__all__ = ["BaseParameterClient", "HttpClient", "SocketClient"]


class BaseParameterClient(PartOfServer):
    """A client of any kind."""

    client_type = "base"

    @classmethod
    def get_client(cls, client_type: str, port: int = 4000) -> NoReturn:
        """Raises ConfigError: there is no server that it could talk to."""
        raise ConfigError(cls._message())


class HttpClient(BaseParameterClient):
    """Over HTTP."""

    client_type = "http"


class SocketClient(BaseParameterClient):
    """Over a plain socket."""

    client_type = "socket"
