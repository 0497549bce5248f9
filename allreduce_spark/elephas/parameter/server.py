"""Parameter servers."""

from __future__ import annotations

from allreduce_spark.elephas.gone import PartOfServer

__all__ = ["BaseParameterServer", "HttpServer", "SocketServer"]


class BaseParameterServer(PartOfServer):
    """A server of any kind."""


class HttpServer(BaseParameterServer):
    """Over HTTP."""


class SocketServer(BaseParameterServer):
    """Over a plain socket."""
