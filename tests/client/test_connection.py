"""Connections of the clients to a server: targets, tokens, TLS."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from emberpc.client import TLS, AsyncClient, Client, Health, InputError, InputTypeError, Unavailable
from emberpc.client._core.connection import ConnectionSettings, is_local, is_port_valid
from emberpc.client.exceptions import Circumstances, _client_message
from fake_server import FakeServer


@pytest.mark.parametrize(
    "target",
    [
        "localhost:50051",
        "localhost",
        "127.0.0.1:1",
        "127.8.9.1",
        "[::1]:50051",
        "::1",
        "dns:localhost:50051",
        "dns:///localhost:50051",
        "dns:///[::1]:50051",
        "dns:///%5B::1%5D:50051",
        "ipv4:127.0.0.1:1,127.0.0.2:2",
        "ipv6:[::1]:1",
        "ipv6:%5B::1%5D:1",
        "unix:/run/emberpc.sock",
        "unix:///run/emberpc.sock",
    ],
)
def test_is_local_is_true_for_targets_on_this_host(target: str) -> None:
    assert is_local(target)


@pytest.mark.parametrize(
    "target",
    [
        "embeddings:50051",
        "localhost.example.com:50051",
        "127.0.0.1.example.com",
        "10.0.0.1:50051",
        "0.0.0.0:50051",
        "[::2]:50051",
        "dns:embeddings",
        "dns://10.0.0.1/localhost:50051",
        "dns:////localhost",
        "ipv4:127.0.0.1:1,10.0.0.1:1",
        "ipv6:[2001:db8::1]:1",
        "xds:///localhost",
        "localhost@example.com",
        "",
    ],
)
def test_is_local_is_false_for_other_targets(target: str) -> None:
    assert not is_local(target)


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("localhost", "localhost:50051"),
        ("10.0.0.7", "10.0.0.7:50051"),
        ("::1", "[::1]:50051"),
        ("[::1]", "[::1]:50051"),
        ("[::1]:7", "[::1]:7"),
        ("host:7", "host:7"),
        ("unix:/run/emberpc", "unix:/run/emberpc"),
        ("dns:///host", "dns:///host"),
    ],
)
def test_a_target_without_a_port_gets_the_default_port(target: str, wanted: str) -> None:
    assert ConnectionSettings(target, 1, None, None, 1, own_channel=False).target == wanted


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"target": ""}, InputError, "target is empty"),
        ({"target": 50051}, InputTypeError, "target is of type int"),
        ({"target": "http://host:1"}, InputError, "give HOST:PORT alone"),
        ({"timeout": 0}, InputError, "timeout is 0"),
        ({"timeout": None}, InputTypeError, "timeout is None; it must be a number of seconds"),
        ({"timeout": "30"}, InputTypeError, "timeout is of type str"),
        ({"timeout": float("nan")}, InputError, "timeout is nan"),
        ({"timeout": float("inf")}, InputError, "timeout is inf"),
        ({"timeout": 9e9}, InputError, "at most 3153600000, a hundred years"),
        ({"timeout": 10**400}, InputError, "timeout is beyond the range of a float"),
        ({"in_flight": None}, InputTypeError, "in_flight is of type NoneType"),
        ({"in_flight": 10**5000}, InputError, "in_flight is beyond"),
        ({"tls": "roots.pem"}, InputTypeError, "tls is of type str"),
        ({"token": b"t"}, InputTypeError, "token is of type bytes"),
        ({"in_flight": 0}, InputError, "in_flight is 0"),
        ({"target": "host:1", "token": "t"}, InputError, "the token would travel to host:1 in plain text"),
        ({"token": ""}, InputError, "token is empty or has characters"),
        ({"token": "a b\n"}, InputError, "token is empty or has characters"),
    ],
)
def test_invalid_settings_of_a_client_are_refused(
    client: Any, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        client(**settings)


@pytest.mark.parametrize(
    "target",
    ["localhost:0", "localhost:99999", "localhost:", "[::1]:65536", "dns:///a:70000", "ipv4:127.0.0.1:1,127.0.0.1:0"],
)
def test_a_port_out_of_range_is_refused(target: str) -> None:
    with pytest.raises(InputError, match="its port must be 1 to 65535"):
        Client(target)


@pytest.mark.parametrize(
    "target", ["unix:/run/a:0", "::1", "ipv6:[::1]:1", "dns:///a", "xds:///a", "a:http", "vsock:2:70000", "ipv6:1::0:0"]
)
def test_a_target_without_a_port_in_digits_is_valid(target: str) -> None:
    assert is_port_valid(target)


@pytest.mark.parametrize(
    "details",
    [
        "errors resolving x:1: [field:hostname lookup error:address lookup failed for x:1: Domain name not found]",
        "DNS resolution failed for x:1: C-ares status is not ARES_SUCCESS",
    ],
)
def test_an_unknown_host_name_is_named(details: str) -> None:
    message = _client_message(grpc.StatusCode.UNAVAILABLE, details, Circumstances("x:1", "/emberpc.v1.Any/Embed", 1.0))
    assert message.startswith("the host name in x:1 has no address; check its spelling")


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 9e9, "30", 10**400])
def test_an_invalid_timeout_of_a_call_is_refused_before_any_request(
    fake: FakeServer, shell_type: Any, timeout: Any
) -> None:
    shell = shell_type(fake.target)
    try:
        for name, arguments in (("embed", (["a"],)), ("embed_stream", (["a"],)), ("verify_collection", ("c",))):
            with pytest.raises((InputError, InputTypeError), match="timeout is"):
                shell(name, *arguments, timeout=timeout)
    finally:
        shell.close()
    assert not fake.asked


def test_the_longest_allowed_timeout_works(fake: FakeServer, shell_type: Any) -> None:
    shell = shell_type(fake.target, timeout=100 * 365 * 24 * 3600)
    try:
        assert shell("embed", ["a"]).shape == (1, 8)
        assert len(shell("embed_stream", ["a"])) == 1
    finally:
        shell.close()
    assert fake.asked["Embed"][0].seconds_left > 365 * 24 * 3600  # gRPC sends at most 27,000 hours


def test_a_path_in_place_of_a_certificate_is_refused() -> None:
    with pytest.raises(InputTypeError, match=r"root_certificates is of type str; .*TLS\.from_files"):
        TLS("roots.pem")  # type: ignore[arg-type]  # that is the point


def test_no_message_or_repr_contains_the_token() -> None:
    token = "s3cret token"
    with pytest.raises(InputError) as raised:
        Client(token=token)
    assert token not in str(raised.value)
    with Client("localhost:1", token="s3cret") as client:
        assert "s3cret" not in repr(client)
        assert "s3cret" not in repr(client._runner._connection)
    assert "KEY" not in repr(TLS(private_key=b"KEY", certificate_chain=b"c"))


def test_a_private_key_without_a_certificate_is_refused() -> None:
    with pytest.raises(InputError, match="go together"):
        TLS(private_key=b"key")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a self-signed certificate for `embeddings.test`."""
    if not shutil.which("openssl"):
        pytest.skip("making certificates needs the program openssl")
    folder = tmp_path_factory.mktemp("certificates")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=embeddings.test", "-addext", "subjectAltName=DNS:embeddings.test"),
            *("-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")),
        ],
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture
def secure(certificates: Path) -> Iterator[FakeServer]:
    """A server that takes only clients with the certificate."""
    key, chain = (certificates / "key.pem").read_bytes(), (certificates / "cert.pem").read_bytes()
    credentials = grpc.ssl_server_credentials([(key, chain)], chain, require_client_auth=True)
    with FakeServer(credentials) as server:
        yield server


