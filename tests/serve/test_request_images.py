"""Images of requests: what is taken becomes what training sees, everything else is refused with a reason."""

import asyncio
import base64
import http.server
import io
import struct
import threading
import zlib
from collections.abc import Iterator

import pytest
from PIL import Image

from rl.images import canonicalise
from serve.errors import ApiError
from serve.images import load_image
from serve.settings import ImageSettings

SETTINGS = ImageSettings()


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def load(address: str, settings: ImageSettings = SETTINGS):  # type: ignore[no-untyped-def]
    return asyncio.run(load_image(address, settings, "p"))


def refusal(address: str, settings: ImageSettings = SETTINGS) -> str:
    with pytest.raises(ApiError) as caught:
        load(address, settings)
    assert caught.value.status == 400
    assert caught.value.param == "p"
    return caught.value.message


def bomb(width: int, height: int) -> bytes:
    """A small PNG that claims to be large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("format", "kind"), [("PNG", "png"), ("JPEG", "jpeg"), ("WEBP", "webp"), ("BMP", "bmp")])
def test_an_image_becomes_what_training_sees(format: str, kind: str) -> None:
    content = encoded(Image.new("RGB", (20, 10), "red"), format)
    assert load(url(content, f"image/{kind}")) == canonicalise(content, "training")


def test_transparent_pixels_turn_white_and_a_still_gif_is_taken() -> None:
    assert load(url(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0))))).open().getpixel((0, 0)) == (255, 255, 255)
    assert load(url(encoded(Image.new("L", (8, 8)), "GIF"), "image/gif")).width == 8


def test_what_is_no_acceptable_image_is_refused_with_the_reason() -> None:
    still, moved = Image.new("L", (8, 8)), Image.new("L", (8, 8), 255)
    animated = encoded(still, "GIF", save_all=True, append_images=[moved])
    whole = encoded(Image.effect_noise((64, 64), 50))
    assert refusal(url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml")).startswith("the image's type is")
    assert refusal(url(b"<svg/>")) == "this is no image of type image/png"
    assert refusal(url(encoded(still, "JPEG"))) == "this is no image of type image/png"
    assert refusal(url(encoded(still, "TIFF"), "image/tiff")).startswith("the image's type is image/tiff")
    assert refusal(url(animated, "image/gif")) == "the image is animated; give one frame of it"
    assert refusal(url(whole[: len(whole) // 2])) == "the image is damaged or cut off"
    assert "is too large; at most 10000 px a side" in refusal(url(bomb(20000, 20000)))
    assert "10001x8, but at most 10000 px a side" in refusal(url(bomb(10001, 8)))
    assert "9000x9000" in refusal(url(bomb(9000, 9000)))
    assert "is 8x2" in refusal(url(encoded(Image.new("L", (8, 2)))))
    assert "over 1024 bytes" in refusal(url(whole), ImageSettings(max_bytes=1024))


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("data:image/png,abc", "must be of the form"),
        ("data:image/png;base64", "must be of the form"),
        ("data:image/png;base64,!!!!", "not valid base64"),
        ("data:;base64,AAAA", "type is not given"),
        ("file:///etc/passwd", "as a data URL"),
        ("ftp://example.com/a.png", "as a data URL"),
        ("https://example.com/a.png", "not fetched from this host"),
        ("http://127.0.0.1/a.png", "not fetched from this host"),
        ("http://[", "not a valid address"),
        ("", "as a data URL"),
    ],
)
def test_other_addresses_are_refused(address: str, says: str) -> None:
    assert says in refusal(address)


@pytest.fixture
def host() -> Iterator[str]:
    """A web server on loopback: /good.png, /moved (a redirect to it), /slow, /large and 404 for the rest."""
    content = encoded(Image.new("RGB", (8, 8), "blue"))
    done = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/slow":
                done.wait(30)
            found = self.path in ("/good.png", "/large")
            self.send_response(302 if self.path == "/moved" else 200 if found else 404)
            self.send_header("Location", "/good.png")
            self.send_header("Content-Type", "image/png")
            self.end_headers()
            self.wfile.write(b"x" * 100_000 if self.path == "/large" else content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        done.set()
        server.shutdown()


def test_an_allowed_host_is_fetched_from_within_limits_and_without_redirects(host: str) -> None:
    allowed = ImageSettings(hosts=("127.0.0.1",), timeout_s=1, max_bytes=50_000)
    assert load(f"{host}/good.png", allowed).width == 8
    assert "answered 302; redirects are not followed" in refusal(f"{host}/moved", allowed)
    assert "answered 404" in refusal(f"{host}/none", allowed)
    assert "over 50000 bytes" in refusal(f"{host}/large", allowed)
    assert "did not come within 1 s" in refusal(f"{host}/slow", allowed)
    assert "cannot be fetched" in refusal("http://127.0.0.1:1/a.png", allowed)


def test_a_name_that_leads_into_the_own_network_is_not_followed(host: str) -> None:
    inside = ImageSettings(hosts=("localhost",), timeout_s=5)
    assert refusal(host.replace("127.0.0.1", "localhost") + "/good.png", inside) == "the image cannot be fetched"
