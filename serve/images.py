"""Images of requests: checked before they are decoded, canonicalised as in training, never fetched by the engine."""

import asyncio
import base64
import io
import ipaddress
import socket
import warnings
from contextlib import suppress
from urllib.parse import urlsplit

from PIL import Image

from cluster.errors import DataError
from rl.images import CanonicalImage, canonicalise
from serve.errors import ApiError
from serve.settings import ImageSettings

FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP", "image/gif": "GIF", "image/bmp": "BMP"}
PORTS = {"http": 80, "https": 443}
IPV6_UNICAST = ipaddress.ip_network("2000::/3")
_decoding = asyncio.Semaphore(4)
"""A large image takes twenty times its pixels in memory while it is decoded."""


async def load_image(url: str, settings: ImageSettings, param: str) -> CanonicalImage:
    """The image of a data URL, or of a web address on a host that is allowed. `param` names it in errors.

    Raises:
        ApiError: 400, says what is wrong with it.
    """
    if url.startswith("data:"):
        content, kind = _from_data_url(url, settings, param)
    elif url.startswith(tuple(f"{scheme}://" for scheme in PORTS)):
        content, kind = await _fetch(url, settings, param)
    else:
        raise _refused("give the image as a data URL, data:image/png;base64,…", param)
    async with _decoding:
        return await asyncio.to_thread(_decode, content, kind, settings, param)


def _refused(message: str, param: str) -> ApiError:
    return ApiError(400, message, "invalid_image", param)


def _from_data_url(url: str, settings: ImageSettings, param: str) -> tuple[bytes, str]:
    head, comma, text = url.removeprefix("data:").partition(",")
    kind, _, encoding = head.partition(";")
    if not comma or encoding != "base64":
        raise _refused("the data URL must be of the form data:image/png;base64,…", param)
    if len(text) * 3 // 4 > settings.max_bytes:
        raise _refused(f"the image is over {settings.max_bytes} bytes; make it smaller", param)
    try:
        return base64.b64decode(text, validate=True), kind
    except ValueError:
        raise _refused("the data URL is not valid base64", param) from None


async def _fetch(url: str, settings: ImageSettings, param: str) -> tuple[bytes, str]:
    """Fetch from an allowed host, without following redirects. The address is looked up once, checked, and connected
    to, so that no second look-up can lead elsewhere."""
    import httpx

    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
    except ValueError:
        raise _refused("this is not a valid address", param) from None
    if host not in settings.hosts:
        raise _refused("images are not fetched from this host; give the image as a data URL", param)
    try:
        async with asyncio.timeout(settings.timeout_s):
            address = await _address(host, port)
            pinned = httpx.URL(url).copy_with(host=address)
            headers = {"Host": parts.netloc, "Accept-Encoding": "identity"}
            extensions = {"sni_hostname": host}
            async with (
                httpx.AsyncClient(follow_redirects=False, trust_env=False) as client,
                client.stream("GET", pinned, headers=headers, extensions=extensions) as answer,
            ):
                if answer.status_code != 200:
                    raise _refused(f"the image's host answered {answer.status_code}; redirects are not followed", param)
                content = bytearray()
                async for piece in answer.aiter_raw():
                    content += piece
                    if len(content) > settings.max_bytes:
                        raise _refused(f"the image is over {settings.max_bytes} bytes; make it smaller", param)
                return bytes(content), answer.headers.get("content-type", "").partition(";")[0]
    except TimeoutError:
        raise _refused(f"the image did not come within {settings.timeout_s:g} s", param) from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError):
        raise _refused("the image cannot be fetched", param) from None


async def _address(host: str, port: int) -> str:
    """An address of the host. A name must not lead into the own network; an address there can be allowed as such.

    Raises:
        OSError: there is none, or it is not public.
    """
    with suppress(ValueError):
        return str(ipaddress.ip_address(host))
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(one[4][0]) for one in found]
    if not all(map(_is_public, addresses)):
        raise OSError("not a public address")
    return str(addresses[0])


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether it is on the internet, and no way of writing an address of another network."""
    if not address.is_global or address.is_multicast:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return True
    return address in IPV6_UNICAST and address.sixtofour is None and address.teredo is None


def _decode(content: bytes, kind: str, settings: ImageSettings, param: str) -> CanonicalImage:
    """The image, its size checked before any pixel is decoded. PIL's readers raise almost anything on damaged files."""
    if kind not in FORMATS:
        raise _refused(f"the image's type is {kind or 'not given'}, but must be one of {', '.join(FORMATS)}", param)
    limits = f"{settings.max_side} px a side and {settings.max_pixels:,} pixels in all"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=[FORMATS[kind]])
    except Image.DecompressionBombError:  # PIL's own limit, which is higher than most of ours
        raise _refused(f"the image is too large; at most {limits} are taken", param) from None
    except Exception:
        raise _refused(f"this is no image of type {kind}", param) from None
    width, height = image.size
    if max(width, height) > settings.max_side or width * height > settings.max_pixels:
        raise _refused(f"the image is {width}x{height}, but at most {limits} are taken", param)
    try:
        if getattr(image, "n_frames", 1) > 1:
            raise _refused("the image is animated; give one frame of it", param)
        image.load()
        return canonicalise(image, "the image")
    except ApiError:
        raise
    except DataError as error:
        raise _refused(str(error), param) from None
    except Exception:
        raise _refused("the image is damaged or cut off", param) from None
