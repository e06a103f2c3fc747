"""Settings of a connection: target, timeout, TLS, token, options of the channel."""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc

from emberpc.client._core import checks
from emberpc.client._core.rpc_call import Call
from emberpc.client.exceptions import (
    Circumstances,
    EmberpcError,
    InputError,
    InputTypeError,
    RpcFailure,
    from_rpc,
    no_response,
)

#: The default port of `emberpc serve`, and of a target that is a host alone.
DEFAULT_PORT = 50051

#: Message of the exception Cancelled for a call after `close()` of the client.
CLIENT_CLOSED = "the client is closed; make another one"
#: Message of Cancelled for a call over the caller's channel, which the caller has closed.
CHANNEL_CLOSED = "the channel is closed; give the client an open one"
#: Message of Cancelled for a call in flight that was cancelled, for example by `close()`.
CALL_CANCELLED = "the call was cancelled before its response came"

ChannelOptions = list[tuple[str, "str | int"]]

#: Longest timeout of a call, in seconds: a hundred years. A much longer timeout would overflow gRPC's clock, and the
#: call would fail at once.
_MAX_TIMEOUT = 100 * 365 * 24 * 3600
#: Pattern that a whole bearer token must match (RFC 6750).
_TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
#: Finds the port of each address of a target, after a host without a colon or an IPv6 address in brackets.
_PORT = re.compile(r"(?:^|[/:,])(?:[^/:,\[\]]+|\[[^\]]*\]):([0-9]*)(?=,|$)")

