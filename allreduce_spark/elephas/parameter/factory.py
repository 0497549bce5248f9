"""Factories of parameter servers and their clients."""

from __future__ import annotations

from typing import NoReturn

from allreduce_spark.elephas.gone import PartOfServer
from allreduce_spark.errors import ConfigError

__all__ = ["ClientServerFactory", "HttpFactory", "SocketFactory"]


class ClientServerFactory(PartOfServer):
    """A factory of any kind."""

    @classmethod
    def get_factory(cls, _type: str) -> NoReturn:
        """Raises ConfigError: there is nothing to make."""
        raise ConfigError(cls._message())


class HttpFactory(ClientServerFactory):
    """Over HTTP."""


class SocketFactory(ClientServerFactory):
    """Over a plain socket."""
