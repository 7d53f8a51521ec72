"""A real browser for tests: chromium without a screen, driven by its DevTools protocol."""

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
    """A window of the browser, open within a `with` block."""

    def __init__(self, width: int = 1600, height: int = 1000) -> None:
        assert CHROMIUM is not None
        self.command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        self.command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
        self.command += [f"--window-size={width},{height}", "--remote-debugging-port=0", "--remote-allow-origins=*"]
        self.stack = ExitStack()
        self.message_ids = itertools.count(1)

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
        """Wait for the address of the first page's debugger; the browser writes the port to a file."""
        port_file, deadline = Path(self.folder, "DevToolsActivePort"), time.monotonic() + 60
        while not (port_file.is_file() and port_file.read_text().strip()):
            assert self.process.poll() is None, "the browser did not start"
            assert time.monotonic() < deadline, "the browser does not answer"
            time.sleep(0.1)
        port = port_file.read_text().split()[0]
        while time.monotonic() < deadline:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
                pages = [target for target in json.load(answer) if target["type"] == "page"]
            if pages:
                return str(pages[0]["webSocketDebuggerUrl"])
            time.sleep(0.1)
        raise AssertionError("the browser has no page")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        message_id = next(self.message_ids)
        self.socket.send(json.dumps({"id": message_id, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv(timeout=60))
            if answer.get("id") == message_id:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def open(self, url: str) -> None:
        """Load a page, also if its address differs from the current one only after the #."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """Evaluate JavaScript and return its value."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        return answer["result"].get("value")

    def text(self) -> str:
        """Return all text of the page."""
        return str(self.run("document.body ? document.body.innerText : ''"))

    def wait_for(self, *texts: str, seconds: float = 60) -> str:
        """Wait until the page has all of these texts; return the page's text."""
        deadline = time.monotonic() + seconds
        while True:
            shown = self.text()
            missing = [text for text in texts if text not in shown]
            if not missing:
                return shown
            assert time.monotonic() < deadline, f"the page does not say {missing}; it says:\n{shown}"
            time.sleep(0.2)

    def click(self, text: str) -> None:
        """Click on the innermost element with this text."""
        script = f"""(() => {{
            const every = [...document.querySelectorAll('button, a, [role=tab], [role=menuitem], span, div')];
            const found = every.filter(one => one.textContent.trim() === {json.dumps(text)});
            if (!found.length) return false;
            found[found.length - 1].click();
            return true;
        }})()"""
        assert self.run(script), f"nothing to click says {text}; the page says:\n{self.text()}"

    def screenshot(self, path: Path) -> None:
        """Write a PNG of the page."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
