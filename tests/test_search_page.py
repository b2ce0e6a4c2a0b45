"""The search page: what it answers, to whom, and how it looks from inside a browser."""

import contextlib
import http.client
import io
import json
import re
import shutil
import socket
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import browser
import numpy as np
import pytest
from PIL import Image

import mlip_jax
from mlip_jax import main as door
from mlip_jax.core.errors import UserError
from mlip_jax.search import server
from mlip_jax.search.answers import Answer, Answers
from mlip_jax.search.collection import open_collection
from mlip_jax.search.index import Index
from mlip_jax.search.server import MOST_BYTES, make_server

COUNT = 12
HOSTILE = "<img src=x onerror=document.title='hacked'>.png"


@pytest.fixture(scope="module")
def photos(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "photos & more"
    folder.mkdir()
    for number in range(COUNT - 1):
        shutil.copy(pairs.parent / f"{number}.png", folder / f"{number}.png")
    shutil.copy(pairs.parent / "20.png", folder / HOSTILE)
    return folder


@pytest.fixture(scope="module")
def port(photos, trained, tmp_path_factory):
    """Where a server answers."""
    folder = tmp_path_factory.mktemp("page") / "index"
    command = [f"--workdir={trained}", f"--images={photos}", f"--index={folder}"]
    assert door.main(["mlip", "search", *command]) == 0
    answers = Answers(Index(folder), open_collection(str(photos)), mlip_jax.load(trained), 10)
    with make_server(answers, 0) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield listening.server_port
        listening.shutdown()
        thread.join()


@pytest.fixture
def ask(port):
    """Sends a request; gives the status, the headers and the content."""

    def send(path, method="GET", body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(connection):
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, names)
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    return send


def results_of(answer):
    status, _, content = answer
    assert status == 200, content
    return json.loads(content)["results"]


def picture(answer, kind):
    status, headers, content = answer
    assert status == 200 and headers["Content-Type"] == f"image/{kind.lower()}", content
    image = Image.open(io.BytesIO(content))
    assert image.format == kind
    return image


def test_words_find_what_the_command_line_finds(ask, photos, trained):
    results = results_of(ask("/search?text=picture%204&top=5"))
    model = mlip_jax.load(trained)
    paths = sorted(photos.glob("*.png"))
    scores = model.encode_image(paths) @ model.encode_text(["picture 4"])[0]
    best = np.argsort(-scores)[:5]
    assert [result["path"] for result in results] == [str(paths[row]) for row in best]
    np.testing.assert_allclose([result["score"] for result in results], scores[best], atol=1e-6)


def test_an_image_finds_itself(ask, photos):
    content = (photos / "7.png").read_bytes()
    results = results_of(ask("/search?top=3", "POST", content))
    assert results[0]["path"] == str(photos / "7.png") and len(results) == 3
    again = results_of(ask(f"/search?like={results[0]['row']}&top=3"))
    assert [result["row"] for result in again] == [result["row"] for result in results]


def test_pictures_of_a_row(ask):
    assert max(picture(ask("/thumbnail/3"), "JPEG").size) <= 224
    assert picture(ask("/square/3"), "JPEG").size == (512, 512)
    maps = [ask(f"/saliency/{row}?text=picture%20{row}") for row in range(4)]
    overlays = [picture(answer, "PNG") for answer in maps if answer[0] != 204]
    assert overlays and all(image.mode == "RGBA" and image.size == (512, 512) for image in overlays)
    assert all(image.getchannel("A").getextrema()[1] > 128 for image in overlays)


def test_the_page_says_what_is_searched(ask, photos, trained):
    about = json.loads(ask("/about")[2])
    assert about["count"] == COUNT and about["images"] == str(photos)
    assert about["name"] == "photos & more" and about["model"] == f"{trained} (step 8)"
    status, headers, content = ask("/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", headers["Content-Security-Policy"])[1]
    assert content.count(f'nonce="{nonce}"'.encode()) == 2 and b"{{" not in content
    assert not re.search(rb"(src|href)=\"(?!data:,)", content)  # no other file is needed
    assert nonce not in str(ask("/")[1])


@pytest.mark.parametrize(
    ("path", "status", "sentence"),
    [
        ("/search", 400, "no words"),
        ("/search?text=%20", 400, "no words"),
        ("/search?text=" + 10_001 * "x", 400, "more than 10,000 letters"),
        ("/search?text=x&top=0", 400, "top: expected a whole number from 1 to 500"),
        ("/search?text=x&top=1000000", 400, "top: expected"),
        ("/search?like=12", 400, "like: expected a whole number from 0 to 11"),
        ("/search?like=-1", 400, "like: expected"),
        ("/saliency/1", 400, "no words"),
        ("/thumbnail/12", 404, "no such image"),
        ("/thumbnail/-1", 404, "no such page"),
        ("/thumbnail/" + 30 * "9", 404, "no such page"),
        ("/thumbnail/1/../../../../etc/passwd", 404, "no such page"),
        ("/thumbnail/..%2f..%2fetc%2fpasswd", 404, "no such page"),
        ("/../../../etc/passwd", 404, "no such page"),
        ("//etc/passwd", 404, "no such page"),
        ("/index.json", 404, "no such page"),
        ("/page.html", 404, "no such page"),
        ("/?" + 9 * "a=1&", 200, ""),
        ("/search?" + 9 * "a=1&", 400, "too many values"),
    ],
)
def test_what_is_not_there(ask, path, status, sentence):
    answer = ask(path)
    assert answer[0] == status
    assert status == 200 or sentence in json.loads(answer[2])["error"]


def test_other_sites_are_refused(ask, port):
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", "127.0.0.1:1", ""):
        assert ask("/", Host=host)[0] == 403
        assert ask("/search?text=x", Host=host)[0] == 403
        assert ask("/search", "POST", b"x", Host=host)[0] == 403
    assert ask("/", Host=f"localhost:{port}")[0] == 200
    assert ask("/search", "POST", b"x", Origin="http://evil.example")[0] == 403
    assert ask("/search?text=x", Origin=f"http://127.0.0.1:{port}")[0] == 200
    assert ask("/thumbnail/1", Sec_Fetch_Site="cross-site")[0] == 403
    assert ask("/", Sec_Fetch_Site="cross-site")[0] == 200  # a link to the page
    assert ask("/thumbnail/1")[1]["Cross-Origin-Resource-Policy"] == "same-origin"


def test_bodies_that_are_no_images(ask):
    for body in (b"", b"no image", b"<svg xmlns='http://www.w3.org/2000/svg'/>"):
        status, _, content = ask("/search", "POST", body)
        assert status == 415 and "no image that can be read" in json.loads(content)["error"]
    assert ask("/search", "POST", b"", Content_Length=str(MOST_BYTES + 1))[0] == 413
    assert ask("/search", "POST", b"", Content_Length="-5")[0] == 411
    assert ask("/elsewhere", "POST", b"x")[0] == 404
    assert ask("/search", "PUT", b"x")[0] == 501


def test_an_image_that_is_gone(ask, photos):
    row = results_of(ask("/search", "POST", (photos / "9.png").read_bytes()))[0]["row"]
    (photos / "9.png").rename(photos / "9")
    try:
        status, _, content = ask(f"/thumbnail/{row}")
    finally:
        (photos / "9").rename(photos / "9.png")
    assert status == 404 and "cannot be read any more" in json.loads(content)["error"]


class Pages:
    """Stands in for answers: says how many bytes came, when it may."""

    def __init__(self):
        self.may, self.now, self.most = threading.Event(), 0, 0
        self.lock = threading.Lock()

    def get(self, path, values):
        return Answer(200, "text/plain", b"here")

    def search_like(self, content, values):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self.may.wait(60)
        with self.lock:
            self.now -= 1
        return Answer(200, "text/plain", str(len(content)).encode())


@pytest.fixture
def pages():
    answers = Pages()
    with make_server(answers, 0) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield answers, listening.server_port
        answers.may.set()
        listening.shutdown()
        thread.join()


def raw(port, text):
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(text.replace("PORT", str(port)).encode())
        return connection.makefile("rb").read()


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_address_that_is_none_is_refused(pages, capfd, method):
    host = "Host: 127.0.0.1:PORT\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    answer = raw(pages[1], f"{method} http://[ HTTP/1.1\r\n{host}")
    assert answer.startswith(b"HTTP/1.1 400 ") and b"this is no address" in answer
    assert not capfd.readouterr().err


def test_images_wait_before_they_are_read(pages):
    answers, port = pages
    head = "POST /search HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nConnection: close\r\n"
    asked = f"{head}Content-Length: 5\r\n\r\nimage"
    with ThreadPoolExecutor(6) as pool:
        sent = [pool.submit(raw, port, asked) for _ in range(6)]
        while answers.now < 2:
            time.sleep(0.01)
        answers.may.set()
        assert all(each.result().endswith(b"5") for each in sent)
    assert answers.most <= 2


def test_connections_are_bounded(pages, monkeypatch):
    _, port = pages
    with contextlib.ExitStack() as stack:
        for _ in range(64):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        assert raw(port, "").startswith(b"HTTP/1.1 503 ")


def test_an_image_that_does_not_come_is_not_waited_for(pages, monkeypatch):
    monkeypatch.setattr(server, "_LATEST", -1)
    head = "POST /search HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nContent-Length: 5\r\n\r\nima"
    assert raw(pages[1], head).startswith(b"HTTP/1.1 408 ")


def test_a_port_that_is_taken(port):
    with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}: .*--serve=0"):
        make_server(None, port)


