"""Polite HTTP: robots.txt, one request at a time, pauses, retries, limits."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from urllib.parse import urljoin, urlsplit

import requests
from protego import Protego
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

ATTEMPTS = 6  # for one address
BACKOFF_S, BACKOFF_CAP_S = 1.0, 60.0
LONGEST_PAUSE_S = 300.0  # a longer Retry-After ends the run
DEFAULT_INTERVAL_S = 1.0  # between two requests to a host whose robots.txt names no delay
TIMEOUT_S = (10, 60)  # to connect, between two chunks of the body
REDIRECTS = 5
CHALLENGE_RETRIES = 2  # for a challenge page with status 200, which may be an error of the host


class FetchError(Exception):
    """One address failed, for the reason in the message. The run continues."""


class NotThere(FetchError):
    """The server does not have it (404, 410)."""


class StopRun(Exception):
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
        self.session = requests.Session()
        self.session.headers["User-Agent"] = user_agent
        self.robots: dict[str, Protego] = {}
        self.last_request: dict[str, float] = {}
        self.requests = 0

    def get(self, url: str, max_bytes: int, expect: str = "") -> bytes:
        """The body of an address, after up to ATTEMPTS attempts with exponential backoff and jitter.

        Args:
            max_bytes: a longer body is an error.
            expect: prefix of the content type, such as "image/"; any other is a failed attempt.

        Raises:
            NotThere: 404 or 410. FetchError: any other error of this address. StopRun: a challenge page, or a
            Retry-After longer than LONGEST_PAUSE_S.
        """
        challenges = 0
        for attempt in range(ATTEMPTS):
            pause = min(BACKOFF_CAP_S, BACKOFF_S * 2**attempt) * random.uniform(0.5, 1.5)
            try:
                return self._follow(url, max_bytes, expect)
            except _Retry as error:
                reason = str(error)
                challenges += error.is_challenge
                if challenges > CHALLENGE_RETRIES:
                    raise StopRun(reason) from None
                pause = pause if error.pause is None else error.pause
            except requests.RequestException as error:
                reason = f"connection: {type(error).__name__}"
            except ValueError as error:  # an address or header that requests does not check
                raise FetchError(f"malformed answer: {error}") from None
            if attempt + 1 < ATTEMPTS:
                self.sleep(pause)
        raise FetchError(f"{reason} ({ATTEMPTS} attempts)")

    def _follow(self, url: str, max_bytes: int, expect: str) -> bytes:
        """One attempt, with redirects to allowed hosts."""
        for _ in range(REDIRECTS + 1):
            if not self._robots_of(url).can_fetch(url, self.user_agent):
                raise FetchError(f"robots.txt disallows {url}")
            self._wait_turn(url)
            with self.session.get(url, stream=True, timeout=TIMEOUT_S, allow_redirects=False) as response:
                if response.is_redirect:
                    url = urljoin(url, response.headers["Location"])
                    continue
                return self._read(response, urlsplit(url).netloc, max_bytes, expect)
        raise FetchError(f"more than {REDIRECTS} redirects")

    def _read(self, response: requests.Response, host: str, max_bytes: int, expect: str) -> bytes:
        """The whole body of a response, or the exception that its status means."""
        kind = response.headers.get("Content-Type", "")
        body = bytearray()
        for piece in response.iter_content(1 << 16):  # urllib3 raises when the body is shorter than Content-Length
            body += piece
            if len(body) > max_bytes:
                raise FetchError(f"longer than {max_bytes:,} bytes")

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
                rules = self.get(f"{parts.scheme}://{host}/robots.txt", 1 << 19)
                self.robots[host] = Protego.parse(rules.decode("utf-8-sig", errors="replace"))
            except NotThere:
                pass
            except FetchError as error:
                del self.robots[host]
                raise StopRun(f"{host}/robots.txt cannot be read ({error}), so no request is allowed") from None
        return self.robots[host]

    def interval(self, host: str) -> float:
        """Seconds between two requests to this host: the delay of its robots.txt, else DEFAULT_INTERVAL_S."""
        delay = self.robots[host].crawl_delay(self.user_agent) if host in self.robots else None
        return DEFAULT_INTERVAL_S if delay is None else delay

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


def _retry_after(response: requests.Response) -> float | None:
    """Seconds of the header Retry-After, a number or a date."""
    value = response.headers.get("Retry-After")
    try:
        return None if value is None else Retry().parse_retry_after(value)
    except InvalidHeader:
        return None
