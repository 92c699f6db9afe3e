"""A headless ComfyUI on the CPU with the nodes of wadi, and what it is asked."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]
STARTUP, ANSWER = 240, 120  # seconds


class Server:
    """ComfyUI from a checkout, with a folder of its own for models, nodes and outputs.

    Args:
        checkout: of ComfyUI.
        folder: new, for models, nodes and outputs.
    """

    def __init__(self, checkout: str, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log.txt"
        for name in ("models/lorad", "output", "input", "temp", "user"):
            (folder / name).mkdir(parents=True)
        shutil.copytree(ROOT / "integrations" / "comfyui", folder / "custom_nodes" / "lorad")
        shutil.copytree(Path(__file__).parent / "comfyui_nodes", folder / "custom_nodes" / "for_tests")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        options = ["--cpu", "--force-fp32", "--port", str(port), "--base-directory", str(folder)]
        options += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch"]
        python = os.environ.get("COMFYUI_PYTHON", sys.executable)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, "main.py", *options], cwd=checkout, env=environment, stdout=log, stderr=log
            )

    def wait(self) -> None:
        """Wait until it answers."""
        end = time.monotonic() + STARTUP
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.ask("system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")

    def ask(self, path: str, content: dict | None = None) -> dict:
        """Get a path, or post to it."""
        data = None if content is None else json.dumps(content).encode()
        with urllib.request.urlopen(f"{self.address}/{path}", data, timeout=30) as answer:
            return json.load(answer)

    def run(self, workflow: dict) -> dict:
        """Run a workflow in API form; return its entry of the history."""
        name = self.ask("prompt", {"prompt": workflow})["prompt_id"]
        end = time.monotonic() + ANSWER
        while time.monotonic() < end:
            if name in (history := self.ask(f"history/{name}")):
                return history[name]
            time.sleep(0.1)
        raise RuntimeError(f"ComfyUI did not finish:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait(30)
