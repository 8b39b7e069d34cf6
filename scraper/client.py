"""Polite HTTP: robots.txt, one request at a time, pauses, retries, limits."""

from __future__ import annotations

import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from threading import Event, Timer
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from protego import Protego
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

ATTEMPTS = 6  # for one address
BACKOFF_S, BACKOFF_CAP_S = 1.0, 60.0
LONGEST_PAUSE_S = 300.0  # a longer Retry-After or Crawl-delay ends the run
DEFAULT_INTERVAL_S = 1.0  # between two requests to a host whose robots.txt names no delay
TIMEOUT_S = (10, 60)  # to connect, between two chunks of the body
WHOLE_S = 300.0  # for a whole answer, which may otherwise arrive letter by letter for ever
PIECE = 1 << 14  # bytes of a body that are unpacked at once, to a thousand times as many at most
PACKED = ("", "identity", "gzip", "deflate")  # encodings of a body: one of them, and not several within each other
ROBOTS_BYTES = 1 << 19  # of robots.txt that are read: RFC 9309 requires 500 KiB, the rest may be ignored
WILDCARDS = 4  # of a rule of robots.txt that are read: the time of a match grows with their power
REDIRECTS = 5
CHALLENGE_RETRIES = 2  # for a challenge page with status 200, which may be an error of the host


class ClientError(Exception):
    """Its message is a line that can be printed: parts of it come from the server."""

    def __init__(self, reason: str) -> None:
        super().__init__("".join(sign if sign.isprintable() else "\ufffd" for sign in reason[:300]))


class FetchError(ClientError):
    """One address failed, for the reason in the message. The run continues."""


class NotThere(FetchError):
    """The server does not have it (404, 410)."""


class StopRun(ClientError):
    """The server refuses further requests, for the reason in the message. The run stops and can resume later."""


