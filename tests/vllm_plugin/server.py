"""An OpenAI-compatible server started as a user would, and clients that storm it."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from token_sparse_attention import bundled

START_SECONDS = 240


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Server:
    """A running server: where it listens, its process and its log."""

    url: str
    process: psutil.Process
    log: Path

    def get(self, path: str) -> str:
        import urllib.request

        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as reply:
            return reply.read().decode()

    def memory_mib(self) -> list[float]:
        """Return the resident memory of each of the server's processes, shared pages split."""
        processes = [self.process, *self.process.children(recursive=True)]
        return [round(one.memory_full_info().pss / 2**20, 1) for one in processes]


@contextmanager
def serve(folder: Path, additional_config: dict, environment: dict[str, str], *arguments: str):
    """Run what ``vllm serve`` runs on the bundled model, and stop it.

    The command itself looks for a distribution called vllm, and the CPU build has another name.
    """
    port, log = free_port(), folder / "server.log"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(bundled.MODEL)),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--attention-backend", "CUSTOM"),
        *("--additional-config", json.dumps(additional_config)),
        *arguments,
    ]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    server = Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid), log)
    try:
        _wait(server, process)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(server: Server, process: subprocess.Popen) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            server.get("/health")
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start: {server.log.read_text()[-4000:]}")


@dataclass
class Storm:
    """What came of many requests.

    Attributes:
        replies: the streamed text of each, in the order asked.
        pieces: how many pieces each came in.
        aborted: how many more there were, which the client hung up on.
        seconds: from the first request to the last reply.
    """

    replies: list[str]
    pieces: list[int]
    aborted: int = 0
    seconds: float = 0.0


def storm(url: str, prompts: list[list[int]], concurrency: int, aborts: float = 0.0) -> Storm:
    """Send prompts from `concurrency` clients at once, and read the streamed replies.

    Args:
        url: of the server.
        prompts: token ids.
        concurrency: requests under way at once.
        aborts: share of further requests, whose client hangs up after the first piece.
    """
    return asyncio.run(_storm(url, prompts, concurrency, aborts))


async def _storm(url: str, prompts: list[list[int]], concurrency: int, aborts: float) -> Storm:
    from openai import AsyncOpenAI

    result = Storm([""] * len(prompts), [0] * len(prompts))
    draw, gate = random.Random(0), asyncio.Semaphore(concurrency)
    settings = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, "timeout": 300}

    async def ask(client: AsyncOpenAI, model: str, number: int, hang_up: bool) -> None:
        async with gate:
            stream = await client.completions.create(
                model=model, prompt=prompts[number], max_tokens=32, temperature=0, stream=True
            )
            async with stream:
                async for piece in stream:
                    if hang_up:
                        result.aborted += 1
                        return
                    result.replies[number] += piece.choices[0].text
                    result.pieces[number] += 1

    tasks = [(number, False) for number in range(len(prompts))]
    tasks += [(draw.randrange(len(prompts)), True) for _ in range(int(aborts * len(prompts)))]
    draw.shuffle(tasks)
    start = time.monotonic()
    async with AsyncOpenAI(**settings) as client:
        model = (await client.models.list()).data[0].id
        await asyncio.gather(*(ask(client, model, *task) for task in tasks))
    result.seconds = time.monotonic() - start
    return result