@pytest.mark.slow
@pytest.mark.skipif(
    not browser.installed(), reason=f"none of {', '.join(browser.PROGRAMS)} is installed"
)
def test_in_a_browser(port, photos, tmp_path):
    with browser.open_page(tmp_path / "profile") as page:
        page.ask("Page.navigate", url=f"http://127.0.0.1:{port}/")
        page.wait("document.title === 'photos & more'")
        assert f"{COUNT} images of {photos}" in page.value("document.body.innerText")

        page.click("#text")
        page.ask("Input.insertText", text="<b>picture</b> 20")
        page.click("button.main")
        page.wait("document.querySelectorAll('#results li').length === 10")
        images = "[...document.images].filter(i => i.src.includes('/thumbnail/'))"
        page.wait(f"{images}.length === 10 && {images}.every(i => i.complete && i.naturalWidth)")
        assert "for “<b>picture</b> 20”" in page.value("document.body.innerText")
        assert not page.value("document.querySelector('main b b, [onerror]')")
        assert "?text=%3Cb%3Epicture" in page.value("location.search")

        page.click("#results li:nth-child(1) button")
        page.wait("document.querySelector('#panel').open")
        page.wait("document.querySelector('#square').naturalWidth === 512")
        page.wait("/pinker|No part/.test(document.querySelector('#explanation').innerText)")
        if page.value("document.querySelector('#explanation').innerText.includes('pinker')"):
            page.wait("document.querySelector('#heat').naturalWidth === 512")
        page.click("#like")
        page.wait("document.querySelector('#status').innerText.includes('nearest images to')")
        assert not page.value("document.querySelector('#panel').open")
        assert page.value("document.querySelector('#results b').innerText") == "1.0000"

        page.drop(photos / HOSTILE)
        page.wait("document.querySelector('#status').innerText.includes('onerror')")
        first = page.value("document.querySelector('#results .path').innerText")
        assert first == str(photos / HOSTILE)
        assert page.value("document.title") == "photos & more"

        page.drop(tmp_path / "profile" / "Local State")
        page.wait("document.querySelector('#status').className === 'wrong'")
        assert "no image that can be read" in page.value("document.body.innerText")

        query = urllib.parse.urlencode({"text": "picture 1"})
        page.ask("Page.navigate", url=f"http://127.0.0.1:{port}/?{query}")
        page.wait("document.querySelectorAll('#results li').length === 10")
        refused = [text for text in map(str, page.complaints) if "415" not in text]
        assert not refused