class PoliteClient:
    """GET requests to a few named hosts, strictly one after the other.

    Args:
        hosts: "host" or "host:port" names allowed; any other is refused, in redirects, too.
        user_agent: name of the project and a contact.
        sleep, clock: replaced by tests.
    """

    def __init__(
        self,
        hosts: set[str],
        user_agent: str,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.hosts, self.user_agent = hosts, user_agent
        self.sleep, self.clock = sleep, clock
        self.sockets: list[socket.socket] = []
        self.session = requests.Session()
        self.session.headers.update({"User-Agent": user_agent, "Accept-Encoding": "gzip, deflate"})
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, _Adapter(self.sockets))
        self.robots: dict[str, Protego] = {}
        self.last_request: dict[str, float] = {}
        self.requests = 0

    def get(self, url: str, max_bytes: int, expect: str = "", cut: bool = False) -> bytes:
        """The body of an address, after up to ATTEMPTS attempts with exponential backoff and jitter.

        Args:
            max_bytes: a longer body is an error, or with `cut` is cut there.
            expect: prefix of the content type, such as "image/"; any other is a failed attempt.

        Raises:
            NotThere: 404 or 410. FetchError: any other error of this address. StopRun: a challenge page, or a
            Retry-After longer than LONGEST_PAUSE_S.
        """
        challenges = 0
        for attempt in range(ATTEMPTS):
            pause = min(BACKOFF_CAP_S, BACKOFF_S * 2**attempt) * random.uniform(0.5, 1.5)
            try:
                return self._follow(url, max_bytes, expect, cut)
            except _Retry as error:
                reason = str(error)
                challenges += error.is_challenge
                if challenges > CHALLENGE_RETRIES:
                    raise StopRun(reason) from None
                pause = max(pause, error.pause or 0.0)
            except requests.RequestException as error:
                reason = f"connection: {type(error).__name__}"
            except ValueError as error:  # an address or header that requests does not check
                raise FetchError(f"malformed answer: {error}") from None
            if attempt + 1 < ATTEMPTS:
                self.sleep(pause)
        raise FetchError(f"{reason} ({ATTEMPTS} attempts)")

    def _follow(self, url: str, max_bytes: int, expect: str, cut: bool) -> bytes:
        """One attempt, with redirects to allowed hosts."""
        for _ in range(REDIRECTS + 1):
            if not self._robots_of(url).can_fetch(url, self.user_agent):
                raise FetchError(f"robots.txt disallows {url}")
            self._wait_turn(url)
            with (
                self._hung_up_after(WHOLE_S),
                self.session.get(url, stream=True, timeout=TIMEOUT_S, allow_redirects=False) as response,
            ):
                if response.is_redirect:
                    url = urljoin(url, response.headers["Location"])
                    continue
                return self._read(response, urlsplit(url).netloc, max_bytes, expect, cut)
        raise FetchError(f"more than {REDIRECTS} redirects")

    @contextmanager
    def _hung_up_after(self, seconds: float) -> Iterator[None]:
        """Close the connections after so many seconds, and raise: timeouts of a socket begin anew with every byte."""
        hung_up = Event()

        def hang_up() -> None:
            hung_up.set()
            for connection in self.sockets:
                with suppress(OSError):  # closed already
                    connection.shutdown(socket.SHUT_RDWR)

        timer = Timer(seconds, hang_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
        if hung_up.is_set():  # what had arrived may look like an answer
            raise _Retry(f"the answer did not end within {seconds:.0f} s")

    def _read(self, response: requests.Response, host: str, max_bytes: int, expect: str, cut: bool) -> bytes:
        """The whole body of a response, or the exception that its status means."""
        kind = response.headers.get("Content-Type", "")
        packed = response.headers.get("Content-Encoding", "").strip().lower()
        if packed not in PACKED:
            raise FetchError(f"content encoding {packed}, which was not asked for")
        body = bytearray()
        for piece in response.iter_content(PIECE):  # urllib3 raises when the body is shorter than Content-Length
            body += piece
            if len(body) > max_bytes:
                if not cut:
                    raise FetchError(f"longer than {max_bytes:,} bytes")
                del body[max_bytes:]
                break

        status = response.status_code
        challenge = f"{host} answers with a challenge page (status {status})"
        if response.headers.get("cf-mitigated") == "challenge":
            raise StopRun(challenge)
        if status in (404, 410):
            raise NotThere(f"status {status}")
        if is_challenge(body):
            raise _Retry(challenge, is_challenge=True) if status == 200 else StopRun(challenge)
        if status == 429 or status >= 500:
            pause = _retry_after(response)
            if pause is not None and pause > LONGEST_PAUSE_S:
                raise StopRun(f"{host} requests a pause of {pause:.0f} s")
            raise _Retry(f"status {status}", pause)
        if status != 200:
            raise FetchError(f"status {status}")
        if not kind.startswith(expect):
            raise _Retry(f"content type {kind or 'missing'}, expected {expect}")
        return bytes(body)

    # ---------------------------------------------------------------------------------- robots.txt and pauses

    def _robots_of(self, url: str) -> Protego:
        """The host's robots.txt, read once. Without one (404) all is allowed, unreachable nothing (RFC 9309)."""
        host = self._check_host(url)
        if host not in self.robots:
            parts = urlsplit(url)
            self.robots[host] = Protego.parse("")  # for the request of robots.txt itself, and without one
            try:
                rules = self.get(f"{parts.scheme}://{host}/robots.txt", ROBOTS_BYTES, cut=True)
                self.robots[host] = Protego.parse(simple_rules(rules.decode("utf-8-sig", errors="replace")))
                self._check_delay(host)
            except NotThere:
                pass
            except FetchError as error:
                del self.robots[host]
                raise StopRun(f"{host}/robots.txt cannot be read ({error}), so no request is allowed") from None
        return self.robots[host]

    def interval(self, host: str) -> float:
        """Seconds between two requests to this host: the delay of its robots.txt, else DEFAULT_INTERVAL_S."""
        delay = self.robots[host].crawl_delay(self.user_agent) if host in self.robots else None
        return DEFAULT_INTERVAL_S if delay is None or not delay >= 0 else delay  # not a number, too

    def _check_delay(self, host: str) -> None:
        if (delay := self.interval(host)) > LONGEST_PAUSE_S:
            del self.robots[host]
            raise StopRun(f"{host}/robots.txt asks for {delay:.0f} s between two requests")

    def _wait_turn(self, url: str) -> None:
        host = urlsplit(url).netloc
        if host in self.last_request:
            self.sleep(max(0.0, self.last_request[host] + self.interval(host) - self.clock()))
        self.last_request[host] = self.clock()
        self.requests += 1

    def _check_host(self, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.netloc not in self.hosts:
            raise FetchError(f"unexpected host {parts.netloc or url}")
        return parts.netloc


class _Retry(Exception):
    """An attempt failed; another one may succeed, after `pause` seconds if the server named them."""

    def __init__(self, reason: str, pause: float | None = None, is_challenge: bool = False) -> None:
        super().__init__(reason)
        self.pause, self.is_challenge = pause, is_challenge


def is_challenge(body: bytes | bytearray) -> bool:
    """Whether the page is a challenge ("prove that you are human")."""
    head = bytes(body[:8192])
    # Not "challenge-platform": ordinary pages of the same network have that script, too.
    return bool(re.search(rb"<title>\s*Just a moment|cf[-_]chl", head, re.IGNORECASE))


def simple_rules(text: str) -> str:
    """robots.txt with at most WILDCARDS in a rule: "Disallow" is cut, and so forbids more, and "Allow" left out."""

    def simple(line: str) -> str:
        parts = line.split("*")
        if len(parts) <= WILDCARDS + 1 or ":" not in parts[0]:
            return line
        return "" if line.strip().lower().startswith("allow") else "*".join(parts[: WILDCARDS + 1])

    return "\n".join(map(simple, text.splitlines()))


def _retry_after(response: requests.Response) -> float | None:
    """Seconds of the header Retry-After: a number, or a date, which is compared with the clock of the server."""
    value = response.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value[:18])
    try:
        now = parsedate_to_datetime(response.headers["Date"]).timestamp() if "Date" in response.headers else time.time()
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None


class _Adapter(HTTPAdapter):
    """Keeps the sockets of its connections in a list, so that they can be closed from another thread."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        self.sockets = sockets
        super().__init__()

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        sockets = self.sockets

        def kept(base: Any) -> Any:
            class Connection(base):
                def connect(self) -> None:
                    super().connect()
                    sockets[:] = [sock for sock in sockets if sock.fileno() >= 0] + [self.sock]

            return Connection

        class Pool(HTTPConnectionPool):
            ConnectionCls = kept(HTTPConnection)

        class SecurePool(HTTPSConnectionPool):
            ConnectionCls = kept(HTTPSConnection)

        self.poolmanager.pool_classes_by_scheme = {"http": Pool, "https": SecurePool}
