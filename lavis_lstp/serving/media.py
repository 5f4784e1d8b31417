"""The media of a request: `data:` URLs, uploaded files and, where hosts are allowed, addresses.

In: what a content part names. Out: bytes, or the path of an upload. Addresses are fetched only from hosts that
`--allow-hosts` names: each step of a redirect is checked anew, a name that leads to a private address is refused, and
the connection goes to the very address that was checked, so that no second look-up can lead elsewhere.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote_to_bytes

import httpx

from lavis_lstp.errors import ConfigError, VideoError, shortened
from lavis_lstp.serving.files import ID, FileStore, TooLarge
from lavis_lstp.serving.limits import Limits

DATA = re.compile(r"data:[\w.+-]*/?[\w.+-]*(;[\w.+-]+=[^;,]*)*(?P<base64>;base64)?,", re.ASCII)
MOST_HEADER = 200  # characters of a data: URL before its comma
MOST_REDIRECTS = 3


def data_url(url: str, name: str) -> bytes:
    """The content of a `data:` URL; what it says of its type is not believed.

    Raises:
        VideoError: it is not of the form.
    """
    match = DATA.match(url[:MOST_HEADER])
    if match is None:
        raise VideoError(f"{name}: expected a URL of the form data:video/mp4;base64,...")
    text = url[match.end() :]
    if not match["base64"]:
        return unquote_to_bytes(text)
    return base64_bytes(text, name)


def base64_bytes(text: str, name: str) -> bytes:
    """Decode a text. Raises VideoError for one that is not base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise VideoError(f"{name}: its data are not base64") from None


class MediaReader:
    """Finds the content of the media that a request names.

    Args:
        files: uploads.
        hosts: whose addresses may be fetched, such as `media.example.org`; a port is part of the name where it is not
            the scheme's own.
        limits: of bytes and seconds.
    """

    def __init__(self, files: FileStore, hosts: Iterable[str], limits: Limits):
        self.files, self.limits = files, limits
        self.hosts = frozenset(host.lower() for host in hosts)

    async def read(self, owner: str, named: str, name: str) -> bytes | Path:
        """The medium behind a URL or a file id.

        Args:
            named: a `data:` URL, a file id, or an address.
            name: what errors call it.

        Raises:
            VideoError, ConfigError: it is of no known form, or not allowed.
            NoSuchFile: no upload of this owner's.
        """
        if named[:5].lower() == "data:":
            return data_url(named, name)
        if ID.match(named):
            return await asyncio.to_thread(self.files.path, owner, named)
        if named[:8].lower().startswith(("http://", "https://")):
            return await self._fetch(named, name)
        scheme = shortened(named.partition(":")[0], 20)
        raise ConfigError(f"{name}: expected a data: URL, an uploaded file's id or an http(s) URL, got '{scheme}:...'")

    async def read_all(self, owner: str, named: Sequence[str], name: str) -> bytes | Path | list[bytes] | None:
        """One medium, or several pictures, which stand for a video; None where there is none."""
        if len(named) < 2:
            return await self.read(owner, named[0], name) if named else None
        found = [await self.read(owner, one, f"{name}, picture {i}") for i, one in enumerate(named)]
        return [one if isinstance(one, bytes) else await asyncio.to_thread(one.read_bytes) for one in found]

    async def _fetch(self, url: str, name: str) -> bytes:
        if not self.hosts:
            raise ConfigError(f"{name}: this server fetches no URLs; send a data: URL, or upload it to /v1/files")
        try:
            return await asyncio.wait_for(self._followed(url, name), self.limits.fetch_seconds)
        except asyncio.TimeoutError:
            raise VideoError(f"{name}: took more than {self.limits.fetch_seconds:g} s to fetch") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
            raise VideoError(f"{name}: cannot be fetched ({type(error).__name__})") from None

    async def _followed(self, url: str, name: str) -> bytes:
        for _ in range(MOST_REDIRECTS + 1):
            answer = await self._get(httpx.URL(url), name)
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise VideoError(f"{name}: is redirected more than {MOST_REDIRECTS} times")

    async def _get(self, url: httpx.URL, name: str) -> bytes | str:
        """The content at an address, or the address that it leads to."""
        if url.scheme not in ("http", "https"):
            raise ConfigError(f"{name}: leads to a URL that is not http(s)")
        host = url.host.lower() if url.port is None else f"{url.host.lower()}:{url.port}"
        if host not in self.hosts:
            raise ConfigError(f"{name}: host '{shortened(host, 100)}' is not one that this server fetches from")
        address = await public_address(url.host, url.port or (443 if url.scheme == "https" else 80), name)
        pinned = url.copy_with(host=address)
        async with httpx.AsyncClient(follow_redirects=False, trust_env=False, timeout=10) as client:
            request = client.build_request("GET", pinned, headers={"Host": url.netloc.decode("ascii")})
            request.extensions["sni_hostname"] = url.host
            response = await client.send(request, stream=True)
            try:
                if response.is_redirect:
                    return str(url.join(response.headers["location"]))
                if response.status_code != 200:
                    raise VideoError(f"{name}: its host answers with status {response.status_code}")
                return await self._content(response, name)
            finally:
                await response.aclose()

    async def _content(self, response: httpx.Response, name: str) -> bytes:
        content = io.BytesIO()
        async for chunk in response.aiter_bytes():
            content.write(chunk)
            if content.tell() > self.limits.inline_bytes:
                raise TooLarge(f"{name}: has more than the {self.limits.inline_bytes} bytes that are admitted")
        return content.getvalue()


async def public_address(host: str, port: int, name: str) -> str:
    """The first address of a host.

    Raises:
        ConfigError: one of its addresses is private, of this machine, or otherwise not of the public internet.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [entry[4][0] for entry in found]
    for address in addresses:
        known = ipaddress.ip_address(address.partition("%")[0])
        known = getattr(known, "ipv4_mapped", None) or known
        if not known.is_global or known.is_multicast:
            raise ConfigError(f"{name}: its host has an address that is not public")
    return addresses[0]