def test_client_and_server_authenticate_with_certificates(
    secure: FakeServer, certificates: Path, shell_type: Any
) -> None:
    tls = TLS.from_files(
        certificates / "cert.pem",
        private_key=certificates / "key.pem",
        certificate_chain=certificates / "cert.pem",
        server_name="embeddings.test",
    )
    shell = shell_type(secure.target, tls=tls, token="secret")
    try:
        assert shell("health") is Health.SERVING
        shell("models")
    finally:
        shell.close()
    assert secure.asked["ListModels"][0].metadata["authorization"] == "Bearer secret"


def test_a_server_of_another_name_is_not_trusted(secure: FakeServer, certificates: Path) -> None:
    tls = TLS.from_files(
        certificates / "cert.pem", private_key=certificates / "key.pem", certificate_chain=certificates / "cert.pem"
    )
    with Client(secure.target, tls=tls) as client, pytest.raises(Unavailable, match="both sides use TLS"):
        client.health()


def test_a_missing_certificate_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TLS.from_files(tmp_path / "none.pem")


def test_a_client_uses_no_proxy_for_its_own_host(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    with Client(fake.target) as client:
        assert client.health() is Health.SERVING


def test_calls_are_spread_over_all_addresses_of_a_target(fake: FakeServer, shell_type: Any) -> None:
    with FakeServer() as second:
        shell = shell_type(f"ipv4:{fake.target},{second.target}")
        try:
            for _ in range(20):
                shell("models")
        finally:
            shell.close()
        assert len(fake.asked["ListModels"]) > 5
        assert len(second.asked["ListModels"]) > 5


def test_close_returns_though_the_close_of_the_grpc_channel_blocks(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(fake.target)
    let_go, waiting = threading.Event(), threading.Event()

    def close() -> None:
        waiting.set()
        let_go.wait(300)

    monkeypatch.setattr(client._runner._transport._channel, "close", close)
    client.close()
    assert waiting.is_set()
    assert not let_go.is_set()
    let_go.set()
