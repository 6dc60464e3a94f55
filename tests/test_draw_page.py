"""The page on which digits are drawn: its server over plain sockets, and the page in Chromium."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TRAINED_MODEL5, split_options
from PIL import Image

from draw_digit import PageRequest, PageServer, serve_page
from mnist_data import normalize
from predict_digits import load_model, predict
from utils import ScriptError

STROKES = {  # x,y of each point, in shares of the side
    1: [".4,.3 .5,.2 .5,.8"],
    7: [".25,.22 .75,.22 .45,.8", ".35,.5 .7,.5"],
    17: [".2,.2 .2,.8", ".45,.2 .85,.2 .6,.8"],
    8: [".6,.3 .4,.25 .6,.7 .4,.75 .6,.3"],
}
SEEN = """() => ({
  image: [...document.getElementById("seen").getContext("2d").getImageData(0, 0, 28, 28).data]
    .filter((_, i) => i % 4 == 0),
  bars: [...document.querySelectorAll("#bars span")].map(bar => bar.textContent),
  answer: document.getElementById("answer").textContent,
  message: document.getElementById("message").textContent,
})"""
EMPTY = {"image": [0] * 784, "bars": [""] * 10, "answer": "", "message": ""}
DROP = """bytes => { const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([new Uint8Array(bytes)], "one"));
  dispatchEvent(new DragEvent("drop", {dataTransfer})) }"""
PASTE = DROP.replace('new DragEvent("drop", {', 'new ClipboardEvent("paste", {clipboardData: ')
SLOW_FIRST = """() => { const fast = createImageBitmap; let wait = 600;
  window.createImageBitmap = async (...options) => {
    const milliseconds = wait; wait = 0;
    await new Promise(resolve => setTimeout(resolve, milliseconds));
    return fast(...options) } }"""


def draw_picture(*lefts: int) -> bytes:
    picture = Image.new("L", (200, 200), 255)
    for left in lefts:
        picture.paste(0, (left, 40, left + 13, 160))
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """The port of a script without MNIST; it must end in one line, whatever the tests do to it."""
    where = "--checkpoint", TRAINED_MODEL5, "--data-dir", tmp_path_factory.mktemp("empty")
    command = split_options("predict_digits.py --draw --device cpu", *where)
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"BROWSER": "echo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as script:
        assert script.stderr.readline() == f"Reading with {TRAINED_MODEL5}\n"
        address = script.stdout.readline().split()[3]
        yield int(address.strip("/").rpartition(":")[2])
        script.send_signal(signal.SIGINT)
        assert script.wait(timeout=20) == 130
        assert script.stdout.read() == f"{address}\n"  # from the browser
        assert script.stderr.read() == "predict_digits.py: interrupted; run it again\n"


def send(port: int, head: str, body: bytes = b"") -> bytes:
    """Return the answer to a client that sends a request and then closes its side."""
    # The server's timeout is longer
    with socket.create_connection(("127.0.0.1", port), timeout=8) as client:
        client.sendall(f"{head}\r\n\r\n".encode() + body)
        client.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    return answer.rpartition(b"\r\n\r\n")[2]


def post(port: int, body: bytes) -> dict:
    own = f"127.0.0.1:{port}"
    head = f"POST / HTTP/1.0\r\nHost: {own}\r\nOrigin: http://{own}\r\n"
    return json.loads(send(port, f"{head}Content-Length: {len(body)}", body))


def check(image: list, probabilities: list[float]) -> None:
    """Check that these are, to a thousandth, the probabilities that the model gives the image."""
    model = load_model(TRAINED_MODEL5, torch.device("cpu"))
    pixels = torch.tensor(image, dtype=torch.uint8).view(1, 1, 28, 28)
    expected = predict(model, normalize(pixels)).softmax(1)[0].tolist()
    assert probabilities == pytest.approx(expected, abs=6e-4)


OWN = "HTTP/1.1\r\nHost: localhost"
LENGTH = f"POST / {OWN}\r\nContent-Length:"


@pytest.mark.parametrize(
    "case",
    [  # the status of the answer, and the request's head
        "400 \x16\x03\x01 \xff",
        "403 GET / HTTP/1.1",
        f"403 GET / {OWN}.example.org",
        f"403 {LENGTH} 1\r\nOrigin: http://example.org",
        f"403 POST / {OWN}:1\r\nOrigin: http://localhost:2\r\nContent-Length: 1",
        f"404 GET /../models.py {OWN}",
        f"501 PUT / {OWN}",
        f"411 POST / {OWN}",
        f"411 {LENGTH}",
        f"400 {LENGTH} 2",
        f"400 {LENGTH} -1",
        f"400 {LENGTH} x",
        f"413 {LENGTH} 1000000",
        f"413 {LENGTH} {'9' * 5000}",
    ],
)
def test_refused(case, port):
    status, head = case.split(" ", 1)
    body = b"x" if "Length" in head else b""
    assert f"Error code: {status}" in send(port, head, body).decode()


def test_answered(port):
    idle = socket.create_connection(("127.0.0.1", port))
    for request in ("", f"{LENGTH} 9\r\n\r\nx", f"GET / {OWN}\r\n\r\n"):
        # A client that goes away without reading the answer
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.sendall(request.encode())
    assert send(port, f"GET / {OWN}") == (ROOT / "draw_digit.html").read_bytes()
    assert "no known format" in post(port, b"no picture")["message"]
    answer = post(port, draw_picture(95))
    assert (answer["text"], answer["message"]) == ("1", "")
    check(answer["digits"][0]["image"], answer["digits"][0]["probabilities"])
    idle.close()


def test_port_in_use(port):
    message = f"^cannot use port {port}: .*; leave out --port or name another$"
    with pytest.raises(ScriptError, match=message):
        serve_page(dict, port)


def test_one_reader_and_a_silent_client(monkeypatch, capsys):
    def read(picture):
        return {"quotient": 1 // len(picture), "thread": threading.current_thread().name}

    assert 0 < PageRequest.timeout < 60
    monkeypatch.setattr(PageRequest, "timeout", 0.3)
    with PageServer(read, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            assert post(port, b"") == {"message": "integer division or modulo by zero"}
            assert post(port, b"x") == post(port, b"x")  # a model may hold state
            assert client.recv(1) == b""
        server.shutdown()
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium on this machine")
def test_the_page(port, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as tool:
        chromium = shutil.which("chromium")
        browser = tool.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        size = {"width": 400, "height": 900}
        page = browser.new_page(has_touch=True, viewport=size, device_scale_factor=2)
        errors, asked, answered, images = [], [], [], {}
        page.on("pageerror", lambda error: errors.append(error))
        page.on("request", lambda request: asked.append(request))
        page.on("requestfinished", lambda request: answered.append(request))
        page.goto(f"http://127.0.0.1:{port}/")
        box = page.locator("#pad").bounding_box()
        press = page.keyboard.press

        def draw(digit):
            for stroke in STROKES[digit]:
                for point in stroke.split():
                    x, y = map(float, point.split(","))
                    left = box["x"] + x * box["width"]
                    page.mouse.move(left, box["y"] + y * box["height"], steps=3)
                    page.mouse.down()  # which it is already after the first point
                page.mouse.up()

        def wait(**wanted):
            """Return what is seen as soon as it equals what is wanted, or passes its tests."""
            for _ in range(200):
                seen = page.evaluate(SEEN)
                if all(
                    want(seen[key]) if callable(want) else want == seen[key]
                    for key, want in wanted.items()
                ):
                    return seen
                time.sleep(0.05)
            raise AssertionError(seen)

        for digit, key in ((1, "Escape"), (8, "Delete"), (7, "Escape")):  # draw and clear
            wait(**EMPTY)
            press("Control+a")  # what is selected must not be dragged
            draw(digit)
            while page.wait_for_timeout(200) or len(answered) < len(asked):
                pass
            seen = wait(image=any, message="")
            images[digit] = seen["image"]
            shares = [float(bar.strip("%")) / 100 for bar in seen["bars"]]
            check(seen["image"], shares)
            assert seen["answer"] == str(np.argmax(shares)) == str(digit)
            press(key)
        assert len(set(map(tuple, images.values()))) == 3
        wait(**EMPTY)
        draw(17)
        wait(answer="17", image=any)
        page.wait_for_timeout(300)
        last = page.evaluate(SEEN)
        box_of_1 = {"x": 0.2 * box["width"], "y": box["height"] / 2}
        page.click("#pad", position=box_of_1)
        first = wait(image=lambda image: image != last["image"])
        assert float(last["bars"][7][:-1]) > 50 < float(first["bars"][1][:-1])
        press("Delete")
        wait(**EMPTY)
        press("Control+z")
        press("Control+z")
        press("Control+z")  # both strokes
        wait(**EMPTY)
        press("Control+Z")  # with Caps Lock
        wait(image=images[7])
        page.click("#undo")  # the bar of the 7
        wait(image=lambda image: any(image) and image != images[7])
        page.click("#clear")
        wait(**EMPTY)
        page.touchscreen.tap(100, 300)  # a dot, which is no digit
        wait(message=lambda message: message.startswith("no ink"))
        press("Escape")
        wait(**EMPTY)
        page.mouse.move(100, 200)  # a stroke that the system cancels
        page.mouse.down()
        page.mouse.move(100, 300)
        wait(image=any)
        page.dispatch_event("#pad", "pointercancel", {"pointerId": 1})
        wait(**EMPTY)
        page.mouse.up()

        held = []  # one request at a time, and the newest drawing wins
        asked.clear()
        page.route("**/", lambda route: route.continue_() if held else held.append(route))
        draw(1)
        press("Escape")
        draw(8)
        assert len(asked) == 1
        held[0].continue_()
        wait(image=images[8])
        page.route("**/", lambda route: route.abort())
        draw(1)
        wait(bars=EMPTY["bars"], message=lambda message: message.startswith("no answer ("))
        page.unroute("**/")

        page.evaluate(SLOW_FIRST)
        page.evaluate(DROP, list(draw_picture(70, 120)))
        page.evaluate(PASTE, list(draw_picture(95)))  # the newer one wins
        page.wait_for_timeout(1000)
        dropped = wait(image=any, message="", answer="1")
        (tmp_path / "a.txt").write_text("text")
        page.set_input_files("#file", tmp_path / "a.txt")
        wait(image=dropped["image"], message="cannot read a.txt as a picture: use PNG or JPEG")
        noise = np.random.default_rng(1).integers(0, 255, (1500, 1000, 3), np.uint8)
        noise[400:1100, 400:600] = 0
        Image.fromarray(noise).save(tmp_path / "noise.png")  # 4 MB
        with page.expect_file_chooser() as chooser:
            page.click("#choose")
        chooser.value.set_files(tmp_path / "noise.png")
        wait(image=lambda image: any(image) and image != dropped["image"])
        press("Control+z")
        wait(**dropped)
        browser.close()
    assert errors == []
