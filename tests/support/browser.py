"""A real browser for tests: Debian's chromium without a screen, driven by its own protocol."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One window."""

    def __init__(self, width: int = 1600, height: int = 1000) -> None:
        assert CHROMIUM is not None
        self.command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        self.command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
        self.command += [f"--window-size={width},{height}", "--remote-debugging-port=0", "--remote-allow-origins=*"]
        self.stack = ExitStack()
        self.numbers = itertools.count(1)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            command = [*self.command, f"--user-data-dir={self.folder}", "about:blank"]
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(self._end)
            self.socket = stack.enter_context(connect(self._address(), max_size=None))
            self.call("Page.enable")
            self.call("Runtime.enable")
            # MLflow opens its assistant on the first visit
            quiet = "try { localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true') } catch {}"
            self.call("Page.addScriptToEvaluateOnNewDocument", source=quiet)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _end(self) -> None:
        self.process.terminate()
        self.process.wait(20)

    def _address(self) -> str:
        """Of the first page's debugger, once the browser has written down on which port it listens."""
        place, until = Path(self.folder, "DevToolsActivePort"), time.monotonic() + 60
        while not (place.is_file() and place.read_text().strip()):
            assert self.process.poll() is None, "the browser did not start"
            assert time.monotonic() < until, "the browser does not answer"
            time.sleep(0.1)
        port = place.read_text().split()[0]
        while time.monotonic() < until:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
                pages = [one for one in json.load(answer) if one["type"] == "page"]
            if pages:
                return str(pages[0]["webSocketDebuggerUrl"])
            time.sleep(0.1)
        raise AssertionError("the browser has no page")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv(timeout=60))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def open(self, url: str) -> None:
        """A page that differs only behind the # is loaded anew, too."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """What a piece of JavaScript comes to."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        return answer["result"].get("value")

    def text(self) -> str:
        """All that can be read on the page."""
        return str(self.run("document.body ? document.body.innerText : ''"))

    def wait_for(self, *texts: str, seconds: float = 60) -> str:
        """Until the page says all of these; the page's text."""
        until = time.monotonic() + seconds
        while True:
            shown = self.text()
            missing = [text for text in texts if text not in shown]
            if not missing:
                return shown
            assert time.monotonic() < until, f"the page does not say {missing}; it says:\n{shown}"
            time.sleep(0.2)

    def click(self, text: str) -> None:
        """On the innermost element with this text."""
        script = f"""(() => {{
            const every = [...document.querySelectorAll('button, a, [role=tab], [role=menuitem], span, div')];
            const found = every.filter(one => one.textContent.trim() === {json.dumps(text)});
            if (!found.length) return false;
            found[found.length - 1].click();
            return true;
        }})()"""
        assert self.run(script), f"nothing to click says {text}; the page says:\n{self.text()}"

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