#: Settings of pings, which find a connection that broke without notice. While a call is in flight, gRPC sends a ping
#: every 30 seconds; after two pings without data between them, one a minute. Between calls it sends none. A connection
#: whose ping has no response for 10 seconds counts as broken. The server must accept a ping every 30 seconds, or else
#: it closes the connection; see `_KEEPALIVE` of `emberpc.server.app`.
_KEEPALIVE: ChannelOptions = [("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 10_000)]

#: gRPC's service config: calls are spread over all addresses of the target. It has no retry policy, since the client
#: retries by itself; the module `retries` says why. Even without a policy, gRPC repeats calls that no server has
#: begun to handle.
_SERVICE_CONFIG: dict[str, Any] = {"loadBalancingConfig": [{"round_robin": {}}]}


@dataclass(frozen=True)
class TLS:
    """Settings of an encrypted connection. Key and certificates are PEM, whose contents are not checked here.

    Attributes:
        root_certificates: certificates of the authorities that may sign the server's certificate; None: those of gRPC.
        private_key: the client's key, if the server requires client certificates (mTLS).
        certificate_chain: the certificate of `private_key`, and any intermediate certificates.
        server_name: name that the server's certificate must have; empty: the host of the target.

    Raises:
        InputTypeError: a certificate or the key is not bytes.
        InputError: only one of `private_key` and `certificate_chain` is given.
    """

    root_certificates: bytes | None = None
    private_key: bytes | None = field(default=None, repr=False)
    certificate_chain: bytes | None = None
    server_name: str = ""

    def __post_init__(self) -> None:
        for name in ("root_certificates", "private_key", "certificate_chain"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bytes):
                raise InputTypeError(
                    f"{name} is of type {type(value).__name__}; it must be PEM as bytes, or use TLS.from_files"
                )
        if (self.private_key is None) != (self.certificate_chain is None):
            raise InputError("private_key and certificate_chain go together; give both or neither")

    @classmethod
    def from_files(
        cls,
        root_certificates: Path | str | None = None,
        *,
        private_key: Path | str | None = None,
        certificate_chain: Path | str | None = None,
        server_name: str = "",
    ) -> TLS:
        """Return the settings with the contents of PEM files.

        The parameters are named like the attributes. All but `server_name` are paths of files; None: no file.

        Raises:
            OSError: a file cannot be read.
            InputError: only one of `private_key` and `certificate_chain` is given.
            InputTypeError: a path is neither a str nor a path object.
        """
        files = {
            "root_certificates": root_certificates,
            "private_key": private_key,
            "certificate_chain": certificate_chain,
        }
        roots, key, chain = (
            None if file is None else checks.path(file, name).read_bytes() for name, file in files.items()
        )
        return cls(roots, key, chain, server_name)

    def credentials(self) -> grpc.ChannelCredentials:
        """Return the credentials with which gRPC opens an encrypted channel: certificates and key, no `server_name`."""
        return grpc.ssl_channel_credentials(self.root_certificates, self.private_key, self.certificate_chain)


@dataclass(frozen=True)
class ConnectionSettings:
    """The checked arguments of a client's constructor.

    Attributes:
        target: gRPC's name of the server, such as `localhost:50051` or `dns:///embeddings:50051`. A host alone gets
            port 50051.
        timeout: seconds that a call may take unless the call states another timeout.
        tls: settings of the encryption; None: plain text.
        token: bearer token that is sent with every call; None: no token.
        in_flight: maximum number of requests that one method call of the client keeps in flight.
        own_channel: whether the caller passed a channel of its own. The caller is then responsible for its security.
    """

    target: str
    timeout: float
    tls: TLS | None
    token: str | None = field(repr=False)
    in_flight: int
    own_channel: bool

    def __post_init__(self) -> None:
        """Validate the arguments, and add the default port to a target that is a host alone.

        Raises:
            InputTypeError: an argument has the wrong type.
            InputError: the target is empty, an HTTP URL or has an invalid port, an argument is out of range, the token
                does not have the form of a bearer token, or the client's own channel would send the token in plain text
                to a target that is not local (`is_local`).
        """
        if not isinstance(self.target, str):
            raise InputTypeError(f"target is of type {type(self.target).__name__}; it must be a str, HOST:PORT")
        if not self.target:
            raise InputError("target is empty; give HOST:PORT")
        if is_url(self.target):
            raise InputError(f"target is {self.target!r}; give HOST:PORT alone, and tls=TLS(...) for an encrypted one")
        object.__setattr__(self, "target", _with_port(self.target))
        if not is_port_valid(self.target):
            raise InputError(f"target is {self.target!r}; its port must be 1 to 65535")
        if self.timeout is None:
            raise InputTypeError("timeout is None; it must be a number of seconds, since every call has a deadline")
        self.deadline(self.timeout)
        if not 1 <= checks.count(self.in_flight, "in_flight") <= 1000:
            raise InputError(f"in_flight is {self.in_flight}; it must be 1 to 1000")
        if self.tls is not None and not isinstance(self.tls, TLS):
            raise InputTypeError(f"tls is of type {type(self.tls).__name__}; it must be TLS(...) or None")
        if self.token is None:
            return
        if not isinstance(self.token, str):
            raise InputTypeError(f"token is of type {type(self.token).__name__}; it must be a str")
        if not _TOKEN.fullmatch(self.token):
            raise InputError("token is empty or has characters that a bearer token may not have; check how it was read")
        if self.tls is None and not self.own_channel and not is_local(self.target):
            raise InputError(
                f"the token would travel to {self.target} in plain text; give tls=TLS(...), or connect to this host"
            )

    def deadline(self, timeout: float | None) -> float:
        """Validate a timeout in seconds and return it as a float; None: the timeout of the constructor.

        Raises:
            InputTypeError: the timeout is not a number.
            InputError: the timeout is not above 0, or is longer than a hundred years.
        """
        seconds = checks.number(self.timeout if timeout is None else timeout, "timeout")
        if not 0 < seconds <= _MAX_TIMEOUT:  # NaN is refused too
            raise InputError(
                f"timeout is {seconds:g} seconds; it must be above 0 and at most {_MAX_TIMEOUT}, a hundred years"
            )
        return seconds

    def error(
        self, failure: RpcFailure, call: Call[Any, Any], timeout: float | None, *, late: bool = False
    ) -> EmberpcError:
        """Return the exception for a failed call.

        Args:
            failure: the error of gRPC.
            call: the call.
            timeout: timeout of the call in seconds; None: that of the constructor.
            late: whether the last try of the call ran for more than 5 seconds. Such a call is not retried, and the
                message for UNAVAILABLE says so.
        """
        return from_rpc(failure, self._circumstances(call, timeout, late=late))

    def silence(self, call: Call[Any, Any], timeout: float | None) -> EmberpcError:
        """Return DeadlineExceeded for a stream without a result within `timeout` seconds; None: the constructor's."""
        return no_response(self._circumstances(call, timeout))

    def _circumstances(self, call: Call[Any, Any], timeout: float | None, *, late: bool = False) -> Circumstances:
        seconds = self.deadline(timeout)
        return Circumstances(
            self.target, call.method.path, seconds, items=call.items, first=call.first, vector=call.vector, late=late
        )

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata to send with every call: `authorization` with the bearer token; empty without a token."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    @property
    def options(self) -> ChannelOptions:
        """Options of gRPC, as (name, value), for a channel that the client opens to the target."""
        options: ChannelOptions = [
            ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            *_KEEPALIVE,
            # Milliseconds of the first and the longest pause between attempts to connect, so that a restarted server is
            # found soon. By default the pauses grow to two minutes.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 1000),
            # By default, channels of a process to the same server share connections, and so also the pause after a
            # failed attempt to connect. With this option the channel has connections of its own.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if is_local(self.target):
            # Connections to this host do not use a proxy of the environment, which could read the token.
            options.append(("grpc.enable_http_proxy", 0))
        if self.tls is not None and self.tls.server_name:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return options


def _with_port(target: str) -> str:
    """Return a target with port 50051 if it is a host alone (a name, an IPv4 or an IPv6 address), else unchanged."""
    host = target.removeprefix("[").removesuffix("]")
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            return target  # it has a port or another scheme, such as unix:
        return f"[{host}]:{DEFAULT_PORT}"
    return target if "/" in target else f"{target}:{DEFAULT_PORT}"


def is_port_valid(target: str) -> bool:
    """Return whether each port that a target states in digits is 1 to 65535, and no port is empty.

    A port that is a word is valid here, and so is a target without a port, such as a Unix socket, or with one of
    another kind (vsock). An IPv6 address states a port only after brackets.
    """
    if target.startswith(("unix:", "unix-abstract:", "vsock:")):
        return True
    ports = re.findall(r"\]:([0-9]*)(?=,|$)", target) if target.startswith("ipv6:") else _PORT.findall(target)
    return all(port and len(port) <= 5 and 1 <= int(port) <= 65535 for port in ports)


def is_url(target: str) -> bool:
    """Return whether a target begins with `http:` or `https:`, in any case of letters. gRPC does not accept URLs."""
    return target.lower().startswith(("http:", "https:"))


def is_local(target: str) -> bool:
    """Return whether calls to a target certainly stay on this host: a Unix socket, `localhost` or loopback addresses.

    Host names are not resolved: every other name counts as not local, and so do other addresses of this host.
    """
    scheme, colon, rest = target.partition(":")
    if colon and scheme in ("unix", "unix-abstract"):
        return True
    if colon and scheme == "dns":
        # Only `dns:HOST` and `dns:///HOST` can be local. In `dns://AUTHORITY/HOST` the authority is a DNS server, which
        # can return any address.
        rest = rest.removeprefix("///")
        return not rest.startswith("/") and _is_loopback(unquote(rest))
    if colon and scheme in ("ipv4", "ipv6"):
        return all(_is_loopback(address) for address in unquote(rest).split(","))
    return _is_loopback(target)


def _is_loopback(address: str) -> bool:
    """Return whether the host in HOST, HOST:PORT, [IPV6] or [IPV6]:PORT is `localhost` or a loopback address."""
    host = address[1:].partition("]")[0] if address.startswith("[") else address
    if host == address and host.count(":") == 1:
        host = host.partition(":")[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
